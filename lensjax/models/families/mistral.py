"""Mistral in Flax NNX: Llama with grouped queries and, in early versions, a sliding window.

References
----------
Jiang et al. 2023, Mistral 7B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lensjax.models.families.llama import Llama, LlamaConfig, sliding_window, table
from lensjax.models.registry import positive

__all__ = ["Mistral", "MistralConfig", "table"]


@dataclasses.dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Configuration of Mistral."""

    SIZES: ClassVar[dict[str, int]] = LlamaConfig.SIZES | {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
    }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> LlamaConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        # Absent means 4096, null means no window.
        window = sliding_window(raw, source)
        count = positive(raw, "num_hidden_layers", cls.SIZES["num_hidden_layers"], source)
        # Absent means 8 key heads, null as many key heads as query heads.
        key_heads = 8 if "num_key_value_heads" not in raw else 0
        return cls.read(raw, source, windows=(window,) * count, num_key_value_heads=key_heads)


class Mistral(Llama):
    """Mistral with its language-model head; see `Llama`."""

    config: MistralConfig
