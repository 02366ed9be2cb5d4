"""Functions without a transformation or without forward mode: another method, and a report that says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

from lensjax import InputError
from lensjax.tangents import (
    Composed,
    curvature_operator,
    explain,
    gradient_norms,
    hessian_trace,
    hvp,
    ntk,
    ntk_features,
    ntk_operator,
)


def dense(f, w, x):
    """Return the kernel from gradients computed one after the other."""
    gradients = jnp.stack([jax.grad(f)(w, one).ravel() for one in x])
    return gradients @ gradients.T


def test_an_operation_that_cannot_be_mapped_over_examples():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x = jnp.asarray(rng.normal(size=(3, 4, 5))), jnp.asarray(rng.normal(size=(4, 6, 4)))

        def f(w, rows):
            return jnp.sum(jnp.tanh(jax.lax.ragged_dot(rows, w, jnp.array([2, 1, 3]))))

        want = dense(f, w, x)
        kernel, report = ntk(f, w, x, return_report=True)
        np.testing.assert_allclose(kernel, want, rtol=1e-12)
        assert report.method == "jacobian"
        assert "cannot be transformed, NotImplementedError: ragged_dot" in report.reason
        assert explain(f, w, x).reason == report.reason
        np.testing.assert_allclose(gradient_norms(f, w, x) ** 2, jnp.diag(want), rtol=1e-12)
        squares = [jnp.sum(ntk_features(f, w, x, width=128, key=jax.random.key(s)) ** 2, 1) for s in range(3)]
        np.testing.assert_allclose(squares, 3 * [jnp.diag(want)], rtol=1e-12)  # more features than parameters
        with pytest.raises(InputError, match=r"cannot map over examples .*choose method='auto' or 'jacobian'"):
            ntk(f, w, x, method="transform")


def test_an_ordinary_differential_equation_whose_rule_closes_over_arrays():
    def f(w, start):
        return odeint(lambda y, t, w: jnp.tanh(y @ w), start, jnp.array([0.0, 1.0]), w)[-1].sum()

    w, x = jnp.full((4, 4), 0.3), jnp.arange(12.0).reshape(3, 4) / 10
    want = dense(f, w, x)
    for method in ("auto", "jacobian", "ntvp"):
        np.testing.assert_allclose(ntk(f, w, x, method=method), want, rtol=1e-4)


def own_rule(calls_itself):
    """Return sin(x) y with a rule for its gradient that is written as in JAX's guide, or without calling itself."""

    @jax.custom_vjp
    def f(x, y):
        return jnp.sin(x) * y

    def forward(x, y):
        return (f(x, y) if calls_itself else jnp.sin(x) * y), (jnp.cos(x), jnp.sin(x), y)

    f.defvjp(forward, lambda saved, g: (saved[0] * g * saved[2], saved[1] * g))
    return f


@pytest.mark.parametrize("calls_itself", [False, True])
def test_curvature_of_a_function_with_a_backward_rule_alone(calls_itself):
    with jax.enable_x64(True):
        f, w = own_rule(calls_itself), jnp.array([0.3, -0.7, 0.2])
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
        loss = Composed(lambda w, x: f(x @ w, x.sum(1)), lambda z, x: (z**2).mean())

        def plain(w):
            return ((jnp.sin(x @ w) * x.sum(1)) ** 2).mean()

        hessian, jacobian = jax.hessian(plain)(w), jax.jacobian(lambda w: jnp.sin(x @ w) * x.sum(1))(w)
        np.testing.assert_allclose(hvp(loss, w, w, x), hessian @ w, rtol=1e-10)
        np.testing.assert_allclose(jax.jit(lambda v: hvp(loss, w, v, x))(w), hessian @ w, rtol=1e-10)
        for matrix, want in (("hessian", hessian), ("gauss_newton", jacobian.T @ jacobian / 3)):
            operator = curvature_operator(loss, w, x, matrix=matrix)
            np.testing.assert_allclose(jnp.stack([operator @ e for e in jnp.eye(3)]), want, rtol=1e-8, atol=1e-12)
            estimate = hessian_trace(loss, w, x, key=jax.random.key(0), probes=64, matrix=matrix)
            assert abs(estimate.trace - jnp.trace(want)) < 4 * estimate.standard_error
        kernel = dense(lambda w, one: f(one @ w, one.sum()), w, x)
        operator = ntk_operator(lambda w, one: f(one @ w, one.sum()), w, x)
        np.testing.assert_allclose(operator.dense(), kernel, rtol=1e-10, atol=1e-14)


def test_a_rule_that_cannot_be_differentiated_at_all_says_so():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    def backward(x, g):
        return (jax.lax.while_loop(lambda c: c[1] < 1, lambda c: (c[0] * jnp.cos(x), c[1] + 1), (g, 0))[0],)

    f.defvjp(lambda x: (f(x), x), backward)
    with pytest.raises(InputError, match=r"its Hessian needs that rule differentiated, which fails: .*jax.custom_jvp"):
        hvp(lambda w: f(w).sum() ** 2, jnp.ones(3), jnp.ones(3))
