"""Quadratic forms of each parameter from one pass each way, against products with the matrix in float64."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.tangents import hessian_trace
from lensjax.tangents.curvature.quadratic_forms import gauss_newton_quadratic_forms, hessian_quadratic_forms
from support import programs

pytestmark = pytest.mark.usefixtures("quick_to_compile")

FORWARDS = [name for name in programs.PROGRAMS if name != "custom_backward_rule"]  # has no second derivative

WALKS = ("dense_layer", "left_operand", "tied_embedding", "head_in_chunks", "scanned_stack", "stacked_then_scanned",
         "stacked_and_shared_within", "scan_in_a_scan", "branches", "custom_forward_rule", "low_rank_product",
         "disjoint_slices", "experts_by_lookup", "convolution", "rounded_on_the_side", "policy_of_checkpoint",
         "through_complex_numbers", "parameter_without_effect", "region_told_apart_by_input")  # fmt: skip
"""One for each kind of program; the rules for its operations are the same for both matrices."""


def problem(name):
    """Return outputs (N, 2) of the parameters, a loss of outputs, the parameters and a direction."""
    f, shapes, kind, _ = programs.PROGRAMS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    params = {key: jnp.asarray(rng.normal(size=shape) * 0.6) for key, shape in shapes.items()}
    x = jnp.asarray(rng.integers(0, 7, (3, 6)) if kind == "tokens" else rng.normal(size=(3, 5, 4)))
    v = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}
    return jax.vmap(f, in_axes=(None, 0)), params, x, v


def loss_of_outputs(z, x):
    return jnp.sum(jnp.cosh(z - 0.3))


def of_leaves(function, params, *rest):
    structure = jax.tree.structure(params)
    return lambda leaves: function(jax.tree.unflatten(structure, leaves), *rest)


def by_products(product, params, v):
    """Return v_i . (product)_i of each parameter, and a scale for errors: the sum of |v_ij (product)_ij|."""
    terms = [np.asarray(v[key] * product[key]) for key in sorted(params)]
    return [t.sum() for t in terms], sum(np.abs(t).sum() for t in terms)


@pytest.mark.parametrize("name", FORWARDS)
def test_forms_of_the_hessian_are_those_of_its_products(name):
    with jax.enable_x64(True):
        f, params, x, v = problem(name)

        def loss(p):
            return loss_of_outputs(f(p, x), x)

        want, scale = by_products(jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1])(params, v), params, v)
        of = jax.jit(
            lambda p, v: hessian_quadratic_forms(of_leaves(loss, params), jax.tree.leaves(p), jax.tree.leaves(v))
        )
        got = of(params, v)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * scale)
        assert scale > 0


@pytest.mark.parametrize("name", WALKS)
def test_forms_of_the_gauss_newton_matrix_are_those_of_its_products(name):
    with jax.enable_x64(True):
        f, params, x, v = problem(name)
        z, push = jax.linearize(lambda p: f(p, x), params)
        curvature = np.cosh(np.asarray(z) - 0.3)  # of `loss_of_outputs`, a diagonal
        (product,) = jax.linear_transpose(push, params)(curvature * push(v))
        want, scale = by_products(product, params, v)

        def middle(z, dz):
            return jax.jvp(jax.grad(lambda z: loss_of_outputs(z, x)), (z,), (dz,))[1]

        leaves, along = jax.tree.leaves(params), jax.tree.leaves(v)
        got = jax.jit(lambda p, v: gauss_newton_quadratic_forms(of_leaves(f, params, x), middle, p, v))(leaves, along)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * scale)


@jax.custom_vjp
def cubed(x):
    return x**3


cubed.defvjp(lambda x: (x**3, x), lambda x, ct: (3 * x**2 * ct,))


def test_what_has_only_a_backward_rule_is_multiplied_instead():
    """The trace is that of the matrix all the same."""
    with jax.enable_x64(True):
        params, x = {"w": jnp.array([0.5, -1.0, 2.0])}, jnp.arange(1.0, 7.0).reshape(2, 3)

        def loss(p, x):
            return jnp.sum(jax.lax.cond(x[0, 0] > 0, cubed, jnp.sin, p["w"]) * x)

        assert hessian_quadratic_forms(of_leaves(loss, params, x), [params["w"]], [params["w"]]) is None
        assert (
            gauss_newton_quadratic_forms(of_leaves(loss, params, x), lambda z, dz: dz, [params["w"]], [params["w"]])
            is None
        )
        estimate = hessian_trace(loss, params, x, key=jax.random.key(0), probes=1)
        assert estimate.trace == pytest.approx(float(jnp.sum(6 * params["w"] * x)), rel=1e-12)  # a diagonal matrix


def test_a_product_with_integers():
    signs = jnp.asarray([[1, -1, 1], [1, 1, -1]], jnp.int8)

    def loss(leaves):
        return jnp.sum(jnp.sin(jax.lax.dot(leaves[0], signs.T, preferred_element_type=jnp.float32)))

    w, v = jnp.asarray([[0.1, 0.2, 0.3]]), jnp.asarray([[1.0, 2.0, -1.0]])
    product = jax.jvp(jax.grad(lambda w: loss([w])), (w,), (v,))[1]
    np.testing.assert_allclose(hessian_quadratic_forms(loss, [w], [v])[0], jnp.vdot(v, product), rtol=1e-5)


def dots(jaxpr):
    """Return the output shapes of all matrix products in a program and those that it calls."""
    own = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    return own + [shape for inner in jax.extend.core.subjaxprs(jaxpr) for shape in dots(inner)]


def test_no_weight_gradient_is_made():
    """The two products of a weight's gradient are not in the program, and nothing else is."""
    params = [jnp.ones((5, 7)), jnp.ones((7, 11))]
    x = jnp.ones((3, 5))

    def loss(leaves):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ leaves[0]) @ leaves[1]))

    jaxpr = jax.make_jaxpr(functools.partial(hessian_quadratic_forms, loss))(params, params).jaxpr
    shapes = dots(jaxpr)
    assert shapes
    assert not {(5, 7), (7, 5), (7, 11), (11, 7)} & set(shapes)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_large_forms_in_float32(matrix):
    """More than 2^20 weights, activations and table entries, float32 against products in float64."""
    rng = np.random.default_rng(0)
    params = {"e": rng.normal(size=(2100, 512)), "up": rng.normal(size=(512, 1100)) / 22,
              "down": rng.normal(size=(1100, 512)) / 33, "bias": rng.normal(size=512)}  # fmt: skip
    ids = rng.integers(0, 2100, (8, 260))
    v = {name: np.sign(rng.normal(size=a.shape)) for name, a in params.items()}

    def f(p, ids):
        return jnp.tanh(jnp.tanh(p["e"][ids]) @ p["up"]) @ p["down"] + p["bias"]

    def loss(z, ids):
        return jnp.mean(jnp.log(jnp.cosh(z)))

    def middle(z, dz, ids):
        return jax.jvp(jax.grad(lambda z: loss(z, ids)), (z,), (dz,))[1]

    assert min(a.size for name, a in params.items() if name in ("e",)) > 2**20
    with jax.enable_x64(True):
        p, d = jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, v)
        if matrix == "hessian":
            product = jax.jit(lambda p, d: jax.jvp(jax.grad(lambda p: loss(f(p, ids), ids)), (p,), (d,))[1])(p, d)
        else:
            z, push = jax.linearize(lambda p: f(p, ids), p)
            (product,) = jax.linear_transpose(push, p)(middle(z, push(d), ids))
        want, _ = by_products(product, p, d)
    p, d = (jax.tree.leaves(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), t)) for t in (params, v))
    if matrix == "hessian":
        got = jax.jit(functools.partial(hessian_quadratic_forms, of_leaves(lambda q: loss(f(q, ids), ids), params)))(
            p, d
        )
    else:
        outputs = of_leaves(f, params, ids)
        got = jax.jit(lambda p, d: gauss_newton_quadratic_forms(outputs, lambda z, dz: middle(z, dz, ids), p, d))(p, d)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
