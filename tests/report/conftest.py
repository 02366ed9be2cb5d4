"""Selections to render: with and without intervals, truth, phases, failures; with names that mean harm."""

import numpy as np
import pytest

from lensjax.losses.curves import Curves
from lensjax.selection import Selection
from lensjax.selectors import SELECTORS
from support.hostile import HOSTILE


def table(names, zero_shot, complete):
    sizes = np.array([0.0, 200, 400, 800, 1600] if zero_shot else [200.0, 400, 800, 1600])
    losses = np.array([[b / (300 + s**0.6) + e for s in sizes] for b, e in ((900, 1.0), (700, 1.5), (1500, 0.8))])
    losses = np.concatenate([losses, losses + 0.1])[: len(names)]
    if not complete:
        losses[1, -1] = np.nan
    return Curves(tuple(names), sizes, losses, np.array([1e6, 2e6, 3e6, 4e6, 5e6, 6e6])[: len(names)])


@pytest.fixture
def hostile():
    """Names that mean harm."""
    return HOSTILE


@pytest.fixture
def make():
    """Make a selection by real selectors from a small table: method names, changes -> Selection."""

    def make(*methods, names=("alpha", "beta", "gamma"), zero_shot=True, complete=False, **changes):
        curves, target = table(names, zero_shot, complete), 12800.0
        flops = 6.0 * curves.parameters[:, None] * curves.sizes
        values = {
            "source": "a table",
            "curves": curves,
            "target": target,
            "scores": {m: SELECTORS[m](curves, target) for m in methods or ("averaged",)},
            "flops": flops,
            "full_flops": 6.0 * curves.parameters * target,
            "cost_note": "6 N D with 1 token(s) per sample",
        }
        return Selection(**{**values, **changes})

    return make
