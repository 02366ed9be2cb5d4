"""Certainty of a choice: the probability of being the best, and the smallest credible set of candidates."""

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
