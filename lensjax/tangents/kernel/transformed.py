"""Compiled transformed programs, one for each function and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lensjax.tangents.kernel.problem import KernelProblem
from lensjax.tangents.parameters import Function, one_example
from lensjax.tangents.program.compile_cache import cached_compile
from lensjax.tangents.program.reductions import Reduction
from lensjax.tangents.program.transform import Transform


def transformed(
    problem: KernelProblem, reduction: Reduction, params: Any, x1: Any, x2: Any, key: Any = None
) -> dict[int, jax.Array]:
    """Return the reduction of each layer's gradients; compiled once for each function and shapes."""
    return transformed_program(problem, reduction)(params, x1, x2, key)


def transformed_program(problem: KernelProblem, reduction: Reduction) -> Any:
    """Return the compiled function (params, x1, x2, key) behind `transformed`."""
    static = without_function(problem)

    def make(get: Callable[[], Function]) -> Any:
        def run(params: Any, x1: Any, x2: Any, key: Any) -> dict[int, jax.Array]:
            own = dataclasses.replace(static, function=get())
            x = x1 if x2 is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)
            plan = own.plan(params, one_example(x1))
            return Transform(plan, reduction, own.outputs)(jax.tree.leaves(params), jax.tree.leaves(x), key)

        return jax.jit(run)

    return cached_compile(problem.function, (static, reduction), make)


def without_function(problem: KernelProblem) -> KernelProblem:
    """Return the problem without its function, for a cache key that does not keep the function alive."""
    return dataclasses.replace(problem, function=_no_function)


def _no_function(params: Any, example: Any) -> Any:
    raise AssertionError("a placeholder for the function, where that must not be kept")
