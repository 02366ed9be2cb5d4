"""Contractions of per-example weight gradients that never hold all of these gradients at once.

The gradient of a weight that a layer multiplies with is, for example b and output c, `left[b].T @ right[b, c]`: inputs
times cotangents, summed over the tokens. Almost all uses need a sum over its entries only: inner products between
examples, or squares. So a chunk of columns is computed for all examples, reduced, and freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

CHUNK_BYTES = 2**21
"""Bytes of the per-example gradients that exist at once: 2 to 4 MB were fastest on CPU."""

LEAST_COLUMNS = 32
"""A chunk has at least this many columns, however many examples there are: narrower products are slow."""

EXACT = jax.lax.Precision.HIGHEST
"""Kernels are used for their small differences: no reduced-precision passes on devices that have them."""

HALVED_ROWS = 512
"""From this many rows on a symmetric product is halved: products of fewer are slow, above all on several cores."""

PAIR_BYTES = 2**24
"""Bytes of the products of token pairs that exist at once, if they can be split that far."""

ReduceFunction = Callable[[jax.Array], jax.Array]


def reduce_weight_gradients(
    left: jax.Array, right: jax.Array, reduce: ReduceFunction, *, chunk_bytes: int = CHUNK_BYTES
) -> jax.Array:
    """Sum `reduce` over the columns of all per-example weight gradients `left[b].T @ right[b, c]`.

    Parameters
    ----------
    left : float array (B, T, d)
    right : float array (B, C, T, e)
        C outputs for each example.
    reduce : callable
        From (B, C, K), some K entries of each gradient, to their contribution; contributions are added.
        It must be zero for entries that are zero.
    chunk_bytes : int
        About the memory of the gradients that exist at once, of at least `LEAST_COLUMNS` columns.

    Returns
    -------
    array, as from `reduce`, accumulated in at least float32.
    """
    examples, tokens, d = left.shape
    outputs, e = right.shape[1], right.shape[3]
    dtype = accumulation_dtype(left, right)
    if outputs == 1 and d > e:
        left, right, d, e = right[:, 0], left[:, None], e, d
    size, pieces = split_columns(e, examples * outputs * d * dtype.itemsize, chunk_bytes)
    left = rows_first(left) if outputs == 1 else left

    def one(columns: jax.Array) -> jax.Array:
        form, columns = ("bdt,bte->bde", columns[:, 0]) if outputs == 1 else ("btd,bcte->bced", columns)
        gradient = jnp.einsum(form, left, columns, precision=EXACT, preferred_element_type=dtype)
        return reduce(gradient.reshape(examples, outputs, -1))

    if pieces == 1:
        return one(right)
    right = pad_axis(right, 3, pieces * size - e)

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        return total + one(jax.lax.dynamic_slice_in_dim(right, start, size, axis=3)), None

    shape = jax.eval_shape(one, jax.ShapeDtypeStruct((examples, outputs, tokens, size), right.dtype))
    return jax.lax.scan(step, jnp.zeros(shape.shape, shape.dtype), jnp.arange(pieces) * size)[0]


def reduce_products(
    products: Sequence[tuple[jax.Array, jax.Array]],
    plus: jax.Array | None,
    reduce: ReduceFunction,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> jax.Array:
    """Sum `reduce` over the rows of per-example gradients that are sums of products and of a dense array.

    Parameters
    ----------
    products : pairs of float arrays, (B, T, v) and (B, C, T, e), or (B, C, T, v) and (B, T, e)
        Each adds `left.T @ right`; T may differ.
    plus : float array (B, C, v, e), optional
        Added to these.
    reduce, chunk_bytes : see `reduce_weight_gradients`
    """
    everything = [x for product in products for x in product] + ([] if plus is None else [plus])
    dtype = accumulation_dtype(*everything)
    rows = plus.shape[2] if plus is not None else products[0][0].shape[-1]
    shape = jax.eval_shape(lambda: _gradient(_arranged(products), plus, dtype)).shape
    size, pieces = split_columns(rows, shape[0] * shape[1] * shape[3] * dtype.itemsize, chunk_bytes)
    missing = pieces * size - rows
    products = [(pad_axis(left, _row_axis(left, right), missing), right) for left, right in _arranged(products)]
    plus = None if plus is None else pad_axis(plus, 2, missing)

    def one(start: jax.Array) -> jax.Array:
        def rows_of(x: jax.Array, axis: int) -> jax.Array:
            return x if pieces == 1 else jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)

        part = [(rows_of(left, _row_axis(left, right)), right) for left, right in products]
        gradient = _gradient(part, None if plus is None else rows_of(plus, 2), dtype)
        return reduce(gradient.reshape(*gradient.shape[:2], -1))

    if pieces == 1:
        return one(jnp.int32(0))
    result = jax.eval_shape(one, jnp.int32(0))
    zero = jnp.zeros(result.shape, result.dtype)
    return jax.lax.scan(lambda total, start: (total + one(start), None), zero, jnp.arange(pieces) * size)[0]


def _arranged(products: Sequence[tuple[jax.Array, jax.Array]]) -> list[tuple[jax.Array, jax.Array]]:
    """Return products with the left factor's axes in the fastest order: rows before tokens for one output."""
    return [(rows_first(x) if _row_axis(x, y) == 1 else x, y) for x, y in products]


