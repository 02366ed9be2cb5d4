"""Random features: exact projections of dense Jacobians, unbiased, and an error that is reported truthfully."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lensjax_kernels import head_cross_entropy

from lensjax import InputError
from lensjax.tangents import ntk, ntk_features, sketch_error
from lensjax.tangents.program import contributions
from lensjax.tangents.program.reductions import TensorSketch


def f(p, ids):
    """Every kind of contribution: tied fused head, stack under a scan, loop constant, lookup, materialised bias."""
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
            # Biased by a lost or doubled contribution, the mean would be off by far more than its standard error.
            assert np.abs(error.mean(0) / standard_error).max() < 4.5
            spread[width] = error.std()
        assert 2.5 < spread[16] / spread[256] < 6.5  # about sqrt(256 / 16)


@pytest.mark.parametrize("tokens", [1, 24])  # by Fourier transforms, and by products
def test_error_falls_with_any_width_also_for_wide_layers_and_gradients_of_low_rank(tokens):
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(256, 256)) / 16, np.float32) for _ in range(2)]
    x = jnp.asarray(rng.normal(size=(12, tokens, 256)), np.float32)

    def network(w, x):
        return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]).sum()

    for width in (256, 1009, 1024):  # a prime, too
        errors = []
        for seed in range(4):
            phi = ntk_features(network, params, x, width=width, key=jax.random.key(seed))
            errors.append(sketch_error(network, params, x, phi, key=jax.random.key(9)).diagonal)
        assert 0.6 < np.sqrt(np.mean(np.square(errors)) * width / 2) < 1.5


@pytest.mark.parametrize("width", [31, 8])  # more than rows and columns, and fewer
@pytest.mark.parametrize("outputs", [(1, 1), (1, 3), (3, 1)])
def test_both_methods_of_sketching_are_the_sum_of_signed_entries(width, outputs, monkeypatch):
    with jax.enable_x64(True):
        rng, key, reduction = np.random.default_rng(5), jax.random.key(4), TensorSketch(5, width)
        left, right = rng.normal(size=(5, outputs[0], 3, 12)), rng.normal(size=(5, outputs[1], 3, 9))
        rows, row_signs = map(np.asarray, reduction.hash_entries(key, 12, "left", np.float64))
        columns, column_signs = map(np.asarray, reduction.hash_entries(key, 9, "right", np.float64))
        gradient = np.einsum("bctd,bkte->ckbde", left, right).reshape(max(outputs), 5, 12, 9)
        want = np.zeros((max(outputs), 5, width))
        for i, j in np.ndindex(12, 9):
            want[:, :, (rows[i] + columns[j]) % width] += row_signs[i] * column_signs[j] * gradient[:, :, i, j]
        for transformed, memory in ((1e9, 2**25), (0, 2**25), (0, 1), (0, 2 * 8 * 3 * 4 * width)):
            monkeypatch.setattr(contributions, "TRANSFORMED", transformed)
            monkeypatch.setattr(contributions, "OUTER_BYTES", memory)
            got = jax.jit(lambda a, g: contributions.sketch_contribution(a, g, reduction, key))(left, right)
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_chunks_of_the_vocabulary_do_not_change_the_features_of_a_head(monkeypatch):
    with jax.enable_x64(True):
        rng = np.random.default_rng(6)
        hidden, weight = jnp.asarray(rng.normal(size=(3, 4, 5))), jnp.asarray(rng.normal(size=(301, 5)))
        labels = jnp.asarray(rng.integers(0, 301, (3, 4))).at[0, 1].set(-100)
        saved = (hidden, labels, jax.nn.logsumexp(hidden @ weight.T, axis=-1), None)
        cotangents = jnp.asarray(rng.normal(size=(3, 2, 4)))

        def features_of_head():
            # Compiled anew: chunks are chosen while tracing.
            compiled = jax.jit(lambda *a: contributions.head_contribution(*a[:3], TensorSketch(3, 16), a[3]))
            return compiled(saved, weight, cotangents, jax.random.key(0))

        whole = features_of_head()
        monkeypatch.setattr(contributions, "LOGIT_BYTES", 1)
        parts = features_of_head()
        left = jax.nn.softmax(hidden @ weight.T) - jax.nn.one_hot(labels, 301)
        left = jnp.where(labels[..., None] < 0, 0, left)[:, None]
        right = cotangents[..., None] * hidden[:, None]
        want = jax.jit(lambda a, g: contributions.sketch_contribution(a, g, TensorSketch(3, 16), jax.random.key(0)))(
            left, right
        )
        for got in (whole, parts):
            np.testing.assert_allclose(got[0], cotangents[..., None] * (left @ weight), rtol=1e-11, atol=1e-11)
            np.testing.assert_allclose(got[1], want, rtol=1e-11, atol=1e-11)


def test_all_uses_of_a_parameter_have_the_same_projection():
    """The features of a sum of two uses with the same gradient are twice those of one, also where one transposes."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(7)
        w, c = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(4, 6, 3)))
        ids = jnp.asarray(rng.integers(0, 5, (4, 6)))

        def looked_up(w, x):
            return (w[x[0]] * x[1]).sum()

        def multiplied(w, x):
            return ((jax.nn.one_hot(x[0], 5) @ w) * x[1]).sum()

        def transposed(w, x):
            return ((x[1] @ w.T) * jax.nn.one_hot(x[0], 5)).sum()

        def features(f):
            return ntk_features(f, w, (ids, c), width=16, key=jax.random.key(2))

        want = 2 * features(looked_up)
        for one, other in ((looked_up, multiplied), (looked_up, transposed), (multiplied, transposed)):
            got = features(lambda w, x, one=one, other=other: one(w, x) + other(w, x))
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_features_are_linear_in_the_gradient():
    """Scaling an example's output scales its features: no contribution is quadratic or lost."""
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
