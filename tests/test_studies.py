"""The studies' gradients against finite differences, on small problems."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lensjax
from support.paths import ROOT

STUDIES = ROOT / "benchmarks" / "studies"


@pytest.fixture(scope="module")
def study():
    """Import a study by name, as its own script would find what it imports."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(STUDIES))
    yield importlib.import_module
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(STUDIES.parent)):
            del sys.modules[name]


@pytest.fixture
def curves():
    """Three candidates that follow a law but for noise, at seven sizes."""
    rng = np.random.default_rng(0)
    sizes = np.array([0.0, 200, 400, 800, 1600, 3200, 6400])
    laws = ((40.0, 12.0, 0.3, 0.8), (30.0, 8.0, 0.35, 1.1), (60.0, 25.0, 0.4, 0.6))
    losses = np.array([[B / (D_l + size**beta) + E for size in sizes] for B, D_l, beta, E in laws])
    losses *= np.exp(0.01 * rng.normal(size=losses.shape))
    return lensjax.Curves(("a", "b", "c"), sizes, losses, np.array([1e6, 2e6, 4e6]))


def test_finite_differences_are_of_order_four(study):
    found = study("study").central(lambda x: np.sin(x).sum(), np.array([0.3, 0.5]), np.array([1.0, 0.0]), 1e-2)
    np.testing.assert_allclose(found, np.cos(0.3), rtol=1e-9)


def test_disagreement_ends_a_study(study):
    common = study("study")
    found = common.agreement([1.0, 2.0], [1.0, 2.2])
    assert found["compared"] == 2
    assert found["largest"] == pytest.approx(0.2 / 2.2)
    assert found["median"] == pytest.approx(0.5 * 0.2 / 2.2)
    common.require(found, 0.1, "it")
    with pytest.raises(SystemExit, match="it: derivative and finite difference disagree"):
        common.require(found, 0.05, "it")
    with pytest.raises(SystemExit, match="disagree"):
        common.require(common.agreement([np.nan], [1.0]), 0.05, "it")


def test_derivatives_by_width_and_weights(study, curves):
    found = study("fit_hyperparameters").check(curves, 51_200.0, 3e-3)
    assert found["with_derivative"] == 3
    assert found["width"]["compared"] == 3
    assert found["weights"]["compared"] == 21
    assert found["width"]["largest"] < 1e-5
    assert found["weights"]["largest"] < 1e-5
    assert np.abs(found["by_weight"]).max() > 1e-3


def test_descent_of_width_and_fade_lowers_the_error(study, curves):
    module = study("fit_hyperparameters")
    with jax.enable_x64(True):
        slope = jax.grad(lambda x: module.error(curves, 6400.0, x))(jnp.array([np.log(3e-3), 0.1]))
        repeated = [
            module.central(lambda x: module.error(curves, 6400.0, x), np.array([np.log(3e-3), 0.1]), unit, 1e-4)
            for unit in np.eye(2)
        ]
        np.testing.assert_allclose(slope, repeated, rtol=1e-4)
        x, course = module.tune([curves], 6400.0, steps=4)
    assert np.isfinite(x).all()
    assert min(course) < course[0]


def test_derivatives_by_time_and_learning_rate(study):
    module = study("early_stopping")
    with jax.enable_x64(True):
        made = module.problem(train=16, held_out=8)
        at = np.array([np.log(20.0), np.log(0.3 * made["dynamics"].largest_stable_rate())])
        found = module.check(made, at)
        slope = jax.grad(lambda x: module.residual(made, x))(jnp.asarray(at))
    assert set(found) == {"residual", "held_out_loss", "predicted_loss"}
    assert all(agreed["largest"] < 1e-6 for agreed in found.values())
    # F(Theta, t) depends on the product of both only, and falls with it.
    np.testing.assert_allclose(slope[0], slope[1], rtol=1e-9)
    assert float(slope[0]) < 0


def test_descent_finds_the_time_to_stop(study):
    module = study("early_stopping")
    with jax.enable_x64(True):
        made = module.problem(train=24, held_out=32)
        x, course = module.descend(made, steps=120)
        end = float(module.held_out_loss(made, jnp.array([np.log(1e6), x[1]])))
        slope = jax.grad(lambda at: module.held_out_loss(made, at))(jnp.asarray(x))
    assert course[-1] < course[0]
    assert course[-1] < end
    np.testing.assert_allclose(slope, 0.0, atol=2e-3)


@pytest.fixture
def contest(study, curves):
    with jax.enable_x64(True):
        return study("next_sizes").contest_of(curves, (0, 1), visible=1600.0, target=51_200.0)


def test_derivatives_of_doubt_by_the_division_of_the_budget(study, contest):
    found = study("next_sizes").check(contest, 0.2 * contest.full)
    assert found["compared"] == 4
    assert found["largest"] < 1e-6


def test_variance_is_that_of_the_linearised_posterior(study, contest):
    """Against the textbook formula with dense matrices, gradients by finite differences."""
    module = study("next_sizes")
    further = np.array([[3200.0], [6400.0]])
    expected = 0.0
    for law, more in zip(contest.laws, further, strict=True):

        def log_loss(one, size):
            B, E, beta, D_l = np.exp(one[0]), np.exp(one[1]), one[2], np.exp(one[3])
            return np.log(B / (D_l + size**beta) + E)

        def slope(size, law=law, log_loss=log_loss):
            return np.array([module.central(lambda one: log_loss(one, size), law, unit, 1e-3) for unit in np.eye(4)])

        seen = np.stack([slope(size) for size in [*contest.sizes, *more]])
        covariance = np.linalg.inv(np.diag(module.PRIOR**-2.0) + seen.T @ seen / module.NOISE**2)
        expected += slope(51_200.0) @ covariance @ slope(51_200.0)
    with jax.enable_x64(True):
        np.testing.assert_allclose(module.variance(contest, jnp.asarray(further)), expected, rtol=1e-5)


def test_a_design_costs_its_budget_and_leaves_less_doubt_than_the_start(study, contest):
    module = study("next_sizes")
    with jax.enable_x64(True):
        budget = 0.2 * contest.full
        sizes, course = module.design(contest, budget, steps=60)
    assert (sizes * contest.parameters[:, None]).sum() == pytest.approx(budget)
    assert sizes.min() >= contest.sizes.max()
    assert course[-1] < course[0] < 0
