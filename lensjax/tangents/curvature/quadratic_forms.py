"""Quadratic forms v_i . (H v)_i of every block of parameters from one pass each way, without the product H v.

Each parameter w is moved along its direction, w + s v, with a step s of its own. The form of one parameter is the
derivative with respect to its step of the loss's derivative along all directions together, at s = 0. Where an operation
is linear in the parameter, op(w + s v, x) = op(w, x) + s op(v, x), and the derivatives by the steps need only op(v, x)
and its vector-Jacobian product for x, which both passes compute anyway. The products of a weight's gradient, a quarter
of a Hessian-vector product, are not computed, nor the product itself, which is as large as the parameters. Wherever
else a parameter is read, w + s v is differentiated as usual, so that the result is correct for any program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as jp
from lensjax_kernels.gram import EXACT

from lensjax.tangents.program import ir
from lensjax.tangents.program.analysis import IDENTITIES, SAME_ENTRIES

Leaves = list[jax.Array]

BILINEAR = {jp.dot_general_p, jp.conv_general_dilated_p}
"""Operations that are linear in the parameter and in the other operand."""

PARTS = {jp.slice_p, jp.dynamic_slice_p}
"""Operations whose output is part of their first operand."""


def hessian_quadratic_forms(loss: Callable[[Leaves], jax.Array], leaves: Leaves, v: Leaves) -> list[jax.Array] | None:
    """Return v_i . (H v)_i of each leaf i, with H the Hessian of a scalar loss, at least float32.

    Parameters
    ----------
    loss : callable, leaves -> real scalar, twice differentiable
    leaves, v : lists of floating-point arrays, alike

    Returns
    -------
    list of scalars; or None if the loss has no forward mode (`jax.custom_vjp`).
    """
    run = _along(loss, leaves, v, second=True)
    if run is None:
        return None
    return list(jax.grad(lambda s: jax.jvp(run, (s,), (_ones(s),))[1])(_steps(leaves)))


def gauss_newton_quadratic_forms(
    outputs: Callable[[Leaves], Any], output_hvp: Callable[[Any, Any], Any], leaves: Leaves, v: Leaves
) -> list[jax.Array] | None:
    """Return v_i . (J^T output_hvp(z, J v))_i of each leaf i, with z the outputs and J their Jacobian.

    Parameters
    ----------
    outputs : callable, leaves -> pytree of arrays
    output_hvp : callable (z, J v) -> pytree like z
    leaves, v : lists of floating-point arrays, alike

    Returns
    -------
    list of scalars, at least float32; or None as `hessian_quadratic_forms`.
    """
    run = _along(outputs, leaves, v, second=False)
    if run is None:
        return None

    def product(s: list[jax.Array]) -> jax.Array:
        z, dz = jax.jvp(run, (s,), (_ones(s),))
        factors = jax.lax.stop_gradient(output_hvp(z, dz))
        products = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), z, factors))
        return jnp.sum(jnp.stack(products))

    return list(jax.grad(product)(_steps(leaves)))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the inner product of two arrays of one shape, at least float32.

    In two stages: XLA's dot on CPU adds in order, which is wrong by 0.4 % at 40 million float32 elements.
    """
    wide = jnp.promote_types(jnp.float32, a.dtype)
    a, b = jnp.ravel(a).astype(wide), jnp.ravel(b).astype(wide)
    whole = a.size // _ROW * _ROW
    rows = jnp.einsum("ij,ij->i", a[:whole].reshape(-1, _ROW), b[:whole].reshape(-1, _ROW), precision=EXACT)
    return jnp.sum(rows) + jnp.vdot(a[whole:], b[whole:], precision=EXACT)


_ROW = 1024


def _steps(leaves: Leaves) -> list[jax.Array]:
    return [jnp.zeros((), jnp.promote_types(jnp.float32, w.dtype)) for w in leaves]


def _ones(steps: list[jax.Array]) -> list[jax.Array]:
    return [jnp.ones_like(s) for s in steps]


