"""Qwen2 and Qwen2.5 in Flax NNX: Llama with biases on queries, keys and values.

References
----------
Yang et al. 2024, Qwen2 technical report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lensjax.models.families.llama import Llama, LlamaConfig, layer_windows, sliding_window, table
from lensjax.models.registry import positive

__all__ = ["Qwen2", "Qwen2Config", "table"]


@dataclasses.dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """Configuration of Qwen2."""

    SIZES: ClassVar[dict[str, int]] = LlamaConfig.SIZES | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
    }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> LlamaConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        return cls.read(raw, source, qkv_bias=True, **windows_and_key_heads(raw, source, cls.SIZES))


class Qwen2(Llama):
    """Qwen2 with its language-model head; see `Llama`."""

    config: Qwen2Config


def windows_and_key_heads(raw: Mapping[str, Any], source: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the settings `windows` and `num_key_value_heads` of Qwen2 and Qwen3.

    Without `use_sliding_window` no layer has a window; with it, the layers from `max_window_layers` on have one. An
    absent number of key heads means 32, null as many key heads as query heads.
    """
    window = sliding_window(raw, source) if raw.get("use_sliding_window", False) else None
    first_windowed = raw.get("max_window_layers", 28)
    count = positive(raw, "num_hidden_layers", sizes["num_hidden_layers"], source)
    types = ["full_attention" if window is None or i < first_windowed else "sliding_attention" for i in range(count)]
    key_heads = 32 if "num_key_value_heads" not in raw else 0
    return {"windows": layer_windows(raw, window, types, source), "num_key_value_heads": key_heads}
