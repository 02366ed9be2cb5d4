"""Algorithm 1 of LensLLM: fine-tune on less and less data until the curve stops being a straight line.

In the power phase log loss is linear in log D. Coming from the largest affordable size downwards, the first size
that deviates from the line through the larger ones belongs to the pre-power phase; still smaller sizes add nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lensjax.errors import InputError

GAMMA = 3
TAU = 5.0


@dataclasses.dataclass(frozen=True)
class StoppingDecision:
    """Whether to go on to the next smaller size.

    Attributes
    ----------
    stop : bool
    points_on_line : int
        Number of points, from the largest size downwards, that lie on one line.
    deviation : float
        Distance of the last point from the line through the others, in standard deviations of their residuals;
        NaN if there are too few points to say.
    reason : str
    """

    stop: bool
    points_on_line: int
    deviation: float
    reason: str


def fit_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least-squares intercept and slope of y on x, both (n,) with n >= 2 and x not constant."""
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    return float(y.mean() - slope * x.mean()), slope


def line_deviation(log_sizes: np.ndarray, log_losses: np.ndarray) -> float:
    """Distance of the last point from the least-squares line through the earlier ones, over their residuals' std.

    Points are ordered from the largest size downwards. Infinite if the earlier points lie exactly on a line and the
    last does not, 0 if it does too.
    """
    intercept, slope = fit_line(log_sizes[:-1], log_losses[:-1])
    spread = float(np.std(log_losses[:-1] - intercept - slope * log_sizes[:-1]))
    distance = float(abs(log_losses[-1] - intercept - slope * log_sizes[-1]))
    if spread == 0.0:
        return 0.0 if distance == 0.0 else float("inf")
    return distance / spread


def check_rule(gamma: int, tau: float) -> None:
    """Refuse a stopping rule that cannot work.

    Raises
    ------
    InputError
        If `gamma` is below 3 (two points always lie on a line) or `tau` is not positive.
    """
    if gamma < 3:
        raise InputError(f"gamma is {gamma}; a line needs at least 3 points to have residuals. The paper uses 3 to 5.")
    if not tau > 0:
        raise InputError(f"tau is {tau:g}; the deviation allowed is a positive number. The paper uses 1 to 5.")


def should_stop(sizes: np.ndarray, losses: np.ndarray, *, gamma: int = GAMMA, tau: float = TAU) -> StoppingDecision:
    """Decide after each fine-tuning run whether a smaller subset is worth another one.

    Parameters
    ----------
    sizes : array (n,)
        Training samples of the runs so far, strictly descending, all positive.
    losses : array (n,)
        Their test losses.
    gamma : int
        Points needed before the line is trusted.
    tau : float
        Deviation, in residual standard deviations, at which to stop.

    Returns
    -------
    StoppingDecision

    Raises
    ------
    InputError
        See `check_rule`.
    ValueError
        If sizes are not strictly descending and positive.

    References
    ----------
    LensLLM (ICML 2025), Algorithm 1; the same rule is AtS in ICML 2024 (arXiv 2402.02314), with k and delta.
    """
    check_rule(gamma, tau)
    sizes, losses = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if np.any(sizes <= 0) or np.any(np.diff(sizes) >= 0):
        raise ValueError(f"sizes must be positive and strictly descending, found {sizes.tolist()}")
    if len(sizes) <= gamma:
        return StoppingDecision(False, len(sizes), float("nan"), f"fewer than {gamma + 1} sizes measured")
    found = line_deviation(np.log(sizes), np.log(losses))
    if found > tau:
        reason = (
            f"{sizes[-1]:g} samples lie {found:.1f} residual standard deviations off the line (tau {tau:g}): "
            "the pre-power phase begins"
        )
        return StoppingDecision(True, len(sizes) - 1, found, reason)
    return StoppingDecision(
        False, len(sizes), found, f"{sizes[-1]:g} samples still on the line ({found:.1f} of {tau:g})"
    )


def replay_stopping_rule(
    sizes: np.ndarray, losses: np.ndarray, *, gamma: int = GAMMA, tau: float = TAU
) -> StoppingDecision:
    """Replay Algorithm 1 on a finished curve: `should_stop` for each prefix, until one says stop.

    Parameters and errors are those of `should_stop`. If `stop` is true, one more point than `points_on_line` was
    measured.
    """
    for n in range(1, len(sizes) + 1):
        decision = should_stop(sizes[:n], losses[:n], gamma=gamma, tau=tau)
        if decision.stop:
            return decision
    if len(sizes) == 0:
        return StoppingDecision(False, 0, float("nan"), "no size measured")
    return dataclasses.replace(decision, reason="the smallest size was reached")
