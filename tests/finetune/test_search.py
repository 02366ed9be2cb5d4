"""Search over learning rates and batch sizes."""

import dataclasses

import pytest

from lensjax.finetune import DivergedError, FineTuner, Plan, Search, tune
from lensjax.finetune.search import parallel_trials

PLAN = Plan(learning_rate=1e-2, batch_size=8, max_epochs=6, min_steps_between=1, warmup=2)
RATES = (1e-5, 1e-3, 1e-2)


@pytest.fixture(scope="module")
def tuner(setting):
    model, _, buckets = setting
    return FineTuner(model, PLAN, buckets, 0)


@pytest.fixture(scope="module")
def alone(tuner, setting):
    """Each rate trained by itself, without a rival."""
    return [tuner.trials(*setting[1], rates=(rate,), seed=0)[0] for rate in RATES]


def test_rates_side_by_side_are_what_they_are_alone(tuner, setting, alone):
    together = tuner.trials(*setting[1], rates=RATES, seed=0)
    assert [t.learning_rate for t in together] == list(RATES)
    for one, other in zip(together, alone, strict=True):
        assert one.status == other.status == "finished"
        assert (one.steps, one.steps_run, one.tokens, one.reason) == (
            other.steps,
            other.steps_run,
            other.tokens,
            other.reason,
        )
        assert one.test_loss == pytest.approx(other.test_loss, rel=1e-5)
        for (step, loss), (same, wanted) in zip(one.validation_history, other.validation_history, strict=True):
            assert step == same
            assert loss == pytest.approx(wanted, rel=1e-5)


def test_a_trial_that_ends_leaves_the_others_as_they_are(tuner, setting, alone):
    # The first two end before their time, so that the rows of those that go on move together.
    ended = tuner.trials(
        *setting[1], rates=RATES, seed=0, should_prune=lambda epochs, best, others: epochs >= 2 and best > min(others)
    )
    assert [t.status for t in ended] == ["pruned", "pruned", "finished"]
    assert [t.steps_run for t in ended[:2]] == [2 * ended[0].steps_per_epoch] * 2
    assert ended[2].test_loss == pytest.approx(alone[2].test_loss, rel=1e-5)
    assert ended[0].test_loss is None
    assert 0 < ended[0].flops < alone[0].flops


def test_the_trial_with_the_lowest_validation_loss_is_the_run_and_all_are_paid_for(tuner, setting, alone):
    found = tune(tuner, *setting[1], search=Search(learning_rates=RATES, prune_after=100), seed=0)
    best = min(alone, key=lambda t: t.validation_loss)
    assert (found.learning_rate, found.batch_size) == (best.learning_rate, 8)
    assert found.test_loss == pytest.approx(best.test_loss, rel=1e-6)
    assert found.flops == sum(t.flops for t in found.trials) == sum(t.flops for t in alone)
    assert found.tokens == sum(t.tokens for t in alone)
    assert found.chosen_tokens == best.tokens
    assert found.samples == sum(t.samples for t in alone)


@pytest.mark.parametrize("at_once", [1, 3])
def test_pruned_trials_end_early_and_the_choice_stays(tuner, setting, at_once):
    search = Search(learning_rates=RATES, batch_sizes=(8, 16), parallel_trials=at_once)
    found = tune(tuner, *setting[1], search=search, seed=0)
    assert len(found.trials) == 6
    pruned = [t for t in found.trials if t.status == "pruned"]
    assert pruned
    for trial in pruned:
        assert trial.steps_run >= search.prune_after * trial.steps_per_epoch
        assert trial.steps_run < PLAN.max_epochs * trial.steps_per_epoch
        assert "worse than the other trials" in trial.reason
    assert found.learning_rate == 1e-2
    assert found.validation_loss == min(t.validation_loss for t in found.trials if t.validation_loss is not None)


