"""The operations in which a parameter meets the examples and whose factors give its per-example gradients.

For a product, and a convolution as one with patches of its input, example b's gradient is `left[b].T @ right[b]`:
inputs times cotangents over the tokens. For a row lookup the left factor is one-hot, for the fused head softmax minus
one-hot; neither ever exists as a whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as jp
from lensjax_kernels.cross_entropy_gram import head_losses
from lensjax_kernels.gram import accumulation_dtype

from lensjax.tangents.program import convolutions, ir

KEPT_LOGITS = 2**27
"""The fused head keeps its logits for the backward pass if they take fewer bytes than this."""


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterUse:
    """One operation with a parameter among its operands and known factors of its gradient.

    Attributes
    ----------
    operation : ir.Operation
    which : index of the operand that is the parameter
    kind : {"dot", "conv", "rows", "head"}
    """

    operation: ir.Operation
    which: int
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter as an operand."""
        return tuple(self.operation.inputs[self.which].aval.shape)

    def tokens(self) -> int:
        """Return how many vectors of one example the parameter is applied to."""
        out, shape = self.operation.outputs[0].aval.shape, self.shape
        if self.kind == "conv":
            return convolutions.tokens(self.operation.params, out)
        if self.kind == "dot":
            contracting, batch = self.operation.params["dimension_numbers"]
            used = (*contracting[self.which], *batch[self.which])
            return math.prod(out) // max(1, math.prod(n for i, n in enumerate(shape) if i not in used))
        return math.prod(out) // max(1, math.prod(shape[1:])) if self.kind == "rows" else math.prod(out)

    def forward(self, w: jax.Array, rest: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        """Apply the operation to (B, ...) operands and one parameter: output (B, ...), and what the factors need."""
        if self.kind == "head":
            hidden, labels = rest
            rows, vocabulary = hidden.reshape(-1, hidden.shape[-1]), w.shape[0]
            keep = labels.size * vocabulary * accumulation_dtype(hidden, w).itemsize < KEPT_LOGITS
            losses, normalizers, logits = head_losses(rows, w, labels.reshape(-1), keep=keep)
            logits = None if logits is None else logits.reshape(*labels.shape, vocabulary)
            return losses.reshape(labels.shape), (hidden, labels, normalizers.reshape(labels.shape), logits)
        (x,) = rest
        return self.apply(w, x), (x,)

    def apply(self, w: jax.Array, x: jax.Array) -> jax.Array:
        """Apply an operation other than a "head" to operands (B, ...)."""

        def one(x: jax.Array) -> jax.Array:
            args = (x, w) if self.which == 1 else (w, x)
            return self.operation.bind(*args)[0]

        return jax.vmap(one)(x)


@dataclasses.dataclass(frozen=True, eq=False)
class FactorLayout:
    """How a use's operands become matrix factors of the gradient, in the axes of the node that it belongs to.

    Attributes
    ----------
    use : ParameterUse
    inputs_first : bool
        Whether the inputs are the factor with the gradient's rows and the cotangents the one with its columns.
    contracted, free : for "dot" and "conv", the order of the parameter's contracted and free axes in the node
    """

    use: ParameterUse
    inputs_first: bool
    contracted: tuple[int, ...] = ()
    free: tuple[int, ...] = ()

    def inputs(self, x: jax.Array) -> jax.Array:
        """Return the input factor (B, H, T, d) of a "dot" or "conv" for its other operand (B, ...); H: batch axes."""
        if self.use.kind == "conv":
            operation = self.use.operation
            x = convolutions.patches(operation.params, x, self.use.shape, operation.outputs[0].aval.shape)
            x = jnp.transpose(x, (0, 1, 2, *(3 + i for i in self.contracted)))
            return x.reshape(*x.shape[:3], math.prod(x.shape[3:]))
        contracting, batch = self._dimensions(1 - self.use.which)
        free = [i for i in range(x.ndim - 1) if i not in contracting and i not in batch]
        order = [*batch, *free, *(contracting[i] for i in self.contracted)]
        x = jnp.transpose(x, (0, *(1 + i for i in order)))
        sizes, nb, nf = x.shape[1:], len(batch), len(free)
        return x.reshape(x.shape[0], math.prod(sizes[:nb]), math.prod(sizes[nb : nb + nf]), math.prod(sizes[nb + nf :]))

    def cotangents(self, ct: jax.Array) -> jax.Array:
        """Return the cotangent factor (B, H, T, e) of a "dot" or "conv", (B, T, e) of a "rows", (B, T) of a "head"."""
        if self.use.kind == "head":
            return ct
        if self.use.kind == "conv":
            return convolutions.flatten_positions(self.use.operation.params, ct)
        if self.use.kind == "rows":
            offset = self.use.operation.params["dimension_numbers"].offset_dims
            tokens = [i for i in range(ct.ndim - 1) if i not in offset]
            ct = jnp.transpose(ct, (0, *(1 + i for i in tokens), *(1 + i for i in offset)))
            return ct.reshape(ct.shape[0], math.prod(ct.shape[1 : 1 + len(tokens)]), -1)
        nb, nw = len(self._dimensions(1)[1]), len(self.free)
        nx = ct.ndim - 1 - nb - nw
        of_x = range(nb, nb + nx) if self.use.which == 1 else range(nb + nw, nb + nw + nx)
        of_w = nb + nx if self.use.which == 1 else nb
        order = [*range(nb), *of_x, *(of_w + i for i in self.free)]
        ct = jnp.transpose(ct, (0, *(1 + i for i in order)))
        sizes = ct.shape[1:]
        return ct.reshape(
            ct.shape[0], math.prod(sizes[:nb]), math.prod(sizes[nb : nb + nx]), math.prod(sizes[nb + nx :])
        )

    def ids(self, indices: jax.Array) -> jax.Array:
        """Return the row (B, T) that each token of a "rows" adds a gradient to; -1 if it adds none.

        For an index beyond the table JAX reads the nearest row, but in some modes of a lookup the row gets no gradient.
        """
        height, places = self.use.shape[0], indices.astype(jnp.promote_types(indices.dtype, jnp.int32))
        ids = places[..., 0].reshape(indices.shape[0], -1)
        if self.use.operation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            return jnp.clip(ids, 0, height - 1)
        # The slice takes the other axes whole, so that every index but 0 along them is beyond the table too.
        others = (places[..., 1:] == 0).all(-1).reshape(ids.shape)
        return jnp.where((ids >= 0) & (ids < height) & others, ids, -1)

    def height(self) -> int:
        """Return the number of rows of the gradient."""
        if self.use.kind in ("rows", "head"):
            return self.use.shape[0]
        contracted, batch = _axes(self.use)
        axes = (
            contracted
            if self.inputs_first
            else [i for i in range(len(self.use.shape)) if i not in (*contracted, *batch)]
        )
        return math.prod(self.use.shape[i] for i in axes)

    def _dimensions(self, operand: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        contracting, batch = self.use.operation.params["dimension_numbers"]
        return contracting[operand], batch[operand]


def parameter_use(operation: ir.Operation, which: int, is_batched: Callable[[ir.Atom], bool]) -> ParameterUse | None:
    """Return the use of operand `which`, or None if the factors of this operation are not known."""
    others = [a for i, a in enumerate(operation.inputs) if i != which]
    if operation.kind == "head":
        return ParameterUse(operation, which, "head") if which == 1 and is_batched(others[0]) else None
    if operation.primitive is jp.dot_general_p and is_batched(others[0]):
        return ParameterUse(operation, which, "dot")
    if operation.primitive is jp.conv_general_dilated_p and which == 1 and is_batched(others[0]):
        plain = operation.params["batch_group_count"] == 1 and not ir.is_complex(operation.outputs[0])
        # An empty output has no patches.
        return ParameterUse(operation, which, "conv") if plain and operation.outputs[0].aval.size else None
    if operation.primitive is jp.gather_p and which == 0:
        numbers, shape = operation.params["dimension_numbers"], operation.inputs[0].aval.shape
        by_row = (
            numbers.collapsed_slice_dims in ((), (0,))
            and numbers.start_index_map[:1] == (0,)
            and not numbers.operand_batching_dims
            and tuple(operation.params["slice_sizes"]) == (1, *shape[1:])
        )
        return ParameterUse(operation, which, "rows") if by_row else None
    return None


def factor_layout(use: ParameterUse, permutation: tuple[int, ...], rows: int | None) -> FactorLayout | None:
    """Return how a use's factors are arranged in the axes of a node.

    Parameters
    ----------
    use : ParameterUse
    permutation : axis i of the operand is axis `permutation[i]` of the node
    rows : int or None
        How many leading axes of the node are the rows of the gradient; None: any split will do.

    Returns
    -------
    FactorLayout, or None if the factors do not split the node's axes there.
    """
    if use.kind in ("rows", "head"):
        fits = rows in (None, 1) and permutation == tuple(range(len(permutation)))
        return FactorLayout(use, True) if fits else None
    contracted, batch_axes = _axes(use)
    free = [i for i in range(len(use.shape)) if i not in contracted and i not in batch_axes]
    by_node = sorted(range(len(contracted)), key=lambda i: permutation[contracted[i]])
    free_by_node = sorted(range(len(free)), key=lambda i: permutation[free[i]])
    contracted_axes = [permutation[contracted[i]] for i in by_node]
    free_axes = [permutation[free[i]] for i in free_by_node]
    inputs_first = True
    if rows is not None:
        if batch_axes or not (contracted_axes == list(range(rows)) or free_axes == list(range(rows))):
            return None
        inputs_first = contracted_axes == list(range(rows))
    return FactorLayout(use, inputs_first, tuple(by_node), tuple(free_by_node))


def _axes(use: ParameterUse) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the contracted axes and the batch axes of the parameter of a "dot" or "conv"."""
    if use.kind == "dot":
        contracting, batch = use.operation.params["dimension_numbers"]
        return contracting[use.which], batch[use.which]
    contracted, out = convolutions.kernel_axes(use.operation.params)
    return contracted, (out,) if use.operation.params["feature_group_count"] > 1 else ()


def other_operands(use: ParameterUse, operands: list[Any]) -> tuple[Any, ...]:
    """Return the operands other than the parameter."""
    return tuple(x for i, x in enumerate(operands) if i != use.which)
