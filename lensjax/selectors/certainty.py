"""Certainty of a choice: probabilities of being the best, credible sets, and remarks on the order of candidates."""

from __future__ import annotations

import numpy as np

CREDIBLE_LEVEL = 0.9
"""Probability of the intervals and credible sets that are reported."""


def best_probability(draws: np.ndarray) -> np.ndarray:
    """Probability that each candidate has the lowest loss of all.

    Parameters
    ----------
    draws : array (N, M)
        Joint draws of the candidates' losses, or of any increasing function of them.

    Returns
    -------
    float64 array (M,)
        Share of draws in which the candidate is lowest, adding to 1; a tie is shared equally.
    """
    lowest = draws == draws.min(axis=1, keepdims=True)
    return np.asarray((lowest / lowest.sum(axis=1, keepdims=True)).mean(axis=0))


def smallest_credible_set(probability: np.ndarray, level: float = CREDIBLE_LEVEL) -> np.ndarray:
    """Smallest set of candidates that contains the best with the given probability.

    Parameters
    ----------
    probability : array (M,)
        Of being the best, adding to 1.
    level : float
        Between 0 and 1.

    Returns
    -------
    bool array (M,)
    """
    order = np.argsort(-probability, kind="stable")
    before = np.cumsum(probability[order]) - probability[order]
    # A sum that misses the level only by rounding has reached it.
    inside = np.zeros(len(probability), bool)
    inside[order] = before < level - 1e-12
    return inside


def out_of_order(score: np.ndarray, predicted: np.ndarray, probability: np.ndarray, largest: np.ndarray) -> list[str]:
    """Say of each candidate why it stands before one whose loss is expected to be lower or that is likelier the best.

    Said of all candidates where they were measured up to different sizes, else of the first only. Differences that a
    report does not show have none.

    Parameters
    ----------
    score, predicted, probability, largest : float64 arrays (M,)

    Returns
    -------
    list of str
        M of them, "" where nothing is to be explained.
    """
    order = np.argsort(score, kind="stable")
    shown, percent = np.round(predicted, 4), np.round(100 * probability)
    found = [""] * len(score)
    for place, row in enumerate(order if np.ptp(largest) > 0 else order[:1]):
        behind = order[place + 1 :]
        reasons = []
        if (shown[behind] < shown[row]).any():
            reasons.append("a lower expected loss")
        if (percent[behind] > percent[row]).any():
            reasons.append("a higher P(best)")
        if reasons:
            found[row] = f"placed before {' and '.join(reasons)}: the order is by expected loss with a share of AtS"
    return found
