"""Shapes, dtypes and finite values of the public functions of tangents, with and without jit; how often they trace."""

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from lensjax import hessian_trace, kernel_dynamics, ntk, ntk_blocks, ntk_features
from lensjax.tangents import gauss_newton_product, gradient_norms, hvp, ntk_operator

N, M, C, WIDTH = 5, 3, 2, 4


def network(params, x):
    """Return two outputs of one example (4,)."""
    return jnp.tanh(x @ params["first"] + params["bias"]) @ params["second"]


def one_output(params, x):
    return network(params, x)[0]


def loss(params, x):
    return (jax.vmap(network, (None, 0))(params, x) ** 2).mean()


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "first": jax.random.normal(keys[0], (WIDTH, 6), dtype),
        "bias": jax.random.normal(keys[1], (6,), dtype),
        "second": jax.random.normal(keys[2], (6, C), dtype),
    }
    return params, jax.random.normal(keys[3], (N, WIDTH), dtype), jax.random.normal(keys[4], (M, WIDTH), dtype)


class KernelShapes(chex.TestCase):
    """What `ntk` promises of its result, for every choice of outputs."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ("full", (N, C, M, C)),
        ("trace", (N, M)),
        ("diagonal", (N, M, C)),
    )
    def test_several_outputs(self, outputs, shape):
        params, x1, x2 = arrays()
        kernel = self.variant(lambda *given: ntk(network, *given, outputs=outputs))(params, x1, x2)
        chex.assert_shape(kernel, shape)
        chex.assert_type(kernel, jnp.float32)
        chex.assert_tree_all_finite(kernel)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("transform", "jacobian", "ntvp")
    def test_one_output(self, method):
        params, x1, _ = arrays()
        kernel = self.variant(lambda *given: ntk(one_output, *given, method=method))(params, x1)
        chex.assert_shape(kernel, (N, N))
        chex.assert_trees_all_close(kernel, kernel.T, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_layers_and_norms(self):
        params, x1, _ = arrays()
        layers = self.variant(lambda *given: ntk(one_output, *given, by_layer="parameter"))(params, x1)
        norms = self.variant(lambda *given: gradient_norms(one_output, *given))(params, x1)
        assert set(layers) == set(params)
        chex.assert_shape(list(layers.values()), (N, N))
        chex.assert_shape(norms, (N,))
        chex.assert_trees_all_close(norms**2, jnp.diagonal(sum(layers.values())), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_operators(self):
        params, x1, x2 = arrays()
        operator = ntk_operator(network, params, x1, x2)
        product = self.variant(lambda v: operator @ v)(jnp.ones((M, C)))
        chex.assert_shape(product, (N, C))
        chex.assert_tree_all_finite(product)


class CurvatureShapes(chex.TestCase):
    """Products with curvature have the tree of the parameters."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_products(self):
        params, x, _ = arrays()
        product = self.variant(lambda p, v: hvp(loss, p, v, x))(params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(product, params)

        def outputs(params, x):
            return jax.vmap(network, (None, 0))(params, x)

        def squares(y, x):
            return (y**2).mean()

        product = self.variant(lambda p, v: gauss_newton_product(outputs, squares, p, v, x))(params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(product, params)
        chex.assert_tree_all_finite(product)


def test_blocks_and_features_have_their_shapes():
    params, x1, x2 = arrays()
    blocks = ntk_blocks(network, params, x1, x2, block=2)
    chex.assert_shape(blocks, (N, C, M, C))
    features = ntk_features(one_output, params, x1, width=8, key=jax.random.key(1))
    chex.assert_shape(features, (N, 8))
    chex.assert_tree_all_finite((blocks, features))


def test_estimates_are_numbers_with_errors():
    params, x, _ = arrays()
    estimate = hessian_trace(loss, params, x, key=jax.random.key(0), probes=4)
    chex.assert_scalar(estimate.trace)
    chex.assert_scalar_positive(estimate.standard_error)
    assert set(estimate.by_layer) == set(params)
    chex.assert_tree_all_finite(estimate.by_layer)


def test_dynamics_follow_the_kernels_axes():
    params, x1, _ = arrays()
    dynamics = kernel_dynamics(ntk(network, params, x1), outputs=jnp.ones((N, C)))
    chex.assert_shape(dynamics.loss(10.0, 1e-3), ())
    chex.assert_tree_all_finite(dynamics.loss(jnp.array([0.0, 1.0, jnp.inf]), 1e-3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_are_at_least_float32(dtype):
    params, x1, _ = arrays(dtype)
    chex.assert_type(ntk(one_output, params, x1), jnp.float32)


def test_later_calls_of_the_same_shapes_trace_nothing():
    params, x1, _ = arrays()
    executed = []

    def counted(params, x):
        executed.append(1)
        return one_output(params, x)

    first = ntk(counted, params, x1)
    guarded = chex.assert_max_traces(lambda params, x: one_output(params, x), n=len(executed))
    for scale in (1.0, 2.0, 3.0):
        again = ntk(guarded, jax.tree.map(lambda p, s=scale: s * p, params), x1)
        chex.assert_equal_shape([first, again])
    chex.assert_trees_all_close(ntk(guarded, params, x1), first, rtol=1e-5)
    # With other shapes, it would be traced anew.
    with pytest.raises(AssertionError, match=r"Function .* is traced"):
        ntk(guarded, params, x1[:2])
