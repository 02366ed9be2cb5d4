"""T5 in Flax NNX: v1.0 (ReLU, tied head) and v1.1 (gated GELU, untied head).

References
----------
Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer.
Shazeer 2020, GLU Variants Improve Transformer (v1.1).
Xue et al. 2021, mT5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.base import Seq2SeqConfig, Seq2SeqLM
from lensjax.models.registry import Rule, Table, positive, transposed


@dataclasses.dataclass(frozen=True)
class T5Config(Seq2SeqConfig):
    """Configuration of T5; fields that stand in config.json have the same name as there.

    Attributes
    ----------
    d_kv, d_ff : int
        Features of a head, and inner width of the MLP.
    activation : str
        Activation of the MLP, from feed_forward_proj.
    gated : bool
        Whether the MLP multiplies the activations by the output of a second matrix.
    tie_word_embeddings : bool
        Whether the head is the embedding table.
    scale_decoder_outputs : bool
        Whether the head's inputs are multiplied by d_model**-0.5: by default if T5's head is tied, never in mT5.
    """

    max_length: None = None
    d_kv: int = 64
    d_ff: int = 2048
    activation: str = "relu"
    gated: bool = False
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0

    # Defaults that differ between the configuration classes of T5, mT5 and Switch Transformer in transformers.
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> T5Config:
        """Read a config.json; see `ModelConfig.from_dict`."""
        projection = raw.get("feed_forward_proj", cls.DEFAULTS["feed_forward_proj"])
        gate, _, name = projection.rpartition("-") if isinstance(projection, str) else ("?", "", "")
        if gate not in ("", "gated"):
            raise InputError(
                f"{source}: feed_forward_proj {projection!r} is not known; write ACTIVATION or gated-ACTIVATION."
            )
        # "gated-gelu" is the one spelling in which "gelu" means the tanh approximation.
        activation = "gelu_new" if projection == "gated-gelu" else name
        tied = raw.get("tie_word_embeddings", True)
        return cls.read(
            raw,
            source,
            activation=activation,
            gated=gate == "gated",
            tie_word_embeddings=tied,
            scale_decoder_outputs=cls.scales_decoder_outputs(raw, tied),
        )

    @classmethod
    def scales_decoder_outputs(cls, raw: Mapping[str, Any], tied: bool) -> bool:
        """Return whether the head's inputs are scaled, given whether config.json ties the head."""
        # transformers 5 writes this setting, because the tie_word_embeddings that it writes may be wrong.
        return bool(raw.get("scale_decoder_outputs", tied))

    @classmethod
    def read(cls, raw: Mapping[str, Any], source: str, **values: Any) -> Any:
        """Read the settings that T5, mT5 and Switch Transformer share, and set `values`."""
        size = lambda name: positive(raw, name, cls.DEFAULTS[name], source)  # noqa: E731
        layers.activation(values["activation"], source)
        buckets = positive(raw, "relative_attention_num_buckets", 32, source)
        distance = positive(raw, "relative_attention_max_distance", 128, source)
        if buckets % 4 or distance <= buckets // 2:
            raise InputError(
                f"{source}: relative_attention_num_buckets {buckets} must be a multiple of 4 and less than twice "
                f"relative_attention_max_distance {distance}; correct config.json."
            )
        pad = raw.get("pad_token_id")
        pad = 0 if pad is None else pad
        start = raw.get("decoder_start_token_id")
        optional = ("dropout_rate", "layer_norm_epsilon", "initializer_factor")
        return cls.base(
            raw,
            vocab_size=size("vocab_size"),
            width=positive(raw, "d_model", cls.DEFAULTS.get("d_model", 512), source),
            heads=size("num_heads"),
            layers=size("num_layers"),
            max_length=None,
            decoder_layers=positive(raw, "num_decoder_layers", size("num_layers"), source),
            # Some published files do not set it; all these models start with the padding token.
            decoder_start_token_id=pad if start is None else start,
            pad_token_id=pad,
            d_kv=positive(raw, "d_kv", 64, source),
            d_ff=size("d_ff"),
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=distance,
            **{name: raw[name] for name in optional if name in raw},
            **values,
        )


