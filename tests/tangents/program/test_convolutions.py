"""Kernels, norms and features of programs with convolutions, against dense Jacobians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.tangents import explain, gradient_norms, ntk, ntk_features
from lensjax.tangents.program import contributions
from support import convolution_programs as programs


def reference(name):
    """Return f, parameters and examples in float64, and the dense Jacobian (N, 2, P)."""
    f, shapes, expected = programs.PROGRAMS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    params = {key: jnp.asarray(rng.normal(size=shape) * 0.6) for key, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 5, 4)))
    jacobians = jax.jit(jax.vmap(jax.jacrev(f), in_axes=(None, 0)))(params, x)
    return f, params, x, np.concatenate([np.reshape(j, (4, 2, -1)) for j in jacobians.values()], 2), expected


@pytest.mark.parametrize("patches", [2**28, 4000])  # all at once, and some examples at a time
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_kernels_and_norms_are_those_of_dense_jacobians(name, patches, quick_to_compile, monkeypatch):
    monkeypatch.setattr(contributions, "PATCH_BYTES", patches)
    with jax.enable_x64(True):
        f, params, x, jacobian, expected = reference(name)
        want = np.einsum("icp,jkp->icjk", jacobian, jacobian)
        scale = np.abs(want).max()
        np.testing.assert_allclose(ntk(f, params, x, method="transform"), want, rtol=0, atol=1e-12 * scale)
        one = ntk(lambda p, e: f(p, e)[1], params, x[:1], x[1:], method="transform")
        np.testing.assert_allclose(one, want[:1, 1, 1:, 1], rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(gradient_norms(f, params, x) ** 2, np.einsum("icic->ic", want), rtol=1e-11)
        report = explain(f, params, x, method="transform")
        assert {p: t.how for t in report.treatments for p in t.parameters} == expected


@pytest.mark.parametrize("name", ["plain", "grouped", "applied_twice", "a_product_and_a_convolution_of_length_one"])
def test_features_are_unbiased_and_do_not_depend_on_the_batch(name, quick_to_compile):
    with jax.enable_x64(True):
        f, params, x, jacobian, _ = reference(name)
        found = [ntk_features(f, params, x, width=64, key=jax.random.key(seed)) for seed in range(40)]
        square = np.asarray([np.sum(np.square(phi), axis=-1) for phi in found])
        error = (square.mean(0) - np.sum(jacobian**2, 2)) / (square.std(0) / np.sqrt(40))
        assert np.abs(error).max() < 4.5
        again = ntk_features(f, params, x, width=64, key=jax.random.key(0), batch=3)
        np.testing.assert_allclose(again, found[0], rtol=1e-10, atol=1e-12)
