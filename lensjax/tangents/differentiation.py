"""Derivatives along a direction, also of functions that can only be differentiated backwards.

A function with a backward rule of its own (`jax.custom_vjp`) has no forward mode. The pull-back ``u -> J^T u`` is
linear, and the pull-back of that is ``v -> J v``: two passes backwards do what one forwards does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as jp

from lensjax.errors import InputError
from lensjax.tangents.program import ir

NO_REVERSE_MODE = re.compile("Reverse-mode differentiation does not work")
"""What JAX says of a `while_loop`."""


def no_forward_mode(error: Exception) -> bool:
    """Whether JAX raised it because a function has no forward mode."""
    return isinstance(error, TypeError) and "can't apply forward-mode autodiff" in str(error)


def pushed(function: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """Return J v, with J the Jacobian of `function` at x.

    Raises
    ------
    InputError
        If the function's backward rule cannot be differentiated backwards either.
    """

    def forwards(v: Any) -> Any:
        return jax.jvp(function, (x,), (v,))[1]

    def backwards(v: Any) -> Any:
        z, pull = jax.vjp(function, x)
        return jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, z))[1](v)[0]

    return _either(function, x, v, forwards, backwards, "a product with its Jacobian")


def hessian_product(loss: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """Return H v, with H the Hessian of a scalar loss at x: forward over reverse, else reverse over reverse.

    Raises
    ------
    InputError
        If the loss's backward rule cannot be differentiated in either mode.
    """
    gradient = jax.grad(loss)

    def forwards(v: Any) -> Any:
        return jax.jvp(gradient, (x,), (v,))[1]

    def backwards(v: Any) -> Any:
        return jax.vjp(gradient, x)[1](v)[0]  # v^T H, which is H v: it is symmetric

    return _either(loss, x, v, forwards, backwards, "its Hessian")


def sandwich(outputs: Callable[[Any], Any], middle: Callable[[Any, Any], Any], x: Any) -> Callable[[Any], Any]:
    """Return v -> J^T middle(z, J v), with J the Jacobian and z the value of `outputs` at x.

    Raises
    ------
    InputError
        As `pushed`, by what is returned.
    """
    if _own_rules(outputs, x):
        z, pull = jax.vjp(outputs, x)
        return lambda v: pull(middle(z, pushed(outputs, x, v)))[0]
    z, push = jax.linearize(outputs, x)
    transposed = jax.linear_transpose(push, x)
    return lambda v: transposed(middle(z, push(v)))[0]


def _either(
    function: Callable[[Any], Any],
    x: Any,
    v: Any,
    forwards: Callable[[Any], Any],
    backwards: Callable[[Any], Any],
    what: str,
) -> Any:
    if _own_rules(function, x):
        # JAX finds out only when it runs or compiles a program, by an operation that stands for what is missing.
        program = jax.make_jaxpr(forwards)(v)
        if _names(program) & {"custom_lin"}:
            return _twice(what, lambda: backwards(v))
    return forwards(v)


def _own_rules(function: Callable[[Any], Any], x: Any) -> bool:
    """Whether a function has backward rules of its own somewhere; not looked for where Python decides by values."""
    try:
        return ir.holds(jax.make_jaxpr(function)(x), jp.custom_vjp_call_p)
    except jax.errors.ConcretizationTypeError:
        return False


def _names(program: Any) -> set[str]:
    """Return the names of all primitives in a program and those that it calls."""
    return {e.primitive.name for e in program.eqns}.union(*(_names(p) for e in program.eqns for p in ir.called(e)))


def _twice(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"f has a backward rule of its own (jax.custom_vjp), so that {what} needs that rule differentiated, which "
            f"fails: {str(error).splitlines()[0]} Write the rule as plain JAX, or give f by jax.custom_jvp."
        ) from error
