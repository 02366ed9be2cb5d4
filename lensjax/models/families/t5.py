"""T5 in Flax NNX: v1.0 (relu, tied head), v1.1 (gated GELU, head of its own), and mT5.

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
    """What T5's config.json decides; the names are those of the file where it has them.

    Attributes
    ----------
    d_kv, d_ff : int
        Width of a head, and of the perceptron.
    activation : str
        The perceptron's, from feed_forward_proj.
    gated : bool
        Whether the perceptron multiplies the activation with a second matrix' output.
    tie_word_embeddings : bool
        Whether the head is the embedding table.
    scale_decoder_outputs : bool
        Whether the head's inputs are multiplied by d_model**-0.5; by default where T5's head is tied, never in mT5.
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

    # Where transformers' configuration classes of the family differ.
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> T5Config:
        """Read the dictionary of a config.json; `source` names it in error messages.

        Raises
        ------
        InputError
            If a value asks for what this port does not compute.
        """
        projection = raw.get("feed_forward_proj", cls.DEFAULTS["feed_forward_proj"])
        gate, _, name = projection.rpartition("-") if isinstance(projection, str) else ("?", "", "")
        if gate not in ("", "gated"):
            raise InputError(
                f"{source}: feed_forward_proj {projection!r} is not known; write ACTIVATION or gated-ACTIVATION."
            )
        # The name stands for the tanh approximation in this one spelling, and only in this one.
        activation = "gelu_new" if projection == "gated-gelu" else name
        tied = raw.get("tie_word_embeddings", True)
        return cls._read(
            raw,
            source,
            activation=activation,
            gated=gate == "gated",
            tie_word_embeddings=tied,
            scale_decoder_outputs=cls._scales(raw, tied),
        )

    @classmethod
    def _scales(cls, raw: Mapping[str, Any], tied: bool) -> bool:
        # transformers 5 writes the decision itself: it forgets the tying it was made from.
        return bool(raw.get("scale_decoder_outputs", tied))

    @classmethod
    def _read(cls, raw: Mapping[str, Any], source: str, **values: Any) -> Any:
        """Read what T5 and its kin have in common."""
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
            # Some published files lack it; all these models start from the padding token.
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
    """Return a linear layer without bias, drawn with a standard deviation of `std` times the configuration's factor."""
    init = layers.normal(config.initializer_factor * std)
    return nnx.Linear(inputs, outputs, use_bias=False, param_dtype=dtype, kernel_init=init, rngs=rngs)


