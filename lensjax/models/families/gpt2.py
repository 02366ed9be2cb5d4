"""GPT-2 in Flax NNX: gpt2 to gpt2-xl, Cerebras-GPT, LaMini-GPT, mGPT.

References
----------
Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
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
    ModelConfig,
    Rule,
    Table,
    causal_table,
    norm_rules,
    positive,
    typed,
    width_and_heads,
)


@dataclasses.dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Configuration of GPT-2; fields that stand in config.json have the same name as there."""

    max_length: int
    n_inner: int = 0
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> GPT2Config:
        """Read a config.json; see `ModelConfig.from_dict`."""
        width, heads = width_and_heads(raw, source, n_embd=768, n_head=12)
        if raw.get("add_cross_attention", False):
            raise InputError(f"{source}: add_cross_attention is true; only decoders without it are supported.")
        layers.activation(typed(raw, "activation_function", "gelu_new", source), source)
        return cls.base(
            raw,
            vocab_size=positive(raw, "vocab_size", 50257, source),
            width=width,
            heads=heads,
            layers=positive(raw, "n_layer", 12, source),
            max_length=positive(raw, "n_positions", 1024, source),
            n_inner=positive(raw, "n_inner", 4 * width, source),
            **cls.optional_fields(raw, source, without=("n_inner",)),
        )


class Attention(nnx.Module):
    """Causal self-attention with one matrix for queries, keys and values."""

    def __init__(self, config: GPT2Config, dtype: Any, rngs: nnx.Rngs):
        std = config.initializer_range
        self.qkv = layers.linear(config.width, 3 * config.width, std, dtype, rngs)
        self.out = layers.linear(config.width, config.width, layers.residual_std(std, config.layers), dtype, rngs)
        self.config = config

    def __call__(self, x: jax.Array, mask: jax.Array, scale: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply attention to x (N*T, d) with the mask (N, 1, T, T)."""
        samples, length = mask.shape[0], mask.shape[-1]
        qkv = self.qkv(x).reshape(samples, length, 3, self.config.heads, -1)
        mixed = layers.attention(
            qkv[:, :, 0],
            qkv[:, :, 1],
            qkv[:, :, 2],
            mask,
            scale=scale,
            dropout=self.config.attn_pdrop,
            dropout_key=key,
        )
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """One layer: attention and an MLP, each applied to the normalised residual stream."""

    def __init__(self, config: GPT2Config, dtype: Any, rngs: nnx.Rngs):
        std = config.initializer_range
        self.attention_norm = _norm(config, dtype, rngs)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.mlp_in = layers.linear(config.width, config.n_inner, std, dtype, rngs)
        self.mlp_out = layers.linear(config.n_inner, config.width, layers.residual_std(std, config.layers), dtype, rngs)
        self.config = config

    def __call__(self, x: jax.Array, per_layer: tuple[jax.Array, jax.Array | None], mask: jax.Array) -> jax.Array:
        """Apply the layer to the residual stream x (N*T, d); `per_layer` is its score scale and dropout key."""
        scale, key = per_layer
        weights_key, attention_key, mlp_key = layers.split_key(key, 3)
        rate = self.config.resid_pdrop
        x = x + layers.drop(self.attention(self.attention_norm(x), mask, scale, weights_key), rate, attention_key)
        inner = layers.ACTIVATIONS[self.config.activation_function](self.mlp_in(self.mlp_norm(x)))
        return x + layers.drop(self.mlp_out(inner), rate, mlp_key)


class GPT2(CausalLM):
    """GPT-2 with its language-model head.

    Parameters
    ----------
    config : GPT2Config
    dtype : dtype of the parameters
    rngs : nnx.Rngs
        The stream "params" gives the keys for the initial weights.
    """

    config: GPT2Config

    def __init__(self, config: GPT2Config, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config)
        init = layers.normal(config.initializer_range)
        self.tokens = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)
        self.positions = layers.Embedding(config.max_length, config.width, dtype, init, rngs)
        self.layers = nnx.List([Block(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = _norm(config, dtype, rngs)
        if not config.tie_word_embeddings:
            self.head = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)

    def decode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the inputs (N*T, d) of the head; see `CausalLM`."""
        config = self.config
        embed_key, layers_key = layers.split_key(dropout_key, 2)
        x = self.tokens(input_ids.reshape(-1)) + self.positions(layers.positions_from_mask(attention_mask).reshape(-1))
        x = layers.drop(x, config.embd_pdrop, embed_key)
        scale = jnp.full(config.layers, (config.width // config.heads) ** -0.5 if config.scale_attn_weights else 1.0)
        if config.scale_attn_by_inverse_layer_idx:
            scale = scale / jnp.arange(1, config.layers + 1)
        keys = layers.keys_per_layer(layers_key, config.layers)
        return self.norm(self.run_layers(self.layers, x, (scale, keys), layers.causal_mask(attention_mask)))


def _norm(config: GPT2Config, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layers.layer_norm(config.width, config.layer_norm_epsilon, dtype, rngs)


def table(config: GPT2Config) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters; its linear layers store (in, out), as ours."""
    block = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp_in": "mlp.c_fc",
        "mlp_out": "mlp.c_proj",
    }
    rules = [
        Rule("tokens.embedding", "wte.weight"),
        Rule("positions.embedding", "wpe.weight"),
        *norm_rules("norm", "ln_f"),
    ]
    for ours, theirs in block.items():
        weight = "scale" if ours.endswith("norm") else "kernel"
        rules.append(Rule(f"layers.{{i}}.{ours}.{weight}", f"h.{{i}}.{theirs}.weight"))
        rules.append(Rule(f"layers.{{i}}.{ours}.bias", f"h.{{i}}.{theirs}.bias"))
    return causal_table(
        rules,
        tied=config.tie_word_embeddings,
        embedding="wte.weight",
        prefix="transformer.",
        # The causal mask, which old checkpoints store as a buffer.
        ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    )
