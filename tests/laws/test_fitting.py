"""`fit`: exact recovery, tables with holes, priors, statuses, phase fitting, joint t, bad input."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.laws import LAWS, fit, kernel_residual

SIZES = np.concatenate([[0.0], 200.0 * 2.0 ** np.arange(11)])
EIGENVALUES = np.geomspace(1e-5, 1e-1, 8) * np.array([[1.0], [2.0], [0.7]])
PROJECTIONS = np.random.default_rng(3).normal(size=(3, 8)) * 6.0
RATE = 0.1
COMMON = {"B": [300.0, 80.0, 100.0], "E": [0.8, 1.2, 0.5], "beta": [0.5, 0.35, 0.4]}
EXACT = {
    "power": COMMON | {"alpha": [0.5, 1.3, 2.0], "B": [30.0, 8.0, 100.0]},
    "rectified": COMMON | {"D_l": [60.0, 20.0, 5.0]},
    "lens": COMMON | {"F": [60.0, 20.0, 5.0]},
}


def exact_losses(law, params, sizes=SIZES):
    with jax.enable_x64(True):
        columns = {k: np.asarray(v, float).reshape(3, -1) for k, v in params.items()}
        return np.exp(np.asarray(LAWS[law](columns, sizes)))


def noisy(law="rectified", size=0.01, seed=0):
    losses = exact_losses(law, EXACT[law])
    return losses * np.exp(size * np.random.default_rng(seed).normal(size=losses.shape))


def residual_at(t):
    with jax.enable_x64(True):
        return np.asarray(kernel_residual(t, EIGENVALUES[:, None], PROJECTIONS[:, None], RATE))


@dataclasses.dataclass
class Table:
    sizes: np.ndarray
    losses: np.ndarray


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("delta", [1e-3, 1e3])
def test_recovers_exact_parameters(law, delta):
    fits = fit(Table(SIZES, exact_losses(law, EXACT[law])), law=law, huber_delta=delta)
    assert fits.status == ("converged",) * 3
    assert set(fits.params) == set(EXACT[law])
    for name, value in EXACT[law].items():
        np.testing.assert_allclose(fits.params[name], value, rtol=1e-6, err_msg=name)
    assert (fits.objective < 1e-20).all()
    far = np.array([1e6, 1e9])
    np.testing.assert_allclose(fits.predict(far), exact_losses(law, EXACT[law], far), rtol=1e-7)
    np.testing.assert_allclose(fits.predict(1e6), exact_losses(law, EXACT[law], far)[:, 0], rtol=1e-7)


def test_raw_parameters_and_transition_belong_to_the_natural_ones():
    fits = fit(SIZES, noisy(), "rectified")
    for name in ("B", "beta", "E", "D_l"):
        raw = fits.raw[name] if name in fits.raw else np.exp(fits.raw[f"log_{name}"])
        np.testing.assert_allclose(raw, fits.params[name], rtol=1e-12)
    np.testing.assert_allclose(fits.transition, fits.params["D_l"] ** (1 / fits.params["beta"]), rtol=1e-10)
    assert np.isnan(fit(SIZES, noisy("power"), "power").transition).all()


@pytest.mark.parametrize("delta", [1e-3, 0.02, 1e3])
@pytest.mark.parametrize("law", LAWS)
def test_objective_is_that_of_the_paper_and_no_neighbour_is_lower(law, delta):
    losses, rng = noisy(law), np.random.default_rng(1)
    weights = rng.uniform(0.5, 2.0, losses.shape)
    fits = fit(SIZES, losses, law, huber_delta=delta, weights=weights)

    def objective(params):
        used = SIZES > 0 if law == "power" else SIZES >= 0
        residual = np.log(exact_losses(law, params))[:, used] - np.log(losses[:, used])
        size = np.abs(residual)
        return (weights[:, used] * np.where(size < delta, size**2 / 2, delta * (size - delta / 2))).sum(1)

    np.testing.assert_allclose(fits.objective, objective(fits.params), rtol=1e-9)
    for _ in range(200):
        near = {name: v * np.exp(rng.normal() * 10.0 ** rng.uniform(-7, -1)) for name, v in fits.params.items()}
        assert (objective(near) >= fits.objective * (1 - 1e-9)).all()


@pytest.mark.parametrize("law", ["power", "rectified"])
def test_more_starts_find_nothing_lower(law):
    losses = noisy(law, 0.02, seed=5)
    two, eight = (fit(SIZES, losses, law, starts=n).objective for n in (2, 8))
    np.testing.assert_allclose(two, eight, rtol=1e-6)


def test_the_unit_of_sizes_does_not_matter():
    losses = noisy()
    base = fit(SIZES, losses, "rectified")
    scaled = fit(SIZES * 1e5, losses, "rectified")
    np.testing.assert_allclose(scaled.objective, base.objective, rtol=1e-9)
    np.testing.assert_allclose(scaled.params["E"], base.params["E"], rtol=1e-6)
    np.testing.assert_allclose(scaled.predict(1e11), base.predict(1e6), rtol=1e-7)


@pytest.mark.parametrize("law", ["power", "rectified"])
def test_ragged_table_equals_each_row_alone(law):
    losses = noisy(law)
    losses[0, 8:] = np.nan
    losses[1, [2, 5]] = np.nan
    losses[2, 0] = np.nan
    table = fit(SIZES, losses, law)
    for row in range(3):
        alone = fit(SIZES, losses[row], law)
        np.testing.assert_allclose(alone.objective[0], table.objective[row], rtol=1e-9)
        np.testing.assert_allclose(alone.predict(1e6)[0], table.predict(1e6)[row], rtol=1e-7)
        assert alone.points[0] == table.points[row]
        assert alone.status[0] == table.status[row]


def test_padding_and_order_of_points_do_not_matter():
    losses = noisy()
    base = fit(SIZES, losses, "rectified").predict(1e6)
    hole = np.full((3, 2), np.nan)
    padded = fit(np.concatenate([SIZES, [7.0, 1e9]]), np.concatenate([losses, hole], 1), "rectified")
    np.testing.assert_allclose(padded.predict(1e6), base, rtol=1e-9)
    seen = np.arange(len(SIZES)) % 3 != 1
    holed = np.where(seen, losses, np.nan)
    np.testing.assert_allclose(
        fit(SIZES, holed, "rectified").predict(1e6),
        fit(SIZES[seen], losses[:, seen], "rectified").predict(1e6),
        rtol=1e-9,
    )
    order = np.random.default_rng(0).permutation(len(SIZES))
    np.testing.assert_allclose(fit(SIZES[order], losses[:, order], "rectified").predict(1e6), base, rtol=1e-9)
    each = np.stack([SIZES, SIZES[order], SIZES[::-1]])
    mixed = np.stack([losses[0], losses[1, order], losses[2, ::-1]])
    np.testing.assert_allclose(fit(each, mixed, "rectified").predict(1e6), base, rtol=1e-9)


def test_weight_zero_is_a_point_left_out_and_weight_two_a_point_given_twice():
    losses = noisy()
    weights = np.ones_like(losses)
    weights[:, 3] = 0.0
    without = np.delete(losses, 3, 1)
    base = fit(np.delete(SIZES, 3), without, "rectified", huber_delta=0.1)
    np.testing.assert_allclose(
        fit(SIZES, losses, "rectified", huber_delta=0.1, weights=weights).predict(1e6), base.predict(1e6), rtol=1e-8
    )
    assert (fit(SIZES, losses, "rectified", weights=weights).points == len(SIZES) - 1).all()
    weights[:, 3] = 2.0
    twice = fit(np.append(SIZES, SIZES[3]), np.concatenate([losses, losses[:, 3:4]], 1), "rectified", huber_delta=0.1)
    doubled = fit(SIZES, losses, "rectified", huber_delta=0.1, weights=weights)
    np.testing.assert_allclose(doubled.predict(1e6), twice.predict(1e6), rtol=1e-8)


def test_phase_fitting_with_known_offsets_at_each_size():
    steps = 50.0 + np.sqrt(SIZES) * np.array([[1.0], [2.0], [3.0]])
    losses = exact_losses("lens", COMMON | {"F": residual_at(steps)})
    by_F = fit(SIZES, losses, F=residual_at(steps))
    by_t = fit(SIZES, losses, eigenvalues=EIGENVALUES, projections=PROJECTIONS, learning_rate=RATE, t=steps)
    for fits in (by_F, by_t):
        assert fits.status == ("converged",) * 3
        assert np.isnan(fits.transition).all()
        for name, value in COMMON.items():
            np.testing.assert_allclose(fits.params[name], value, rtol=1e-7)
    truth = exact_losses("lens", COMMON | {"F": residual_at(np.full((3, 1), 5e3))}, np.array([1e6]))
    np.testing.assert_allclose(by_t.predict([1e6], t=5e3), truth, rtol=1e-8)
    np.testing.assert_allclose(by_F.predict([1e6], F=residual_at(np.full((3, 1), 5e3))), truth, rtol=1e-8)


def test_constant_offset_predicts_by_itself():
    F = np.array([[60.0], [20.0], [5.0]])
    fits = fit(SIZES, exact_losses("lens", EXACT["lens"]), F=F)
    np.testing.assert_allclose(fits.params["F"], F[:, 0])
    np.testing.assert_allclose(fits.transition, F[:, 0] ** (1 / np.array(COMMON["beta"])), rtol=1e-6)
    np.testing.assert_allclose(fits.predict(1e6), exact_losses("lens", EXACT["lens"], np.array([1e6]))[:, 0], rtol=1e-8)


def test_joint_t_is_recovered_and_extrapolates():
    t = np.array([300.0, 1000.0, 3000.0])
    truth = COMMON | {"F": residual_at(t[:, None])}
    fits = fit(SIZES, exact_losses("lens", truth), eigenvalues=EIGENVALUES, projections=PROJECTIONS, learning_rate=RATE)
    assert fits.status == ("converged",) * 3
    np.testing.assert_allclose(fits.params["t"], t, rtol=1e-6)
    np.testing.assert_allclose(fits.raw["log_t"], np.log(t), rtol=1e-6)
    np.testing.assert_allclose(fits.params["F"], residual_at(t[:, None])[:, 0], rtol=1e-6)
    np.testing.assert_allclose(fits.predict(1e6), exact_losses("lens", truth, np.array([1e6]))[:, 0], rtol=1e-8)
    later = exact_losses("lens", COMMON | {"F": residual_at(np.full((3, 1), 9e3))}, np.array([1e6]))[:, 0]
    np.testing.assert_allclose(fits.predict(1e6, t=9e3), later, rtol=1e-7)


def test_t_beyond_the_kernel_is_reported():
    losses = exact_losses("lens", COMMON | {"F": 4.0 * residual_at(np.zeros((3, 1)))})
    fits = fit(SIZES, losses, eigenvalues=EIGENVALUES, projections=PROJECTIONS, learning_rate=RATE)
    assert all("at a bound: t = 0" in s for s in fits.status)
    assert fits.converged.all()


def test_priors_pull_and_strong_priors_decide():
    losses = noisy()
    free = fit(SIZES, losses, "rectified").raw["beta"]
    target = free + 0.2
    distance = [
        np.abs(fit(SIZES, losses, "rectified", prior={"beta": (target, s)}).raw["beta"] - target)
        for s in (1e-3, 1e-1, 1e3)
    ]
    assert (distance[0] < 0.2).all()
    assert (distance[1] < distance[0]).all()
    assert (distance[2] < 1e-4).all()
    np.testing.assert_allclose(
        fit(SIZES, losses, "rectified", prior={"beta": (target, 0.0)}).raw["beta"], free, rtol=1e-9
    )


@pytest.mark.parametrize("name", ["log_B", "E", "beta", "log_D_l"])
def test_each_prior_adds_its_penalty(name):
    losses = noisy()
    fits = fit(SIZES, losses, "rectified", prior={name: (1.0, np.array([0.01, 0.0, 0.5]))})
    bare = np.array([0.01, 0.0, 0.5]) / 2 * (fits.raw[name] - 1.0) ** 2
    size = np.abs(np.log(fits.predict(SIZES)) - np.log(losses))
    huber = np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum(1)
    np.testing.assert_allclose(fits.objective, huber + bare, rtol=1e-9)
    assert fits.converged.all()


def test_priors_stand_in_for_missing_points():
    losses = np.array([3.0, 2.5, 2.3])
    prior = {"beta": (0.4, 1e-2), "E": (1.0, 1e-2)}
    assert fit(SIZES[:3], losses, "rectified").status == ("failed: too few points (3 for 4 free parameters)",)
    assert fit(SIZES[:3], losses, "rectified", prior=prior).status == ("converged",)


def test_statuses_say_what_is_special():
    losses = np.full((6, len(SIZES)), np.nan)
    losses[0] = noisy()[0]
    losses[1] = 30.0 / (10.0 + SIZES**0.3) - 0.1
    losses[2, :3] = [3.0, 2.8, 2.7]
    losses[4] = 2.0
    losses[5] = np.linspace(2.0, 3.0, len(SIZES))
    fits = fit(SIZES, losses, "rectified")
    assert fits.status[0] == "converged"
    assert fits.status[1] == "converged; at a bound: E = 0"
    assert fits.params["E"][1] == 0.0
    assert fits.at_bound[2, 1] == 1
    assert fits.status[2] == "failed: too few points (3 for 4 free parameters)"
    assert fits.status[3] == "failed: too few points (0 for 4 free parameters)"
    for row in (4, 5):
        assert "flat curve" in fits.status[row]
        assert "not determined" in fits.status[row]
    assert fits.converged.tolist() == [True, True, False, False, True, True]
    assert fits.determined[:2].all()
    assert not fits.determined[2:].any()
    assert np.isnan(fits.predict(1e6)[2:4]).all()
    assert np.isnan([v[2:4] for v in fits.params.values()]).all()
    assert np.isnan(fits.objective[2:4]).all()
    np.testing.assert_allclose(fits.predict(1e6)[4], 2.0, rtol=1e-6)


def test_power_law_leaves_zero_shot_losses_out():
    losses = noisy("power")
    changed = losses.copy()
    changed[:, 0] = 50.0
    np.testing.assert_array_equal(fit(SIZES, changed, "power").predict(1e6), fit(SIZES, losses, "power").predict(1e6))
    assert (fit(SIZES, losses, "power").points == len(SIZES) - 1).all()


GOOD = noisy()


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((SIZES, GOOD, "linear"), {}, "choose from power, rectified, lens"),
        (([1.0, 2.0],), {}, "sizes and losses"),
        ((SIZES[:3], GOOD), {}, "sizes has shape"),
        ((1.0, GOOD), {}, "for one size"),
        ((-SIZES - 1, GOOD), {}, "sizes must be finite and >= 0, found -1"),
        ((SIZES, -GOOD), {}, "losses must be positive"),
        ((SIZES, GOOD[:0]), {}, "nothing to fit"),
        ((SIZES, GOOD[None]), {}, "must be .curves, sizes."),
        ((SIZES, GOOD), {"weights": -1.0}, "weights must be finite and >= 0"),
        ((SIZES, GOOD), {"weights": np.ones(5)}, "weights has shape"),
        ((SIZES, GOOD), {"huber_delta": 0.0}, "huber_delta must be > 0"),
        ((SIZES, GOOD), {"starts": 0}, "from 1 to 8"),
        ((SIZES, GOOD), {"prior": {"gamma": (1, 1)}}, "log_B, E, beta, log_F"),
        ((SIZES, GOOD), {"prior": {"beta": (1, -1)}}, "strength must be >= 0"),
        ((SIZES, GOOD), {"prior": {"beta": (np.nan, 1)}}, "mean must be finite"),
        ((SIZES, GOOD, "power"), {"F": 1.0}, "belong to the law 'lens'"),
        ((SIZES, GOOD), {"F": -1.0}, "F must be finite"),
        ((SIZES, GOOD), {"F": 0.0}, "infinite there"),
        ((SIZES, GOOD), {"t": 1.0}, "t needs eigenvalues"),
        ((SIZES, GOOD), {"eigenvalues": np.ones(3)}, "come together"),
        ((SIZES, GOOD), {"F": 1.0, "eigenvalues": np.ones(3), "projections": np.ones(3)}, "not both"),
        ((SIZES, GOOD), {"eigenvalues": np.zeros(3), "projections": np.ones(3)}, "one eigenvalue > 0"),
        ((SIZES, GOOD), {"eigenvalues": -np.ones(3), "projections": np.ones(3)}, "eigenvalues must be finite"),
        ((SIZES, GOOD), {"eigenvalues": np.ones(3), "projections": np.zeros(3)}, "must not all be 0"),
        ((SIZES, GOOD), {"eigenvalues": np.ones(3), "projections": np.ones(3), "t": -1.0}, "t must be finite and >= 0"),
    ],
)
def test_bad_input_is_refused(args, options, message):
    with pytest.raises(InputError, match=message):
        fit(*args, **options)


def test_predict_refuses_what_it_cannot_use():
    rectified = fit(SIZES, GOOD, "rectified")
    given = fit(SIZES, GOOD, F=np.full(GOOD.shape, 5.0))
    with pytest.raises(InputError, match="no F or t"):
        rectified.predict(1e6, F=1.0)
    with pytest.raises(InputError, match="own F at each size"):
        given.predict(1e6)
    with pytest.raises(InputError, match="not both"):
        given.predict(1e6, F=1.0, t=1.0)
    with pytest.raises(InputError, match="needs a fit with eigenvalues"):
        given.predict(1e6, t=1.0)
    with pytest.raises(InputError, match="one-dimensional"):
        rectified.predict(np.ones((2, 2)))


def test_all_curves_of_a_table_share_one_compiled_fit():
    """A `fit` inside `jax.jit` is traced once for all tables of one shape, and so is its derivative."""
    sizes = np.array([0.0, 200, 400, 800, 1600, 3200], np.float32)
    losses = np.stack([b / (10 + sizes**0.4) + 1 for b in (20.0, 30.0, 40.0)])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def slopes(table):
        return jax.grad(lambda y: jnp.sum(fit(sizes, y, law="rectified").predict(1e6)))(table)

    found = [slopes(scale * losses) for scale in (1.0, 1.5, 2.0)]
    chex.assert_equal_shape([*found, losses])
    chex.assert_trees_all_close(found[0], found[2], rtol=1e-2, atol=1e-3)
    chex.assert_tree_all_finite(found)