def test_known_trials_are_not_made_again(tuner, setting, monkeypatch):
    search = Search(learning_rates=RATES, batch_sizes=(8, 16))
    told = []
    whole = tune(tuner, *setting[1], search=search, seed=0, on_trials=told.append)
    assert tuple(t for group in told for t in group) == whole.trials
    known = {(t.learning_rate, t.batch_size): t for t in whole.trials[:4]}
    repeated = []
    original = FineTuner.trials
    monkeypatch.setattr(
        FineTuner,
        "trials",
        lambda self, *a, **k: repeated.append((k["rates"], k["batch_size"])) or original(self, *a, **k),
    )
    again = tune(tuner, *setting[1], search=search, seed=0, known=known)
    assert repeated == [((1e-3,), 16), ((1e-2,), 16)]
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(whole, seconds=0)


def test_after_divergence_there_is_one_retry_at_a_lower_rate(setting):
    model, sets, buckets = setting
    tuner = FineTuner(model, dataclasses.replace(PLAN, learning_rate=1e30, clip=1e30), buckets, 0)
    found = tune(tuner, *sets, search=Search(retry=1e-32), seed=0)
    assert [t.status for t in found.trials] == ["diverged", "finished"]
    assert found.learning_rate == pytest.approx(1e-2)
    assert found.flops == sum(t.flops for t in found.trials) > found.trials[1].flops
    with pytest.raises(DivergedError) as caught:
        tune(tuner, *sets, search=Search(), seed=0)
    assert [t.learning_rate for t in caught.value.trials] == pytest.approx([1e30, 0.25e30])
    assert all(t.status == "diverged" and t.test_loss is None for t in caught.value.trials)


def test_a_trial_that_diverges_beside_others_is_recorded_and_never_chosen(setting):
    model, sets, buckets = setting
    tuner = FineTuner(model, dataclasses.replace(PLAN, clip=1e30), buckets, 0)
    for at_once in (1, 2):
        found = tune(tuner, *sets, search=Search(learning_rates=(1e-2, 1e30), parallel_trials=at_once), seed=0)
        assert [t.status for t in found.trials] == ["finished", "diverged"]
        assert found.learning_rate == 1e-2
        assert found.flops > found.trials[0].flops


def decided(search=None, rates=4, **changes):
    """How many trials run at once, of a model with 100 weights of which 10 are trained."""
    facts = {"parameters": 100, "trainable": 10, "memory": 10**6, "platform": "gpu", "sharded": False}
    return parallel_trials(search or Search(), rates, **facts | changes)


@pytest.mark.parametrize("fit", [1, 2, 3, 9])
def test_on_an_accelerator_as_many_rates_are_trained_at_once_as_fit_into_half_of_its_memory(fit):
    room = 2 * (4 * 100 + 20 * 10 * fit)
    assert decided(memory=room) == min(fit, 4)
    assert decided(memory=room - 2) == max(min(fit - 1, 4), 1)


def test_elsewhere_rates_are_trained_one_after_the_other_unless_asked_for():
    for change in ({"platform": "cpu"}, {"sharded": True}, {"memory": None}, {"memory": 0}):
        assert decided(**change) == 1
        assert decided(Search(parallel_trials=3), **change) == 3
    assert decided(Search(parallel_trials=9)) == 4


def test_progress_covers_all_trials(tuner, setting):
    seen = []
    search = Search(learning_rates=RATES, batch_sizes=(8, 16))
    tune(tuner, *setting[1], search=search, seed=0, on_progress=seen.append)
    shares = [p.done for p in seen]
    assert 0 < shares[0] < 0.2
    assert 0.8 < max(shares) <= 1
    assert search.trials(PLAN) == 7


def test_other_searches_are_other_runs():
    first = Search().as_record()
    assert first["lanes"] is None
    assert first["hopeless_after"] == 2
    assert Search(parallel_trials=3).as_record() == first | {"lanes": 3}
    assert Search(prune_after=4).as_record() == first | {"hopeless_after": 4}