def _along(
    function: Callable[[Leaves], Any], leaves: Leaves, v: Leaves, *, second: bool
) -> Callable[[list[jax.Array]], Any] | None:
    """Return a function of one step for each leaf, or None if the function has no forward mode.

    It may only be called with steps of 0, in one `jax.jvp` with all tangents 1, and a `jax.grad` of that.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(leaves)
    if ir.holds(closed, jp.custom_vjp_call_p):
        return None
    block, structure = ir.elaborate(closed, heads=False), jax.tree.structure(out)

    def run(steps: list[jax.Array]) -> Any:
        inputs = [_Directional(w, d, s) for w, d, s in zip(leaves, v, steps, strict=True)]
        interpreter = _Interpreter(second)
        return jax.tree.unflatten(structure, [interpreter.to_array(x) for x in interpreter.block(block, inputs)])

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class _Directional:
    """A parameter w + s v or part of one, before any operation other than a rearrangement.

    Attributes
    ----------
    value, direction : arrays of one shape
    step : scalar, or (n,) with one step for each of the n entries along the first axis
    """

    value: jax.Array
    direction: jax.Array
    step: jax.Array

    def map(self, view: Callable[[jax.Array], jax.Array]) -> _Directional:
        """Return the result of a linear rearrangement."""
        return _Directional(view(self.value), view(self.direction), self.step)


jax.tree_util.register_dataclass(_Directional, ["value", "direction", "step"], [])


class _Interpreter:
    """Interpreter of a program whose parameters are `_Directional`.

    Parameters
    ----------
    second : bool
        Whether the derivative with respect to the steps is taken of tangents, else of values.
    """

    def __init__(self, second: bool) -> None:
        self.second = second

    def block(self, block: ir.Block, args: Sequence[Any]) -> list[Any]:
        """Return what a block gives; parameters that are handed through stay `_Directional`."""
        values: dict[ir.Value, Any] = dict(zip(block.inputs, args, strict=True))

        def read(atom: ir.Atom) -> Any:
            return atom.value if isinstance(atom, ir.Known) else values[atom]

        for operation in block.operations:
            outs = self._operation(operation, [read(a) for a in operation.inputs])
            values.update(zip(operation.outputs, outs, strict=True))
        return [read(a) for a in block.outputs]

    def to_array(self, x: Any) -> Any:
        """Return a parameter as an array, which is differentiated like any other value from then on."""
        return (
            _directional_value(self.second)(x.step, x.value, x.direction, x.direction)
            if isinstance(x, _Directional)
            else x
        )

    def _operation(self, operation: ir.Operation, operands: list[Any]) -> list[Any]:
        if operation.kind == "remat":
            return self._remat(operation, operands)
        if operation.kind == "scan":
            return self._scan(operation, operands)
        directional = [i for i, x in enumerate(operands) if isinstance(x, _Directional)]
        if directional:
            outs = self._rearrange(operation, operands)
            if outs is None and len(directional) == 1 and not operands[directional[0]].step.ndim:
                outs = self._apply_linear(operation, operands, directional[0])
            if outs is not None:
                return outs
        return operation.bind(*map(self.to_array, operands))

    def _rearrange(self, operation: ir.Operation, operands: list[Any]) -> list[Any] | None:
        """Return the outputs of an operation that only rearranges parameters, None for any other."""
        primitive, first = operation.primitive, operands[0]
        if primitive is jp.concatenate_p or primitive.name == "stack":
            return self._join(operation, operands)
        if not isinstance(first, _Directional) or any(isinstance(x, _Directional) for x in operands[1:]):
            return None
        out = operation.outputs[0]
        real = ir.is_float(out) and not ir.is_complex(out)  # what is cast to integers has no derivative
        entries = primitive in SAME_ENTRIES and out.aval.size == first.value.size and real
        scaled = primitive in (jp.mul_p, jp.div_p) and ir.scalar(operation.inputs[1]) is not None
        anywhere = scaled or (entries and (primitive in IDENTITIES or primitive is jp.neg_p))
        if anywhere or ((entries or primitive in PARTS) and not first.step.ndim):
            return [first.map(lambda w: operation.bind(w, *operands[1:])[0])]
        if primitive.name == "split" and not first.step.ndim:
            pieces = zip(operation.bind(first.value), operation.bind(first.direction), strict=True)
            return [_Directional(w, v, first.step) for w, v in pieces]
        return None

    @staticmethod
    def _join(operation: ir.Operation, operands: list[Any]) -> list[Any] | None:
        """Return several parameters joined along the first axis as one, such as the layers of a loop."""
        stacked = operation.primitive is not jp.concatenate_p
        axis = operation.params["axis" if stacked else "dimension"]
        if axis != 0 or not all(isinstance(x, _Directional) and not (stacked and x.step.ndim) for x in operands):
            return None
        lengths = [1 if stacked else x.value.shape[0] for x in operands]
        steps = [jnp.broadcast_to(x.step, (n,)) for x, n in zip(operands, lengths, strict=True)]
        value, direction = (
            operation.bind(*parts)[0] for parts in ([x.value for x in operands], [x.direction for x in operands])
        )
        return [_Directional(value, direction, jnp.concatenate(steps))]

    def _apply_linear(self, operation: ir.Operation, operands: list[Any], which: int) -> list[Any] | None:
        """Return the output of an operation that is linear in a parameter, None for any other."""
        w, primitive = operands[which], operation.primitive
        if primitive in BILINEAR and jnp.issubdtype(operation.inputs[1 - which].aval.dtype, jnp.floating):

            def apply(w: jax.Array, x: jax.Array) -> jax.Array:
                return operation.bind(*((w, x) if which == 0 else (x, w)))[0]

            return [_directional_bilinear(apply, self.second)(w.step, w.value, w.direction, operands[1 - which])]
        if primitive is jp.gather_p and which == 0:
            # The values in place of rows that do not exist do not depend on the step.
            filled = dataclasses.replace(operation, params={**operation.params, "fill_value": 0})
            rows, moving = operation.bind(w.value, *operands[1:])[0], filled.bind(w.direction, *operands[1:])[0]
            if operation.params["mode"] != jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
                return [self.to_array(_Directional(rows, moving, w.step))]
            # For indices beyond the table JAX reads the nearest row, but that row gets no gradient.
            dropped = {**filled.params, "mode": jax.lax.GatherScatterMode.FILL_OR_DROP}
            back = dataclasses.replace(operation, params=dropped).bind(w.direction, *operands[1:])[0]
            return [_directional_value(self.second)(w.step, rows, moving, back)]
        return None

    def _remat(self, operation: ir.Operation, operands: list[Any]) -> list[Any]:
        body = operation.body
        assert body is not None

        def run(operands: list[Any]) -> list[Any]:
            return [self.to_array(x) for x in self.block(body, operands)]

        return jax.checkpoint(run, policy=operation.params["policy"], prevent_cse=ir.prevents_cse(operation))(operands)

    def _scan(self, operation: ir.Operation, operands: list[Any]) -> list[Any]:
        body, params = operation.body, operation.params
        assert body is not None
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, length = operands[:first], params["length"]
        xs = [
            dataclasses.replace(x, step=jnp.broadcast_to(x.step, (length,))) if isinstance(x, _Directional) else x
            for x in operands[last:]
        ]

        def step(carry: list[Any], own: list[Any]) -> Any:
            outs = [self.to_array(x) for x in self.block(body, [*consts, *carry, *own])]
            return outs[: last - first], outs[last - first :]

        carry = [self.to_array(x) for x in operands[first:last]]
        after, ys = jax.lax.scan(step, carry, xs, length=length, reverse=params["reverse"], unroll=params["unroll"])
        return [*after, *ys]


def _step_gradients(v: jax.Array, ct: jax.Array, step: jax.Array) -> jax.Array:
    """Return the inner products of v and ct, one for each step."""
    return (jax.vmap(dot)(v, ct) if step.ndim else dot(v, ct)).astype(step.dtype)


def _directional_value(second: bool) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Return (step, w, v, back) -> w + step * v at step 0, with the tangent v, and `back` for v in the backward pass.

    The two differ where JAX's own forward and backward rules do.
    """

    @jax.custom_vjp
    def pair(step: jax.Array, w: jax.Array, v: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
        return w, v

    def forward(step: jax.Array, w: jax.Array, v: jax.Array, back: jax.Array) -> Any:
        return (w, v), (step, back)

    def backward(residual: Any, cts: Any) -> Any:
        step, back = residual
        return _step_gradients(back, cts[0], step), None, None, None

    pair.defvjp(forward, backward)

    @jax.custom_jvp
    def value(step: jax.Array, w: jax.Array, v: jax.Array, back: jax.Array) -> jax.Array:
        return w

    value.defjvp(lambda primals, tangents: pair(*primals))
    return value


def _directional_bilinear(apply: Callable[[jax.Array, jax.Array], jax.Array], second: bool) -> Callable[..., jax.Array]:
    """Return (step, w, v, x) -> apply(w + step * v, x) at step 0, with `apply` bilinear."""

    def value_and_tangent(w: jax.Array, v: jax.Array, x: jax.Array, dx: jax.Array) -> Any:
        of_direction = apply(v, x)
        return (apply(w, x), apply(w, dx) + of_direction), of_direction

    @jax.custom_vjp
    def pair(step: jax.Array, w: jax.Array, v: jax.Array, x: jax.Array, dx: jax.Array) -> Any:
        return value_and_tangent(w, v, x, dx)[0]

    def forward(step: jax.Array, w: jax.Array, v: jax.Array, x: jax.Array, dx: jax.Array) -> Any:
        outs, of_direction = value_and_tangent(w, v, x, dx)
        return outs, (step, w, v, x, dx if second else None, of_direction)

    def backward(residual: Any, cts: Any) -> Any:
        step, w, v, x, dx, of_direction = residual
        ct, ct_of_tangent = cts
        step_gradient, vjp = dot(of_direction, ct), jax.vjp(lambda x: apply(w, x), x)[1]
        if not second:
            return step_gradient.astype(step.dtype), None, None, vjp(ct)[0], None
        (through_direction,) = jax.vjp(lambda x: apply(v, x), x)[1](ct_of_tangent)
        step_gradient = step_gradient + dot(dx, through_direction)
        return step_gradient.astype(step.dtype), None, None, vjp(ct)[0] + through_direction, vjp(ct_of_tangent)[0]

    pair.defvjp(forward, backward)

    @jax.custom_jvp
    def value(step: jax.Array, w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        return apply(w, x)

    @value.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        return pair(*primals, tangents[3])

    return value
