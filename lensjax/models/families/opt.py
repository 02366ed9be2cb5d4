"""OPT in Flax NNX: all sizes; 350m is post-norm and projects its embeddings, the others are pre-norm.

References
----------
Zhang et al. 2022, OPT: Open pre-trained transformer language models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.base import CausalLM
from lensjax.models.registry import (
    ModelConfig,
    Rule,
    Table,
    causal_table,
    linear_rules,
    norm_rules,
    positive,
    typed,
    width_and_heads,
)

OFFSET = 2
"""The position of the first token is at this row of the position table; no real token uses the rows before it."""


@dataclasses.dataclass(frozen=True)
class OPTConfig(ModelConfig):
    """Configuration of OPT; fields that stand in config.json have the same name as there."""

    max_length: int
    ffn_dim: int = 0
    word_embed_proj_dim: int = 0
    activation_function: str = "relu"
    init_std: float = 0.02
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    final_norm: bool = True
    tie_word_embeddings: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> OPTConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        width, heads = width_and_heads(raw, source, hidden_size=768, num_attention_heads=12)
        if raw.get("layerdrop"):
            raise InputError(f"{source}: layerdrop is {raw['layerdrop']}, which is not supported; set it to 0.")
        layers.activation(typed(raw, "activation_function", "relu", source), source)
        pre_norm = raw.get("do_layer_norm_before", True)
        return cls.base(
            raw,
            vocab_size=positive(raw, "vocab_size", 50272, source),
            width=width,
            heads=heads,
            layers=positive(raw, "num_hidden_layers", 12, source),
            max_length=positive(raw, "max_position_embeddings", 2048, source),
            ffn_dim=positive(raw, "ffn_dim", 3072, source),
            word_embed_proj_dim=positive(raw, "word_embed_proj_dim", width, source),
            final_norm=pre_norm and not raw.get("_remove_final_layer_norm", False),
            **cls.optional_fields(raw, source, without=("ffn_dim", "word_embed_proj_dim", "final_norm")),
        )


class Block(nnx.Module):
    """One layer: attention and an MLP, each with a norm before it (pre-norm) or after the residual sum (post-norm)."""

    def __init__(self, config: OPTConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.attention_norm, self.mlp_norm = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.query = _linear(config, width, width, dtype, rngs)
        self.key = _linear(config, width, width, dtype, rngs)
        self.value = _linear(config, width, width, dtype, rngs)
        self.out = _linear(config, width, width, dtype, rngs)
        self.mlp_in = _linear(config, width, config.ffn_dim, dtype, rngs)
        self.mlp_out = _linear(config, config.ffn_dim, width, dtype, rngs)
        self.config = config

    def __call__(self, x: jax.Array, key: jax.Array | None, mask: jax.Array) -> jax.Array:
        """Apply the layer to the residual stream x (N*T, d); mask (N, 1, T, T)."""
        config = self.config
        weights_key, attention_key, mlp_key = layers.split_key(key, 3)
        shape = (mask.shape[0], mask.shape[-1], config.heads, config.width // config.heads)
        h = self.attention_norm(x) if config.do_layer_norm_before else x
        mixed = layers.attention(
            self.query(h).reshape(shape),
            self.key(h).reshape(shape),
            self.value(h).reshape(shape),
            mask,
            scale=shape[-1] ** -0.5,
            dropout=config.attention_dropout,
            dropout_key=weights_key,
        )
        x = x + layers.drop(self.out(mixed.reshape(x.shape)), config.dropout, attention_key)
        if not config.do_layer_norm_before:
            x = self.attention_norm(x)
        h = self.mlp_norm(x) if config.do_layer_norm_before else x
        inner = layers.ACTIVATIONS[config.activation_function](self.mlp_in(h))
        x = x + layers.drop(self.mlp_out(inner), config.dropout, mlp_key)
        return x if config.do_layer_norm_before else self.mlp_norm(x)


class OPT(CausalLM):
    """OPT with its language-model head.

    Parameters
    ----------
    config : OPTConfig
    dtype : dtype of the parameters
    rngs : nnx.Rngs
        The stream "params" gives the keys for the initial weights.
    """

    config: OPTConfig

    def __init__(self, config: OPTConfig, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config)
        init = layers.normal(config.init_std)
        width, narrow = config.width, config.word_embed_proj_dim
        self.tokens = layers.Embedding(config.vocab_size, narrow, dtype, init, rngs)
        self.positions = layers.Embedding(config.max_length + OFFSET, width, dtype, init, rngs)
        if narrow != width:
            self.project_in = _linear(config, narrow, width, dtype, rngs, bias=False)
            self.project_out = _linear(config, width, narrow, dtype, rngs, bias=False)
        self.layers = nnx.List([Block(config, dtype, rngs) for _ in range(config.layers)])
        if config.final_norm:
            self.norm = _norm(config, dtype, rngs)
        if not config.tie_word_embeddings:
            self.head = layers.Embedding(config.vocab_size, narrow, dtype, init, rngs)

    def decode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the inputs (N*T, word_embed_proj_dim) of the head; see `CausalLM`."""
        config = self.config
        x = self.tokens(input_ids.reshape(-1))
        projected = config.word_embed_proj_dim != config.width
        if projected:
            x = self.project_in(x)
        x = x + self.positions(layers.positions_from_mask(attention_mask).reshape(-1) + OFFSET)
        x = self.run_layers(
            self.layers,
            x,
            layers.keys_per_layer(dropout_key, config.layers),
            layers.causal_mask(attention_mask),
        )
        if config.final_norm:
            x = self.norm(x)
        return self.project_out(x) if projected else x


def _norm(config: OPTConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layers.layer_norm(config.width, 1e-5, dtype, rngs, affine=config.layer_norm_elementwise_affine)


def _linear(
    config: OPTConfig, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, *, bias: bool = True
) -> nnx.Linear:
    return layers.linear(inputs, outputs, config.init_std, dtype, rngs, bias=bias and config.enable_bias)


def table(config: OPTConfig) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters."""
    block = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "mlp_in": "fc1",
        "mlp_out": "fc2",
    }
    linears = {f"layers.{{i}}.{ours}": f"decoder.layers.{{i}}.{theirs}" for ours, theirs in block.items()}
    linears |= {name: f"decoder.{name}" for name in ("project_in", "project_out")}
    norms = {
        "layers.{i}.attention_norm": "decoder.layers.{i}.self_attn_layer_norm",
        "layers.{i}.mlp_norm": "decoder.layers.{i}.final_layer_norm",
        "norm": "decoder.final_layer_norm",
    }
    rules = [
        Rule("tokens.embedding", "decoder.embed_tokens.weight"),
        Rule("positions.embedding", "decoder.embed_positions.weight"),
    ]
    for ours, theirs in linears.items():
        rules += linear_rules(ours, theirs)
    for ours, theirs in norms.items():
        rules += norm_rules(ours, theirs)
    return causal_table(
        rules, tied=config.tie_word_embeddings, embedding="decoder.embed_tokens.weight", prefix="model."
    )
