"""Scores from facts about the candidates instead of losses: NLPmetrics and LogME."""

import numpy as np
import pytest

from lensjax import selectors
from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.selection import losses_fingerprint
from lensjax.selectors import SELECTORS


def curves(**facts):
    return Curves(("a", "b", "c"), [0, 200], [[3.0, 2.0], [2.5, 2.2], [2.8, 2.1]], facts=facts)


def test_the_smallest_exponent_wins():
    given = {"pl_alpha": [3.0, 2.0, 2.5], "e_tpl_lambda": [0.5, np.nan, 0.0], "log_me": [1.0, 2.0, 3.0]}
    scores = SELECTORS["nlp_metrics"](curves(**given), 1e4)
    assert scores.method == "nlp_metrics"
    assert scores.best == "b"
    assert scores.score.tolist() == [3.0, 2.0, 2.5]
    assert list(scores.details) == ["pl_alpha", "e_tpl_lambda"]
    assert np.isnan(scores.predicted_loss).all()
    assert scores.used.shape == (3, 2)
    assert not scores.used.any()


def test_the_highest_evidence_wins():
    scores = SELECTORS["log_me"](curves(log_me=[-0.5, -0.25, 0.125]), 1e4)
    assert [scores.names[row] for row in scores.order] == ["c", "b", "a"]
    assert scores.score.tolist() == [0.5, 0.25, -0.125]
    assert scores.details["log_me"].tolist() == [-0.5, -0.25, 0.125]
    assert np.isnan(scores.predicted_loss).all()
    assert not scores.used.any()


@pytest.mark.parametrize(("method", "fact"), [("nlp_metrics", "pl_alpha"), ("log_me", "log_me")])
def test_a_missing_fact_is_named(method, fact):
    start = f"curves: {fact} of %s is not known, which method {method} needs. Add a column '{fact}' "
    for found, name in ((curves(), "a"), (curves(**{fact: [1.0, np.nan, np.nan]}), "b")):
        with pytest.raises(InputError) as error:
            SELECTORS[method](found, 1e4)
        assert str(error.value).startswith(start % name)
        assert str(error.value).endswith("or choose another method.")


def test_the_functions_that_find_the_facts_keep_their_names():
    assert SELECTORS["nlp_metrics"] is selectors.by_nlp_metrics
    assert SELECTORS["log_me"] is selectors.by_log_me
    rng = np.random.default_rng(0)
    assert selectors.nlp_metrics({"w": rng.standard_normal((60, 60))}).mean() > 1
    assert np.isfinite(selectors.log_me(rng.standard_normal((20, 3)), np.arange(20) % 2))


def test_facts_are_part_of_what_a_choice_depends_on():
    prints = {losses_fingerprint(curves(**facts)) for facts in ({}, {"log_me": [1, 2, 3]}, {"log_me": [1, 2, 4]})}
    assert len(prints) == 3
