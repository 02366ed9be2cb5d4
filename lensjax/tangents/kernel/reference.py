"""Kernels from materialised Jacobians and from kernel-vector products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lensjax.tangents.kernel.operator import NtkOperator
from lensjax.tangents.kernel.problem import Problem
from lensjax.tangents.parameters import abstract, one_example
from lensjax.tangents.program.reductions import Pairs


def has_reverse_mode(problem: Problem, params: Any, x1: Any) -> bool:
    """Whether the function can be differentiated backwards (a `while_loop` with a gradient cannot)."""

    def pull(params: Any, example: Any) -> Any:
        y, back = jax.vjp(lambda chosen: problem.flat(params, chosen, example), problem.chosen(params))
        return back(y)

    try:
        jax.eval_shape(pull, abstract(params), one_example(x1))
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        return False
    return True


def by_jacobian(problem: Problem, params: Any, x1: Any, x2: Any, crossed: bool) -> dict[int, jax.Array]:
    """Return each layer's kernel from per-example Jacobians of all its parameters."""
    reducer = Pairs(problem.rows, problem.columns, crossed)
    x = x1 if x2 is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)

    def of_chosen(chosen: list[jax.Array], example: Any) -> jax.Array:
        return problem.flat(params, chosen, example)

    differentiate = jax.jacrev if has_reverse_mode(problem, params, x1) else jax.jacfwd
    jacobians = jax.vmap(differentiate(of_chosen), in_axes=(None, 0))(problem.chosen(params), x)
    result: dict[int, jax.Array] = {}
    for layer, jacobian in zip((n for n in problem.layers if n is not None), jacobians, strict=True):
        share = reducer(jacobian.reshape(reducer.examples, problem.outputs, -1))
        result[layer] = result[layer] + share if layer in result else share
    return result


def by_products(problem: Problem, params: Any, x1: Any, x2: Any, crossed: bool) -> dict[int, jax.Array]:
    """Return each layer's kernel from its products with all unit vectors."""
    result = {}
    columns = problem.rows if problem.columns is None else problem.columns
    for layer in range(len(problem.layer_names)):
        whole = NtkOperator(problem, params, x1, x2, layer).dense()
        whole = whole.reshape(problem.rows, problem.outputs, columns, problem.outputs)
        result[layer] = whole if crossed else jnp.einsum("icjc->cij", whole)
    return result
