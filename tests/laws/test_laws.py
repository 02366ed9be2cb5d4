"""The law functions against plain float64 NumPy formulas, and their derivatives at the extremes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.laws import LAWS, kernel_residual, lens_law, log_kernel_residual, phase_transition

SIZES = np.concatenate([[0.0, 1.0], np.geomspace(200, 1e12, 40)])
PARAMS = {
    "power": {"B": 30.0, "E": 0.8, "beta": 0.4, "alpha": 1.7},
    "rectified": {"B": 300.0, "E": 0.8, "beta": 0.4, "D_l": 50.0},
    "lens": {"B": 300.0, "E": 0.8, "beta": 0.4, "F": 50.0},
}


def naive(law, p, D):
    if law == "power":
        return np.log((p["B"] / np.maximum(D, 1.0) ** p["beta"] + p["E"]) ** p["alpha"])
    return np.log(p["B"] / (p.get("F", p.get("D_l")) + D ** p["beta"]) + p["E"])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("change", [{}, {"E": 0.0}, {"beta": 1e-3}, {"beta": 3.0}, {"B": 1e-8}])
def test_agrees_with_naive_formula(law, change):
    params = PARAMS[law] | change
    with jax.enable_x64(True):
        values = np.asarray(LAWS[law](params, SIZES))
    np.testing.assert_allclose(values, naive(law, params, SIZES), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("beta", [1e-3, 0.4, 5.0])
@pytest.mark.parametrize("E", [0.0, 0.8])
@pytest.mark.parametrize("x64", [False, True])
def test_values_and_derivatives_finite_from_zero_to_1e12(law, beta, E, x64):
    with jax.enable_x64(x64):
        params = {name: jnp.full(SIZES.shape, v) for name, v in (PARAMS[law] | {"beta": beta, "E": E}).items()}
        values, vjp = jax.vjp(LAWS[law], params, jnp.asarray(SIZES))
        slopes, by_size = vjp(jnp.ones_like(values))
    assert np.isfinite(values).all()
    for name, slope in slopes.items():
        assert np.isfinite(slope).all(), name
    # d/dD of D^beta is infinite at D = 0 for beta < 1; there the law gives 0, elsewhere it is finite.
    assert np.isfinite(by_size).all()


@pytest.mark.parametrize("law", LAWS)
def test_derivatives_agree_with_differences(law):
    names = list(PARAMS[law])
    point = np.array([PARAMS[law][n] for n in names])

    def value(p):
        return LAWS[law](dict(zip(names, p, strict=True)), SIZES)

    with jax.enable_x64(True):
        slopes = np.asarray(jax.jacobian(value)(jnp.asarray(point)))
        for i, x in enumerate(point):
            step = np.zeros(len(names))
            step[i] = 1e-5 * x
            difference = (np.asarray(value(point + step)) - np.asarray(value(point - step))) / (2e-5 * x)
            np.testing.assert_allclose(slopes[:, i], difference, rtol=1e-6, atol=1e-9)


def test_zero_floor_has_the_derivative_of_the_law():
    """At E = 0 the derivative with respect to E is 1 / L, not NaN."""
    with jax.enable_x64(True):
        slope = jax.grad(lambda E: lens_law({"B": 300.0, "E": E, "beta": 0.4, "F": 50.0}, 1000.0))(0.0)
    np.testing.assert_allclose(slope, (50.0 + 1000.0**0.4) / 300.0, rtol=1e-12)


def test_kernel_residual_is_the_norm_of_the_matrix_exponential(rng):
    from scipy.linalg import expm

    A = rng.normal(size=(6, 6))
    theta = A @ A.T
    residual = rng.normal(size=6)
    eigenvalues, vectors = np.linalg.eigh(theta)
    with jax.enable_x64(True):
        for t in (0.0, 1.0, 7.0, 1e5):
            value = kernel_residual(t, eigenvalues, vectors.T @ residual, 0.03)
            np.testing.assert_allclose(value, np.sum((expm(-0.03 * t * theta) @ residual) ** 2), rtol=1e-9, atol=1e-300)


def test_kernel_residual_is_differentiable_and_ignores_padding(rng):
    eigenvalues, projections = rng.uniform(0.0, 1.0, (2, 5)), rng.normal(size=(2, 5))
    padded = np.pad(eigenvalues, ((0, 0), (0, 3))), np.pad(projections, ((0, 0), (0, 3)))
    with jax.enable_x64(True):
        t = jnp.array([3.0, 40.0])
        np.testing.assert_allclose(
            log_kernel_residual(t, *padded), log_kernel_residual(t, eigenvalues, projections), rtol=1e-14
        )
        slope = jax.grad(lambda t: kernel_residual(t, *padded, 0.1).sum())(t)
        exact = np.sum(-0.2 * eigenvalues * np.exp(-0.2 * eigenvalues * np.asarray(t)[:, None]) * projections**2, 1)
    np.testing.assert_allclose(slope, exact, rtol=1e-12)


def test_phase_transition_is_where_the_terms_are_equal():
    F, beta = np.array([50.0, 3.0, 0.0]), np.array([0.4, 1.2, 0.5])
    with jax.enable_x64(True):
        D = np.asarray(phase_transition(F, beta))
    np.testing.assert_allclose(D**beta, F, rtol=1e-12)


def test_eigenvalues_and_projections_must_match():
    # One projection would broadcast against all eigenvalues, to a number that looks right.
    for projections in (np.ones(1), np.ones((2, 4)), 1.0):
        with pytest.raises(InputError, match="must end in the same number of eigenvectors"):
            kernel_residual(1.0, np.ones((2, 5)), projections)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


class TransformedLaws(chex.TestCase):
    """Shape, dtype and value are the same with and without `jax.jit`, and with and without a batch axis."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_laws(self):
        for law, function in LAWS.items():
            params = {name: np.full((3, 1), value, np.float32) for name, value in PARAMS[law].items()}
            values = self.variant(function)(params, SIZES.astype(np.float32))
            chex.assert_shape(values, (3, len(SIZES)))
            chex.assert_type(values, jnp.float32)
            chex.assert_tree_all_finite(values)
            chex.assert_trees_all_close(values[0], naive(law, PARAMS[law], SIZES), rtol=2e-5, atol=2e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_kernel_residual(self):
        rng = np.random.default_rng(7)
        eigenvalues, projections = (rng.uniform(0.1, 1.0, (2, 5)).astype(np.float32) for _ in range(2))
        t = np.array([0.0, 20.0], np.float32)
        values = self.variant(kernel_residual)(t, eigenvalues, projections, np.float32(0.1))
        chex.assert_shape(values, (2,))
        chex.assert_type(values, jnp.float32)
        chex.assert_trees_all_close(
            values, np.sum(np.exp(-0.2 * eigenvalues * t[:, None]) * projections**2, 1), rtol=1e-5
        )
        one = self.variant(kernel_residual)(t[1], eigenvalues[1], projections[1], np.float32(0.1))
        chex.assert_trees_all_close(one, values[1], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_phase_transition(self):
        values = self.variant(phase_transition)(np.float32([[50.0], [3.0]]), np.float32([0.4, 0.5, 1.2]))
        chex.assert_shape(values, (2, 3))
        chex.assert_type(values, jnp.float32)
        chex.assert_trees_all_close(values[1, 1], np.float32(9.0), rtol=1e-5)
