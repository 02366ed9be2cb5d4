"""The contribution of a parameter with several uses, whose per-example gradient is the sum over them.

The factors of products are concatenated along their tokens. Where rows are looked up as well (an embedding tied to the
head) there are two methods: cross terms over token pairs, which never make a gradient; or the summed gradient, some
rows at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from lensjax_kernels.cross_entropy import IGNORED
from lensjax_kernels.cross_entropy_gram import softmax_minus_onehot
from lensjax_kernels.gram import crossed_gram

from lensjax.tangents.program.contributions import (
    RowsOf,
    factor_contribution,
    lookup_contribution,
    row_chunk_contribution,
)
from lensjax.tangents.program.operations import FactorLayout, ParameterUse
from lensjax.tangents.program.reductions import GramReduction, Reduction


@dataclasses.dataclass(frozen=True)
class _Dense:
    left: jax.Array  # (B, T, d)
    right: jax.Array  # (B, C, T, e)
    inputs_first: bool

    def rows(self, start: jax.Array, size: int) -> jax.Array:
        factor = self._by_row()[0]
        width = factor.shape[-1]
        chunk = jax.lax.dynamic_slice_in_dim(factor, jnp.minimum(start, width - size), size, axis=factor.ndim - 1)
        chunk = jnp.roll(chunk, jnp.minimum(width - size - start, 0), axis=factor.ndim - 1)
        return jnp.where(start + jnp.arange(size) < width, chunk, 0)

    def columns(self) -> jax.Array:
        return self._by_row()[1]

    def _by_row(self) -> tuple[jax.Array, jax.Array]:
        if self.right.shape[1] == 1:
            return self.by_row()
        return (self.left, self.right) if self.inputs_first else (self.right, self.left)

    def by_row(self) -> tuple[jax.Array, jax.Array]:
        """Return factors (B, T, rows) and (B, 1, T, columns), for one output."""
        return (self.left, self.right) if self.inputs_first else (self.right[:, 0], self.left[:, None])


@dataclasses.dataclass(frozen=True)
class _Head:
    hidden: jax.Array  # (B, T, d)
    labels: jax.Array  # (B, T)
    normalizers: jax.Array  # (B, T)
    logits: jax.Array | None  # (B, T, V)
    cotangents: jax.Array  # (B, C, T)

    def rows(self, weight: jax.Array | None) -> RowsOf:
        assert weight is not None

        def left(start: jax.Array, size: int) -> jax.Array:
            # `row_chunk_contribution` needs the row at `start` first, and zeros after the last row.
            own = min(size, weight.shape[0])
            factor = softmax_minus_onehot(
                self.hidden, weight, self.labels, self.normalizers, self.logits, start=start, size=own
            )
            return jnp.roll(factor, jnp.minimum(weight.shape[0] - own - start, 0), axis=2)

        return left

    def columns(self) -> jax.Array:
        return self.cotangents[..., None] * self.hidden[:, None].astype(self.cotangents.dtype)


def use_token_pairs(
    uses: Sequence[ParameterUse], in_loops: bool, tokens: Sequence[int], outputs: int, reduction: Reduction
) -> bool:
    """Whether a parameter's cross terms are computed over token pairs; a head then contributes in the backward pass.

    Parameters
    ----------
    uses : of the parameter
    in_loops : whether any is in a loop
    tokens : of each use, for one example
    outputs : of each example
    reduction : Reduction
    """
    kinds = [use.kind for use in uses]
    dense = len(kinds) - kinds.count("rows")
    if not isinstance(reduction, GramReduction) or "rows" not in kinds or dense == 0:
        return False
    if "head" in kinds and (dense > 1 or in_loops):
        return False
    if ("dot" in kinds or "conv" in kinds) and outputs > 1:
        return False
    looked_up = sum(n for n, kind in zip(tokens, kinds, strict=True) if kind == "rows")
    others = sum(tokens) - looked_up
    pairs = reduction.rows * (reduction.columns or reduction.rows)
    # Operations on token pairs also read and write them all; the other method computes the head's left factor again.
    crossed = others if reduction.columns is None else 2 * others
    direct = 2 * pairs * looked_up * (looked_up + crossed) * outputs**2
    return direct < uses[0].shape[0] * reduction.examples * others


def shared_contribution(
    layouts: Sequence[FactorLayout],
    saved: Sequence[tuple[jax.Array, ...]],
    cotangents: Sequence[jax.Array],
    weight: jax.Array | None,
    reduction: Reduction,
    direct: bool,
) -> jax.Array:
    """Return the contribution of a parameter that is used more than once.

    Parameters
    ----------
    layouts : one for each use
    saved : for each use, what its forward pass saved, with the iterations of the loops around it as axis 1: (B, L, ...)
    cotangents : for each use, those of its output, (B, C, L, ...)
    weight : the parameter, where a head is among the uses
    reduction : Reduction
    direct : the answer of `use_token_pairs`; a head's own contribution is then left out here
    """
    dots: list[_Dense] = []
    heads: list[_Head] = []
    ids: list[jax.Array] = []
    added: list[jax.Array] = []
    for layout, residual, ct in zip(layouts, saved, cotangents, strict=True):
        right = _merge(jax.vmap(jax.vmap(layout.cotangents, 1, 1), 2, 2)(ct), layout)
        if layout.use.kind in ("dot", "conv"):
            left = jax.vmap(layout.inputs, 1, 1)(residual[0])[:, :, 0]
            left = left.reshape(left.shape[0], -1, left.shape[-1])
            dots.append(_Dense(left, right, layout.inputs_first))
        elif layout.use.kind == "rows":
            looked = jax.vmap(layout.ids, 1, 1)(residual[0])
            ids.append(looked.reshape(looked.shape[0], -1))
            added.append(right)
        else:
            hidden, labels, normalizers, logits = residual
            merged = (labels.shape[0], -1)
            hidden = hidden.reshape(*merged, hidden.shape[-1])
            logits = None if logits is None else logits.reshape(*merged, logits.shape[-1])
            heads.append(_Head(hidden, labels.reshape(merged), normalizers.reshape(merged), logits, right))
    outputs = cotangents[0].shape[1]
    orientations = {part.inputs_first for part in dots}
    if dots and not ids and not heads and (outputs == 1 or len(orientations) == 1):
        return _concatenated_contribution(dots, outputs, reduction)
    table = (jnp.concatenate(ids, 1), jnp.concatenate(added, 2)) if ids else None
    height = layouts[0].height()
    if table is not None and not dots and not heads:
        return lookup_contribution(*table, height, False, reduction, None)
    if direct:
        assert table is not None
        assert isinstance(reduction, GramReduction)
        return _token_pair_contribution(dots, heads, *table, height, weight, reduction)
    products: list[tuple[RowsOf, jax.Array]] = [(part.rows, part.columns()) for part in dots]
    products += [(head.rows(weight), head.columns()) for head in heads]
    return row_chunk_contribution(products, table, height, reduction)


def _merge(right: jax.Array, layout: FactorLayout) -> jax.Array:
    """Join loops and tokens of cotangent factors: (B, C, L, [H = 1], T, ...) -> (B, C, L * T, ...)."""
    if layout.use.kind in ("dot", "conv"):
        right = right[:, :, :, 0]
    return right.reshape(*right.shape[:2], -1, *right.shape[4:])


def _concatenated_contribution(dots: Sequence[_Dense], outputs: int, reduction: Reduction) -> jax.Array:
    if outputs == 1:
        factors = [part.by_row() for part in dots]
        first = True
    else:
        factors = [(part.left, part.right) for part in dots]
        first = dots[0].inputs_first
    left = jnp.concatenate([a for a, _ in factors], 1)
    right = jnp.concatenate([g for _, g in factors], 2)
    return factor_contribution(left, right, first, reduction, None)


def _token_pair_contribution(
    dots: Sequence[_Dense],
    heads: Sequence[_Head],
    ids: jax.Array,
    added: jax.Array,
    height: int,
    weight: jax.Array | None,
    reduction: GramReduction,
) -> jax.Array:
    total = lookup_contribution(ids, added, height, False, reduction, None)
    if dots:
        total = total + _concatenated_contribution(dots, 1, reduction)
        factors = [part.by_row() for part in dots]
        left, right = jnp.concatenate([a for a, _ in factors], 1), jnp.concatenate([g for _, g in factors], 2)
        source: tuple[Any, ...] = (left,)
    else:
        head = heads[0]
        right = head.columns()
        source = (head.hidden, head.labels, head.normalizers, head.logits)
    added = jnp.where((ids < 0)[:, None, :, None], 0, added)  # these tokens look nothing up
    ids = jnp.maximum(ids, 0)
    split = reduction.sides
    one_way = _cross_terms(split_tree(source, reduction, 0), split(right)[0], split(ids)[1], split(added)[1], weight)
    other_way = one_way
    if reduction.columns is not None:
        other_way = _cross_terms(
            split_tree(source, reduction, 1), split(right)[1], split(ids)[0], split(added)[0], weight
        )
    return total + reduction.arrange(one_way + other_way.transpose(2, 3, 0, 1))


def split_tree(arrays: tuple[Any, ...], reduction: GramReduction, side: int) -> tuple[Any, ...]:
    """Return one side of each array."""
    return tuple(None if a is None else reduction.sides(a)[side] for a in arrays)


def _cross_terms(
    source: tuple[Any, ...], right: jax.Array, ids: jax.Array, added: jax.Array, weight: jax.Array | None
) -> jax.Array:
    if len(source) == 1:
        left = source[0]
        return crossed_gram(lambda i: left[i][:, ids], right, added)
    hidden, labels, normalizers, logits = source
    assert weight is not None
    looked_up = weight[ids.reshape(-1)]

    def entries(i: jax.Array) -> jax.Array:
        if logits is None:
            # One "row of the head" for each looked-up token, without labels: these are ids, not indices of such rows.
            none = jnp.full_like(labels[i], -1)
            probabilities = softmax_minus_onehot(hidden[i], looked_up, none, normalizers[i]).reshape(-1, *ids.shape)
        else:
            probabilities = jnp.exp(logits[i][:, ids] - normalizers[i][:, None, None])
        left = probabilities - (labels[i][:, None, None] == ids)
        return jnp.where(labels[i][:, None, None] == IGNORED, 0, left)

    return crossed_gram(entries, right, added)
