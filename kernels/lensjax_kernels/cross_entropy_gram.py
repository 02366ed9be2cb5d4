"""The fused head and cross-entropy for several examples: losses, VJP, and reductions of the weight's gradients.

The gradient of one token's loss with respect to the logits is `softmax - one-hot`, so the head's per-example weight
gradient is `left.T @ right` with left = softmax - one-hot, (tokens x vocabulary), and right = cotangent * hidden.
The left factor is computed for a chunk of the vocabulary at a time from the hidden states and each token's
log-normaliser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lensjax_kernels.cross_entropy import IGNORED
from lensjax_kernels.gram import (
    EXACT,
    ReduceFunction,
    accumulation_dtype,
    pad_axis,
    reduce_weight_gradients,
    split_columns,
    summed_products,
    symmetric_blocks,
    token_products,
    weighted_gram,
)

LOGIT_BYTES = 2**26
"""Bytes of the logits that exist at once where they are not kept."""

FACTOR_BYTES = 2**24
"""Bytes of the left factors whose token pairs are multiplied at once: the products copy and transpose parts of them."""


def head_losses(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, *, keep: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return each token's cross-entropy and its log-normaliser, and all logits if they are to be kept.

    Parameters
    ----------
    hidden : float array (M, d)
    weight : float array (V, d)
    labels : int array (M,); -100 has no loss
    keep : bool

    Returns
    -------
    losses, log_normalizers : float arrays (M,), at least float32
    logits : float array (M, V), or None
    """
    dtype = accumulation_dtype(hidden, weight)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    size, pieces = split_columns(rows, vocabulary * dtype.itemsize, LOGIT_BYTES)
    if keep:
        size, pieces = rows, 1
    hidden, labels = pad_axis(hidden, 0, pieces * size - rows), pad_axis(labels, 0, pieces * size - rows)

    def piece(one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = _logits(one[0], weight, dtype)
        is_label = jax.lax.broadcasted_iota(one[1].dtype, logits.shape, 1) == one[1][:, None]
        of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=1)
        log_normalizer = jax.nn.logsumexp(logits, axis=1)
        return jnp.where(one[1] == IGNORED, 0, log_normalizer - of_label), log_normalizer, logits

    if pieces == 1:
        losses, normalizers, logits = piece((hidden, labels))
        return losses, normalizers, logits if keep else None
    pieces_of = (hidden.reshape(pieces, size, -1), labels.reshape(pieces, size))
    losses, normalizers = jax.lax.map(lambda one: piece(one)[:2], pieces_of)
    return losses.reshape(-1)[:rows], normalizers.reshape(-1)[:rows], None


def softmax_minus_onehot(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    log_normalizers: jax.Array,
    logits: jax.Array | None = None,
    *,
    start: jax.Array | int = 0,
    size: int | None = None,
) -> jax.Array:
    """Return softmax minus one-hot for some rows of the weight.

    Parameters
    ----------
    hidden : float array (..., T, d)
    weight : float array (V, d)
    labels : int array (..., T)
    log_normalizers : float array (..., T)
    logits : float array (..., T, V), optional
        If they were kept; else they are computed again.
    start, size : int
        The rows; default all. A chunk that would end after the last row ends with it instead; its rows before
        `start` are zero then.

    Returns
    -------
    float array (..., T, size); 0 where a token has no loss.
    """
    vocabulary = weight.shape[0]
    size = vocabulary if size is None else size
    first = jnp.minimum(start, vocabulary - size)
    if logits is None:
        logits = _logits(hidden, rows_at(weight, start, size), log_normalizers.dtype)
    else:
        logits = jax.lax.dynamic_slice_in_dim(logits, first, size, axis=logits.ndim - 1)
    ids = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    left = jnp.exp(logits - log_normalizers[..., None]) - (ids == labels[..., None])
    return jnp.where((labels[..., None] == IGNORED) | (ids < start), 0, left)


