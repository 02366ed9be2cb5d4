"""Journals written before settings and states were renamed are still continued."""

from types import SimpleNamespace

import pytest

from lensjax.finetune import Search
from lensjax.journal import key_of
from lensjax.select.records import read_trial
from lensjax.select.request import Prepared, Request

# The digests are those that were computed before `parallel_trials` and `prune_after` had these names.
REQUESTS = {
    "default": (Request(), "72b22998f67d6b0a"),
    "search": (Request(search=Search((1e-3, 3e-4), (8, 16))), "108c7966d8b1a922"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_identifies_a_run_is_what_it_was(name):
    request, digest = REQUESTS[name]
    task = SimpleNamespace(fingerprint="0123456789abcdef", text_only=False)
    found = Prepared(request, task, (), {}, (50, 100), 1600, 128, ()).definition
    assert list(found["search"]) == ["learning_rates", "batch_sizes", "lanes", "hopeless_after", "retry"]
    assert key_of(found) == digest


def test_other_searches_are_other_runs():
    first = Search().as_record()
    assert first["lanes"] is None
    assert first["hopeless_after"] == 2
    assert Search(parallel_trials=3).as_record() == first | {"lanes": 3}
    assert Search(prune_after=4).as_record() == first | {"hopeless_after": 4}


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