def _row_axis(left: jax.Array, right: jax.Array) -> int:
    """Return the axis of the rows of a left factor from `_arranged`."""
    return 1 if left.ndim == 3 and right.shape[1] == 1 else left.ndim - 1


def _gradient(products: Sequence[tuple[jax.Array, jax.Array]], plus: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Return the sum (B, C, v, e) of products from `_arranged`."""
    total = plus
    for left, right in products:
        if left.ndim == 4:
            form = "bctv,bte->bcve"
        elif right.shape[1] == 1:  # an axis of 1 in a product costs time on CPU
            form, right = "bvt,bte->bve", right[:, 0]
        else:
            form = "btv,bcte->bcve"
        one = jnp.einsum(form, left, right, precision=EXACT, preferred_element_type=dtype)
        one = one if one.ndim == 4 else one[:, None]
        total = one if total is None else total + one
    assert total is not None
    return total


def rows_first(left: jax.Array) -> jax.Array:
    """Return left factors (..., T, d) as (..., d, T), so that a product with (..., T, e) is one of plain matrices.

    On CPU that is 1.2 to 2.6 times as fast as contracting the first axes of both, with the copy, but not with several
    outputs among the columns. XLA would undo it without the barrier.
    """
    return jax.lax.optimization_barrier(jnp.swapaxes(left, -1, -2))


def split_columns(columns: int, bytes_per_column: int, chunk_bytes: int) -> tuple[int, int]:
    """Return (columns of a chunk, chunks) so that a chunk takes about `chunk_bytes`.

    The size of a chunk is a multiple of 8, and a divisor of the number of columns if there is one nearby.
    """
    pieces = max(1, math.ceil(columns * bytes_per_column / chunk_bytes))
    if pieces == 1:
        return columns, 1
    size = max(LEAST_COLUMNS, math.ceil(columns / pieces))
    size = min(columns, -(-size // 8) * 8)
    for near in range(size * 5 // 4 // 8 * 8, size * 3 // 5, -8):
        if columns % near == 0:
            return near, columns // near
    return size, -(-columns // size)


def pad_axis(x: jax.Array, axis: int, missing: int) -> jax.Array:
    """Return `x` with `missing` zeros after its end along `axis`."""
    return x if missing == 0 else jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Return the dtype to accumulate in: that of the arrays, at least float32."""
    return jnp.dtype(jnp.result_type(jnp.float32, *(a.dtype for a in arrays)))


def symmetric_blocks(examples: int) -> list[tuple[slice, slice]]:
    """Return (rows, columns) of blocks that cover one side of a matrix and its diagonal: three quarters of it.

    A second halving would save another eighth, and lose it again because its products are smaller.

    Parameters
    ----------
    examples : int
        Rows of the matrix.
    """
    middle = (examples + 1) // 2
    first, second = slice(0, middle), slice(middle, examples)
    return [(first, second), (first, first), (second, second)] if examples > 1 else [(first, first)]


def assemble_symmetric(blocks: Sequence[tuple[slice, slice]], parts: Sequence[jax.Array]) -> jax.Array:
    """Return the symmetric matrix whose `symmetric_blocks` are given."""
    size = max(columns.stop for _, columns in blocks)
    whole = jnp.zeros((size, size), parts[0].dtype)
    for (rows, columns), part in zip(blocks, parts, strict=True):
        whole = whole.at[rows, columns].set(part)
        if rows != columns:
            whole = whole.at[columns, rows].set(part.T)
    return whole


def gram_matrix(x: jax.Array) -> jax.Array:
    """Return `x @ x.T` for x (N, K), in at least float32; where N is large, mostly on one side of the diagonal."""
    whole = [(slice(0, len(x)), slice(0, len(x)))]
    blocks, dtype = symmetric_blocks(len(x)) if len(x) >= HALVED_ROWS else whole, accumulation_dtype(x)
    parts = [jnp.matmul(x[r], x[c].T, precision=EXACT, preferred_element_type=dtype) for r, c in blocks]
    return parts[0] if len(parts) == 1 else assemble_symmetric(blocks, parts)


def token_gram(left1: jax.Array, right1: jax.Array, left2: jax.Array, right2: jax.Array) -> jax.Array:
    """Return inner products of per-example weight gradients, contracted over pairs of tokens.

    Entry (i, c, j, k) is `<left1[i].T @ right1[i, c], left2[j].T @ right2[j, k]>`, computed as the sum over token
    pairs of `(left1 left2^T) * (right1 right2^T)`: no gradient is computed, and only the pairs of some rows'
    tokens exist at a time. It is faster where examples times tokens is far below the widths; else see
    `reduce_weight_gradients`.

    Parameters
    ----------
    left1, left2 : float arrays (N, T, d), (M, S, d)
    right1, right2 : float arrays (N, C, T, e), (M, C', S, e)

    Returns
    -------
    float array (N, C, M, C'), at least float32.
    """
    dtype = accumulation_dtype(left1, right1, left2, right2)

    def row(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs = jnp.einsum("td,msd->tms", one[0], left2, precision=EXACT, preferred_element_type=dtype)
        return _weighted(inputs, one[1], right2, dtype)

    return _map_rows(row, (left1, right1), right1, right2)


def symmetric_token_gram(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return `token_gram(left, right, left, right)`, most of it on one side of the diagonal only.

    Parameters
    ----------
    left : float array (N, T, d)
    right : float array (N, C, T, e)

    Returns
    -------
    float array (N, C, N, C), at least float32.
    """
    (examples, tokens, _), outputs, dtype = left.shape, right.shape[1], accumulation_dtype(left, right)
    if outputs > 1 or (examples * tokens) ** 2 * dtype.itemsize > PAIR_BYTES:
        return token_gram(left, right, left, right)
    # Slices of matrices, because slices of arrays with more axes are copied and transposed for every product.
    flat = (left.reshape(examples * tokens, -1), right.reshape(examples * tokens, -1))
    blocks = symmetric_blocks(examples)
    weights, products = (token_products(x, blocks, tokens) for x in flat)
    return summed_products(blocks, weights, products, tokens)


def token_products(x: jax.Array, blocks: Sequence[tuple[slice, slice]], tokens: int) -> list[jax.Array]:
    """Return the blocks of `x @ x.T` for x (N * T, d); blocks count examples, of T tokens each."""
    dtype, parts = accumulation_dtype(x), []
    for rows, columns in blocks:
        ours, theirs = (x[s.start * tokens : s.stop * tokens] for s in (rows, columns))
        parts.append(jnp.matmul(ours, theirs.T, precision=EXACT, preferred_element_type=dtype))
    return parts


def summed_products(
    blocks: Sequence[tuple[slice, slice]],
    weights: Sequence[jax.Array],
    products: Sequence[jax.Array],
    tokens: int,
) -> jax.Array:
    """Return the sums (N, 1, N, 1) over token pairs of two matrices' products, both given by blocks."""
    parts = []
    for (rows, columns), one, other in zip(blocks, weights, products, strict=True):
        shape = (rows.stop - rows.start, tokens, columns.stop - columns.start, tokens)
        parts.append(jnp.sum((one * other).reshape(shape), axis=(1, 3)))
    return assemble_symmetric(blocks, parts)[:, None, :, None]


def row_gram(ids1: jax.Array, right1: jax.Array, ids2: jax.Array, right2: jax.Array) -> jax.Array:
    """Return inner products of per-example gradients of a table whose rows were looked up.

    In the gradient of example i, output c, `right1[i, c, t]` is added to row `ids1[i, t]` for each t, so that two
    tokens have an inner product where their ids are equal.

    Parameters
    ----------
    ids1, ids2 : int arrays (N, T), (M, S)
    right1, right2 : float arrays (N, C, T, e), (M, C', S, e)

    Returns
    -------
    float array (N, C, M, C'), at least float32.
    """
    dtype = accumulation_dtype(right1, right2)

    def row(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        equal = (one[0][:, None, None] == ids2).astype(dtype)
        return _weighted(equal, one[1], right2, dtype)

    return _map_rows(row, (ids1, right1), right1, right2)


def crossed_gram(entries: Callable[[jax.Array], jax.Array], right1: jax.Array, right2: jax.Array) -> jax.Array:
    """Return inner products of a dense per-example gradient with one of looked-up rows of the same table.

    Parameters
    ----------
    entries : callable i -> float array (T, M, S)
        `left[i, t, id]`, the left factor of example i's dense gradient at the rows looked up by (M, S).
    right1 : float array (N, C, T, e)
        Right factor of the dense gradients.
    right2 : float array (M, C', S, e)
        Added to the looked-up rows.

    Returns
    -------
    float array (N, C, M, C'), at least float32.
    """
    dtype = accumulation_dtype(right1, right2)

    def row(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _weighted(entries(one[0]).astype(dtype), one[1], right2, dtype)

    return _map_rows(row, (jnp.arange(right1.shape[0]), right1), right1, right2)


def weighted_gram(weights: jax.Array, right1: jax.Array, right2: jax.Array) -> jax.Array:
    """Return the sums over token pairs of weights (N, T, M, S) times products of right1 and right2.

    Parameters
    ----------
    weights : float array (N, T, M, S)
        Products of the left factors.
    right1, right2 : float arrays (N, C, T, e), (M, C', S, e)

    Returns
    -------
    float array (N, C, M, C'), at least float32.
    """
    dtype = accumulation_dtype(weights, right1, right2)
    return _map_rows(lambda one: _weighted(one[0], one[1], right2, dtype), (weights, right1), right1, right2)


def _map_rows(row: Callable[..., jax.Array], each: Any, right1: jax.Array, right2: jax.Array) -> jax.Array:
    """Map over examples, as many at once as `PAIR_BYTES` allows: few large products are faster than many small ones."""
    (examples, outputs, tokens, _), others = right1.shape, right2.shape[:3]
    one = outputs * tokens * math.prod(others) * accumulation_dtype(right1, right2).itemsize
    together = max(1, PAIR_BYTES // max(1, one))
    return jax.vmap(row)(each) if together >= examples else jax.lax.map(row, each, batch_size=together)


def _weighted(weights: jax.Array, right1: jax.Array, right2: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sum weights (T, M, S) times <right1 (C, T, e), right2 (M, C', S, e)> over tokens: (C, M, C')."""
    if right1.shape[0] == right2.shape[1] == 1:
        products = jnp.einsum("te,mse->tms", right1[0], right2[:, 0], precision=EXACT, preferred_element_type=dtype)
        return jnp.sum(products * weights, axis=(0, 2))[None, :, None]
    products = jnp.einsum("cte,mkse->ctmks", right1, right2, precision=EXACT, preferred_element_type=dtype)
    return jnp.einsum("ctmks,tms->cmk", products, weights, precision=EXACT)


def add_rows(into: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Add rows (B, C, T, e) to `into` (B, C, V, e) at ids (B, T); ids outside [0, V) are ignored."""
    height = into.shape[2]
    ids = jnp.where((ids >= 0) & (ids < height), ids, height)  # a negative index would count from the end

    def one(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        return table.at[:, ids].add(rows, mode="drop")

    return jax.vmap(one)(into, ids, rows.astype(into.dtype))
