"""Language-model head fused with the cross-entropy, so that the logits of all tokens never exist at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

IGNORED = -100
"""The label of a position that has no loss, as in Hugging Face."""

CHUNK_ROWS = 512
"""Default limit of the rows of a chunk: with fewer, adding the weight's (V, d) gradients costs more than the logits."""

CHUNK_ELEMENTS = 2**25
"""Default limit of the logits that exist at once: 128 MB in float32."""


@functools.partial(jax.jit, static_argnames="chunk")
def head_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """Cross-entropy of `hidden @ weight.T + bias` against `labels`, one loss for each row.

    The logits of one chunk of rows at a time are computed, reduced to losses and freed; the backward pass computes them
    again. Differentiable in forward mode, reverse mode and both nested, and under `jax.vmap`. Compiled as one call of
    this name, by which `lensjax.tangents` recognises it.

    Parameters
    ----------
    hidden : float array (M, d)
        Inputs of the head.
    weight : float array (V, d)
        One row for each entry of the vocabulary, as in an embedding table.
    labels : int array (M,)
        In [0, V), or -100 where the row has no loss.
    bias : float array (V,), optional
        Added to the logits.
    chunk : int, optional
        Rows whose logits exist at once. Default: `CHUNK_ROWS`, fewer where that exceeds `CHUNK_ELEMENTS` logits.
        The rows are split evenly, so fewer may be taken. Under `jax.vmap` this is a chunk of each mapped row set.

    Returns
    -------
    float array (M,)
        Losses in nats, at least float32; exactly 0 where the label is -100.

    Raises
    ------
    ValueError
        If `chunk` is not positive.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    if chunk is None:
        chunk = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}.")
    pieces = -(-rows // chunk)
    if pieces <= 1:
        return _losses(hidden, weight, labels, bias)
    size = -(-rows // pieces)
    bias = None if bias is None else bias.astype(jnp.promote_types(jnp.float32, bias.dtype))
    missing = pieces * size - rows
    if missing:
        hidden = jnp.pad(hidden, ((0, missing), (0, 0)))
        labels = jnp.pad(labels, (0, missing), constant_values=IGNORED)

    # Cast outside the scan and back inside: the gradients of the weight are then added in float32.
    dtype = weight.dtype
    wide = weight.astype(jnp.promote_types(jnp.float32, dtype))

    @jax.checkpoint
    def piece(carry: None, rows_of_piece: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return carry, _losses(rows_of_piece[0], wide.astype(dtype), rows_of_piece[1], bias)

    pieces_of = (hidden.reshape(pieces, size, -1), labels.reshape(pieces, size))
    return jax.lax.scan(piece, None, pieces_of)[1].reshape(-1)[:rows]


def _losses(hidden: jax.Array, weight: jax.Array, labels: jax.Array, bias: jax.Array | None) -> jax.Array:
    accumulation_dtype = jnp.promote_types(jnp.float32, hidden.dtype)
    logits = jax.lax.dot_general(hidden, weight, (((1,), (1,)), ((), ())), preferred_element_type=accumulation_dtype)
    if bias is not None:
        logits = logits + bias.astype(accumulation_dtype)
    # A comparison, not a gather: its transpose is elementwise too, and the head weight is used only once.
    is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=1)
    return jnp.where(labels == IGNORED, 0, jax.nn.logsumexp(logits, axis=1) - of_label)


def next_token_labels(labels: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Return the labels (N, T - 1) of the positions 0..T-2 of a causal language model.

    Position t predicts `labels[:, t + 1]`; -100 where that label is -100 or where either position is padding,
    for padding predicts nothing: without this, padding on the left would add a loss for the first token.
    """
    real = attention_mask != 0
    return jnp.where(real[:, 1:] & real[:, :-1], labels[:, 1:], IGNORED)
