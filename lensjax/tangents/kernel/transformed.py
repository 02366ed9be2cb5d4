"""Transformed programs, compiled once for each function and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lensjax.tangents.kernel.problem import Problem
from lensjax.tangents.parameters import Function, one_example
from lensjax.tangents.program.compile_cache import compiled
from lensjax.tangents.program.reductions import Reducer
from lensjax.tangents.program.transform import Transform


def transformed(
    problem: Problem, reducer: Reducer, params: Any, x1: Any, x2: Any, key: Any = None
) -> dict[int, jax.Array]:
    """Return what the reducer wants for each layer; compiled once for each function and shapes."""
    return program(problem, reducer)(params, x1, x2, key)


def program(problem: Problem, reducer: Reducer) -> Any:
    """Return the compiled function (params, x1, x2, key) behind `transformed`."""
    static = without_function(problem)

    def make(get: Callable[[], Function]) -> Any:
        def run(params: Any, x1: Any, x2: Any, key: Any) -> dict[int, jax.Array]:
            own = dataclasses.replace(static, function=get())
            x = x1 if x2 is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x1, x2)
            plan = own.plan(params, one_example(x1))
            return Transform(plan, reducer, own.outputs)(jax.tree.leaves(params), jax.tree.leaves(x), key)

        return jax.jit(run)

    return compiled(problem.function, (static, reducer), make)


def without_function(problem: Problem) -> Problem:
    """Return the facts alone: what is kept with a function must not keep it alive."""
    return dataclasses.replace(problem, function=_no_function)


def _no_function(params: Any, example: Any) -> Any:
    raise AssertionError("only stands for the function where it must not be kept")
