"""The contribution of one parameter to a kernel, to norms or to a sketch, from the factors of its gradient.

Axes: B examples, C outputs, T tokens (everything a weight is applied to), H batch axes of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from lensjax_kernels.cross_entropy_gram import (
    LOGIT_BYTES,
    cross_entropy_vjp,
    cross_entropy_vjp_token_gram,
    rows_at,
    softmax_minus_onehot,
)
from lensjax_kernels.gram import (
    EXACT,
    accumulation_dtype,
    add_rows,
    pad_axis,
    reduce_products,
    reduce_weight_gradients,
    row_gram,
    split_columns,
    symmetric_token_gram,
    token_gram,
)

from lensjax.tangents.program.operations import FactorLayout
from lensjax.tangents.program.reductions import GramReduction, Reduction, TensorSketch

TOKEN_PAIRS_COST = {"symmetric": 0.8, "plain": 1.0, "outputs": 2.0}
"""Cost of a product over token pairs, in units of a product that makes per-example gradients (CPU)."""

GRAM_OVERHEAD = 32
"""Products of few gradients with each other are slow: as slow as with this many rows more (CPU)."""

LARGEST_PAIRS = 2**26
"""Limit of the memory for the fused head's products of token pairs, in bytes."""

OUTER_BYTES = 2**25
"""Bytes of the rows that looked-up cotangents are added to at once, of the factors of products there, and of sketched
factors."""

PATCH_BYTES = 2**28
"""Bytes of the patches of a convolution's inputs at once; beyond it, gradients are made some examples at a time."""

SCATTERED, MULTIPLIED, TRANSFORMED = 0.7, 0.01, 2.5
"""Cost of a sketch in nanoseconds (CPU): of adding an entry to a feature, of multiplying for an entry and a token, and
of the Fourier transform for a feature and a token."""

RowsOf = Callable[[jax.Array, int], jax.Array]


def token_pairs(reduction: GramReduction, tokens: int, outputs: int) -> float:
    """Return the number of token pairs of a kernel, weighted by the cost of products over them."""
    kind = "outputs" if outputs > 1 else "symmetric" if reduction.columns is None else "plain"
    return reduction.rows * (reduction.columns or reduction.rows) * tokens**2 * TOKEN_PAIRS_COST[kind]


def gradient_pairs(reduction: GramReduction, outputs: int) -> float:
    """Return the number of pairs of gradients of a kernel, weighted by the cost of their products."""
    return (reduction.rows * outputs + GRAM_OVERHEAD) * (reduction.columns or reduction.rows) * outputs


def materialized_contribution(cotangents: jax.Array, reduction: Reduction, key: jax.Array | None) -> jax.Array:
    """Return the contribution of a parameter whose per-example gradients (B, C, ...) exist."""
    flat = cotangents.reshape(*cotangents.shape[:2], -1)
    if isinstance(reduction, TensorSketch):
        assert key is not None
        return reduction.sketch(flat, key)
    return reduction(flat)