def rows_at(weight: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """Return the rows of the weight that belong to `start` and `size` of `softmax_minus_onehot`."""
    return jax.lax.dynamic_slice_in_dim(weight, jnp.minimum(start, weight.shape[0] - size), size)


def cross_entropy_vjp(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    log_normalizers: jax.Array,
    logits: jax.Array | None,
    cotangents: jax.Array,
    reduce: ReduceFunction | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the VJP of the losses for the hidden states, and a reduction of the weight's per-example gradients.

    Both need softmax - one-hot, which is computed once, for a chunk of the vocabulary at a time.

    Parameters
    ----------
    hidden : float array (B, T, d)
    weight : float array (V, d)
    labels : int array (B, T)
    log_normalizers : float array (B, T)
    logits : float array (B, T, V), or None where they were not kept
    cotangents : float array (B, C, T)
    reduce : callable (B, C, K) -> array, or None for no reduction
        See `reduce_weight_gradients`.

    Returns
    -------
    float array (B, C, T, d), like `hidden` in dtype; and the sum of the results of `reduce`, or None.
    """
    dtype = log_normalizers.dtype
    right = cotangents.astype(dtype)[..., None] * hidden[:, None].astype(dtype)
    size, pieces = split_columns(weight.shape[0], labels.size * dtype.itemsize, LOGIT_BYTES)

    def one(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = softmax_minus_onehot(hidden, weight, labels, log_normalizers, logits, start=start, size=size)
        direction = jnp.einsum("btv,vd->btd", left, rows_at(weight, start, size).astype(dtype))
        return direction, jnp.zeros((), dtype) if reduce is None else reduce_weight_gradients(left, right, reduce)

    direction, reduced = _summed(one, size, pieces)
    hidden_cotangents = cotangents.astype(dtype)[..., None] * direction[:, None]
    return hidden_cotangents.astype(hidden.dtype), None if reduce is None else reduced


def cross_entropy_vjp_token_gram(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    log_normalizers: jax.Array,
    logits: jax.Array | None,
    cotangents: jax.Array,
    rows: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the VJP of the losses for the hidden states and the weight's kernel, computed over token pairs.

    Cheaper than `cross_entropy_vjp` where examples times tokens is below the width; keeps one number for each pair of
    tokens.

    Parameters
    ----------
    hidden, weight, labels, log_normalizers, logits, cotangents : see `cross_entropy_vjp`
    rows : int or None
        The first `rows` examples are the kernel's rows, the others its columns; None: all are rows and columns.

    Returns
    -------
    float array (B, C, T, d), like `hidden` in dtype; float array (N, C, M, C), at least float32.
    """
    dtype = log_normalizers.dtype
    right = cotangents.astype(dtype)[..., None] * hidden[:, None].astype(dtype)
    size, pieces = split_columns(weight.shape[0], labels.size * dtype.itemsize, min(LOGIT_BYTES, FACTOR_BYTES))

    def sides(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (x, x) if rows is None else (x[:rows], x[rows:])

    (examples, tokens), symmetric = labels.shape, rows is None and cotangents.shape[1] == 1
    blocks = symmetric_blocks(examples)

    def one(start: jax.Array) -> tuple[jax.Array, Any]:
        left = softmax_minus_onehot(hidden, weight, labels, log_normalizers, logits, start=start, size=size)
        direction = jnp.einsum("btv,vd->btd", left, rows_at(weight, start, size).astype(dtype))
        if symmetric:
            return direction, token_products(left.reshape(examples * tokens, -1), blocks, tokens)
        return direction, jnp.einsum("ntv,msv->ntms", *sides(left), precision=EXACT)

    direction, products = _summed(one, size, pieces)
    hidden_cotangents = (cotangents.astype(dtype)[..., None] * direction[:, None]).astype(hidden.dtype)
    if symmetric:
        others = token_products(right.reshape(examples * tokens, -1), blocks, tokens)
        return hidden_cotangents, summed_products(blocks, products, others, tokens)
    return hidden_cotangents, weighted_gram(products, *sides(right))


def _summed(one: Callable[[jax.Array], tuple[jax.Array, Any]], size: int, pieces: int) -> tuple[jax.Array, Any]:
    """Return the sum of a function over the chunks of the vocabulary."""
    if pieces == 1:
        return one(jnp.int32(0))

    def step(total: tuple[jax.Array, Any], start: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
        return jax.tree.map(jnp.add, total, one(start)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jnp.int32(0)))
    return jax.lax.scan(step, zeros, jnp.arange(pieces) * size)[0]


def _logits(hidden: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum("...td,vd->...tv", hidden, weight, preferred_element_type=dtype)
