import numpy as np
import pytest

from lensjax.selectors import best_probability, smallest_credible_set


def test_probability_of_being_best_is_a_share_of_the_draws():
    draws = np.array([[1.0, 2, 3], [2, 1, 3], [0, 1, 1], [5, 5, 6]])
    np.testing.assert_allclose(best_probability(draws), [2.5 / 4, 1.5 / 4, 0])
    rng = np.random.default_rng(0)
    assert best_probability(rng.standard_normal((1000, 7))).sum() == pytest.approx(1, abs=1e-12)


def test_probability_of_two_normal_candidates_is_the_known_one():
    rng = np.random.default_rng(1)
    draws = rng.standard_normal((200_000, 2)) + np.array([0.0, 1.0])
    # P(X < Y) for a difference of 1 and a standard deviation of sqrt(2).
    assert best_probability(draws)[0] == pytest.approx(0.7602, abs=0.005)


@pytest.mark.parametrize(
    ("probability", "certainty", "inside"),
    [
        ([0.5, 0.3, 0.2], 0.9, [True, True, True]),
        ([0.05, 0.9, 0.05], 0.9, [False, True, False]),
        ([0.1, 0.2, 0.7], 0.9, [False, True, True]),
        ([0.6, 0.4], 0.5, [True, False]),
        ([0.0, 1.0], 0.9, [False, True]),
    ],
)
def test_the_smallest_set_that_is_likely_enough(probability, certainty, inside):
    assert smallest_credible_set(np.array(probability), certainty).tolist() == inside