def dot_contribution(
    layout: FactorLayout, x: jax.Array, cotangents: jax.Array, reduction: Reduction, key: jax.Array | None
) -> jax.Array:
    """Return the contribution of a product's parameter; `x` (B, ...) the other operand, `cotangents` (B, C, ...)."""
    left = layout.inputs(x)
    right = jax.vmap(layout.cotangents, 1, 1)(cotangents)
    if left.shape[1] == 1:
        return factor_contribution(left[:, 0], right[:, :, 0], layout.inputs_first, reduction, key)

    def step(total: jax.Array, one: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        own = None if key is None else jax.random.fold_in(key, one[2])
        return total + factor_contribution(one[0], one[1], layout.inputs_first, reduction, own), None

    zero = jnp.zeros(reduction.shape(right.shape[1]), accumulation_dtype(left, right))
    heads = (jnp.moveaxis(left, 1, 0), jnp.moveaxis(right, 2, 0), jnp.arange(left.shape[1]))
    return jax.lax.scan(step, zero, heads)[0]


def convolution_contribution(
    layout: FactorLayout, x: jax.Array, cotangents: jax.Array, reduction: Reduction, key: jax.Array | None
) -> jax.Array:
    """Return the contribution of a convolution's kernel; `x` (B, ...) its input, `cotangents` (B, C, ...)."""
    groups = layout.use.operation.params["feature_group_count"]
    left = jax.eval_shape(layout.inputs, x)
    if groups == 1 and (isinstance(reduction, TensorSketch) or left.size * left.dtype.itemsize <= PATCH_BYTES):
        right = jax.vmap(layout.cotangents, 1, 1)(cotangents)
        return factor_contribution(layout.inputs(x)[:, 0], right[:, :, 0], layout.inputs_first, reduction, key)

    def gradient(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        own, ct = layout.inputs(one[0][None])[0], layout.cotangents(one[1])
        dtype = accumulation_dtype(own, ct)
        return jnp.einsum("gtd,cgte->cgde", own, ct, precision=EXACT, preferred_element_type=dtype)

    together = max(1, PATCH_BYTES * len(x) // (left.size * left.dtype.itemsize))
    return materialized_contribution(
        jax.lax.map(gradient, (x, cotangents), batch_size=min(together, len(x))), reduction, key
    )


def factor_contribution(
    left: jax.Array, right: jax.Array, inputs_first: bool, reduction: Reduction, key: jax.Array | None
) -> jax.Array:
    """Return the contribution of gradients `left[b].T @ right[b, c]`, or of their transposes."""
    (examples, tokens, d), (_, outputs, _, e) = left.shape, right.shape
    if isinstance(reduction, TensorSketch):
        assert key is not None
        if not inputs_first:
            return sketch_contribution(right, left[:, None], reduction, key)
        return sketch_contribution(left[:, None], right, reduction, key)
    if isinstance(reduction, GramReduction):
        if tokens == 1:
            return _single_token_contribution(left[:, 0], right[:, :, 0], reduction)
        direct = token_pairs(reduction, tokens, outputs) * (d + outputs**2 * e)
        if direct < examples * outputs * tokens * d * e + gradient_pairs(reduction, outputs) * d * e:
            if reduction.columns is None:
                return reduction.arrange(symmetric_token_gram(left, right))
            (left1, left2), (right1, right2) = reduction.sides(left), reduction.sides(right)
            return reduction.arrange(token_gram(left1, right1, left2, right2))
    return reduce_weight_gradients(left, right, reduction)


def _single_token_contribution(left: jax.Array, right: jax.Array, reduction: GramReduction) -> jax.Array:
    (left1, left2), (right1, right2) = reduction.sides(left), reduction.sides(right)
    dtype = accumulation_dtype(left, right)
    inputs = jnp.einsum("nd,md->nm", left1, left2, precision=EXACT, preferred_element_type=dtype)
    if reduction.crossed:
        outputs = jnp.einsum("nce,mke->ncmk", right1, right2, precision=EXACT, preferred_element_type=dtype)
        return inputs[:, None, :, None] * outputs
    return inputs * jnp.einsum("nce,mce->cnm", right1, right2, precision=EXACT, preferred_element_type=dtype)


def lookup_contribution(
    ids: jax.Array, right: jax.Array, height: int, shared: bool, reduction: Reduction, key: jax.Array | None
) -> jax.Array:
    """Return the contribution of a table whose rows `ids` (B, T) were looked up, with cotangents `right` (B, C, T, e).

    `shared`: the ids are the same for all examples.
    """
    (examples, tokens), (_, outputs, _, width) = ids.shape, right.shape
    if isinstance(reduction, TensorSketch):
        assert key is not None
        bucket, signs = reduction.hash_entries(key, height, "left", right.dtype)
        columns, column_signs = reduction.hash_entries(key, width, "right", right.dtype)
        signs = jnp.where(ids < 0, 0, signs[ids])
        right = right * signs[:, None, :, None] * column_signs
        return _one_by_one(lambda b, c: _added(right[b, c], bucket[ids[b]], columns, reduction), examples, outputs)
    if shared and tokens < height:
        unique, places = jnp.unique(ids[0], return_inverse=True, size=tokens)
        places = jnp.where(ids[0] < 0, -1, places.reshape(-1))
        ids, height = jnp.broadcast_to(places, ids.shape), unique.shape[0]
    elif isinstance(reduction, GramReduction):
        direct = token_pairs(reduction, tokens, outputs) * outputs**2 * width
        if direct < height * (examples * outputs * width + gradient_pairs(reduction, outputs) * width):
            # Tokens with an id of -1 look nothing up, and so add no gradient.
            right = jnp.where((ids < 0)[:, None, :, None], 0, right)
            (ids1, ids2), (right1, right2) = reduction.sides(ids), reduction.sides(right)
            return reduction.arrange(row_gram(ids1, right1, ids2, right2))
    return row_chunk_contribution([], (ids, right), height, reduction)


def row_chunk_contribution(
    products: Sequence[tuple[RowsOf, jax.Array]],
    table: tuple[jax.Array, jax.Array] | None,
    height: int,
    reduction: Reduction,
) -> jax.Array:
    """Return the contribution of gradients that are sums of products and of added rows, some rows at a time.

    Parameters
    ----------
    products : pairs of a function (start, size) -> left factor (B, T, size) or (B, C, T, size), and a right factor
        See `reduce_products`; beyond the last row the left factor must be zero.
    table : ids (B, T), -1 for none, and the rows (B, C, T, e) that are added there
    height : number of rows
    reduction : Reduction
    """
    examples = reduction.examples
    if table is not None:
        outputs, width, dtype = table[1].shape[1], table[1].shape[3], accumulation_dtype(table[1])
        bytes_per_row = examples * outputs * width * dtype.itemsize
    else:
        bytes_per_row = max(right.size // right.shape[-1] * right.dtype.itemsize for _, right in products)
    size, pieces = split_columns(height, bytes_per_row, OUTER_BYTES)

    def one(start: jax.Array) -> jax.Array:
        plus = None
        if table is not None:
            empty = jnp.zeros((examples, outputs, size, width), dtype)
            plus = add_rows(empty, jnp.where(table[0] < 0, -1, table[0] - start), table[1])
        return reduce_products([(left(start, size), right) for left, right in products], plus, reduction)

    if pieces == 1:
        return one(jnp.int32(0))
    shape = jax.eval_shape(one, jnp.int32(0))
    zero = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.scan(lambda total, start: (total + one(start), None), zero, jnp.arange(pieces) * size)[0]


def head_contribution(
    saved: tuple[jax.Array, ...],
    weight: jax.Array,
    cotangents: jax.Array,
    reduction: Reduction | None,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the cotangents (B, C, T, d) of the hidden states and the contribution of the head's weight."""
    hidden, labels, normalizers, logits = saved
    if isinstance(reduction, GramReduction):
        (examples, tokens), (vocabulary, width), outputs = labels.shape, weight.shape, cotangents.shape[1]
        pairs = reduction.rows * (reduction.columns or reduction.rows)
        # However many outputs there are, the large products are those of the left factors alone.
        direct = token_pairs(reduction, tokens, 1) * (vocabulary + outputs**2 * width)
        dense = vocabulary * width * (outputs * examples * tokens + gradient_pairs(reduction, outputs))
        if direct < dense and pairs * tokens**2 * normalizers.dtype.itemsize <= LARGEST_PAIRS:
            rows = None if reduction.columns is None else reduction.rows
            hidden_cotangents, blocks = cross_entropy_vjp_token_gram(
                hidden, weight, labels, normalizers, logits, cotangents, rows
            )
            return hidden_cotangents, reduction.arrange(blocks)
    if not isinstance(reduction, TensorSketch):
        return cross_entropy_vjp(hidden, weight, labels, normalizers, logits, cotangents, reduction)
    assert key is not None
    dtype, (vocabulary, width) = normalizers.dtype, weight.shape
    bucket, signs = reduction.hash_entries(key, vocabulary, "left", dtype)
    columns, column_signs = reduction.hash_entries(key, width, "right", dtype)
    scaled = cotangents.astype(dtype)[..., None]
    right = scaled * (hidden.astype(dtype) * column_signs)[:, None]
    # Besides the logits' gradients, a chunk of the vocabulary needs the same rows of one example's weight gradient.
    bytes_per_row = max(normalizers.size, 2 * width) * dtype.itemsize
    size, pieces = split_columns(vocabulary, bytes_per_row, LOGIT_BYTES)

    def step(total: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        left = softmax_minus_onehot(hidden, weight, labels, normalizers, logits, start=start, size=size)
        rows = rows_at(weight, start, size).astype(dtype)
        direction = jnp.einsum("btv,vd->btd", left, rows, precision=EXACT)
        own, places = left * rows_at(signs, start, size), rows_at(bucket, start, size)
        contribution = _by_products(own[:, None], right, places, columns, reduction)
        return (total[0] + direction, total[1] + contribution), None

    zero = (jnp.zeros((*labels.shape, width), dtype), jnp.zeros(reduction.shape(cotangents.shape[1]), dtype))
    direction, contribution = jax.lax.scan(step, zero, jnp.arange(pieces) * size)[0]
    return (scaled * direction[:, None]).astype(hidden.dtype), contribution


def sketch_contribution(left: jax.Array, right: jax.Array, reduction: TensorSketch, key: jax.Array) -> jax.Array:
    """Return features (C, B, width) of `left[b, c].T @ right[b, c]`, factors (B, C or 1, T, d) and (B, C or 1, T, e).

    Few tokens: the sketch of an outer product is the circular convolution of both factors' sketches (Pham & Pagh
    2013, "Fast and scalable polynomial kernels via explicit feature maps"). Many: one example's product at a time is
    made and its entries added where the convolution would put them, which is the same.
    """
    (examples, _, tokens, d), e, dtype = left.shape, right.shape[3], accumulation_dtype(left, right)
    outputs = max(left.shape[1], right.shape[1])
    rows, row_signs = reduction.hash_entries(key, d, "left", dtype)
    columns, column_signs = reduction.hash_entries(key, e, "right", dtype)
    left, right = left * row_signs, right * column_signs
    by_products = outputs * d * e * (SCATTERED + tokens * MULTIPLIED)
    if by_products < tokens * (1 + outputs) * reduction.width * TRANSFORMED:
        return _by_products(left, right, rows, columns, reduction)

    def convolved(factors: tuple[jax.Array, jax.Array]) -> jax.Array:
        scatter_entries = (
            reduction.scatter_entries(x, places) for x, places in zip(factors, (rows, columns), strict=True)
        )
        first, second = (jnp.fft.rfft(x) for x in scatter_entries)
        return jnp.fft.irfft((first * second).sum(2), n=reduction.width)

    size = OUTER_BYTES // (tokens * (1 + outputs) * reduction.width * dtype.itemsize)
    size = min(max(size, 1), examples)
    pieces = -(-examples // size)
    factors = (pad_axis(x, 0, pieces * size - examples) for x in (left, right))
    left, right = (x.reshape(pieces, size, *x.shape[1:]) for x in factors)
    features = jax.lax.map(convolved, (left, right)) if pieces > 1 else convolved((left[0], right[0]))
    return jnp.swapaxes(features.reshape(pieces * size, outputs, -1)[:examples], 0, 1)


def _by_products(
    left: jax.Array, right: jax.Array, rows: jax.Array, columns: jax.Array, reduction: TensorSketch
) -> jax.Array:
    """Return features of signed factors from their products, one at a time."""

    def one(b: jax.Array, c: jax.Array) -> jax.Array:
        # A factor that is the same for all outputs has an axis of 1, to which indices are clamped.
        own, others = (x[b, jnp.minimum(c, x.shape[1] - 1)] for x in (left, right))
        product = jnp.einsum(
            "td,te->de", own, others, precision=EXACT, preferred_element_type=accumulation_dtype(own, others)
        )
        return _added(product, rows, columns, reduction)

    return _one_by_one(one, left.shape[0], max(left.shape[1], right.shape[1]))


def _added(entries: jax.Array, rows: jax.Array, columns: jax.Array, reduction: TensorSketch) -> jax.Array:
    """Return the sums of signed entries (n, e) over the features that their rows and columns hash to."""
    places = (rows[:, None] + columns) % reduction.width
    return jnp.zeros(reduction.width, accumulation_dtype(entries)).at[places.reshape(-1)].add(entries.reshape(-1))


def _one_by_one(one: Callable[[jax.Array, jax.Array], jax.Array], examples: int, outputs: int) -> jax.Array:
    """Return `one(example, output)` for all, (C, B, width)."""
    pairs = jnp.arange(outputs * examples)
    features = jax.lax.map(lambda n: one(n % examples, n // examples), pairs)
    return features.reshape(outputs, examples, -1)
