"""What a caller is told of weights while trials run."""

import dataclasses

import jax
import numpy as np
import pytest

from lensjax.finetune import DivergedError, FineTuner, Plan, Search, tune
from lensjax.models import Lora

PLAN = Plan(learning_rate=1e-2, batch_size=8, max_epochs=3, min_steps_between=1, warmup=2)


@pytest.fixture(scope="module")
def tuner(setting):
    model, _, buckets = setting
    return FineTuner(model, PLAN, buckets, 0)


def told(tuner, sets, search, **changes):
    """Run a search; return its outcome and what was told, each with the validation loss of the weights told of."""
    found = []

    def listen(weights):
        found.append((weights, tuner.loss(weights.params, sets[1])))

    tuner.plan = dataclasses.replace(PLAN, **changes)
    return tune(tuner, *sets, search=search, seed=0, on_weights=listen), found


def test_each_improvement_is_told_with_the_weights_that_have_that_loss(setting, tuner):
    sets = setting[1]
    outcome, found = told(tuner, sets, Search())
    improved = [w for w, _ in found if not w.finished]
    lows = np.minimum.accumulate([loss for _, loss in outcome.validation_history])
    assert [w.validation_loss for w in improved] == sorted(set(lows[1:]), reverse=True)
    assert len(improved) == 3
    for weights, loss in found:
        assert loss == pytest.approx(weights.validation_loss, rel=1e-6)
    last = found[-1][0]
    assert last.finished
    assert (last.step, last.validation_loss) == (outcome.steps, outcome.validation_loss)


def test_trials_side_by_side_report_their_own_weights(setting, tuner):
    sets = setting[1]
    outcome, found = told(tuner, sets, Search(learning_rates=(1e-2, 3e-2), parallel_trials=2, prune_after=9))
    for weights, loss in found:
        assert loss == pytest.approx(weights.validation_loss, rel=1e-5)
    finished = {w.learning_rate: w.validation_loss for w, _ in found if w.finished}
    assert finished == {t.learning_rate: t.validation_loss for t in outcome.trials}
    assert len({w.learning_rate for w, _ in found if not w.finished}) == 2


def test_a_trial_that_diverges_never_finishes_and_one_that_helps_nothing_has_the_untouched_weights(setting, tuner):
    model, sets, buckets = setting
    small = (sets[0].first(8), *sets[1:])
    outcome, found = told(tuner, small, Search(learning_rates=(1e-30,)))
    assert [(w.step, w.finished) for w, _ in found] == [(0, True)]
    assert outcome.steps == 0
    wild = FineTuner(model, dataclasses.replace(PLAN, learning_rate=1e30, clip=1e30), buckets, 0)
    found = []
    with pytest.raises(DivergedError):
        tune(wild, *small, search=Search(retry=1.0), seed=0, on_weights=found.append)
    assert not any(w.finished for w in found)


def test_weights_become_a_model_again(setting):
    model, (_, validation, _), buckets = setting
    for lora in (None, Lora(rank=2)):
        tuner = FineTuner(model, dataclasses.replace(PLAN, lora=lora), buckets, 0)
        params = jax.tree.map(lambda x: x + 0.01, tuner.initial)
        again = FineTuner(tuner.model(params), PLAN, buckets, 0)
        assert again.trainable == tuner.trainable
        assert again.loss(again.initial, validation) == pytest.approx(tuner.loss(params, validation), rel=1e-6)
        assert tuner.loss(params, validation) != pytest.approx(tuner.loss(tuner.initial, validation), rel=1e-6)
