"""The report of a kernel computation: how each parameter was treated, and the memory for it."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator
from typing import Any

import jax

from lensjax.tangents.kernel.problem import KernelProblem
from lensjax.tangents.parameters import one_example
from lensjax.tangents.program import ir
from lensjax.tangents.program.plan import GradientSite, Plan


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How the contribution of some parameters to the kernel is computed.

    Attributes
    ----------
    parameters : paths of the parameters, several where the function joins them first
    how : {"contribution", "factors", "materialized", "unused"}
        "contribution": in the backward pass, from the factors of one use. "factors": used more than once, so the
        inputs and cotangents of the uses are kept. "materialized": per-example gradients exist. "unused": the function
        does not depend on them.
    operations : the primitives that read them, with method "transform"; of materialised ones each named once
    reason : why they are materialised, else ""
    bytes : of the factors that are kept, or of the per-example gradients, for all examples and outputs. Not counted are
        the copies of a materialised parameter, one for each example, that a program may make on the way forward.
    """

    parameters: tuple[str, ...]
    how: str
    operations: tuple[str, ...]
    reason: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class NtkReport:
    """How `lensjax.tangents.ntk` computed a kernel.

    Attributes
    ----------
    method : {"transform", "jacobian", "ntvp"}
    reason : why this method
    examples, outputs : numbers of examples, and of outputs for one example
    treatments : one for each parameter, or for several that are joined
    """

    method: str
    reason: str
    examples: int
    outputs: int
    treatments: tuple[Treatment, ...]

    @property
    def materialized(self) -> tuple[Treatment, ...]:
        """Treatments with per-example gradients, largest first."""
        found = [t for t in self.treatments if t.how == "materialized"]
        return tuple(sorted(found, key=lambda t: -t.bytes))

    def __str__(self) -> str:
        lines = [f"NTK by {self.method} ({self.reason}): {self.examples} examples, {self.outputs} outputs each"]
        for how in ("contribution", "factors", "materialized", "unused"):
            group = [t for t in self.treatments if t.how == how]
            if group:
                total = sum(t.bytes for t in group)
                lines.append(f"  {how}: {sum(len(t.parameters) for t in group)} parameters, {total / 2**20:.1f} MiB")
        for t in self.materialized:
            names = ", ".join(t.parameters[:3]) + (", ..." if len(t.parameters) > 3 else "")
            lines.append(f"    {names}: {t.reason}; {t.bytes / 2**20:.1f} MiB")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"


def report_of(problem: KernelProblem, method: str, reason: str, params: Any, x1: Any) -> NtkReport:
    """Return the report for a problem and the chosen method."""
    examples = problem.rows + (problem.columns or 0)
    leaves = jax.tree.leaves(params)
    chosen = [i for i, layer in enumerate(problem.selection.layers) if layer is not None]
    if method == "transform":
        plan = problem.plan(params, one_example(x1))
        treatments = _planned(plan, problem, examples)
    elif method == "jacobian":
        treatments = [
            Treatment(
                (problem.selection.names[i],), "materialized", (), "the method keeps all per-example gradients",
                examples * problem.outputs * leaves[i].size * leaves[i].dtype.itemsize,
            )
            for i in chosen
        ]  # fmt: skip
    else:
        treatments = [Treatment(tuple(problem.selection.names[i] for i in chosen), "contribution", (), "", 0)]
    return NtkReport(method, reason, examples, problem.outputs, tuple(treatments))


def _planned(plan: Plan, problem: KernelProblem, examples: int) -> list[Treatment]:
    treatments: list[Treatment] = []
    seen: set[int] = set()
    for site in plan.sites:
        seen |= site.node.leaves
        how = {"single": "contribution", "shared": "factors", "materialized": "materialized"}[site.how]
        read = [use.operation.name for use in site.uses]
        operations = tuple(read if site.uses else dict.fromkeys(_readers(plan.block, {site.node.value})))
        names = tuple(problem.selection.names[i] for i in sorted(site.node.leaves))
        treatments.append(Treatment(names, how, operations, site.reason, _memory(site, examples, problem.outputs)))
    unused = [i for i, layer in enumerate(problem.selection.layers) if layer is not None and i not in seen]
    return treatments + [Treatment((problem.selection.names[i],), "unused", (), "", 0) for i in unused]


def _readers(block: ir.Block, values: set[ir.Value]) -> Iterator[str]:
    """Yield the name of each operation that reads one of the values, also inside regions and loops."""
    for operation in block.operations:
        read = [isinstance(a, ir.Value) and a in values for a in operation.inputs]
        if operation.body is not None:
            inside = {inner for inner, r in zip(operation.body.inputs, read, strict=True) if r}
            yield from _readers(operation.body, values | inside)
        elif any(read):
            yield operation.name


def _memory(site: GradientSite, examples: int, outputs: int) -> int:
    """Return the bytes that exist for all examples at once; of what a loop frees again, those of one iteration."""
    value = site.node.value.aval
    if site.how == "materialized":
        return int(examples * outputs * math.prod(value.shape) * value.dtype.itemsize)
    if site.how == "single":
        return 0
    total = 0
    for use, loops in zip(site.uses, site.loops_of_uses, strict=True):
        out = use.operation.outputs[0].aval
        other = [a.aval for i, a in enumerate(use.operation.inputs) if i != use.which]
        size = outputs * math.prod(out.shape) * out.dtype.itemsize
        size += sum(math.prod(a.shape) * a.dtype.itemsize for a in other)
        total += size * math.prod(loop.params["length"] for loop in (*site.node.loops, *loops))
    return int(examples * total)
