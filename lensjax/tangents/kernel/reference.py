"""Kernels from whole Jacobians and from kernel-vector products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lensjax.tangents.differentiation import NO_REVERSE_MODE
from lensjax.tangents.kernel.operator import NtkOperator
from lensjax.tangents.kernel.problem import KernelProblem
from lensjax.tangents.parameters import abstract, one_example
from lensjax.tangents.program.contributions import materialized_contribution
from lensjax.tangents.program.reductions import Reduction


def has_reverse_mode(problem: KernelProblem, params: Any, x1: Any) -> bool:
    """Whether the function has reverse mode (not with a `while_loop` that a gradient flows through)."""

    def gradient(params: Any, example: Any) -> Any:
        y, vjp = jax.vjp(lambda selected: problem.flat_outputs(params, selected, example), problem.selected(params))
        return vjp(y)

    try:
        jax.eval_shape(gradient, abstract(params), one_example(x1))
    except ValueError as error:
        if not NO_REVERSE_MODE.search(str(error)):
            raise
        return False
    return True


def _jacobians(problem: KernelProblem, params: Any, x: Any, reverse: bool) -> list[jax.Array]:
    """Return the Jacobian (B, C, ...) of each selected parameter."""
    selected = problem.selected(params)
    differentiate = jax.jacrev if reverse else jax.jacfwd

    def jacobian(example: Any) -> list[jax.Array]:
        return differentiate(lambda selected: problem.flat_outputs(params, selected, example))(selected)

    def jacobian_by_rows(example: Any) -> list[jax.Array]:
        y, vjp = jax.vjp(lambda selected: problem.flat_outputs(params, selected, example), selected)
        return jax.lax.map(lambda seed: vjp(seed)[0], jnp.eye(problem.outputs, dtype=y.dtype))

    try:
        return jax.vmap(jacobian)(x)
    except NotImplementedError:  # some operations of JAX cannot be mapped (`ragged_dot`)
        return jax.lax.map(jacobian_by_rows, x)


def by_jacobian(
    problem: KernelProblem, params: Any, x1: Any, x2: Any, reduction: Reduction, key: jax.Array | None = None
) -> dict[int, jax.Array]:
    """Return a reduction of each layer's gradients, from per-example Jacobians of all its parameters."""
    x = x1 if x2 is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)
    result: dict[int, jax.Array] = {}
    jacobians = _jacobians(problem, params, x, has_reverse_mode(problem, params, x1))
    for place, (layer, jacobian) in enumerate(
        zip((n for n in problem.selection.layers if n is not None), jacobians, strict=True)
    ):
        own = None if key is None else jax.random.fold_in(key, place)
        contribution = materialized_contribution(
            jacobian.reshape(reduction.examples, problem.outputs, -1), reduction, own
        )
        result[layer] = result[layer] + contribution if layer in result else contribution
    return result


def by_products(problem: KernelProblem, params: Any, x1: Any, x2: Any, crossed: bool) -> dict[int, jax.Array]:
    """Return each layer's kernel from its products with all unit vectors."""
    result = {}
    columns = problem.rows if problem.columns is None else problem.columns
    for layer in range(len(problem.layer_names)):
        whole = NtkOperator(problem, params, x1, x2, layer).dense()
        whole = whole.reshape(problem.rows, problem.outputs, columns, problem.outputs)
        result[layer] = whole if crossed else jnp.einsum("icjc->cij", whole)
    return result
