"""Shapes and dtypes of what the public functions of selectors return: a number, or a row, for each candidate."""

import chex
import numpy as np
from absl.testing import parameterized

from lensjax.losses.curves import Curves
from lensjax.selectors import (
    ats,
    averaged,
    best_probability,
    lens,
    log_me,
    model_size,
    power,
    rectified,
    smallest_credible_set,
    subtuning,
    zero_shot,
)

CANDIDATES, SIZES, DRAWS = 3, 5, 40
D = np.array([0.0, 200.0, 400.0, 800.0, 1600.0])


def curves():
    losses = np.array([[b / (300 + size**0.6) + e for size in D] for b, e in ((900, 1.0), (700, 1.5), (1500, 0.8))])
    return Curves(("a", "b", "c"), D, losses, np.array([1e6, 2e6, 3e6]))


class ScoresShapes(chex.TestCase):
    """What every method promises of its scores."""

    @parameterized.parameters(ats, averaged, lens, model_size, power, rectified, subtuning, zero_shot)
    def test_a_score_for_each_candidate(self, method):
        scores = method(curves(), 12_800.0)
        chex.assert_shape([scores.score, scores.predicted_loss], (CANDIDATES,))
        chex.assert_type([scores.score, scores.predicted_loss], np.float64)
        chex.assert_tree_all_finite(scores.score)
        chex.assert_shape(scores.used, (CANDIDATES, SIZES))
        chex.assert_type(scores.used, bool)
        if scores.interval is not None:
            chex.assert_shape(scores.interval, (CANDIDATES, 2))
        if scores.best_probability is not None:
            chex.assert_shape(scores.best_probability, (CANDIDATES,))


class CertaintyShapes(chex.TestCase):
    """What is said of all candidates from draws of their losses."""

    def test_a_probability_for_each_candidate(self):
        probability = best_probability(np.random.default_rng(0).normal(size=(DRAWS, CANDIDATES)))
        chex.assert_shape(probability, (CANDIDATES,))
        chex.assert_type(probability, np.float64)
        inside = smallest_credible_set(probability)
        chex.assert_shape(inside, (CANDIDATES,))
        chex.assert_type(inside, bool)

    @parameterized.parameters(np.float32, np.float64)
    def test_the_evidence_of_features_is_one_number(self, dtype):
        features = np.random.default_rng(0).normal(size=(DRAWS, SIZES)).astype(dtype)
        evidence = log_me(features, np.arange(DRAWS) % 3)
        chex.assert_scalar(evidence)
        chex.assert_tree_all_finite(evidence)
