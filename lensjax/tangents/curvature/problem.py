"""A curvature computation: a loss, which of its parameters are selected, and how batches are weighted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.environment import require_exact_backend
from lensjax.errors import InputError
from lensjax.tangents.curvature.losses import Composed, ModelLoss
from lensjax.tangents.curvature.quadratic_forms import dot, gauss_newton_quadratic_forms, hessian_quadratic_forms
from lensjax.tangents.differentiation import gauss_newton_map, hessian_product
from lensjax.tangents.parameters import (
    ByLayer,
    ParameterSelection,
    Select,
    abstract,
    is_real_float,
    leaf_names,
    match_parameters,
    refuse_undifferentiable,
    same_structure,
    select_layers,
    without_frozen,
)

Matrix = Literal["hessian", "gauss_newton"]
Leaves = list[jax.Array]
Batches = Any
"""One batch (any pytree but a list), a list of batches, or an iterator over them."""

REMEDY = "; leave such leaves out (parameters=...) or cast them to a floating-point dtype."
"""What to do about parameters that a curvature cannot be computed for."""


@dataclasses.dataclass(frozen=True)
class CurvatureProblem:
    """What is known of a curvature computation before any program is traced.

    Attributes
    ----------
    matrix : {"hessian", "gauss_newton"}
    selection : ParameterSelection
        Its layers are the blocks of parameters.
    weight : callable batch -> number, or None: labelled tokens for models, else the length of the first axis
    """

    matrix: Matrix
    selection: ParameterSelection
    weight: Callable[[Any], Any] | None

    @property
    def block_names(self) -> tuple[str, ...]:
        """Name of each block of parameters."""
        return self.selection.layer_names

    def selected(self, params: Any) -> Leaves:
        """Return the selected parameters."""
        return self.selection.selected(params)

    def block_sums(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """Add one number for each selected leaf up to one for each block, (blocks,)."""
        blocks = self.selection.selected_layers
        return jnp.stack(
            [sum(x for x, b in zip(numbers, blocks, strict=True) if b == k) for k in range(len(self.block_names))]
        )

    def block_products(self, v: Leaves, w: Leaves) -> jax.Array:
        """Return v_i . w_i of each block i, (blocks,), at least float32."""
        return self.block_sums([dot(a, b) for a, b in zip(v, w, strict=True)])

    def product_fn(self, f: Any, params: Any, batch: Any) -> tuple[Callable[[Leaves], Leaves], jax.Array]:
        """Return the product v -> (weight of the batch) * (matrix of the batch) @ v, and the weight."""
        selected = self.selected(params)
        if self.matrix == "hessian":
            loss, weight = self._loss(f, params, batch)
            return (lambda v: hessian_product(loss, selected, v)), weight
        outputs, output_hvp, scale, weight = self._gauss_newton_parts(f, params, batch)
        product = gauss_newton_map(outputs, output_hvp, selected)
        return (lambda v: [(scale * w).astype(w.dtype) for w in product(v)]), weight

    def quadratic_form_fn(self, f: Any, params: Any, batch: Any) -> tuple[Callable[[Leaves], jax.Array], jax.Array]:
        """Return v -> (weight of the batch) * v_i . (matrix of the batch @ v)_i of each block, and the weight."""
        selected = self.selected(params)
        if self.matrix == "hessian":
            loss, weight = self._loss(f, params, batch)
            find, scale = functools.partial(hessian_quadratic_forms, loss, selected), 1.0
        else:
            outputs, output_hvp, scale, weight = self._gauss_newton_parts(f, params, batch)
            find = functools.partial(gauss_newton_quadratic_forms, outputs, output_hvp, selected)

        def quadratic_forms(v: Leaves) -> jax.Array:
            found = find(v)
            if found is None:
                return self.block_products(v, self.product_fn(f, params, batch)[0](v))
            return scale * self.block_sums(found)

        return quadratic_forms, weight

    def _scale(self, f: Any, batch: Any) -> tuple[Any, jax.Array]:
        """Return the factor of a batch's loss, and the weight of the batch."""
        weight = self.batch_weight(f, batch)
        if not isinstance(f, ModelLoss):
            return weight, weight
        # A model's loss is differentiated as a sum: its mean over a batch without labelled tokens is 0 / 0.
        return 1.0 if self.weight is None else weight / jnp.maximum(f.tokens(batch), 1), weight

    def _loss(self, f: Any, params: Any, batch: Any) -> tuple[Callable[[Leaves], Any], jax.Array]:
        """Return the loss of a batch, times its weight, as a function of the selected leaves; and the weight."""
        scale, weight = self._scale(f, batch)
        if isinstance(f, ModelLoss):
            return (lambda leaves: scale * f.sums(self.selection.replace(params, leaves), batch)[0]), weight
        check_scalar(lambda p: f(p, batch), params)  # once, while the program is traced, not in every call
        return (lambda leaves: scale * f(self.selection.replace(params, leaves), batch)), weight

    def _gauss_newton_parts(self, f: Any, params: Any, batch: Any) -> tuple[Any, Any, Any, jax.Array]:
        """Return the outputs as a function of selected leaves, (z, dz) -> H_out dz, the factor, and the weight."""
        scale, weight = self._scale(f, batch)
        if not isinstance(f, ModelLoss):
            check_scalar(lambda p: f(p, batch), params)

        def outputs(leaves: Leaves) -> Any:
            own = self.selection.replace(params, leaves)
            return f.head_inputs(own, batch) if isinstance(f, ModelLoss) else f.outputs(own, batch)

        def output_hvp(z: Any, dz: Any) -> Any:
            if isinstance(f, ModelLoss):
                return f.head_gauss_newton(batch, z, dz)
            return hessian_product(lambda y: f.loss(y, batch), z, dz)

        return outputs, output_hvp, scale, weight

    def batch_weight(self, f: Any, batch: Any) -> jax.Array:
        """Return the weight of a batch."""
        if self.weight is not None:
            return jnp.asarray(self.weight(batch), jnp.result_type(float))
        if isinstance(f, ModelLoss):
            return jnp.asarray(f.tokens(batch), jnp.result_type(float))
        shapes = [jnp.shape(a) for a in jax.tree.leaves(batch)]
        return jnp.asarray(shapes[0][0] if shapes and shapes[0] else 1, jnp.result_type(float))