def norm(config: T5Config, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Return T5's norm: a division by the root mean square and a scale, without mean or bias."""
    return nnx.RMSNorm(
        config.width,
        epsilon=config.layer_norm_epsilon,
        scale_init=jax.nn.initializers.constant(config.initializer_factor),
        param_dtype=dtype,
        rngs=rngs,
    )


def relative_buckets(distance: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance (key position minus query position).

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`; the last holds
    everything beyond. Bidirectional attention has half of all buckets for each sign, causal attention none for keys
    after the query (they share bucket 0 and are masked).

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
    # In float32 as the reference: some distances lie on the edge between two buckets.
    ratio = np.log(np.maximum(back, 1).astype(np.float32) / np.float32(exact))
    growing = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(int)
    return offset + np.where(back < exact, back, np.minimum(growing, buckets - 1))


class Attention(nnx.Module):
    """Attention of `x` to `memory` without scaling of the scores: the initialisation has it."""

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
        """Attend: x (N*T, d), memory (N*S, d), mask (N, 1, T or 1, S), bias (1, H, T, S) -> (N*T, d)."""
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


class Perceptron(nnx.Module):
    """Two matrices around an activation, or three with a gate."""

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
    """One layer: self-attention, in the decoder attention to the encoder, and a perceptron, each on the normed stream.

    Parameters
    ----------
    mlp : callable (config, dtype, rngs) -> module
    cross : bool
        Whether there is attention to the encoder.
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
        self.is_decoder = cross

    def attend(
        self,
        x: jax.Array,
        key: jax.Array | None,
        mask: jax.Array,
        bias: jax.Array,
        memory: jax.Array | None,
        memory_mask: jax.Array | None,
    ) -> jax.Array:
        """Apply the attention to the residual stream x (N*T, d)."""
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
    """The encoder or the decoder: layers that share one table of relative-position biases, and a last norm."""

    def __init__(self, config: T5Config, blocks: list[Any], dtype: Any, rngs: nnx.Rngs):
        init = layers.normal(config.initializer_factor * config.width**-0.5)
        self.relative_bias = layers.Embedding(config.relative_attention_num_buckets, config.heads, dtype, init, rngs)
        self.layers = nnx.List(blocks)
        self.norm = norm(config, dtype, rngs)
        self.config = config

    def bias(self, length: int, *, bidirectional: bool) -> jax.Array:
        """Return the biases (1, H, T, T) of the scores of self-attention."""
        buckets = relative_buckets(
            np.arange(1 - length, length),
            bidirectional=bidirectional,
            buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        position = jnp.arange(length)
        ids = jnp.asarray(buckets, jnp.int32)[position[None, :] - position[:, None] + length - 1]
        return self.relative_bias(ids).transpose(2, 0, 1)[None]


def encoder_mask(attention_mask: jax.Array) -> jax.Array:
    """Return which of the encoder's tokens may be seen: bool (N, 1, 1, S) from the mask (N, S) of real ones."""
    return (attention_mask != 0)[:, None, None, :]


class T5(Seq2SeqLM):
    """T5 with its language-model head.

    Parameters
    ----------
    config : T5Config
    dtype : dtype of the parameters
    rngs : nnx.Rngs
        Stream "params" draws the initial weights.

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
        return [Block(self.config, Perceptron, cross, dtype, rngs) for _ in range(count)]

    def run(
        self,
        stack: Stack,
        ids: jax.Array,
        mask: jax.Array,
        key: jax.Array | None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Run a stack on token ids (N, T) with the mask (N, 1, T or 1, T) of self-attention."""
        config, (samples, length) = self.config, ids.shape
        embed_key, layers_key, last_key = layers.split_key(key, 3)
        x = layers.drop(self.tokens(ids.reshape(-1)), config.dropout_rate, embed_key)
        keys = None if layers_key is None else jax.random.split(layers_key, len(stack.layers))
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
        return self.run(self.encoder, input_ids, encoder_mask(attention_mask), dropout_key)

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
            encoder_mask(attention_mask),
        )
        return x * self.config.width**-0.5 if self.config.scale_decoder_outputs else x

    def head_weight(self) -> jax.Array:
        """Return the head's weight (V, d), the embedding table where the two are tied."""
        return (self.tokens if self.config.tie_word_embeddings else self.head).embedding[...]


ATTENTION = {"q": "q", "k": "k", "v": "v", "out": "o"}


def rules(config: T5Config, mlp: str = "DenseReluDense") -> list[Rule]:
    """Return the rules of T5 and its kin for all but sparse perceptrons; `mlp` is what the checkpoint calls those."""
    mapping = [Rule("tokens.embedding", "shared.weight")]
    if not config.tie_word_embeddings:
        mapping.append(Rule("head.embedding", "lm_head.weight"))
    for stack, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{stack}.layers.{{i}}", f"{stack}.block.{{i}}.layer"
        mapping.append(Rule(f"{stack}.norm.scale", f"{stack}.final_layer_norm.weight"))
        mapping.append(
            Rule(
                f"{stack}.relative_bias.embedding",
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            )
        )
        attentions = [("attention", 0, "SelfAttention")]
        attentions += [("cross", 1, "EncDecAttention")] if stack == "decoder" else []
        for kind, place, module in attentions:
            mapping.append(Rule(f"{ours}.{kind}_norm.scale", f"{theirs}.{place}.layer_norm.weight"))
            for own, name in ATTENTION.items():
                mapping.append(transposed(f"{ours}.{kind}.{own}.kernel", f"{theirs}.{place}.{module}.{name}.weight"))
        mapping.append(Rule(f"{ours}.mlp_norm.scale", f"{theirs}.{last}.layer_norm.weight"))
        matrices = {"gate": "wi_0", "inner": "wi_1", "out": "wo"} if config.gated else {"inner": "wi", "out": "wo"}
        for own, name in matrices.items():
            mapping.append(transposed(f"{ours}.mlp.{own}.kernel", f"{theirs}.{last}.{mlp}.{name}.weight"))
    return mapping


# Old checkpoints have a bias of cross-attention that no implementation uses.
UNUSED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def copies(config: T5Config) -> dict[str, str]:
    """Return the tensors that can only be copies of the embedding table."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    names += ["lm_head.weight"] if config.tie_word_embeddings else []
    return dict.fromkeys(names, "shared.weight")


def table(config: T5Config) -> Table:
    """Return where each parameter stands in a Hugging Face checkpoint (its linear layers store (out, in))."""
    untied = dataclasses.replace(config, tie_word_embeddings=False) if config.tie_word_embeddings else None
    return Table(rules=tuple(rules(config)), same=copies(config), ignored=UNUSED, untied=untied)
