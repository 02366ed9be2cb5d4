"""Selectors that fit a scaling law to each curve and read it off at the target."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lensjax.laws import Fits, fit
from lensjax.losses.curves import Curves
from lensjax.selectors.scores import Scores, require_points
from lensjax.selectors.stopping import GAMMA, TAU, check_rule, replay_stopping_rule

LAW_POINTS = 4  # every law here has four parameters

# Weak priors of `lens`, round numbers from what fine-tuning laws look like, not tuned on the published tables
# (benchmarks/LOG.md shows what other choices would have given): losses are known to about 1 %; beta is
# 0.25 +- 0.15; the irreducible loss is half of the lowest loss seen, give or take that half.
LOSS_NOISE = 0.01
BETA_MEAN, BETA_STD = 0.25, 0.15
FLOOR_SHARE, FLOOR_SHARE_STD = 0.5, 0.5


def power(curves: Curves, target: float) -> Scores:
    """Fit the power law (LensLLM eq. 2) to all visible losses above 0 samples.

    Raises
    ------
    InputError
        If a candidate has fewer than 4 losses above 0 samples.
    """
    require_points("power", curves, LAW_POINTS, zero_shot=False)
    used = np.isfinite(curves.losses) & (curves.sizes > 0)
    return _scores("power", curves, used, fit(_masked(curves, used), law="power"), target)


def rectified(curves: Curves, target: float) -> Scores:
    """Fit the rectified law of ICML 2024 (arXiv 2402.02314) to all visible losses, zero-shot included.

    Raises
    ------
    InputError
        If a candidate has fewer than 4 visible losses.
    """
    require_points("rectified", curves, LAW_POINTS, zero_shot=True)
    used = np.isfinite(curves.losses)
    return _scores("rectified", curves, used, fit(curves, law="rectified"), target)


def lens(curves: Curves, target: float, *, gamma: int = GAMMA, tau: float = TAU, regularised: bool = True) -> Scores:
    """LensLLM: choose the sizes by Algorithm 1 and fit B, F, beta and E of eq. 10 to their losses.

    From the largest visible size downwards, sizes are used until one deviates from the line through the larger ones
    (`replay_stopping_rule`). The law is fitted to the losses of all sizes used, including the one that deviates (it was
    paid for, and it determines F), and to the zero-shot loss where there is one. F is one number per
    candidate here: eq. 10 with F(Theta, t) free. So few points do not determine four parameters (a law fitted to its
    optimum predicts worse), so weak Gaussian priors on beta and E, the constants above, stand beside them.

    Parameters
    ----------
    curves : Curves
    target : float
    gamma : int
        Points that make a line.
    tau : float
        Deviation, in residual standard deviations, at which the pre-power phase begins.
    regularised : bool
        False leaves the priors out; a candidate then needs 4 points.

    Raises
    ------
    InputError
        If a candidate has fewer than `gamma` losses above 0 samples, or the rule is impossible.

    References
    ----------
    LensLLM (ICML 2025), Algorithm 1 and eq. 10.
    """
    check_rule(gamma, tau)
    require_points("lens", curves, gamma, zero_shot=False)
    used = np.zeros(curves.losses.shape, bool)
    reasons = []
    for row, losses in enumerate(curves.losses):
        columns = np.flatnonzero(np.isfinite(losses) & (curves.sizes > 0))[::-1]
        decision = replay_stopping_rule(curves.sizes[columns], losses[columns], gamma=gamma, tau=tau)
        used[row, columns[: decision.points_on_line + decision.stop]] = True
        reasons.append(decision.reason)
    used |= np.isfinite(curves.losses) & (curves.sizes == 0)
    seen = _masked(curves, used)
    fits = fit(seen, law="lens", prior=weak_priors(seen) if regularised else None)
    scores = _scores("lens", curves, used, fits, target)
    return dataclasses.replace(scores, status=tuple(f"{s}; {r}" for r, s in zip(reasons, scores.status, strict=True)))


def weak_priors(curves: Curves) -> dict[str, tuple[Any, Any]]:
    """Return the priors of `lens` on beta and E for `lensjax.fit`: mean and strength.

    Strength is in units of the objective, half of a squared relative error.
    """
    lowest = np.nanmin(curves.losses, axis=1)
    return {
        "beta": (BETA_MEAN, (LOSS_NOISE / BETA_STD) ** 2),
        "E": (FLOOR_SHARE * lowest, (LOSS_NOISE / (FLOOR_SHARE_STD * lowest)) ** 2),
    }


def _masked(curves: Curves, used: np.ndarray) -> Curves:
    return dataclasses.replace(curves, losses=np.where(used, curves.losses, np.nan))


def _scores(method: str, curves: Curves, used: np.ndarray, fits: Fits, target: float) -> Scores:
    predicted = np.asarray(fits.predict(target), np.float64).reshape(len(curves))
    details: dict[str, Any] = {name: np.asarray(value, np.float64) for name, value in fits.params.items()}
    details["transition"] = np.asarray(fits.transition, np.float64)
    details["objective"] = np.asarray(fits.objective, np.float64)
    return Scores(
        method=method,
        names=curves.names,
        score=predicted,
        predicted_loss=predicted,
        status=tuple(fits.status),
        used=used,
        details=details,
        remarks=tuple("; ".join(p for p in s.split("; ") if p != "converged") for s in fits.status),
    )
