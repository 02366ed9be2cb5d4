"""BART in Flax NNX: bart-base, bart-large, bart-large-cnn, bart-large-xsum and models fine-tuned from them.

References
----------
Lewis et al. 2020, BART: Denoising Sequence-to-Sequence Pre-training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.base import Seq2SeqConfig, Seq2SeqLM
from lensjax.models.registry import Rule, Table, check_multiple, linear_rules, norm_rules, positive

OFFSET = 2
"""Rows at the start of the position tables that no position uses."""

FIXED: dict[str, Any] = {
    # Options of old configuration files, with the values that every BART has; transformers no longer reads them.
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
    "static_position_embeddings": False,
    "tie_word_embeddings": True,
    # Random dropping of layers in training, which is not ported.
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


@dataclasses.dataclass(frozen=True)
class BartConfig(Seq2SeqConfig):
    """Configuration of BART; fields that stand in config.json have the same name as there."""

    max_length: int
    decoder_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_ffn_dim: int = 4096
    activation_function: str = "gelu"
    scale_embedding: bool = False
    init_std: float = 0.02
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> BartConfig:
        """Read a config.json; see `ModelConfig.from_dict`."""
        width = positive(raw, "d_model", 1024, source)
        heads = {stack: positive(raw, f"{stack}_attention_heads", 16, source) for stack in ("encoder", "decoder")}
        for stack, count in heads.items():
            check_multiple("d_model", width, f"{stack}_attention_heads", count, source)
        for name, value in FIXED.items():
            if raw.get(name, value) != value:
                raise InputError(f"{source}: {name} is {raw[name]!r}; only {value!r} is supported.")
        layers.activation(raw.get("activation_function", "gelu"), source)
        token_ids = {"decoder_start_token_id": 2, "pad_token_id": 1}
        optional = (
            "activation_function",
            "scale_embedding",
            "init_std",
            "dropout",
            "attention_dropout",
            "activation_dropout",
        )
        return cls.base(
            raw,
            vocab_size=positive(raw, "vocab_size", 50265, source),
            width=width,
            heads=heads["encoder"],
            layers=positive(raw, "encoder_layers", 12, source),
            max_length=positive(raw, "max_position_embeddings", 1024, source),
            decoder_layers=positive(raw, "decoder_layers", 12, source),
            decoder_heads=heads["decoder"],
            encoder_ffn_dim=positive(raw, "encoder_ffn_dim", 4096, source),
            decoder_ffn_dim=positive(raw, "decoder_ffn_dim", 4096, source),
            **{name: default if raw.get(name) is None else raw[name] for name, default in token_ids.items()},
            **{name: raw[name] for name in optional if name in raw},
        )


def _linear(inputs: int, outputs: int, config: BartConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return layers.linear(inputs, outputs, config.init_std, dtype, rngs)


def _norm(config: BartConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return layers.layer_norm(config.width, 1e-5, dtype, rngs)


class Attention(nnx.Module):
    """Attention from `x` to `memory`."""

    def __init__(self, config: BartConfig, heads: int, dtype: Any, rngs: nnx.Rngs):
        self.q, self.k, self.v, self.out = (_linear(config.width, config.width, config, dtype, rngs) for _ in range(4))
        self.heads = heads
        self.config = config

    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply attention from x (N*T, d) to memory (N*S, d) with the mask (N, 1, T or 1, S)."""
        split = lambda y: y.reshape(mask.shape[0], -1, self.heads, self.config.width // self.heads)  # noqa: E731
        mixed = layers.attention(
            split(self.q(x)),
            split(self.k(memory)),
            split(self.v(memory)),
            mask,
            scale=(self.config.width // self.heads) ** -0.5,
            dropout=self.config.attention_dropout,
            dropout_key=key,
        )
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """One post-norm layer: self-attention, cross-attention in the decoder, and an MLP.

    Parameters
    ----------
    cross : bool
        Whether there is cross-attention to the encoder, that is, whether this is a layer of the decoder.
    """

    def __init__(self, config: BartConfig, cross: bool, dtype: Any, rngs: nnx.Rngs):
        heads = config.decoder_heads if cross else config.heads
        inner = config.decoder_ffn_dim if cross else config.encoder_ffn_dim
        self.attention = Attention(config, heads, dtype, rngs)
        self.attention_norm = _norm(config, dtype, rngs)
        if cross:
            self.cross = Attention(config, heads, dtype, rngs)
            self.cross_norm = _norm(config, dtype, rngs)
        self.mlp_in = _linear(config.width, inner, config, dtype, rngs)
        self.mlp_out = _linear(inner, config.width, config, dtype, rngs)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None,
        mask: jax.Array,
        memory: jax.Array | None,
        memory_mask: jax.Array | None,
    ) -> jax.Array:
        """Apply the layer to x (N*T, d)."""
        config = self.config
        keys = layers.split_key(key, 6)
        mixed = self.attention(x, x, mask, keys[0])
        x = self.attention_norm(x + layers.drop(mixed, config.dropout, keys[1]))
        if memory is not None and memory_mask is not None:
            mixed = self.cross(x, memory, memory_mask, keys[2])
            x = self.cross_norm(x + layers.drop(mixed, config.dropout, keys[3]))
        inner = layers.ACTIVATIONS[config.activation_function](self.mlp_in(x))
        out = self.mlp_out(layers.drop(inner, config.activation_dropout, keys[4]))
        return self.mlp_norm(x + layers.drop(out, config.dropout, keys[5]))


class Stack(nnx.Module):
    """The encoder or the decoder: position embeddings, the norm of the embeddings, and the layers."""

    def __init__(self, config: BartConfig, cross: bool, dtype: Any, rngs: nnx.Rngs):
        init = layers.normal(config.init_std)
        self.positions = layers.Embedding(config.max_length + OFFSET, config.width, dtype, init, rngs)
        self.embedding_norm = _norm(config, dtype, rngs)
        count = config.decoder_layers if cross else config.layers
        self.layers = nnx.List([Block(config, cross, dtype, rngs) for _ in range(count)])


class Bart(Seq2SeqLM):
    """BART with its language-model head, which consists of the embedding table and a fixed bias.

    Parameters
    ----------
    config : BartConfig
    dtype : dtype of the parameters
    rngs : nnx.Rngs
        The stream "params" gives the keys for the initial weights.

    Notes
    -----
    As in transformers, there is no gradient for the head's bias (final_logits_bias, which is 0 in most checkpoints),
    and none for the padding token's embedding through the inputs (through the head there is).
    Positions count only the tokens that the mask keeps, so padding on the left changes nothing; in transformers it
    does.
    """

    config: BartConfig

    def __init__(self, config: BartConfig, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config)
        self.tokens = layers.Embedding(config.vocab_size, config.width, dtype, layers.normal(config.init_std), rngs)
        self.encoder = Stack(config, False, dtype, rngs)
        self.decoder = Stack(config, True, dtype, rngs)
        self.logits_bias = nnx.Param(jnp.zeros(config.vocab_size, dtype))

    def _run(
        self,
        stack: Stack,
        ids: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        key: jax.Array | None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        config, (samples, length) = self.config, ids.shape
        embed_key, layers_key = layers.split_key(key, 2)
        flat = ids.reshape(-1)
        x = self.tokens(flat)
        x = jnp.where((flat == config.pad_token_id)[:, None], jax.lax.stop_gradient(x), x)
        if config.scale_embedding:
            x = x * config.width**0.5
        x = stack.embedding_norm(x + stack.positions(positions.reshape(-1) + OFFSET))
        x = layers.drop(x, config.dropout, embed_key)
        keys = layers.keys_per_layer(layers_key, len(stack.layers))
        x = self.run_layers(stack.layers, x, keys, mask, memory, memory_mask)
        return x.reshape(samples, length, config.width)

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the encoder's output (N, S, d); see `Seq2SeqLM`."""
        positions = layers.positions_from_mask(attention_mask)
        return self._run(self.encoder, input_ids, positions, layers.padding_mask(attention_mask), dropout_key)

    def decode(
        self,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array,
        encoded: jax.Array,
        attention_mask: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the inputs (N, T, d) of the head; see `Seq2SeqLM`."""
        return self._run(
            self.decoder,
            decoder_input_ids,
            layers.positions_from_mask(decoder_attention_mask),
            layers.causal_mask(decoder_attention_mask),
            dropout_key,
            encoded.reshape(-1, self.config.width),
            layers.padding_mask(attention_mask),
        )

    def head_bias(self) -> jax.Array:
        """Return the head's fixed bias (V,)."""
        return jax.lax.stop_gradient(self.logits_bias[...])


def _row(array: np.ndarray) -> list[np.ndarray]:
    return [array[None]]


def table(config: BartConfig) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters; its linear layers store (out, in)."""
    rules = [
        Rule("tokens.embedding", "shared.weight"),
        Rule("logits_bias", "final_logits_bias", lambda arrays: arrays[0][0], _row),
    ]
    attention = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
    for stack in ("encoder", "decoder"):
        layer = f"{stack}.layers.{{i}}"
        rules.append(Rule(f"{stack}.positions.embedding", f"{stack}.embed_positions.weight"))
        norms = [(f"{stack}.embedding_norm", f"{stack}.layernorm_embedding")]
        norms += [(f"{layer}.attention_norm", f"{layer}.self_attn_layer_norm")]
        norms += [(f"{layer}.mlp_norm", f"{layer}.final_layer_norm")]
        linears = [(f"{layer}.mlp_in", f"{layer}.fc1"), (f"{layer}.mlp_out", f"{layer}.fc2")]
        linears += [(f"{layer}.attention.{part}", f"{layer}.self_attn.{name}") for part, name in attention.items()]
        if stack == "decoder":
            norms.append((f"{layer}.cross_norm", f"{layer}.encoder_attn_layer_norm"))
            linears += [(f"{layer}.cross.{part}", f"{layer}.encoder_attn.{name}") for part, name in attention.items()]
        for ours, theirs in norms:
            rules += norm_rules(ours, theirs)
        for ours, theirs in linears:
            rules += linear_rules(ours, theirs)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    return Table(
        rules=tuple(rules),
        prefix="model.",
        unprefixed=("final_logits_bias", "lm_head.weight"),
        copies=dict.fromkeys(copies, "shared.weight"),
        optional=("final_logits_bias",),  # a buffer in transformers, absent in files of the bare model
        ignored=(r"(encoder|decoder)\.version",),
    )
