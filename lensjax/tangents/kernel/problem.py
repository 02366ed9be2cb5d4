"""A kernel computation: a function, which of its parameters are selected, and two sets of examples."""

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
    ParameterSelection,
    Select,
    abstract,
    count_examples,
    is_array_or_number,
    is_not_complex,
    is_real_float,
    leaf_names,
    match_parameters,
    none_selected,
    one_example,
    refuse_undifferentiable,
    select_layers,
)
from lensjax.tangents.program import ir
from lensjax.tangents.program.compile_cache import cacheable
from lensjax.tangents.program.plan import Plan, make_plan

REMEDY = (
    ". Make numbers arrays (jnp.asarray), hold complex arrays as two real ones, keep functions outside of params, or "
    "leave such leaves out (parameters=...)."
)
"""What to do about parameters that a kernel cannot be computed for."""


@dataclasses.dataclass(frozen=True)
class KernelProblem:
    """What is known of a kernel computation before any program is traced.

    Attributes
    ----------
    function : f(params, one example)
    selection : ParameterSelection
    outputs : numbers that `function` gives for one example
    scalar : whether it gives one number without axes
    rows, columns : examples on each side of the kernel; columns None: the rows again
    """

    function: Function
    selection: ParameterSelection
    outputs: int
    scalar: bool
    rows: int
    columns: int | None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Name of each layer."""
        return self.selection.layer_names

    def plan(self, params: Any, example: Any) -> Plan:
        """Trace the function for one example and plan its transformation."""
        closed = jax.make_jaxpr(self.function)(abstract(params), example)
        return make_plan(ir.elaborate(closed), len(self.selection.names), self.selection.layers)

    def selected(self, params: Any) -> list[jax.Array]:
        """Return the selected parameters."""
        return self.selection.selected(params)

    def flat_outputs(self, params: Any, selected: list[jax.Array], example: Any) -> jax.Array:
        """Apply the function with the selected parameters replaced, and flatten its outputs to (outputs,)."""
        results = jax.tree.leaves(self.function(self.selection.replace(params, selected), example))
        return jnp.concatenate([jnp.reshape(r, -1) for r in results])


def make_problem(
    function: Function, params: Any, x1: Any, x2: Any, parameters: Select, by_layer: ByLayer
) -> KernelProblem:
    """Check the input of a kernel computation.

    Raises
    ------
    InputError
        If there are no examples or parameters, sizes disagree, a selected parameter is no real array, a pattern
        matches none, there is no such `by_layer`, or the function's output is not real.
    """
    function = cacheable(function)
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    rows = count_examples(x1, "x1")
    columns = None if x2 is None else count_examples(x2, "x2")
    if x2 is not None and one_example(x1) != one_example(x2):
        raise InputError(
            f"x1 and x2 must agree in structure, shapes and dtypes after the first axis: {one_example(x1)} is not "
            f"{one_example(x2)}; pad or cast one of them."
        )
    named = list(zip(names, leaves, strict=True))
    refuse_undifferentiable(named, is_array_or_number, REMEDY)
    matched = match_parameters(parameters, names, leaves)
    refuse_undifferentiable([one for one, own in zip(named, matched, strict=True) if own], is_not_complex, REMEDY)
    # Arrays of integers are constants: the gradient with respect to them is not defined.
    selected = [own and is_real_float(leaf) for leaf, own in zip(leaves, matched, strict=True)]
    if not any(selected):
        raise none_selected(f"parameters={parameters!r}", names)
    selection = select_layers(names, selected, by_layer)
    shapes = jax.tree.leaves(jax.eval_shape(function, abstract(params), one_example(x1)))
    if not shapes or not all(jnp.issubdtype(s.dtype, jnp.floating) for s in shapes):
        raise InputError(
            f"f must return real floating-point arrays, not {[str(s.dtype) for s in shapes]}; cast or split its output."
        )
    outputs = sum(math.prod(s.shape) for s in shapes)
    scalar = len(shapes) == 1 and shapes[0].shape == ()
    return KernelProblem(function, selection, outputs, scalar, rows, columns)


def is_crossed(problem: KernelProblem, outputs: str) -> bool:
    """Whether different outputs of an example are paired too."""
    return outputs == "full" and problem.outputs > 1
