"""The selectors that LensLLM is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.selectors.scores import Scores, require_points
from lensjax.selectors.stopping import GAMMA, TAU, check_rule, fit_line, line_deviation


def zero_shot(curves: Curves, target: float) -> Scores:
    """Score by the loss before fine-tuning (ZeroShot).

    Raises
    ------
    InputError
        If a candidate has no loss at 0 samples.
    """
    losses = curves.at(0)
    if np.isnan(losses).any():
        name = curves.names[int(np.argmax(np.isnan(losses)))]
        raise InputError(
            f"{curves.source}: {name} has no loss at 0 samples, which method zero_shot needs."
            " Evaluate it before fine-tuning, or choose another method."
        )
    return _without_prediction("zero_shot", curves, losses, curves.sizes == 0)


def model_size(curves: Curves, target: float) -> Scores:
    """Score by minus the logarithm of the number of parameters (ModelSize): the largest model wins.

    Raises
    ------
    InputError
        If the number of parameters of a candidate is not known.
    """
    if curves.parameters is None or np.isnan(curves.parameters).any():
        name = curves.names[0 if curves.parameters is None else int(np.argmax(np.isnan(curves.parameters)))]
        raise InputError(
            f"{curves.source}: the number of parameters of {name} is not known, which method model_size needs. "
            "Add a column 'parameters'."
        )
    return _without_prediction("model_size", curves, -np.log(curves.parameters), np.zeros(len(curves.sizes), bool))


def by_nlp_metrics(curves: Curves, target: float) -> Scores:
    """Score by the mean exponent of the power laws of the weights' spectra (NLPmetrics): the heaviest tails win.

    Parameters
    ----------
    curves : Curves
        With the fact `pl_alpha`, the mean of `lensjax.selectors.nlp_metrics`; `e_tpl_alpha` and `e_tpl_lambda`, where
        they are known, are among the details.
    target : float

    Raises
    ------
    InputError
        If the exponent of a candidate is not known.

    References
    ----------
    Yang et al. 2023 (arXiv 2202.02842).
    """
    remedy = "lensjax.selectors.nlp_metrics finds it from the weights"
    alpha = _fact("nlp_metrics", curves, "pl_alpha", remedy)
    exponents = {
        name: curves.facts[name] for name in ("pl_alpha", "e_tpl_alpha", "e_tpl_lambda") if name in curves.facts
    }
    return _without_prediction("nlp_metrics", curves, alpha, np.zeros(len(curves.sizes), bool), exponents)


def by_log_me(curves: Curves, target: float) -> Scores:
    """Score by minus the evidence that features before fine-tuning explain the target tokens (LogME).

    Parameters
    ----------
    curves : Curves
        With the fact `log_me`, nats per position, see `lensjax.selectors.log_me`.
    target : float

    Raises
    ------
    InputError
        If the evidence of a candidate is not known.

    References
    ----------
    You et al. 2021 (ICML, arXiv 2102.11005).
    """
    evidence = _fact("log_me", curves, "log_me", "lensjax.selectors.log_me finds it from features and target tokens")
    columns = np.zeros(len(curves.sizes), bool)
    return _without_prediction("log_me", curves, -evidence, columns, {"log_me": evidence})


def _fact(method: str, curves: Curves, fact: str, remedy: str) -> np.ndarray:
    """Return a fact (M,) of all candidates."""
    known = curves.facts.get(fact)
    if known is None or np.isnan(known).any():
        name = curves.names[0 if known is None else int(np.argmax(np.isnan(known)))]
        raise InputError(
            f"{curves.source}: {fact} of {name} is not known, which method {method} needs. Add a column {fact!r} "
            f"({remedy}), or choose another method."
        )
    return known


def subtuning(curves: Curves, target: float) -> Scores:
    """Score by the loss after fine-tuning on the largest visible subset (SubTuning).

    Raises
    ------
    InputError
        If only the zero-shot loss is visible, or a candidate was not measured at the largest visible size.
    """
    if len(curves.sizes) == 0 or curves.sizes[-1] <= 0:
        raise InputError(f"{curves.source}: no visible size above 0 samples, which method subtuning needs.")
    losses = curves.losses[:, -1]
    if np.isnan(losses).any():
        name = curves.names[int(np.argmax(np.isnan(losses)))]
        raise InputError(
            f"{curves.source}: {name} has no loss at {curves.sizes[-1]:g} samples, the largest visible size, which "
            "method subtuning compares. Measure it there or lower --visible."
        )
    return _without_prediction("subtuning", curves, losses, np.arange(len(curves.sizes)) == len(curves.sizes) - 1)


def _without_prediction(
    method: str,
    curves: Curves,
    score: np.ndarray,
    columns: np.ndarray,
    details: Mapping[str, np.ndarray] | None = None,
) -> Scores:
    return Scores(
        method=method,
        names=curves.names,
        score=score,
        predicted_loss=np.full(len(curves), np.nan),
        status=("scored; predicts no loss",) * len(curves),
        used=np.broadcast_to(columns, curves.losses.shape),
        details=details or {},
    )


def ats(curves: Curves, target: float, *, k: int = GAMMA, delta: float = TAU) -> Scores:
    """Accept then stop (AtS): extrapolate the straight part of the curve in log-log coordinates.

    Points are accepted from the largest visible size downwards until one deviates; the loss at `target` is read off
    the least-squares line through the accepted ones. As in the authors' evaluation the smallest size only ever serves
    to test the line: with more than `k` sizes it is never one of the points the line goes through.

    Parameters
    ----------
    curves : Curves
    target : float
    k : int
        Points accepted without a test.
    delta : float
        Deviation, in residual standard deviations, at which to stop.

    Raises
    ------
    InputError
        If a candidate has fewer than 2 losses above 0 samples, or the rule is impossible (`check_rule`).

    References
    ----------
    ICML 2024 (arXiv 2402.02314), Algorithm 1, with k = 3 and delta = 5.
    """
    check_rule(k, delta)
    require_points("ats", curves, 2, zero_shot=False)
    predicted = np.empty(len(curves))
    accepted = np.empty(len(curves))
    used = np.zeros(curves.losses.shape, bool)
    status = []
    for row, losses in enumerate(curves.losses):
        columns = np.flatnonzero(np.isfinite(losses) & (curves.sizes > 0))[::-1]
        x, y = np.log(curves.sizes[columns]), np.log(losses[columns])
        kept = next((n for n in range(k, len(x)) if line_deviation(x[: n + 1], y[: n + 1]) > delta), len(x) - 1)
        kept = len(x) if len(x) <= k else kept
        intercept, slope = fit_line(x[:kept], y[:kept])
        predicted[row] = np.exp(intercept + slope * np.log(target))
        accepted[row] = curves.sizes[columns[kept - 1]]
        used[row, columns[: kept + 1]] = True
        status.append(f"line through {kept} sizes down to {accepted[row]:g}")
    return Scores(
        method="ats",
        names=curves.names,
        score=predicted,
        predicted_loss=predicted,
        status=tuple(status),
        used=used,
        details={"smallest_accepted": accepted},
    )
