"""Building blocks of the model families: attention and its masks, activations, norms, rotary embeddings, dropout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lensjax.errors import InputError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activation functions by their name in a Hugging Face config.json."""


class Embedding(nnx.Module):
    """A table of vectors. Unlike `nnx.Embed`, it computes in the dtype that its parameter has when it is called."""

    def __init__(self, entries: int, width: int, dtype: Any, init: nnx.Initializer, rngs: nnx.Rngs):
        self.embedding = nnx.Param(init(rngs.params(), (entries, width), dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return the vectors (..., width) of `ids` (...); an id outside the table gives NaN."""
        return jnp.take(self.embedding[...], ids, axis=0)


def activation(name: str, source: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation function called `name` in the configuration `source`.

    Raises
    ------
    InputError
        If there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise InputError(
            f"{source}: activation {name!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}."
        )
    return ACTIVATIONS[name]


def positions_from_mask(attention_mask: jax.Array) -> jax.Array:
    """Return position ids (N, T) that count only the tokens kept by the mask (N, T), so padding shifts no position."""
    return jnp.maximum(jnp.cumsum(attention_mask, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_mask(attention_mask: jax.Array) -> jax.Array:
    """Return which keys each query may see: bool (N, 1, T, T) from the mask (N, T) of real tokens."""
    length = attention_mask.shape[-1]
    return jnp.tril(jnp.ones((length, length), bool)) & padding_mask(attention_mask)


def padding_mask(attention_mask: jax.Array) -> jax.Array:
    """Return which keys every query may see: bool (N, 1, 1, T) from the mask (N, T) of real tokens."""
    return (attention_mask != 0)[:, None, None, :]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | jax.Array,
    bias: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with the implementation that `attention_implementation` sets.

    Parameters
    ----------
    query : float array (N, T, H, h)
    key, value : float arrays (N, S, K, h)
        K divides H: each key head serves H / K query heads.
    mask : bool array, broadcastable to (N, H, T, S)
        True where the query may see the key. The result of a query that sees no key is the mean of all values.
    scale : float
        Multiplies the scores.
    bias : float array, broadcastable to (N, H, T, S), optional
        Added to the scaled scores.
    dropout : float
        Rate at which attention weights are dropped if `dropout_key` is given.
    dropout_key : PRNG key, optional

    Returns
    -------
    float array (N, T, H, h)
        Scores and softmax are computed in at least float32.
    """
    kind = choose_attention(
        _ATTENTION.get(),
        jax.default_backend(),
        query.dtype,
        lengths=(query.shape[1], key.shape[1]),
        features=query.shape[3],
        bias=bias is not None,
        dropout=dropout > 0 and dropout_key is not None,
    )
    if kind != "plain":
        return fused_attention(query, key, value, mask, scale=scale, bias=bias, implementation=kind)
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    accumulator = jnp.promote_types(jnp.float32, query.dtype)
    scores = jnp.einsum("nthd,nshd->nhts", query, key, preferred_element_type=accumulator) * scale
    if bias is not None:
        scores = scores + bias
    # The smallest finite number rather than -inf: a query that sees no key (padding on the left) would give NaN.
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(accumulator).min), axis=-1).astype(value.dtype)
    weights = drop(weights, dropout, dropout_key)
    return jnp.einsum("nhts,nshd->nthd", weights, value)


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | jax.Array,
    bias: jax.Array | None = None,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Softmax attention by `jax.nn.dot_product_attention`; arguments as in `attention`."""
    if not isinstance(scale, (int, float)):  # it does not accept a traced scale
        query, scale = (query * scale).astype(query.dtype), 1.0
    # cuDNN needs the mask with all its query rows; one mask per sample is enough.
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=float(scale), implementation=implementation
    )


ATTENTIONS = ("auto", "plain", "xla", "cudnn")
"""Implementations of `attention`."""

_ATTENTION: ContextVar[str] = ContextVar("attention", default="auto")


@contextmanager
def attention_implementation(kind: str) -> Iterator[None]:
    """Choose the implementation of attention for functions traced in this context.

    A model enters this context around its layers; to choose the implementation for a model, set its `attention`.

    Parameters
    ----------
    kind : {"auto", "plain", "xla", "cudnn"}
        "plain" is written in basic JAX operations, which can be differentiated in forward and reverse mode any number
        of times. "xla" and "cudnn" are those of `jax.nn.dot_product_attention`, which has no dropout of attention
        weights. "cudnn" is flash attention for NVIDIA GPUs: it does not store the scores, and it supports reverse mode
        once, but neither forward mode nor second derivatives. With "auto", `choose_attention` decides.

    Raises
    ------
    InputError
        If there is no such implementation.
    """
    if kind not in ATTENTIONS:
        raise InputError(f"attention {kind!r} is not known; choose one of {', '.join(ATTENTIONS)}.")
    token = _ATTENTION.set(kind)
    try:
        yield
    finally:
        _ATTENTION.reset(token)


def choose_attention(
    asked: str,
    platform: str,
    dtype: Any,
    *,
    lengths: tuple[int, int],
    features: int,
    bias: bool,
    dropout: bool,
) -> str:
    """Return the implementation to use for one call of `attention`.

    Parameters
    ----------
    asked : str
        One of `ATTENTIONS`. All but "auto" are taken as they are, except that dropout needs "plain".
    platform : str
        As returned by `jax.default_backend()`.
    dtype : dtype of the queries
    lengths : (int, int)
        Number of queries and of keys.
    features : int
        Features of a head.
    bias : bool
        Whether a bias is added to the scores; all biases are learned.
    dropout : bool
        Whether attention weights are dropped.

    Returns
    -------
    "plain", "xla" or "cudnn"
        "auto" is "cudnn" on a GPU, in half precision, with an even number of queries and of keys (cuDNN gets the mask
        as a bias, and computes a bias's gradient only then), and heads of at most 128 features, a multiple of 8.
        Otherwise it is "plain", which was not slower than "xla" on the CPU.
    """
    if dropout:
        return "plain"
    if asked != "auto":
        return asked
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    even = all(length % 2 == 0 for length in lengths)
    fits = half and even and features % 8 == 0 and features <= 128 and not bias
    return "cudnn" if platform in ("gpu", "cuda") and fits else "plain"


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Return `x` with elements dropped at `rate` and the others scaled up; `x` itself if there is no key or no rate."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def per_expert(weight: Any, x: jax.Array) -> jax.Array:
    """Multiply the tokens of each expert by the expert's matrix.

    Parameters
    ----------
    weight : nnx.Variable (E, d, f), or lora.Adapter of one
    x : float array (N, E, C, d)

    Returns
    -------
    float array (N, E, C, f)
    """
    return jnp.einsum("necd,edf->necf", x, weight[...]) if isinstance(weight, nnx.Variable) else weight(x)


def split_key(key: jax.Array | None, count: int) -> list[Any]:
    """Return `count` keys, or a list of `count` times None if there is no key."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def keys_per_layer(key: jax.Array | None, count: int) -> jax.Array | None:
    """Return an array of one key for each of `count` layers, or None if there is no key."""
    return None if key is None else jax.random.split(key, count)


def normal(std: float) -> nnx.Initializer:
    """Return an initializer that draws from a normal distribution of mean 0 and standard deviation `std`."""
    return jax.nn.initializers.normal(std)


def residual_std(std: float, layers: int) -> float:
    """Return GPT-2's standard deviation for matrices whose output is added to the residual stream (two per layer)."""
    return std / math.sqrt(2 * layers)


def linear(inputs: int, outputs: int, std: float, dtype: Any, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    """Return a linear layer whose matrix is drawn with mean 0 and standard deviation `std`; its bias starts at 0."""
    return nnx.Linear(inputs, outputs, use_bias=bias, param_dtype=dtype, kernel_init=normal(std), rngs=rngs)


def layer_norm(width: int, epsilon: float, dtype: Any, rngs: nnx.Rngs, *, affine: bool = True) -> nnx.LayerNorm:
    """Return a layer norm, with scale and bias if it is `affine`."""
    # The variance in one pass cancels in float32; in two passes it does not.
    return nnx.LayerNorm(
        width,
        epsilon=epsilon,
        use_scale=affine,
        use_bias=affine,
        param_dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, in at least float32, then a learned scale.

    Parameters
    ----------
    width : int
    epsilon : float
        Added to the mean square.
    dtype : dtype of the scale
    offset : float
        Added to the learned scale, which starts at 1 - `offset`; Gemma stores the difference from 1. As in
        transformers, rounding to the input's dtype comes after the product with the scale if there is an offset, and
        before it if there is none.
    """

    def __init__(self, width: int, epsilon: float, dtype: Any, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(width, 1.0 - offset, dtype))
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x (..., width); the result has the dtype of x."""
        accumulator = jnp.promote_types(jnp.float32, x.dtype)
        wide = x.astype(accumulator)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        if self.offset:
            return (wide * (self.offset + self.scale[...].astype(accumulator))).astype(x.dtype)
        return wide.astype(x.dtype) * self.scale[...]


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: the angle by which each pair of features is rotated at each position.

    Attributes
    ----------
    features : int
        How many features of a head are rotated, beginning with the first; even.
    theta : float
        Base of the wavelengths.
    kind : {"default", "linear", "llama3"}
        How the frequencies are scaled for inputs longer than those of pre-training.
    factor : float
        Divides the low ("llama3") or all ("linear") frequencies.
    low, high : float
        For "llama3": wavelengths above `context` / `low` are scaled, those below `context` / `high` are not.
    context : float
        For "llama3": length of the pre-training inputs in tokens.

    References
    ----------
    Su et al. 2021, RoFormer, eq. 15; Chen et al. 2023, Extending context window by position interpolation, eq. 4
    ("linear"); Grattafiori et al. 2024, The Llama 3 herd of models ("llama3").
    """

    features: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    context: float = 1.0

    def frequencies(self) -> np.ndarray:
        """Return radians per position: float32 (features / 2,), rounded at the same steps as in transformers."""
        exponent = np.arange(0, self.features, 2, dtype=np.float32) / np.float32(self.features)
        frequencies = (1.0 / np.power(np.float32(self.theta), exponent)).astype(np.float32)
        if self.kind == "linear":
            frequencies = frequencies / np.float32(self.factor)
        elif self.kind == "llama3":
            # Between the unscaled and the scaled frequency, linear in the number of turns over the context.
            turns = self.context * frequencies.astype(np.float64) / (2 * np.pi)
            unscaled = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
            frequencies = (frequencies * (unscaled + (1 - unscaled) / self.factor)).astype(np.float32)
        return frequencies

    def tables(self, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines (N, T, features / 2) of `dtype` for positions (N, T)."""
        angles = positions[..., None] * jnp.asarray(self.frequencies(), jnp.promote_types(jnp.float32, dtype))
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotary(raw: Mapping[str, Any], features: int, context: int, source: str, theta: float = 10_000.0) -> Rotary:
    """Read the rotary embedding from a config.json, new (`rope_parameters`) or old (`rope_theta`, `rope_scaling`).

    Parameters
    ----------
    raw : mapping
        The fields rope_parameters, rope_theta, rope_scaling and original_max_position_embeddings are read, if present.
    features : int
        Rotated features of a head.
    context : int
        The model's longest input.
    source : str
        Names the configuration in error messages.
    theta : float
        The family's default base.

    Raises
    ------
    InputError
        If the type is not supported, a field it needs is missing, or `features` is odd.
    """
    fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = fields.get("rope_type") or fields.get("type") or "default"
    base = fields.get("rope_theta") or raw.get("rope_theta") or theta
    if features < 2 or features % 2:
        raise InputError(f"{source}: rotary embeddings turn {features} features of a head; it must be an even number.")
    needed: dict[str, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in needed:
        raise InputError(f"{source}: rope_type {kind!r} is not supported; supported: {', '.join(sorted(needed))}.")
    missing = [name for name in needed[kind] if not isinstance(fields.get(name), (int, float))]
    if missing:
        raise InputError(f"{source}: rope_type {kind!r} needs a number for {', '.join(missing)}; correct config.json.")
    factor = float(fields["factor"]) if kind != "default" else 1.0
    if kind != "llama3":
        return Rotary(features, float(base), kind, factor)
    original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings") or context
    low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
    return Rotary(features, float(base), kind, factor, low, high, float(original))


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first features of each head of x (N, T, H, h) by the angles of `Rotary.tables`; keep the others."""
    cos, sin = (table[:, :, None, :] for table in tables)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, x[..., 2 * half :]] if 2 * half < x.shape[-1] else rotated, axis=-1)


def window_mask(attention_mask: jax.Array, window: int | None) -> jax.Array:
    """Return `causal_mask` restricted to the last `window` tokens, including the query's own; None means no limit."""
    mask = causal_mask(attention_mask)
    if window is None:
        return mask
    length = attention_mask.shape[-1]
    return mask & jnp.triu(jnp.ones((length, length), bool), 1 - window)
