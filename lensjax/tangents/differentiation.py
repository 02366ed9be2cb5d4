"""Jacobian-, Hessian- and Gauss-Newton-vector products, also of functions that have reverse mode only.

A function with a `jax.custom_vjp` has no forward mode. The vector-Jacobian product ``u -> J^T u`` is linear, and its
own vector-Jacobian product is ``v -> J v``: reverse mode twice computes what forward mode does.
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
"""The message of JAX's error for a `while_loop`."""


def no_forward_mode(error: Exception) -> bool:
    """Whether JAX raised the error because a function has no forward mode."""
    return isinstance(error, TypeError) and "can't apply forward-mode autodiff" in str(error)


def jvp(function: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """Return J v, with J the Jacobian of `function` at x.

    Raises
    ------
    InputError
        If the function's backward rule has no reverse mode either.
    """

    def forward(v: Any) -> Any:
        return jax.jvp(function, (x,), (v,))[1]

    def reverse(v: Any) -> Any:
        z, vjp = jax.vjp(function, x)
        return jax.vjp(lambda u: vjp(u)[0], jax.tree.map(jnp.zeros_like, z))[1](v)[0]

    return _forward_or_reverse(function, x, v, forward, reverse, "a product with its Jacobian")


def hessian_product(loss: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """Return H v, with H the Hessian of a scalar loss at x: forward over reverse, else reverse over reverse.

    Raises
    ------
    InputError
        If the loss's backward rule cannot be differentiated in either mode.
    """
    gradient = jax.grad(loss)

    def forward(v: Any) -> Any:
        return jax.jvp(gradient, (x,), (v,))[1]

    def reverse(v: Any) -> Any:
        return jax.vjp(gradient, x)[1](v)[0]  # v^T H, which is H v: it is symmetric

    return _forward_or_reverse(loss, x, v, forward, reverse, "its Hessian")


def gauss_newton_map(
    outputs: Callable[[Any], Any], output_hvp: Callable[[Any, Any], Any], x: Any
) -> Callable[[Any], Any]:
    """Return v -> J^T output_hvp(z, J v), with J the Jacobian and z the value of `outputs` at x.

    Raises
    ------
    InputError
        As `jvp`, when the returned function is called.
    """
    if _has_custom_vjp(outputs, x):
        z, vjp = jax.vjp(outputs, x)
        return lambda v: vjp(output_hvp(z, jvp(outputs, x, v)))[0]
    z, linear = jax.linearize(outputs, x)
    transposed = jax.linear_transpose(linear, x)
    return lambda v: transposed(output_hvp(z, linear(v)))[0]


def _forward_or_reverse(
    function: Callable[[Any], Any],
    x: Any,
    v: Any,
    forward: Callable[[Any], Any],
    reverse: Callable[[Any], Any],
    what: str,
) -> Any:
    if _has_custom_vjp(function, x):
        # JAX raises only when it runs or compiles a program: the missing rule is an operation of its own in there.
        program = jax.make_jaxpr(forward)(v)
        if _primitive_names(program) & {"custom_lin"}:
            return _reverse_over_reverse(what, lambda: reverse(v))
    return forward(v)


def _has_custom_vjp(function: Callable[[Any], Any], x: Any) -> bool:
    """Whether a function has a `jax.custom_vjp` in it; False where it branches on values and cannot be traced."""
    try:
        return ir.holds(jax.make_jaxpr(function)(x), jp.custom_vjp_call_p)
    except jax.errors.ConcretizationTypeError:
        return False


def _primitive_names(program: Any) -> set[str]:
    """Return the names of all primitives in a program and in those that it calls."""
    return {e.primitive.name for e in program.eqns}.union(
        *(_primitive_names(p) for e in program.eqns for p in ir.called(e))
    )


def _reverse_over_reverse(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"f has a backward rule of its own (jax.custom_vjp), so that {what} needs that rule differentiated, which "
            f"fails: {str(error).splitlines()[0]} Write the rule as plain JAX, or give f by jax.custom_jvp."
        ) from error
