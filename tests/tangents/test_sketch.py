"""Random features: exact projections of dense Jacobians, unbiased, and an error that is reported truthfully."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lensjax_kernels import head_cross_entropy

from lensjax import InputError
from lensjax.tangents import ntk, ntk_features, sketch_error


def f(p, ids):
    """Every way a share comes about: tied fused head, stack under a scan, loop constant, lookup, materialised bias."""
    h = p["e"][ids] + p["pos"][jnp.arange(6)]
    h = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w + p["b"]), None), h, jnp.stack([p["u"], 2 * p["v"]]))[0]
    h = jax.lax.fori_loop(0, 2, lambda i, c: jnp.sin(c @ p["r"]), h)
    return jax.jit(head_cross_entropy)(h, p["e"], ids[::-1]).sum()


def inputs(n=6, dtype=np.float64):
    rng = np.random.default_rng(2)
    shapes = {"e": (9, 4), "pos": (6, 4), "u": (4, 4), "v": (4, 4), "r": (4, 4), "b": (4,)}
    return {k: jnp.asarray(rng.normal(size=s) * 0.7, dtype) for k, s in shapes.items()}, jnp.asarray(
        rng.integers(0, 9, (n, 6))
    )


def test_features_are_unbiased_and_their_error_falls_with_width():
    with jax.enable_x64(True):
        p, x = inputs()
        exact = np.asarray(ntk(f, p, x))
        scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        spread = {}
        for width in (16, 256):
            kernels = []
            for seed in range(40):
                phi = np.asarray(ntk_features(f, p, x, width=width, key=jax.random.key(seed)))
                assert phi.shape == (6, width)
                kernels.append(phi @ phi.T / scale)
            error = np.stack(kernels) - exact / scale
            standard_error = error.std(0) / np.sqrt(40)
            # Biased by a lost or doubled share, the mean would be off by far more than its standard error.
            assert np.abs(error.mean(0) / standard_error).max() < 4.5
            spread[width] = error.std()
        assert 2.5 < spread[16] / spread[256] < 6.5  # about sqrt(256 / 16)


def test_features_are_linear_in_the_gradient():
    """Scaling an example's output scales its features: no share is quadratic or lost on the way."""
    with jax.enable_x64(True):
        p, x = inputs()
        key = jax.random.key(1)
        phi = ntk_features(f, p, x, width=32, key=key)
        both = ntk_features(lambda p, ids: f(p, ids) * jnp.asarray([1.0, -3.0]), p, x, width=32, key=key)
        assert both.shape == (6, 2, 32)
        np.testing.assert_allclose(both[:, 0], phi, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(both[:, 1], -3 * phi, rtol=1e-10, atol=1e-10)


def test_batches_do_not_change_the_features():
    with jax.enable_x64(True):
        p, x = inputs()
        whole = ntk_features(f, p, x, width=32, key=jax.random.key(1))
        parts = ntk_features(f, p, x, width=32, key=jax.random.key(1), batch=4)
        np.testing.assert_allclose(parts, whole, rtol=1e-10, atol=1e-12)


def test_reported_error_is_that_of_the_kernels():
    with jax.enable_x64(True):
        p, x = inputs()
        phi = ntk_features(f, p, x, width=64, key=jax.random.key(0))
        error = sketch_error(f, p, x, phi, key=jax.random.key(3), examples=100)
        exact, sketched = np.asarray(ntk(f, p, x)), np.asarray(phi @ phi.T)
        wrong = (sketched - exact) / np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        off = wrong[~np.eye(6, dtype=bool)]
        want = (np.linalg.norm(sketched - exact) / np.linalg.norm(exact), np.sqrt(np.mean(np.diag(wrong) ** 2)),
                np.sqrt(np.mean(off**2)), 6)  # fmt: skip
        got = (error.relative, error.diagonal, error.off_diagonal, error.examples)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        # The features of a matrix that is exactly the kernel have no error.
        root = np.linalg.cholesky(exact)
        assert sketch_error(f, p, x, root, key=jax.random.key(3)).relative < 1e-12


def test_bad_input_is_named():
    p, x = inputs(dtype=np.float32)
    with pytest.raises(InputError, match="width=2 must be at least 4"):
        ntk_features(f, p, x, width=2, key=jax.random.key(0))
    with pytest.raises(InputError, match=r"features of shape \(3, 8\) do not belong to 6 examples"):
        sketch_error(f, p, x, np.zeros((3, 8)), key=jax.random.key(0))