def make_curvature_problem(
    f: Any, params: Any, matrix: Matrix, parameters: Select, by_layer: ByLayer, weight: Callable[[Any], Any] | None
) -> CurvatureProblem:
    """Check the arguments that all public functions here share; raises what `curvature_operator` does."""
    require_exact_backend()
    if matrix not in ("hessian", "gauss_newton"):
        raise InputError(f"matrix={matrix!r} is not known; choose 'hessian' or 'gauss_newton'.")
    if not callable(f):
        raise InputError(f"f must be a function of (params, batch) or a language model, not {type(f).__name__}.")
    if matrix == "gauss_newton" and not isinstance(f, ModelLoss | Composed):
        raise InputError(
            "matrix='gauss_newton' needs the loss in two parts: give Composed(outputs, loss) or a language model."
        )
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    selected = match_parameters(parameters, names, leaves) if leaves else []
    if leaves and not any(selected):
        own = leaf_names(without_frozen(params))
        raise InputError(
            f"parameters={parameters!r} selects none of the {len(own)} parameters ({', '.join(own[:8])}, ...)."
        )
    counted = [(n, leaf) for n, leaf, own in zip(names, leaves, selected, strict=True) if own]
    check_parameters([n for n, _ in counted], [leaf for _, leaf in counted])
    return CurvatureProblem(matrix, select_layers(names, selected, by_layer), weight)


def iterate_batches(batches: Batches) -> Iterator[Any]:
    """Yield the batches one by one.

    Raises
    ------
    InputError
        If there is none.
    """
    count = 0
    for batch in batches if isinstance(batches, list | Iterator) else [batches]:
        count += 1
        yield batch
    if not count:
        raise InputError("batches is empty; give at least one batch.")


def check_parameters(names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raise InputError unless there are parameters and all can be differentiated."""
    if not leaves:
        raise InputError("params holds no array; give the parameters whose curvature is wanted.")
    refuse_undifferentiable(zip(names, leaves, strict=True), is_real_float, REMEDY)


def check_like(params: Any, v: Any) -> None:
    """Raise InputError unless `v` is like the parameters."""

    def kinds(tree: Any) -> list[Any]:
        return [(jnp.shape(a), jnp.result_type(a)) for a in jax.tree.leaves(tree)]

    if not same_structure(params, v) or kinds(params) != kinds(v):
        raise InputError("v must have the structure, shapes and dtypes of params; make it by jax.tree.map over params.")


def check_scalar(f: Callable[[Any], Any], params: Any) -> None:
    """Raise InputError unless a loss returns one real number."""
    out = jax.eval_shape(f, abstract(params))
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise InputError(
            f"f must return one real number, not {[f'{a.dtype}{list(a.shape)}' for a in leaves]}; take the mean of its "
            "losses."
        )


def check_weight(weight: float) -> None:
    """Raise InputError unless the weight of all batches is positive."""
    if not weight > 0:
        raise InputError(f"the batches weigh {weight} in all; give batches with labelled tokens, or positive weights.")


def check_finite(numbers: np.ndarray, names: Iterable[str], what: str) -> None:
    """Raise InputError if a number (..., blocks) is not finite."""
    bad = [n for n, ok in zip(names, np.isfinite(numbers).reshape(-1, numbers.shape[-1]).all(0), strict=True) if not ok]
    if bad:
        raise InputError(
            f"{what} is not finite in {', '.join(bad[:4])}: check the parameters and the batch for NaN, and the loss "
            "for points without a second derivative."
        )
