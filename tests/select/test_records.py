"""What is read from a journal: trials of earlier versions as well, and none that cannot be read."""

import json
from dataclasses import asdict

import pytest

from lensjax.finetune import Trial
from lensjax.journal import Run
from lensjax.select.records import known_trials, read_trial


@pytest.mark.parametrize(
    ("stored", "read"),
    [("hopeless", "pruned"), ("pruned", "pruned"), ("finished", "finished"), ("diverged", "diverged")],
)
def test_a_trial_that_was_journaled_before_reads(stored, read):
    record = {
        "learning_rate": 0.001,
        "batch_size": 8,
        "status": stored,
        "test_loss": None,
        "validation_loss": None,
        "steps": 13,
        "steps_run": 26,
        "steps_per_epoch": 13,
        "samples": 200,
        "tokens": 1000,
        "flops": 1e6,
        "step_flops": None,
        "evaluation_flops": None,
        "reason": "worse than the other trials after 2 epochs",
        "validation_history": [[0, 3.5], [13, 3.25], [26, 3.3]],
    }
    found = read_trial(record)
    assert found.status == read
    assert found.validation_history == ((0, 3.5), (13, 3.25), (26, 3.3))
    assert found.best_after(1) == 3.25


def test_a_trial_that_cannot_be_read_is_made_again():
    trial = Trial(
        learning_rate=0.1, batch_size=4, status="finished", reason="r", test_loss=2.0, validation_loss=2.0,
        validation_history=((0, 3.0),), steps=1, steps_run=2, steps_per_epoch=2, samples=8, tokens=9, flops=1.0,
        step_flops=None, evaluation_flops=None,
    )  # fmt: skip
    stored = json.loads(json.dumps(asdict(trial)))
    changes = [{"learning_rate": "x"}, {"steps": "1"}, {"validation_history": [[0]]}, {"batch_size": None}, {"new": 1}]
    others = [None, [], "x", {}, *({**stored, **change} for change in changes)]
    records = [Run(f"{n}", "a", 10, 2.0, facts={"trial": of}) for n, of in enumerate([*others, stored])]
    assert known_trials([*records, Run("z", "a", 10, 2.0)]) == {(0.1, 4): trial}
