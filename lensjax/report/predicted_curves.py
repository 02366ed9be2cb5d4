"""The loss curves that a method predicts for each candidate, from the smallest size to the target."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from lensjax.errors import InputError
from lensjax.laws import LAWS
from lensjax.losses.curves import Curves
from lensjax.selection import Selection
from lensjax.selectors import CREDIBLE_LEVEL, METHODS, SELECTORS, Scores
from lensjax.selectors.bayesian_average import law_grid, log_relative_loss, posterior

POINTS = 48
AGREEMENT = 1e-6  # relative; a curve further from the prediction at the target is not the one that was scored


@dataclasses.dataclass(frozen=True, eq=False)
class PredictedCurves:
    """Expected losses of M candidates along the sizes.

    Attributes
    ----------
    sizes : float64 array (K,)
        Ascending, above 0, the target last.
    losses : float64 array (M, K)
        NaN where a candidate has no curve.
    interval : float64 array (M, K, 2) or None
        With probability `CREDIBLE_LEVEL`; None for methods without intervals.
    reason : str
        Why there is no curve or no interval; "" if there are both.
    """

    sizes: np.ndarray
    losses: np.ndarray
    interval: np.ndarray | None
    reason: str


def predicted_curves(selection: Selection, scores: Scores, rows: np.ndarray | None = None) -> PredictedCurves:
    """Return the curves behind a method's predictions.

    They are computed again from the losses. A curve that misses the prediction is left out: the method had options that
    are not known here.

    Parameters
    ----------
    selection : Selection
    scores : Scores
        Of one of its methods.
    rows : int array, optional
        Positions of the candidates whose curves are wanted; the others may have none. Default: all.
    """
    rows = np.arange(len(selection.curves)) if rows is None else rows
    sizes = _sizes(selection)
    nothing = np.full((len(selection.curves), len(sizes)), np.nan)
    if not np.isfinite(scores.predicted_loss).any():
        return PredictedCurves(sizes, nothing, None, f"Method {scores.method} ranks without predicting a loss.")
    name = scores.method
    curve = METHODS[name].curve if name in METHODS else "none"
    interval = None
    try:
        if curve == "average":
            losses, interval = _averaged(selection, sizes, rows)
        elif curve == "law" and {"B", "E", "beta"} <= set(scores.details):
            params = {key: value[:, None] for key, value in scores.details.items()}
            with jax.enable_x64(True):
                losses = np.exp(np.asarray(LAWS[METHODS[name].law](params, sizes)))
        elif curve == "line":
            losses = np.exp(_lines(selection.curves, sizes))
        else:
            return PredictedCurves(sizes, nothing, None, f"Method {name} predicts one loss, not a curve.")
    except InputError as error:
        return PredictedCurves(sizes, nothing, None, f"No curve: {error}")
    agrees = np.isclose(losses[:, -1], scores.predicted_loss, rtol=AGREEMENT)
    losses = np.where(agrees[:, None], losses, np.nan)
    if interval is None:
        reason = f"Method {name} gives no interval; the default method, averaged, does."
        return PredictedCurves(sizes, losses, None, reason)
    return PredictedCurves(sizes, losses, np.where(agrees[:, None, None], interval, np.nan), "")


def _sizes(selection: Selection) -> np.ndarray:
    tuned = selection.curves.sizes[selection.curves.sizes > 0]
    first = min(tuned[0] if len(tuned) else selection.target, selection.target)
    if first == selection.target:
        return np.array([selection.target], np.float64)
    grid = np.geomspace(first, selection.target, POINTS)
    # Rounding must not move the ends.
    return np.unique(np.concatenate([grid[1:-1], tuned[tuned < selection.target], [first, selection.target]]))


def _averaged(selection: Selection, sizes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return losses (M, K) and intervals (M, K, 2) of the candidates at `rows`, NaN for the others.

    The posterior rests on the losses of all candidates, and does not depend on the size that is asked about.
    """
    curves, grid = selection.curves, law_grid()
    found = posterior(curves, selection.target)
    level = found.log_loss[rows] - log_relative_loss(grid, np.array([selection.target]))[:, 0]
    lines = np.full((len(rows), len(sizes)), np.nan)
    known = np.flatnonzero(np.isfinite(found.ats[rows]))
    if len(known):
        lines[known] = _lines(curves.rows(rows[known]), sizes)
    margin = (1 - CREDIBLE_LEVEL) / 2
    losses = np.full((len(curves), len(sizes)), np.nan)
    interval = np.full((*losses.shape, 2), np.nan)
    for k, size in enumerate(sizes):
        at = dataclasses.replace(
            found,
            target=size,
            largest=found.largest[rows],
            weights=found.weights[rows],
            log_loss=level + log_relative_loss(grid, np.array([size]))[:, 0],
            likelihood=found.likelihood[rows],
            ats=lines[:, k],
        )
        losses[rows, k], interval[rows, k] = at.loss(), at.quantiles((margin, 1 - margin))
    return losses, interval


def _lines(curves: Curves, sizes: np.ndarray) -> np.ndarray:
    """Return the log losses (M, K) of AtS: a straight line in log-log coordinates, so two sizes give them all."""
    first, second = (np.log(SELECTORS["ats"](curves, size).predicted_loss) for size in (1.0, np.e))
    return np.asarray(first[:, None] + (second - first)[:, None] * np.log(sizes))
