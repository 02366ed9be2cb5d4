"""Linearised training against matrix exponentials, real gradient descent of linear and of wide models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lensjax import InputError
from lensjax.tangents import kernel_dynamics, ntk


def system(n=6, m=4, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    train, test = (rng.normal(size=(k, rank or n + 3)) for k in (n, m))
    return train @ train.T, test @ train.T, rng.normal(size=n), rng.normal(size=n), rng.normal(size=m), (train, test)


def test_against_the_matrix_exponential():
    with jax.enable_x64(True):
        kernel, cross, outputs, targets, elsewhere, _ = system()
        dynamics = kernel_dynamics(kernel, outputs, targets)
        residual = outputs - targets
        for t in (0.0, 0.3, 7.0, 1e4):
            decay = scipy.linalg.expm(-0.02 * kernel * t)
            np.testing.assert_allclose(dynamics.residual(t, 0.02), decay @ residual, rtol=1e-9, atol=1e-12)
            F = np.sum((decay @ residual) ** 2)
            np.testing.assert_allclose(dynamics.residual_norm(t, 0.02), F, rtol=1e-9, atol=1e-20)
            np.testing.assert_allclose(dynamics.loss(t, 0.02), F / 2, rtol=1e-9, atol=1e-20)
            moved = cross @ np.linalg.solve(kernel, (np.eye(6) - decay) @ residual)
            np.testing.assert_allclose(dynamics.predict(t, cross, elsewhere, 0.02), elsewhere - moved, rtol=1e-9)
        times = jnp.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
        assert dynamics.residual(times).shape == (2, 3, 6)
        assert dynamics.predict(times, cross, elsewhere).shape == (2, 3, 4)
        np.testing.assert_allclose(dynamics.residual(times)[1, 0], dynamics.residual(3.0))
        # An elementwise exponential, the slip of the released code, is something else.
        wrong = np.sum((np.exp(-0.02 * kernel * 0.3) @ residual) ** 2)
        assert abs(wrong / dynamics.residual_norm(0.3, 0.02) - 1) > 0.5


@pytest.mark.parametrize("rank", [None, 3])
def test_discrete_steps_are_gradient_descent_of_a_linear_model(rank):
    with jax.enable_x64(True):
        kernel, cross, outputs, targets, elsewhere, (train, test) = system(rank=rank)
        dynamics = kernel_dynamics(kernel, outputs, targets)
        rate = 0.9 * dynamics.largest_stable_rate()  # some factors 1 - eta lam are negative
        weights = np.zeros(train.shape[1])
        for t in range(12):
            now = outputs + train @ weights - targets
            np.testing.assert_allclose(dynamics.residual(t, rate, discrete=True), now, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(dynamics.residual_norm(t, rate, discrete=True), now @ now, rtol=1e-8)
            np.testing.assert_allclose(
                dynamics.predict(t, cross, elsewhere, rate, discrete=True), elsewhere + test @ weights, rtol=1e-7
            )
            weights = weights - rate * train.T @ now


def test_many_small_discrete_steps_in_float32():
    eigenvalues, t = np.array([1e-6, 1e-4, 0.03]), np.array([10.0, 1e4, 1e6])
    dynamics = kernel_dynamics(np.diag(eigenvalues), np.ones(3))
    log_decay = t[:, None] * np.log1p(-eigenvalues)
    np.testing.assert_allclose(dynamics.residual(t, discrete=True), np.exp(log_decay), rtol=1e-4, atol=1e-30)
    gain = -np.expm1(log_decay) / eigenvalues
    np.testing.assert_allclose(dynamics.change(t, np.eye(3), discrete=True), -gain, rtol=1e-4)


def test_singular_kernels_keep_what_they_cannot_learn():
    with jax.enable_x64(True):
        kernel, cross, outputs, targets, elsewhere, (train, _) = system(rank=3)
        dynamics = kernel_dynamics(kernel, outputs, targets)
        residual = outputs - targets
        stays = residual - train @ np.linalg.pinv(train) @ residual
        np.testing.assert_allclose(dynamics.residual(1e6), stays, atol=1e-6)
        solved = elsewhere - cross @ np.linalg.pinv(kernel, rcond=1e-10) @ residual
        np.testing.assert_allclose(dynamics.predict(1e6, cross, elsewhere), solved, rtol=1e-6, atol=1e-6)
        nothing = kernel_dynamics(np.zeros((6, 6)), outputs, targets)
        np.testing.assert_allclose(nothing.predict(3.0, np.zeros_like(cross), elsewhere, 0.5), elsewhere)
        with pytest.raises(InputError, match="cross_kernel is not zero, but"):
            nothing.predict(3.0, cross, elsewhere, 0.5)
        assert nothing.largest_stable_rate() == np.inf


@pytest.mark.parametrize("rate", [0.0, 1e-6])  # added to the weights of the network: repeats that nearly are
def test_repeated_examples_with_other_labels_in_float32(rate):
    """Gradient flow in the space of the weights by a singular value decomposition of float64 Jacobians."""
    rng = np.random.default_rng(0)
    distinct, other = rng.normal(size=(12, 3)), rng.normal(size=(5, 3))
    x = np.concatenate([distinct, distinct[:4] * (1 + rate)])
    w = {"a": rng.normal(size=(3, 64)), "b": rng.normal(size=64) / 8}

    def f(w, one):
        return jnp.tanh(one @ w["a"]) @ w["b"]

    def jacobian(x):
        hidden = np.tanh(x @ w["a"])
        return np.concatenate([np.einsum("ni,nj->nij", x, (1 - hidden**2) * w["b"]).reshape(len(x), -1), hidden], 1)

    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), w)
    train, test = jnp.asarray(x, jnp.float32), jnp.asarray(other, jnp.float32)
    start, elsewhere = np.tanh(x @ w["a"]) @ w["b"], np.tanh(other @ w["a"]) @ w["b"]
    y = np.sin(x.sum(1))
    y[12:] = y[:4] + np.array([0.3, -0.2, 0.1, 0.4])
    left, values, right = np.linalg.svd(jacobian(x), full_matrices=False)
    kept = values > 1e-4 * values[0]
    cross = ntk(f, narrow, test, train)
    dynamics = kernel_dynamics(ntk(f, narrow, train), start, y)
    assert int(dynamics.resolved.sum()) == 12
    for t in (1e2, 1e4, 1e7, 1e10, np.inf):
        gone = -np.expm1(np.where(kept, -0.01 * values**2, 0.0) * (1e300 if t == np.inf else t))
        moved = (jacobian(other) @ right.T) @ (np.where(kept, gone / values, 0) * (left.T @ (start - y)))
        np.testing.assert_allclose(dynamics.predict(t, cross, elsewhere, 0.01), elsewhere - moved, atol=1e-4)
        left_over = start - y - left @ (gone * (left.T @ (start - y)))
        np.testing.assert_allclose(dynamics.residual(t, 0.01), left_over, atol=1e-4)
        discrete = dynamics.predict(t, cross, elsewhere, 1e-4, discrete=True)
        if t > 1e9:
            np.testing.assert_allclose(discrete, elsewhere - moved, atol=1e-4)


def test_a_large_kernel_in_float32():
    """A kernel of more than 2^20 entries against float64."""
    n, m = 1040, 7
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(k, 64)) / 8 for k in (n, m))
    kernel, cross = train @ train.T + 0.01 * np.eye(n), test @ train.T
    outputs, elsewhere = rng.normal(size=n), rng.normal(size=m)
    values, vectors = np.linalg.eigh(kernel)
    dynamics = kernel_dynamics(kernel, outputs)
    assert dynamics.residual(1.0).dtype == jnp.float32
    assert kernel.size > 2**20
    for t in (0.1, 3.0, 100.0):
        decay = np.exp(-0.02 * values * t)
        want = vectors @ (decay * (vectors.T @ outputs))
        np.testing.assert_allclose(dynamics.residual(t, 0.02), want, atol=1e-5 * np.abs(outputs).max())
        np.testing.assert_allclose(dynamics.residual_norm(t, 0.02), want @ want, rtol=1e-5)
        moved = cross @ (vectors @ ((1 - decay) / values * (vectors.T @ outputs)))
        np.testing.assert_allclose(dynamics.predict(t, cross, elsewhere, 0.02), elsewhere - moved, atol=1e-4)


def test_several_outputs_per_example():
    with jax.enable_x64(True):
        kernel, cross, outputs, targets, elsewhere, _ = system(n=6, m=4)
        flat = kernel_dynamics(kernel, outputs, targets)
        shaped = kernel_dynamics(kernel.reshape(3, 2, 3, 2), outputs.reshape(3, 2), targets.reshape(3, 2))
        np.testing.assert_allclose(shaped.residual(0.1).ravel(), flat.residual(0.1))
        got = shaped.predict(0.1, cross.reshape(2, 2, 3, 2), elsewhere.reshape(2, 2))
        np.testing.assert_allclose(got.ravel(), flat.predict(0.1, cross, elsewhere))


@pytest.mark.parametrize("which", ["residual_norm", "predict"])
def test_derivatives_in_time_and_learning_rate(which):
    with jax.enable_x64(True):
        kernel, cross, outputs, targets, elsewhere, _ = system(rank=3)
        dynamics = kernel_dynamics(kernel, outputs, targets)

        def value(t, rate, discrete=False):
            if which == "residual_norm":
                return dynamics.residual_norm(t, rate, discrete=discrete)
            return jnp.sum(dynamics.predict(t, cross, elsewhere, rate, discrete=discrete) ** 2)

        got = jax.grad(value, (0, 1))(1.7, 0.04)
        h = 1e-5
        want = [
            (value(1.7 + h, 0.04) - value(1.7 - h, 0.04)) / (2 * h),
            (value(1.7, 0.04 + h) - value(1.7, 0.04 - h)) / (2 * h),
        ]
        np.testing.assert_allclose(got, want, rtol=1e-6)
        settled = kernel_dynamics(kernel, outputs, outputs)
        assert jax.grad(lambda t: settled.residual_norm(t, 0.04))(1.7) == 0
        step = jax.grad(lambda rate: value(3, rate, True))(0.04)
        np.testing.assert_allclose(step, (value(3, 0.04 + h, True) - value(3, 0.04 - h, True)) / (2 * h), rtol=1e-6)


def test_negative_eigenvalues_are_said_and_treated_as_asked():
    with jax.enable_x64(True):
        q = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
        kernel = (q * [-0.5, 0.0, 1.0, 2.0]) @ q.T
        residual = q @ [1.0, 2.0, 3.0, 4.0]
        clipped, kept = (kernel_dynamics(kernel, residual, negative=how) for how in ("clip", "keep"))
        for dynamics in (clipped, kept):
            assert dynamics.negative.count in (1, 2)  # the zero may round either way
            assert dynamics.negative.smallest == pytest.approx(-0.5)
            assert dynamics.negative.relative == pytest.approx(0.25)
            assert 1 / 30 - 1e-9 < dynamics.negative.share < 5 / 30 + 1e-9
        assert (clipped.negative.clipped, kept.negative.clipped) == (True, False)
        others = 4 + 9 * np.exp(-2 * 3.0) + 16 * np.exp(-4 * 3.0)
        assert float(clipped.residual_norm(3.0)) == pytest.approx(1 + others)
        assert float(kept.residual_norm(3.0)) == pytest.approx(np.exp(2 * 0.5 * 3.0) + others)
        with pytest.raises(InputError, match=r"negative eigenvalues, down to -0\.5"):
            kernel_dynamics(kernel, residual, negative="refuse")


def trained(width, steps=40, seed=0):
    """Largest relative gap between real and linearised losses, train and test, of a network of one hidden layer."""
    keys = jax.random.split(jax.random.key(seed), 4)
    inputs = jax.random.normal(keys[2], (14, 3))
    x, other = inputs[:8], inputs[8:]
    y, far = jnp.sin(x.sum(1)), jnp.sin(other.sum(1))
    params = {"in": jax.random.normal(keys[0], (3, width)), "out": jax.random.normal(keys[1], (width,))}

    def f(p, one):
        return jnp.tanh(one @ p["in"] / jnp.sqrt(3.0)) @ p["out"] / jnp.sqrt(width)

    def loss(p):
        return 0.5 * jnp.sum(jnp.square(jax.vmap(f, (None, 0))(p, x) - y))

    start, elsewhere = (jax.vmap(f, (None, 0))(params, points) for points in (x, other))
    dynamics = kernel_dynamics(ntk(f, params, x), start, y)
    rate = 0.1 * dynamics.largest_stable_rate()

    def step(p, _):
        value, gradient = jax.value_and_grad(loss)(p)
        beyond = 0.5 * jnp.sum(jnp.square(jax.vmap(f, (None, 0))(p, other) - far))
        return jax.tree.map(lambda a, g: a - rate * g, p, gradient), (value, beyond)

    losses, beyond = jax.jit(lambda p: jax.lax.scan(step, p, None, steps)[1])(params)
    t = jnp.arange(steps)
    linear = dynamics.loss(t, rate, discrete=True)
    cross = ntk(f, params, other, x)
    predicted = 0.5 * jnp.sum(jnp.square(dynamics.predict(t, cross, elsewhere, rate, discrete=True) - far), axis=-1)
    assert losses[-1] < 0.5 * losses[0]  # it has learned something
    return np.array([jnp.abs(linear - losses).max() / losses[0], jnp.abs(predicted - beyond).max() / beyond[0]])


def test_a_wide_network_follows_its_linearisation_and_closer_the_wider_it_is():
    narrow, wide = (np.mean([trained(width, seed=s) for s in range(3)], axis=0) for width in (64, 2048))
    assert (wide < 0.02).all()  # of the first loss, along 40 steps
    assert (wide < narrow / 2).all()


def test_errors():
    good = np.eye(3)
    cases = [
        ((np.ones((3, 2)), np.ones(3)), {}, r"kernel has shape \(3, 2\)"),
        ((good, np.ones(2)), {}, r"outputs have shape \(2,\)"),
        ((good, np.ones(3), np.ones(2)), {}, r"targets have shape \(2,\)"),
        ((good * np.nan, np.ones(3)), {}, "must be finite"),
        ((np.triu(np.ones((3, 3))), np.ones(3)), {}, "differs from its transpose by 1"),
        ((good, np.ones(3)), {"negative": "flip"}, "choose 'clip', 'keep' or 'refuse'"),
        (({"a": good, "b": good}, np.ones(3)), {}, r"dict of 2 layers.*sum\(kernel.values\(\)\), or choose one"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            kernel_dynamics(*arguments, **options)
    with pytest.raises(InputError, match=r"cross_kernel has shape \(3, 2\)"):
        kernel_dynamics(good, np.ones(3)).change(1.0, np.ones((3, 2)))
    with pytest.raises(InputError, match=r"outputs have shape \(3, 1\), but .* shape \(3,\)"):
        kernel_dynamics(good, np.ones(3)).predict(1.0, good, np.ones((3, 1)))
