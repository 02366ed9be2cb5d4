"""Axes hold all positive numbers and have round ticks; numbers and names in short."""

import numpy as np
import pytest

from lensjax.report.figures.scale import Scale, compact, padded, shortened


def test_scales_have_round_ticks():
    assert Scale(50, 6400, 0, 1).ticks(6) == [100, 1000]
    assert Scale(1.3, 2.3, 0, 1).ticks(6) == [1.4, 1.6, 1.8, 2.0, 2.2]
    assert Scale(1, 1e12, 0, 1).ticks(5) == [1, 1e3, 1e6, 1e9, 1e12]
    assert Scale(10, 1000, 5, 25)(100) == pytest.approx(15)


def test_short_forms():
    assert [compact(v) for v in (0, 0.5, 200, 1600, 3_200_000, 2e12)] == ["0", "0.5", "200", "1.6k", "3.2M", "2e+12"]
    assert shortened("short", 10) == "short"
    assert shortened("a-very-long-name-7b", 11) == "a-ver…me-7b"


@pytest.mark.parametrize(
    "values", [(1e-300, 1e300), (5e-324, 1.7e308), (5e-324, 5e-324), (1.7e308, 1.7e308), (1e-12, 1.1e-12), (0.5, 2.0)]
)
def test_scales_hold_all_positive_numbers(values):
    scale = padded(values)
    assert 0 < scale.low <= min(values)
    assert max(values) <= scale.high < np.inf
    assert scale.low < scale.high
    assert all(0 <= scale(value) <= 1 for value in values)
    assert scale(scale.low) == 0
    assert scale(scale.high) == pytest.approx(1)
    ticks = scale.ticks(6)
    assert len(ticks) <= 6
    assert sorted(set(ticks)) == ticks
    assert all(scale.inside(tick) for tick in ticks)
    if values[1] / values[0] > 1.05 and values[0] > 1e-320:
        assert len(ticks) > 1


def test_ticks_of_small_numbers_are_round():
    assert Scale(1.3e-12, 2.3e-12).ticks(6) == [1.4e-12, 1.6e-12, 1.8e-12, 2e-12, 2.2e-12]
    assert Scale(1e-300, 1e300).ticks(5)[1] == 1e-180
