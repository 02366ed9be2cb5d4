"""Phi-1, Phi-1.5 and Phi-2 in Flax NNX: attention and MLP in parallel, rotary embedding of a part of each head.

References
----------
Li et al. 2023, Textbooks are all you need II: phi-1.5 technical report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.base import CausalLM
from lensjax.models.registry import (
    ROTARY_BUFFERS,
    ModelConfig,
    Rule,
    Table,
    causal_table,
    check_multiple,
    linear_rules,
    norm_rules,
    positive,
    typed,
    width_and_heads,
)


@dataclasses.dataclass(frozen=True)
class PhiConfig(ModelConfig):
    """Configuration of Phi; fields that stand in config.json have the same name as there."""

    max_length: int
    rope: layers.Rotary
    intermediate_size: int = 0
    num_key_value_heads: int = 0
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    qk_layernorm: bool = False
    tie_word_embeddings: bool = False
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> PhiConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        width, heads = width_and_heads(raw, source, hidden_size=2048, num_attention_heads=32)
        key_heads = positive(raw, "num_key_value_heads", heads, source)
        check_multiple("num_attention_heads", heads, "num_key_value_heads", key_heads, source)
        length = positive(raw, "max_position_embeddings", 2048, source)
        layers.activation(typed(raw, "hidden_act", "gelu_new", source), source)
        fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        part = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5))
        if not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise InputError(f"{source}: partial_rotary_factor is {part!r}; it must be above 0 and at most 1.")
        read_here = ("rope", "intermediate_size", "num_key_value_heads")
        return cls.base(
            raw,
            vocab_size=positive(raw, "vocab_size", 51200, source),
            width=width,
            heads=heads,
            layers=positive(raw, "num_hidden_layers", 24, source),
            max_length=length,
            rope=layers.rotary(raw, int(width // heads * part), length, source),
            intermediate_size=positive(raw, "intermediate_size", 8192, source),
            num_key_value_heads=key_heads,
            **cls.optional_fields(raw, source, without=read_here, null_is_absent=True),
        )


class Block(nnx.Module):
    """One layer: attention and an MLP in parallel, both applied to the normalised residual stream."""

    def __init__(self, config: PhiConfig, dtype: Any, rngs: nnx.Rngs):
        width, head_dim = config.width, config.width // config.heads
        self.norm = _norm(config, width, dtype, rngs)
        self.query = _linear(config, width, width, dtype, rngs)
        self.key = _linear(config, width, config.num_key_value_heads * head_dim, dtype, rngs)
        self.value = _linear(config, width, config.num_key_value_heads * head_dim, dtype, rngs)
        self.out = _linear(config, width, width, dtype, rngs)
        if config.qk_layernorm:
            self.query_norm = _norm(config, head_dim, dtype, rngs)
            self.key_norm = _norm(config, head_dim, dtype, rngs)
        self.mlp_in = _linear(config, width, config.intermediate_size, dtype, rngs)
        self.mlp_out = _linear(config, config.intermediate_size, width, dtype, rngs)
        self.config = config

    def __call__(
        self, x: jax.Array, key: jax.Array | None, mask: jax.Array, tables: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """Apply the layer to the residual stream x (N*T, d); mask (N, 1, T, T), tables of `layers.Rotary`."""
        config = self.config
        weights_key, attention_key, mlp_key = layers.split_key(key, 3)
        shape = (mask.shape[0], mask.shape[-1], -1, config.width // config.heads)
        h = self.norm(x)
        queries, keys = self.query(h).reshape(shape), self.key(h).reshape(shape)
        if config.qk_layernorm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        mixed = layers.attention(
            layers.rotate(queries, tables),
            layers.rotate(keys, tables),
            self.value(h).reshape(shape),
            mask,
            scale=shape[-1] ** -0.5,
            dropout=config.attention_dropout,
            dropout_key=weights_key,
        )
        attended = layers.drop(self.out(mixed.reshape(x.shape)), config.resid_pdrop, attention_key)
        inner = layers.ACTIVATIONS[config.hidden_act](self.mlp_in(h))
        return attended + layers.drop(self.mlp_out(inner), config.resid_pdrop, mlp_key) + x


class Phi(CausalLM):
    """Phi with its language-model head, which has a bias.

    Parameters
    ----------
    config : PhiConfig
    dtype : dtype of the parameters
    rngs : nnx.Rngs
        The stream "params" gives the keys for the initial weights.
    """

    config: PhiConfig

    def __init__(self, config: PhiConfig, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config)
        init = layers.normal(config.initializer_range)
        self.tokens = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)
        self.layers = nnx.List([Block(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = _norm(config, config.width, dtype, rngs)
        if not config.tie_word_embeddings:
            self.head = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, dtype))

    def decode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the inputs (N*T, d) of the head; see `CausalLM`."""
        config = self.config
        embed_key, layers_key = layers.split_key(dropout_key, 2)
        x = layers.drop(self.tokens(input_ids.reshape(-1)), config.embd_pdrop, embed_key)
        x = self.run_layers(
            self.layers,
            x,
            layers.keys_per_layer(layers_key, config.layers),
            layers.causal_mask(attention_mask),
            config.rope.tables(layers.positions_from_mask(attention_mask), x.dtype),
        )
        return self.norm(x)

    def head_bias(self) -> jax.Array:
        """Return the head's bias (V,)."""
        return self.bias[...]


def _norm(config: PhiConfig, width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layers.layer_norm(width, config.layer_norm_eps, dtype, rngs)


def _linear(config: PhiConfig, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return layers.linear(inputs, outputs, config.initializer_range, dtype, rngs)


def table(config: PhiConfig) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters."""
    linears = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.dense",
        "mlp_in": "mlp.fc1",
        "mlp_out": "mlp.fc2",
    }
    norms = {
        "layers.{i}.norm": "layers.{i}.input_layernorm",
        "layers.{i}.query_norm": "layers.{i}.self_attn.q_layernorm",
        "layers.{i}.key_norm": "layers.{i}.self_attn.k_layernorm",
        "norm": "final_layernorm",
    }
    rules = [Rule("tokens.embedding", "embed_tokens.weight"), Rule("bias", "lm_head.bias")]
    for ours, theirs in linears.items():
        rules += linear_rules(f"layers.{{i}}.{ours}", f"layers.{{i}}.{theirs}")
    for ours, theirs in norms.items():
        rules += norm_rules(ours, theirs)
    return causal_table(
        rules,
        tied=config.tie_word_embeddings,
        embedding="embed_tokens.weight",
        prefix="model.",
        unprefixed=("lm_head.bias",),
        ignored=(ROTARY_BUFFERS,),
    )
