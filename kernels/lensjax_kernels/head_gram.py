"""The fused head and cross-entropy for several examples: losses, pull-back, and what the weight's gradients give.

The gradient of one token's loss with respect to the logits is `softmax - one-hot`, so the head's per-example weight
gradient is `left.T @ right` with left = softmax - one-hot, (tokens x vocabulary), and right = cotangent * hidden.
The left factor is made a chunk of the vocabulary at a time from the hidden states and each token's log-normaliser.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lensjax_kernels.gram import (
    CHUNK_BYTES,
    EXACT,
    Reduce,
    accumulator,
    pad_axis,
    reduce_weight_gradients,
    split_columns,
)
from lensjax_kernels.head import IGNORED

LOGIT_BYTES = 2**25
"""Logits that exist at once."""


def head_losses(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each token's cross-entropy and its log-normaliser.

    Parameters
    ----------
    hidden : float array (M, d)
    weight : float array (V, d)
    labels : int array (M,); -100 has no loss

    Returns
    -------
    losses, log_normalizers : float arrays (M,), at least float32.
    """
    dtype = accumulator(hidden, weight)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    size, pieces = split_columns(rows, vocabulary * dtype.itemsize, LOGIT_BYTES)
    hidden, labels = pad_axis(hidden, 0, pieces * size - rows), pad_axis(labels, 0, pieces * size - rows)

    def piece(one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = _logits(one[0], weight, dtype)
        is_label = jax.lax.broadcasted_iota(one[1].dtype, logits.shape, 1) == one[1][:, None]
        of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=1)
        log_normalizer = jax.nn.logsumexp(logits, axis=1)
        return jnp.where(one[1] == IGNORED, 0, log_normalizer - of_label), log_normalizer

    pieces_of = (hidden.reshape(pieces, size, -1), labels.reshape(pieces, size))
    losses, normalizers = piece((hidden, labels)) if pieces == 1 else jax.lax.map(piece, pieces_of)
    return losses.reshape(-1)[:rows], normalizers.reshape(-1)[:rows]


def head_left(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, log_normalizers: jax.Array, start: jax.Array | int = 0
) -> jax.Array:
    """Return softmax minus one-hot for the rows of the weight that are given.

    Parameters
    ----------
    hidden : float array (..., T, d)
    weight : float array (c, d)
        Rows `start` to `start + c` of the head.
    labels : int array (..., T)
    log_normalizers : float array (..., T)
    start : int

    Returns
    -------
    float array (..., T, c); 0 where a token has no loss.
    """
    logits = _logits(hidden, weight, log_normalizers.dtype)
    ids = start + jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    left = jnp.exp(logits - log_normalizers[..., None]) - (ids == labels[..., None])
    return jnp.where(labels[..., None] == IGNORED, 0, left)


def head_left_times(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, log_normalizers: jax.Array, matrix: jax.Array
) -> jax.Array:
    """Return (softmax - one-hot) @ matrix, a chunk of the vocabulary at a time.

    Parameters
    ----------
    hidden, weight, labels, log_normalizers : see `head_pull`
    matrix : float array (V, k)

    Returns
    -------
    float array (B, T, k)
    """
    vocabulary, dtype = weight.shape[0], log_normalizers.dtype
    size, pieces = split_columns(vocabulary, log_normalizers.size * dtype.itemsize, LOGIT_BYTES)
    weight = pad_axis(weight, 0, pieces * size - vocabulary)
    matrix = pad_axis(matrix, 0, pieces * size - vocabulary)

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        rows = jax.lax.dynamic_slice_in_dim(weight, start, size)
        left = head_left(hidden, rows, labels, log_normalizers, start)
        factor = jax.lax.dynamic_slice_in_dim(matrix, start, size).astype(dtype)  # zero where padded
        return total + jnp.einsum("btv,vk->btk", left, factor, precision=EXACT), None

    zero = jnp.zeros((*labels.shape, matrix.shape[1]), dtype)
    return jax.lax.scan(step, zero, jnp.arange(pieces) * size)[0]


def head_pull(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    log_normalizers: jax.Array,
    cotangents: jax.Array,
    reduce: Reduce | None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[jax.Array, jax.Array | None]:
    """Pull cotangents of the losses back to the hidden states, and reduce the weight's per-example gradients.

    Both need softmax - one-hot, which is made once, a chunk of the vocabulary at a time.

    Parameters
    ----------
    hidden : float array (B, T, d)
    weight : float array (V, d)
    labels : int array (B, T)
    log_normalizers : float array (B, T)
    cotangents : float array (B, C, T)
    reduce : callable (B, C, K) -> array, or None where nothing is to be reduced
        See `reduce_weight_gradients`.
    chunk_bytes : int

    Returns
    -------
    float array (B, C, T, d), like `hidden` in dtype; and the sum of what `reduce` gave, or None.
    """
    vocabulary, width = weight.shape
    dtype = log_normalizers.dtype
    right = cotangents.astype(dtype)[..., None] * hidden[:, None].astype(dtype)
    size, pieces = split_columns(vocabulary, labels.size * dtype.itemsize, LOGIT_BYTES)

    def one(start: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = head_left(hidden, rows, labels, log_normalizers, start)
        # Beyond the vocabulary, where the last chunk is padded, the logits are those of a zero row.
        left = jnp.where(start + jnp.arange(size) < vocabulary, left, 0) if pieces * size > vocabulary else left
        direction = jnp.einsum("btv,vd->btd", left, rows.astype(dtype))
        if reduce is None:
            return direction, jnp.zeros((), dtype)
        return direction, reduce_weight_gradients(left, right, reduce, chunk_bytes=chunk_bytes)

    if pieces == 1:
        direction, reduced = one(jnp.int32(0), weight)
    else:
        padded = pad_axis(weight, 0, pieces * size - vocabulary)

        def step(total: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            rows = jax.lax.dynamic_slice_in_dim(padded, start, size)
            return jax.tree.map(jnp.add, total, one(start, rows)), None

        shapes = jax.eval_shape(one, jnp.int32(0), jax.ShapeDtypeStruct((size, width), weight.dtype))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        direction, reduced = jax.lax.scan(step, zeros, jnp.arange(pieces) * size)[0]
    pulled = cotangents.astype(dtype)[..., None] * direction[:, None]
    return pulled.astype(hidden.dtype), None if reduce is None else reduced


def _logits(hidden: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum("...td,vd->...tv", hidden, weight, preferred_element_type=dtype)
