import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.selectors import StoppingDecision, replay_stopping_rule, should_stop
from lensjax.selectors.stopping import fit_line, line_deviation


def curve(n, slope=-0.3, noise=1e-3, seed=0):
    sizes = 200.0 * 2 ** np.arange(n)[::-1]
    rng = np.random.default_rng(seed)
    return sizes, np.exp(2 + slope * np.log(sizes) + noise * rng.standard_normal(n))


def test_line_equals_polyfit():
    x, y = np.random.default_rng(1).normal(size=(2, 7))
    slope, intercept = np.polyfit(x, y, 1)
    assert fit_line(x, y) == pytest.approx((intercept, slope), rel=1e-10)


def test_deviation_is_measured_in_residuals_of_the_other_points():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    y = np.array([1.0, -1.0, 1.0, 10.0])
    rest = np.polyfit(x[:3], y[:3], 1)
    want = abs(10 - np.polyval(rest, 3)) / np.std(y[:3] - np.polyval(rest, x[:3]))
    assert line_deviation(x, y) == pytest.approx(want)


def test_deviation_from_an_exact_line():
    assert line_deviation(np.array([0.0, 1, 2]), np.array([0.0, 1, 2])) == 0.0
    assert line_deviation(np.array([0.0, 1, 2]), np.array([0.0, 1, 3])) == np.inf


def test_a_straight_curve_is_followed_to_its_smallest_size():
    sizes, losses = curve(8)
    decision = replay_stopping_rule(sizes, losses, gamma=4, tau=50.0)
    assert decision == StoppingDecision(False, 8, decision.deviation, "the smallest size was reached")
    assert decision.deviation < 50


def test_descent_stops_where_the_plateau_begins():
    sizes, losses = curve(8)
    losses[5:] = losses[4] * 1.0001  # the three smallest sizes give no more than the fifth
    decision = replay_stopping_rule(sizes, losses, gamma=4, tau=20.0)
    assert decision.stop
    assert decision.points_on_line == 5
    assert decision.deviation > 20
    assert f"{sizes[5]:g} samples lie" in decision.reason


def test_nothing_is_decided_before_gamma_points():
    sizes, losses = curve(3)
    losses[2] *= 10
    assert not should_stop(sizes, losses, gamma=3, tau=1.0).stop
    sizes, losses = curve(4)
    losses[3] *= 10
    assert should_stop(sizes, losses, gamma=3, tau=1.0).stop
    assert not should_stop(sizes, losses, gamma=4, tau=1.0).stop
    assert replay_stopping_rule(sizes[:0], losses[:0]).points_on_line == 0


def test_impossible_rules_are_refused():
    sizes, losses = curve(4)
    with pytest.raises(InputError, match="gamma is 2; a line needs at least 3"):
        should_stop(sizes, losses, gamma=2)
    with pytest.raises(InputError, match="tau is 0; the deviation allowed"):
        should_stop(sizes, losses, tau=0.0)
    with pytest.raises(ValueError, match="strictly descending"):
        should_stop(sizes[::-1], losses)
