"""A jaxpr as a tree of operations in which every value is one object: calls inlined, regions and loops kept.

Several calls in a jaxpr may have one body, so that a variable does not identify one value; an analysis needs values of
its own for each call. `elaborate` builds this tree, without operations whose outputs are never read.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.extend.core import primitives as jp
from lensjax_kernels import head_cross_entropy

INLINED = (jp.jit_p, jp.closed_call_p, jp.call_p)
"""Calls that are equivalent to their body."""


@dataclasses.dataclass(eq=False)
class Value:
    """The result of one operation, or an input of a block: compared by identity."""

    aval: Any


@dataclasses.dataclass(eq=False)
class Known:
    """A literal or an array that the function closes over."""

    value: Any

    @property
    def aval(self) -> Any:
        """Shape and dtype, as for a `Value`."""
        return jax.typeof(self.value)


Atom = Value | Known


@dataclasses.dataclass(eq=False)
class Block:
    """Operations in order, with inputs and outputs."""

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Atom]


@dataclasses.dataclass(eq=False)
class Operation:
    """One equation.

    Attributes
    ----------
    kind : {"primitive", "head", "remat", "scan"}
        "head": the cross-entropy of `lensjax_kernels.head_cross_entropy`, kept whole.
    primitive, params : of the equation
    inputs, outputs : atoms
    body : Block, for "remat" and "scan" only
    """

    kind: str
    primitive: Any
    params: dict[str, Any]
    inputs: list[Atom]
    outputs: list[Value]
    body: Block | None = None

    @property
    def name(self) -> str:
        """Name of the operation in a report."""
        return "head_cross_entropy" if self.kind == "head" else str(self.primitive.name)

    def bind(self, *args: Any) -> list[Any]:
        """Apply the equation to values for all its inputs."""
        # A rule for derivatives may index its operands by tracers, which a closed-over NumPy array does not take.
        args = tuple(jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args)
        if self.kind == "head":
            return list(jaxpr_as_fun(self.params["jaxpr"])(*args))
        # For primitives with functions among their parameters (custom derivatives), these come first.
        bound = self.primitive.get_bind_params(self.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        out = self.primitive.bind(*functions, *args, **params)
        return list(out) if self.primitive.multiple_results else [out]


def elaborate(closed: ClosedJaxpr, *, heads: bool = True) -> Block:
    """Return the tree of operations of a closed jaxpr.

    Parameters
    ----------
    closed : ClosedJaxpr
    heads : bool
        Whether fused heads are kept whole; else they are inlined like other calls.
    """
    block = _block(closed.jaxpr, closed.consts, heads)
    _drop_unread(block)
    return block


def called(eqn: Any) -> list[Any]:
    """Return the programs that an equation calls, jaxprs with their constants where these belong to them."""
    return [x for x in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(x)]


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def holds(program: Any, primitive: Any) -> bool:
    """Whether a program, or one that it calls, has an equation with the primitive."""
    return any(e.primitive is primitive or any(holds(p, primitive) for p in called(e)) for e in program.eqns)


def prevents_cse(operation: Operation) -> bool:
    """Whether a region that is recomputed is kept apart from its first computation."""
    # There may be one flag for each input, and a transformed region has other inputs.
    return bool(np.any(operation.params["prevent_cse"]))


def is_float(atom: Atom) -> bool:
    """Whether a gradient can flow through the value."""
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.inexact))


def is_complex(atom: Atom) -> bool:
    """Whether the value is complex."""
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating))


def _block(jaxpr: Any, consts: Sequence[Any], heads: bool) -> Block:
    inputs = [Value(v.aval) for v in jaxpr.invars]
    operations: list[Operation] = []
    outputs = _inline(jaxpr, consts, inputs, operations, heads)
    return Block(inputs, operations, outputs)


def _inline(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Atom], operations: list[Operation], heads: bool
) -> list[Atom]:
    values: dict[Any, Atom] = {}
    values.update(zip(jaxpr.constvars, (c if isinstance(c, Value | Known) else Known(c) for c in consts), strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Atom:
        return Known(v.val) if isinstance(v, Literal) else values[v]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        primitive, params = eqn.primitive, dict(eqn.params)
        is_head = heads and primitive in INLINED and _is_head(eqn)
        if primitive in INLINED and not is_head:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            consts_of = inner.consts if isinstance(inner, ClosedJaxpr) else ()
            body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            values.update(zip(eqn.outvars, _inline(body, consts_of, inputs, operations, heads), strict=True))
            continue
        outputs = [Value(v.aval) for v in eqn.outvars]
        if is_head:
            operation = Operation("head", primitive, params, inputs, outputs)
        elif primitive is jp.remat_p:
            operation = Operation("remat", primitive, params, inputs, outputs, _block(params["jaxpr"], (), heads))
        elif primitive is jp.scan_p:
            inner = params["jaxpr"]
            body = _block(inner.jaxpr, inner.consts, heads)
            operation = Operation("scan", primitive, params, inputs, outputs, body)
        else:
            operation = Operation("primitive", primitive, params, inputs, outputs)
        operations.append(operation)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _is_head(eqn: Any) -> bool:
    """Whether a call is our fused head without a bias, by its name and by comparing its body with that of a new trace.

    With a bias, or with a chunk size that was asked for, it is inlined: a bias is a parameter too, and the product with
    the weight has factors like any other.
    """
    function = inspect.unwrap(head_cross_entropy)
    if eqn.params.get("name") != function.__name__ or len(eqn.invars) != 3:
        return False
    avals = [v.aval for v in eqn.invars]
    if [len(a.shape) for a in avals] != [2, 2, 1]:
        return False
    return str(jax.make_jaxpr(function)(*avals).jaxpr) == str(eqn.params["jaxpr"].jaxpr)


def _drop_unread(block: Block) -> None:
    read = {a for a in block.outputs if isinstance(a, Value)}
    kept = []
    for operation in reversed(block.operations):
        if not any(o in read for o in operation.outputs):
            continue
        if operation.body is not None:
            _drop_unread(operation.body)
        read.update(a for a in operation.inputs if isinstance(a, Value))
        kept.append(operation)
    block.operations = kept[::-1]


def scalar(atom: Atom) -> float | None:
    """Return the atom's value if it is one number that is known while tracing, else None."""
    if not isinstance(atom, Known) or np.size(atom.value) != 1:
        return None
    try:
        return float(np.asarray(atom.value).reshape(()))
    except jax.errors.TracerArrayConversionError:
        return None