def linear(inputs: int, outputs: int, std: float, config: T5Config, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a linear layer without bias; the configuration's factor multiplies the standard deviation `std`."""
    return layers.linear(inputs, outputs, config.initializer_factor * std, dtype, rngs, bias=False)


def norm(config: T5Config, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Return T5's norm, an RMS norm with a scale and without bias."""
    return nnx.RMSNorm(
        config.width,
        epsilon=config.layer_norm_epsilon,
        scale_init=jax.nn.initializers.constant(config.initializer_factor),
        param_dtype=dtype,
        rngs=rngs,
    )


def relative_buckets(distance: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance (key position minus query position).

    Half of the buckets contain one distance each. The others grow logarithmically up to `max_distance`; the last
    contains all larger distances. Bidirectional attention has half of the buckets for each sign. Causal attention has
    none for keys after the query: they get bucket 0 and are masked.

    References
    ----------
    Raffel et al. 2020, section 2.1.
    """
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        back = np.abs(distance)
    else:
        back = np.maximum(-distance, 0)
    exact = buckets // 2
    # In float32 as in transformers: some distances lie on the edge between two buckets.
    ratio = np.log(np.maximum(back, 1).astype(np.float32) / np.float32(exact))
    growing = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(int)
    return offset + np.where(back < exact, back, np.minimum(growing, buckets - 1))


class Attention(nnx.Module):
    """Attention from `x` to `memory`. The scores are not scaled; the initialisation of the queries makes up for it."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        inner = config.heads * config.d_kv
        std = config.width**-0.5
        self.q = linear(config.width, inner, (config.width * config.d_kv) ** -0.5, config, dtype, rngs)
        self.k = linear(config.width, inner, std, config, dtype, rngs)
        self.v = linear(config.width, inner, std, config, dtype, rngs)
        self.out = linear(inner, config.width, inner**-0.5, config, dtype, rngs)
        self.config = config

    def __call__(
        self, x: jax.Array, memory: jax.Array, mask: jax.Array, bias: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """Apply attention from x (N*T, d) to memory (N*S, d); mask (N, 1, T or 1, S), bias (1, H, T, S)."""
        split = lambda y: y.reshape(mask.shape[0], -1, self.config.heads, self.config.d_kv)  # noqa: E731
        mixed = layers.attention(
            split(self.q(x)),
            split(self.k(memory)),
            split(self.v(memory)),
            mask,
            scale=1.0,
            bias=bias,
            dropout=self.config.dropout_rate,
            dropout_key=key,
        )
        return self.out(mixed.reshape(x.shape[0], -1))


class MLP(nnx.Module):
    """MLP, gated or not."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        self.inner = linear(config.width, config.d_ff, config.width**-0.5, config, dtype, rngs)
        if config.gated:
            self.gate = linear(config.width, config.d_ff, config.width**-0.5, config, dtype, rngs)
        self.out = linear(config.d_ff, config.width, config.d_ff**-0.5, config, dtype, rngs)
        self.config = config

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Apply to x (N*T, d)."""
        act = layers.ACTIVATIONS[self.config.activation]
        inner = act(self.gate(x)) * self.inner(x) if self.config.gated else act(self.inner(x))
        return self.out(layers.drop(inner, self.config.dropout_rate, key))


class Block(nnx.Module):
    """One layer: self-attention, cross-attention in the decoder, and an MLP, each applied to the normalised stream.

    Parameters
    ----------
    mlp : callable (config, dtype, rngs) -> module
    cross : bool
        Whether there is cross-attention to the encoder.
    """

    def __init__(self, config: T5Config, mlp: Any, cross: bool, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = norm(config, dtype, rngs)
        self.attention = Attention(config, dtype, rngs)
        if cross:
            self.cross_norm = norm(config, dtype, rngs)
            self.cross = Attention(config, dtype, rngs)
        self.mlp_norm = norm(config, dtype, rngs)
        self.mlp = mlp(config, dtype, rngs)
        self.config = config

    def attend(
        self,
        x: jax.Array,
        key: jax.Array | None,
        mask: jax.Array,
        bias: jax.Array,
        memory: jax.Array | None,
        memory_mask: jax.Array | None,
    ) -> jax.Array:
        """Apply self-attention and cross-attention to the residual stream x (N*T, d)."""
        weights_key, out_key, cross_weights_key, cross_out_key = layers.split_key(key, 4)
        rate = self.config.dropout_rate
        normed = self.attention_norm(x)
        x = x + layers.drop(self.attention(normed, normed, mask, bias, weights_key), rate, out_key)
        if memory is None or memory_mask is None:
            return x
        mixed = self.cross(self.cross_norm(x), memory, memory_mask, None, cross_weights_key)
        return x + layers.drop(mixed, rate, cross_out_key)

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None,
        mask: jax.Array,
        bias: jax.Array,
        memory: jax.Array | None,
        memory_mask: jax.Array | None,
    ) -> jax.Array:
        """Apply the layer to the residual stream x (N*T, d)."""
        attend_key, inner_key, out_key = layers.split_key(key, 3)
        x = self.attend(x, attend_key, mask, bias, memory, memory_mask)
        return x + layers.drop(self.mlp(self.mlp_norm(x), inner_key), self.config.dropout_rate, out_key)


class Stack(nnx.Module):
    """The encoder or the decoder: layers that share a table of relative-position biases, and a final norm."""

    def __init__(self, config: T5Config, blocks: list[Any], dtype: Any, rngs: nnx.Rngs):
        init = layers.normal(config.initializer_factor * config.width**-0.5)
        self.relative_bias = layers.Embedding(config.relative_attention_num_buckets, config.heads, dtype, init, rngs)
        self.layers = nnx.List(blocks)
        self.norm = norm(config, dtype, rngs)
        self.config = config

    def bias(self, length: int, *, bidirectional: bool) -> jax.Array:
        """Return the biases (1, H, T, T) added to the scores of self-attention."""
        buckets = relative_buckets(
            np.arange(1 - length, length),
            bidirectional=bidirectional,
            buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        position = jnp.arange(length)
        ids = jnp.asarray(buckets, jnp.int32)[position[None, :] - position[:, None] + length - 1]
        return self.relative_bias(ids).transpose(2, 0, 1)[None]


class T5(Seq2SeqLM):
    """T5 with its language-model head.

    Parameters
    ----------
    config : T5Config
    dtype : dtype of the parameters
    rngs : nnx.Rngs
        The stream "params" gives the keys for the initial weights.

    Notes
    -----
    float16 overflows in pre-trained T5 models of every size; use bfloat16 or float32.
    """

    config: T5Config

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config)
        init = layers.normal(config.initializer_factor)
        self.tokens = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)
        self.encoder = Stack(config, self.blocks(config.layers, False, dtype, rngs), dtype, rngs)
        self.decoder = Stack(config, self.blocks(config.decoder_layers, True, dtype, rngs), dtype, rngs)
        if not config.tie_word_embeddings:
            self.head = layers.Embedding(config.vocab_size, config.width, dtype, init, rngs)

    def blocks(self, count: int, cross: bool, dtype: Any, rngs: nnx.Rngs) -> list[Any]:
        """Return the layers of the encoder or, with `cross`, of the decoder."""
        return [Block(self.config, MLP, cross, dtype, rngs) for _ in range(count)]

    def run(
        self,
        stack: Stack,
        ids: jax.Array,
        mask: jax.Array,
        key: jax.Array | None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Run the encoder or decoder on token ids (N, T) with the mask (N, 1, T or 1, T) of self-attention."""
        config, (samples, length) = self.config, ids.shape
        embed_key, layers_key, last_key = layers.split_key(key, 3)
        x = layers.drop(self.tokens(ids.reshape(-1)), config.dropout_rate, embed_key)
        keys = layers.keys_per_layer(layers_key, len(stack.layers))
        x = self.run_layers(
            stack.layers,
            x,
            keys,
            mask,
            stack.bias(length, bidirectional=memory is None),
            memory,
            memory_mask,
        )
        x = layers.drop(stack.norm(x), config.dropout_rate, last_key)
        return x.reshape(samples, length, config.width)

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the encoder's output (N, S, d); see `Seq2SeqLM`."""
        return self.run(self.encoder, input_ids, layers.padding_mask(attention_mask), dropout_key)

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
        x = self.run(
            self.decoder,
            decoder_input_ids,
            layers.causal_mask(decoder_attention_mask),
            dropout_key,
            encoded.reshape(-1, self.config.width),
            layers.padding_mask(attention_mask),
        )
        return x * self.config.width**-0.5 if self.config.scale_decoder_outputs else x


ATTENTION = {"q": "q", "k": "k", "v": "v", "out": "o"}


def rules(config: T5Config, mlp: str = "DenseReluDense") -> list[Rule]:
    """Return the rules of T5, mT5 and Switch Transformer for all but sparse MLPs.

    Parameters
    ----------
    config : T5Config
    mlp : str
        Name of a layer's MLP in the checkpoint.
    """
    result = [Rule("tokens.embedding", "shared.weight")]
    if not config.tie_word_embeddings:
        result.append(Rule("head.embedding", "lm_head.weight"))
    for stack, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{stack}.layers.{{i}}", f"{stack}.block.{{i}}.layer"
        result.append(Rule(f"{stack}.norm.scale", f"{stack}.final_layer_norm.weight"))
        result.append(
            Rule(
                f"{stack}.relative_bias.embedding",
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            )
        )
        attentions = [("attention", 0, "SelfAttention")]
        attentions += [("cross", 1, "EncDecAttention")] if stack == "decoder" else []
        for kind, place, module in attentions:
            result.append(Rule(f"{ours}.{kind}_norm.scale", f"{theirs}.{place}.layer_norm.weight"))
            for part, name in ATTENTION.items():
                result.append(transposed(f"{ours}.{kind}.{part}.kernel", f"{theirs}.{place}.{module}.{name}.weight"))
        result.append(Rule(f"{ours}.mlp_norm.scale", f"{theirs}.{last}.layer_norm.weight"))
        matrices = {"gate": "wi_0", "inner": "wi_1", "out": "wo"} if config.gated else {"inner": "wi", "out": "wo"}
        for part, name in matrices.items():
            result.append(transposed(f"{ours}.mlp.{part}.kernel", f"{theirs}.{last}.{mlp}.{name}.weight"))
    return result


# Old checkpoints have a bias for cross-attention that no implementation uses.
UNUSED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def copies(config: T5Config) -> dict[str, str]:
    """Return the tensors that must equal the embedding table."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    names += ["lm_head.weight"] if config.tie_word_embeddings else []
    return dict.fromkeys(names, "shared.weight")


def table(config: T5Config) -> Table:
    """Return how a Hugging Face checkpoint stores the parameters; its linear layers store (out, in)."""
    untied = dataclasses.replace(config, tie_word_embeddings=False) if config.tie_word_embeddings else None
    return Table(rules=tuple(rules(config)), copies=copies(config), ignored=UNUSED, untied=untied)
