"""Derivatives of fits against finite differences of the whole refit; callers in float32 and inside transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.laws import LAWS, fit, kernel_residual

SIZES = np.concatenate([[0.0], 200.0 * 2.0 ** np.arange(10)])
FAR = 1e6
COMMON = {"B": 300.0, "E": 0.8, "beta": 0.5}
EIGENVALUES = np.geomspace(1e-5, 1e-1, 8)
PROJECTIONS = np.random.default_rng(3).normal(size=8) * 6.0
KERNEL = {"eigenvalues": EIGENVALUES, "projections": PROJECTIONS, "learning_rate": 0.1}
STEPS = 50.0 + np.sqrt(SIZES)


def residual_at(t):
    with jax.enable_x64(True):
        return np.asarray(kernel_residual(t, EIGENVALUES, PROJECTIONS, 0.1))


def curve(law="rectified", params=None, noise=0.005, seed=0):
    params = (
        params or COMMON | {"rectified": {"D_l": 60.0}, "lens": {"F": 60.0}, "power": {"alpha": 1.3, "B": 30.0}}[law]
    )
    with jax.enable_x64(True):
        losses = np.exp(np.asarray(LAWS[law](params, SIZES)))
    return losses * np.exp(noise * np.random.default_rng(seed).normal(size=losses.shape))


# name -> (losses, options of fit, options of predict)
CASES = {
    "power": (curve("power"), {"law": "power"}, {}),
    "rectified": (curve(), {"law": "rectified"}, {}),
    "lens, F given": (curve("lens", COMMON | {"F": residual_at(STEPS)}), {"F": residual_at(STEPS)}, {"F": 20.0}),
    "lens, t given": (curve("lens", COMMON | {"F": residual_at(STEPS)}), KERNEL | {"t": STEPS}, {"t": 2e3}),
    "lens, t fitted": (curve("lens", COMMON | {"F": residual_at(500.0)}), KERNEL, {}),
}


def differences(function, point, step):
    """Central finite differences of a scalar function of an array, each a complete refit."""
    point = np.asarray(point, float)
    slopes = np.zeros(point.shape)
    for i in np.ndindex(point.shape):
        up, down = point.copy(), point.copy()
        width = step * max(abs(point[i]), 1e-3 * np.abs(point).max())
        up[i] += width
        down[i] -= width
        slopes[i] = (np.asarray(function(up)).item() - np.asarray(function(down)).item()) / (2 * width)
    return slopes


def assert_close(slopes, reference, rtol=1e-4):
    assert np.abs(reference).max() > 0
    np.testing.assert_allclose(np.asarray(slopes, float), reference, rtol=rtol, atol=rtol * np.abs(reference).max())


@pytest.mark.parametrize("delta", [1e-3, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_losses(case, delta):
    losses, options, at = CASES[case]

    def predicted(x):
        return fit(SIZES, x, huber_delta=delta, **options).predict(FAR, **at).sum()

    assert fit(SIZES, losses, huber_delta=delta, **options).status == ("converged",)
    with jax.enable_x64(True):
        slopes = jax.grad(predicted)(jnp.asarray(losses))
    assert slopes.dtype == jnp.float64
    assert_close(slopes, differences(predicted, losses, 1e-6))


def test_weights():
    def predicted(w):
        return fit(SIZES, curve(), "rectified", weights=w, huber_delta=4e-3).predict(FAR).sum()

    weights = np.random.default_rng(1).uniform(0.5, 2.0, SIZES.shape)
    with jax.enable_x64(True):
        slopes = jax.grad(predicted)(jnp.asarray(weights))
    assert_close(slopes, differences(predicted, weights, 1e-5))


def test_huber_delta():
    def predicted(delta):
        return fit(SIZES, curve(), "rectified", huber_delta=delta).predict(FAR).sum()

    with jax.enable_x64(True):
        slope = jax.grad(predicted)(4e-3)
    assert_close(slope, differences(predicted, 4e-3, 1e-4))


@pytest.mark.parametrize("name", ["log_B", "E", "beta", "log_D_l"])
def test_prior_mean_and_strength(name):
    centre = fit(SIZES, curve(), "rectified").raw[name][0] + 0.1

    def predicted(prior):
        return fit(SIZES, curve(), "rectified", huber_delta=0.1, prior={name: (prior[0], prior[1])}).predict(FAR).sum()

    point = np.array([centre, 1e-2])
    with jax.enable_x64(True):
        slopes = jax.grad(predicted)(jnp.asarray(point))
    assert_close(slopes, differences(predicted, point, 1e-4))


def test_offsets_steps_kernel_and_learning_rate():
    losses = CASES["lens, t given"][0]

    def by_offset(F):
        return fit(SIZES, losses, F=F, huber_delta=0.1).predict(FAR, F=20.0).sum()

    def by_kernel(x):
        kernel = {"eigenvalues": EIGENVALUES * x[1], "projections": PROJECTIONS * x[2], "learning_rate": 0.1 * x[3]}
        return fit(SIZES, losses, t=STEPS * x[0], huber_delta=0.1, **kernel).predict(FAR, t=2e3).sum()

    def jointly(x):
        kernel = {"eigenvalues": EIGENVALUES, "projections": PROJECTIONS * x, "learning_rate": 0.1}
        # The prediction itself does not depend on the kernel: t makes up for it.
        return fit(SIZES, CASES["lens, t fitted"][0], huber_delta=0.1, **kernel).params["t"].sum()

    for function, point in ((by_offset, residual_at(STEPS)), (by_kernel, np.ones(4)), (jointly, np.ones(8))):
        with jax.enable_x64(True):
            slopes = jax.grad(function)(jnp.asarray(point))
        assert_close(slopes, differences(function, point, 1e-5))


def test_parameters_objective_and_size():
    losses = curve()
    with jax.enable_x64(True):
        for name in ("B", "E", "beta", "D_l"):

            def parameter(x, name=name):
                return fit(SIZES, x, "rectified", huber_delta=0.1).params[name].sum()

            assert_close(jax.grad(parameter)(jnp.asarray(losses)), differences(parameter, losses, 1e-6))

    def objective(x):
        return fit(SIZES, x, "rectified", huber_delta=0.1).objective.sum()

    def by_size(D):
        return fit(SIZES, losses, "rectified").predict(D).sum()

    with jax.enable_x64(True):
        assert_close(jax.grad(objective)(jnp.asarray(losses)), differences(objective, losses, 1e-5))
        assert_close(jax.grad(by_size)(FAR), differences(by_size, FAR, 1e-4))


def test_a_bound_holds_its_parameter():
    """At E = 0 the derivative is that of the fit constrained to E = 0."""
    losses = 30.0 / (10.0 + SIZES**0.3) - 0.1
    losses *= np.exp(1e-3 * np.random.default_rng(0).normal(size=SIZES.shape))

    def predicted(x):
        return fit(SIZES, x, "rectified", huber_delta=0.1).predict(FAR).sum()

    assert fit(SIZES, losses, "rectified", huber_delta=0.1).status == ("converged; at a bound: E = 0",)
    with jax.enable_x64(True):
        assert_close(jax.grad(predicted)(jnp.asarray(losses)), differences(predicted, losses, 1e-6))
        held = jax.grad(lambda x: fit(SIZES, x, "rectified", huber_delta=0.1).params["E"].sum())(jnp.asarray(losses))
    # The level of the curve moves, E does not.
    np.testing.assert_allclose(held, 0.0, atol=1e-12)


def test_what_is_not_determined_has_no_derivative():
    table = np.stack([curve(), np.full(SIZES.shape, 2.0), curve()])
    table[2, 3:] = np.nan
    fits = fit(SIZES, table, "rectified")
    assert fits.determined.tolist() == [True, False, False]
    with jax.enable_x64(True):
        slopes = np.asarray(
            jax.grad(lambda x: jnp.nansum(fit(SIZES, x, "rectified").params["beta"]))(jnp.asarray(table))
        )
        first = np.asarray(jax.grad(lambda x: fit(SIZES, x, "rectified").predict(FAR)[0])(jnp.asarray(table)))
    assert np.isfinite(slopes[0]).all()
    assert np.isnan(slopes[1]).all()
    assert np.isfinite(first[0]).all()
    assert np.abs(first[0]).max() > 0


def test_a_prediction_that_does_not_see_the_free_direction_keeps_its_derivative():
    """With E = 0 the power law knows only alpha * beta: its predictions are determined, alpha is not."""
    losses = 5.0 * np.maximum(SIZES, 1.0) ** -0.1 * np.exp(2e-3 * np.random.default_rng(0).normal(size=SIZES.shape))
    losses = losses * np.exp(-0.004 * np.log(np.maximum(SIZES, 1.0)) ** 2)
    fits = fit(SIZES, losses, "power", huber_delta=0.1)
    assert "E = 0" in fits.status[0]
    assert not fits.determined[0]

    def predicted(x):
        return fit(SIZES, x, "power", huber_delta=0.1).predict(FAR).sum()

    with jax.enable_x64(True):
        slopes = np.asarray(jax.grad(predicted)(jnp.asarray(losses)))
        alpha = jax.grad(lambda x: fit(SIZES, x, "power", huber_delta=0.1).params["alpha"].sum())(jnp.asarray(losses))
    assert_close(slopes, differences(predicted, losses, 1e-6))
    assert np.isnan(np.asarray(alpha)[1:]).all()


@pytest.fixture(scope="module")
def table():
    return np.stack([curve(seed=1), curve(seed=2)])


def predict_sum(losses):
    return fit(SIZES, losses, law="rectified").predict(FAR).sum()


@pytest.fixture(scope="module")
def reference(table):
    with jax.enable_x64(True):
        return np.asarray(jax.grad(predict_sum)(jnp.asarray(table)))


TRANSFORMS = {
    "grad": jax.grad(predict_sum),
    "grad of jit": jax.grad(jax.jit(predict_sum)),
    "jit of vmap of grad": jax.jit(jax.vmap(jax.grad(predict_sum))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_float32_callers_get_right_gradients(name, table, reference):
    assert not jax.config.jax_enable_x64
    slopes = TRANSFORMS[name](jnp.asarray(table, jnp.float32))
    assert slopes.dtype == jnp.float32
    # The losses themselves are rounded to float32.
    np.testing.assert_allclose(slopes, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())
    assert not jax.config.jax_enable_x64


def test_float32_callers_get_float64_fits(table):
    """Inside a float32 trace the fit is the float64 fit of the rounded losses, to far more than seven digits."""
    rounded = table.astype(np.float32)
    eager = fit(SIZES, rounded, law="rectified")
    traced = jax.jit(lambda x: fit(SIZES, x, law="rectified"))(jnp.asarray(rounded))
    for name in eager.params:
        assert traced.params[name].dtype == np.float64
        np.testing.assert_allclose(traced.params[name], eager.params[name], rtol=1e-10)
    np.testing.assert_allclose(traced.predict(FAR), eager.predict(FAR), rtol=1e-12)
    assert traced.status == eager.status


@pytest.mark.parametrize("case", CASES)
def test_every_form_can_be_traced_in_float32(case):
    losses, options, at = CASES[case]

    def predicted(x):
        fits = fit(SIZES, x, **options)
        assert fits.objective.dtype == jnp.float32
        return fits.predict(jnp.array([FAR, 2 * FAR]), **at).sum(), fits.transition, fits.raw

    value, slopes = jax.jit(jax.value_and_grad(lambda x: predicted(x)[0]))(jnp.asarray(losses, jnp.float32))
    rounded = losses.astype(np.float32).astype(np.float64)
    exact = fit(SIZES, rounded, **options).predict([FAR, 2 * FAR], **at).sum()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    with jax.enable_x64(True):
        reference = jax.grad(lambda x: fit(SIZES, x, **options).predict([FAR, 2 * FAR], **at).sum())(
            jnp.asarray(rounded)
        )
    np.testing.assert_allclose(slopes, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def test_status_inside_a_transformation_is_refused(table):
    def words(losses):
        return fit(SIZES, losses, law="rectified").status

    with pytest.raises(InputError, match="outside of"):
        jax.jit(words)(jnp.asarray(table, jnp.float32))
