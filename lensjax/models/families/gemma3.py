"""Gemma 3 (text) in Flax NNX: local and global layers, four norms a layer, normalised queries and keys.

References
----------
Gemma Team 2025, Gemma 3 technical report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.families import llama
from lensjax.models.registry import Table, positive


@dataclasses.dataclass(frozen=True)
class Gemma3Config(llama.LlamaConfig):
    """Configuration of Gemma 3."""

    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True

    SIZES: ClassVar[dict[str, int]] = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
    }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> llama.LlamaConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if raw.get(name):
                raise InputError(f"{source}: {name} is {raw[name]}; only models without it are supported.")
        width = positive(raw, "hidden_size", cls.SIZES["hidden_size"], source)
        count = positive(raw, "num_hidden_layers", cls.SIZES["num_hidden_layers"], source)
        length = positive(raw, "max_position_embeddings", cls.SIZES["max_position_embeddings"], source)
        head_dim = positive(raw, "head_dim", 256, source)
        window = llama.sliding_window(raw, source)
        pattern = positive(raw, "sliding_window_pattern", 6, source)
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
        windows = llama.layer_windows(raw, window, types, source)
        global_rope, local_rope = _ropes(raw, head_dim, length, source)
        scalar = raw.get("query_pre_attn_scalar", 256)
        if not isinstance(scalar, (int, float)) or scalar <= 0:
            raise InputError(f"{source}: query_pre_attn_scalar is {scalar!r}; it must be a positive number.")
        bias = bool(raw.get("attention_bias", False))
        return cls.read(
            raw,
            source,
            hidden_act=raw.get("hidden_activation") or cls.hidden_act,
            head_dim=256,
            num_key_value_heads=4,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            norm_offset=1.0,
            score_scale=scalar**-0.5,
            embedding_scale=width**0.5,
            windows=windows,
            ropes=tuple(global_rope if window is None else local_rope for window in windows),
        )


def _ropes(raw: Mapping[str, Any], head_dim: int, length: int, source: str) -> tuple[layers.Rotary, layers.Rotary]:
    """Return the rotary embeddings of global and of local layers; only the global one is scaled."""
    fields = raw.get("rope_parameters") or {}
    global_ = (
        {"rope_theta": raw.get("rope_theta")} | (fields.get("full_attention") or {}) | (raw.get("rope_scaling") or {})
    )
    local = {"rope_theta": raw.get("rope_local_base_freq")} | (fields.get("sliding_attention") or {})
    return (
        layers.rotary({"rope_parameters": global_}, head_dim, length, source, theta=1_000_000.0),
        layers.rotary({"rope_parameters": local}, head_dim, length, source),
    )


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each with a norm before and after it."""

    def __init__(self, config: llama.LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        def norm() -> layers.RMSNorm:
            return layers.RMSNorm(config.width, config.rms_norm_eps, dtype, config.norm_offset)

        self.attention_norm, self.attention_out_norm = norm(), norm()
        self.attention = llama.Attention(config, dtype, rngs)
        self.mlp_norm, self.mlp_out_norm = norm(), norm()
        self.mlp = llama.GatedMLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        per_layer: tuple[jax.Array | None, jax.Array | None],
        masks: list[jax.Array],
        tables: list[tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        """Apply the layer to the residual stream x (N*T, d); see `llama.mask_and_tables`."""
        mask, table, key = llama.mask_and_tables(per_layer, masks, tables)
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), mask, table, key))
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))


class Gemma3(llama.Llama):
    """Gemma 3 with its language-model head; see `Llama`."""

    config: Gemma3Config
    block: ClassVar[Any] = Block


def table(config: llama.LlamaConfig) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters."""
    return llama.table(
        config,
        {
            "attention_norm": "input_layernorm",
            "attention_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        },
    )
