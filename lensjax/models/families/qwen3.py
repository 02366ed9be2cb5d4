"""Qwen3 (dense) in Flax NNX: Llama with normalised queries and keys.

References
----------
Yang et al. 2025, Qwen3 technical report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lensjax.models.families.llama import Llama, LlamaConfig, table
from lensjax.models.families.qwen2 import Qwen2Config, windows_and_key_heads

__all__ = ["Qwen3", "Qwen3Config", "table"]


@dataclasses.dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    """Configuration of Qwen3."""

    SIZES: ClassVar[dict[str, int]] = Qwen2Config.SIZES

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> LlamaConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        bias = bool(raw.get("attention_bias", False))
        windows = windows_and_key_heads(raw, source, cls.SIZES)
        return cls.read(raw, source, qkv_bias=bias, out_bias=bias, qk_norm=True, head_dim=128, **windows)


class Qwen3(Llama):
    """Qwen3 with its language-model head; see `Llama`."""

    config: Qwen3Config
