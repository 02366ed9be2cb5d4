"""Kernels from materialised Jacobians and from kernel-vector products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lensjax.tangents.differentiation import NO_REVERSE_MODE
from lensjax.tangents.kernel.operator import NtkOperator, _jacobians
from lensjax.tangents.kernel.problem import KernelProblem
from lensjax.tangents.parameters import abstract, one_example
from lensjax.tangents.program.contributions import materialized_contribution
from lensjax.tangents.program.reductions import Reduction


def has_reverse_mode(problem: KernelProblem, params: Any, x1: Any) -> bool:
    """Whether the function can be differentiated backwards (a `while_loop` with a gradient cannot)."""

    def vjp(params: Any, example: Any) -> Any:
        y, back = jax.vjp(lambda chosen: problem.flat_outputs(params, chosen, example), problem.selected(params))
        return back(y)

    try:
        jax.eval_shape(vjp, abstract(params), one_example(x1))
    except ValueError as error:
        if not NO_REVERSE_MODE.search(str(error)):
            raise
        return False
    return True


def by_jacobian(
    problem: KernelProblem, params: Any, x1: Any, x2: Any, reduction: Reduction, key: jax.Array | None = None
) -> dict[int, jax.Array]:
    """Return what a reducer makes of each layer, from per-example Jacobians of all its parameters."""
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
