"""How sure a choice is: probability of being the best, and the candidates that cannot be ruled out."""

from __future__ import annotations

import numpy as np

CERTAINTY = 0.9


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


def smallest_set(probability: np.ndarray, certainty: float = CERTAINTY) -> np.ndarray:
    """Smallest set of candidates that contains the best with the given probability.

    Parameters
    ----------
    probability : array (M,)
        Of being the best, adding to 1.
    certainty : float
        Between 0 and 1.

    Returns
    -------
    bool array (M,)
    """
    order = np.argsort(-probability, kind="stable")
    before = np.cumsum(probability[order]) - probability[order]
    # A sum that reaches the certainty but for rounding has reached it.
    inside = np.zeros(len(probability), bool)
    inside[order] = before < certainty - 1e-12
    return inside
