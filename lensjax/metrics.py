"""How good a selection was, and what it cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

FORWARD_BACKWARD_FLOPS = 6  # per weight and token: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)


def _pairs(score: ArrayLike, loss: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both arrays in float64 without the candidates for which either is missing."""
    score, loss = np.asarray(score, np.float64), np.asarray(loss, np.float64)
    if score.shape != loss.shape or score.ndim != 1:
        raise ValueError(f"score and loss must be vectors of one length, found shapes {score.shape} and {loss.shape}")
    known = np.isfinite(score) & np.isfinite(loss)
    return score[known], loss[known]


def pear_corr(score: ArrayLike, loss: ArrayLike) -> float:
    """Pearson correlation of score and true full-data loss over candidates.

    Parameters
    ----------
    score : array (M,)
        A selector's score, lower is better; candidates with NaN are left out.
    loss : array (M,)
        True test loss after fine-tuning on all the data, nats per token.

    Returns
    -------
    float
        In [-1, 1]; NaN if fewer than two candidates are known or either side is constant.

    References
    ----------
    LensLLM (ICML 2025), section 4.1; ICML 2024 (arXiv 2402.02314), section 5.
    """
    score, loss = _pairs(score, loss)
    if len(score) < 2 or np.ptp(score) == 0 or np.ptp(loss) == 0:
        return float("nan")
    return float(np.corrcoef(score, loss)[0, 1])


def rel_acc(score: ArrayLike, loss: ArrayLike) -> float:
    """Relative accuracy: how far the chosen candidate is from the worst one, as a share of worst minus best.

    Parameters
    ----------
    score : array (M,)
        Lower is better; the candidate with the lowest score is the choice. NaN is never chosen.
    loss : array (M,)
        True test loss after fine-tuning on all the data. A choice whose loss is unknown has no relative accuracy.

    Returns
    -------
    float
        ``(worst - chosen) / (worst - best)``, 1 if the best candidate was chosen; NaN if it cannot be computed.

    References
    ----------
    LensLLM (ICML 2025), section 4.1; ICML 2024 (arXiv 2402.02314), section 5.
    """
    score, loss = np.asarray(score, np.float64), np.asarray(loss, np.float64)
    if not np.isfinite(score).any() or not np.isfinite(loss).any():
        return float("nan")
    worst, best = np.nanmax(loss), np.nanmin(loss)
    if worst == best:
        return float("nan")
    return float((worst - loss[np.nanargmin(score)]) / (worst - best))


def rmse(predicted: ArrayLike, loss: ArrayLike) -> float:
    """Root mean squared error of predicted against true test loss, nats per token; NaN if nothing was predicted."""
    predicted, loss = _pairs(predicted, loss)
    return float(np.sqrt(np.mean((predicted - loss) ** 2))) if len(loss) else float("nan")


def training_flops(parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
    """Floating-point operations of training: ``6 * parameters * tokens``.

    Parameters
    ----------
    parameters : array (...)
        Number of weights.
    tokens : array (...)
        Tokens seen in training: samples x tokens per sample x epochs x hyper-parameter trials.

    Returns
    -------
    float64 array (...)

    References
    ----------
    Kaplan et al. 2020, section 2.1; LensLLM (ICML 2025), section 4.3, which writes 6 N D.
    """
    return FORWARD_BACKWARD_FLOPS * np.asarray(parameters, np.float64) * np.asarray(tokens, np.float64)
