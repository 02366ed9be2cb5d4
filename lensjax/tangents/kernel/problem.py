"""What a tangent computation is about: a function, its parameters, which of them count, and two sets of examples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lensjax.errors import InputError
from lensjax.tangents.parameters import (
    ByLayer,
    Function,
    Select,
    _is_array,
    _is_real,
    _none,
    _refuse,
    abstract,
    count_examples,
    layer_name,
    leaf_names,
    one_example,
    selection,
)
from lensjax.tangents.program import ir
from lensjax.tangents.program.compile_cache import held
from lensjax.tangents.program.plan import Plan, make_plan


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one computation.

    Attributes
    ----------
    function : f(params, one example)
    names : path of each parameter leaf
    layers : number of each leaf's layer, None where the leaf is held constant
    layer_names : name of each layer
    outputs : numbers that `function` gives for one example
    scalar : whether it gives one number without axes
    rows, columns : examples on each side of the kernel; columns None: the rows again
    """

    function: Function
    names: tuple[str, ...]
    layers: tuple[int | None, ...]
    layer_names: tuple[str, ...]
    outputs: int
    scalar: bool
    rows: int
    columns: int | None

    def plan(self, params: Any, example: Any) -> Plan:
        """Trace the function for one example and plan its transformation."""
        closed = jax.make_jaxpr(self.function)(abstract(params), example)
        return make_plan(ir.elaborate(closed), len(self.names), self.layers)

    def chosen(self, params: Any) -> list[jax.Array]:
        """Return the leaves that count."""
        return [leaf for leaf, layer in zip(jax.tree.leaves(params), self.layers, strict=True) if layer is not None]

    def flat(self, params: Any, chosen: list[jax.Array], example: Any) -> jax.Array:
        """Apply the function with the leaves that count replaced, and flatten what it gives to (outputs,)."""
        leaves, structure = jax.tree.flatten(params)
        values = iter(chosen)
        replaced = [leaf if layer is None else next(values) for leaf, layer in zip(leaves, self.layers, strict=True)]
        results = jax.tree.leaves(self.function(jax.tree.unflatten(structure, replaced), example))
        return jnp.concatenate([jnp.reshape(r, -1) for r in results])


def make_problem(function: Function, params: Any, x1: Any, x2: Any, parameters: Select, by_layer: ByLayer) -> Problem:
    """Check the input of a computation and collect its facts.

    Raises
    ------
    InputError
        If there are no examples or parameters, sizes disagree, a parameter that counts is no real array, a pattern
        selects none, there is no such `by_layer`, or the function's output is not real.
    """
    function = held(function)
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    rows = count_examples(x1, "x1")
    columns = None if x2 is None else count_examples(x2, "x2")
    if x2 is not None and one_example(x1) != one_example(x2):
        raise InputError(
            f"x1 and x2 must agree in structure, shapes and dtypes after the first axis: {one_example(x1)} is not "
            f"{one_example(x2)}; pad or cast one of them."
        )
    named = list(zip(names, leaves, strict=True))
    _refuse((n, a) for n, a in named if not (_is_array(a) or isinstance(a, int | float | complex)))
    chosen = selection(parameters, names, leaves)
    _refuse((n, a) for (n, a), c in zip(named, chosen, strict=True) if c and not (_is_array(a) and _is_real(a)))
    chosen = [c and bool(jnp.issubdtype(a.dtype, jnp.floating)) for a, c in zip(leaves, chosen, strict=True)]
    if not any(chosen):
        raise _none(f"parameters={parameters!r}", names)
    of_layer = [layer_name(by_layer, name) for name in names]
    layer_names = tuple(dict.fromkeys(n for n, c in zip(of_layer, chosen, strict=True) if c))
    layers = tuple(layer_names.index(n) if c else None for n, c in zip(of_layer, chosen, strict=True))
    shapes = jax.tree.leaves(jax.eval_shape(function, abstract(params), one_example(x1)))
    if not shapes or not all(jnp.issubdtype(s.dtype, jnp.floating) for s in shapes):
        raise InputError(
            f"f must return real floating-point arrays, not {[str(s.dtype) for s in shapes]}; cast or split its output."
        )
    outputs = sum(math.prod(s.shape) for s in shapes)
    scalar = len(shapes) == 1 and shapes[0].shape == ()
    return Problem(function, names, layers, layer_names, outputs, scalar, rows, columns)


def is_crossed(problem: Problem, outputs: str) -> bool:
    """Whether different outputs of an example are paired too."""
    return outputs == "full" and problem.outputs > 1
