"""Scores of pretrained models: how many samples they read, and the same from a worker."""

import numpy as np
import pytest

from lensjax.jobs import job, process, runner
from lensjax.jobs.pretrained_scores import POSITIONS, samples_for
from lensjax.select.request import Request, prepare
from lensjax.select.session import runner_config
from lensjax.tasks import Encoded


def test_samples_hold_enough_target_tokens():
    ids = tuple(np.zeros(12, np.int32) for _ in range(1000))
    train = Encoded(ids, np.full(1000, 2), 0)
    assert samples_for(train, 1000) == POSITIONS // 10
    assert samples_for(train, 30) == 30


def test_a_worker_measures_in_its_own_process(tiny_models, tiny_task):
    sizes = {"smallest": 10, "visible": 40, "validation": 20, "test": 20, "max_length": 24}
    prepared = prepare(Request(models=(str(tiny_models[1]), f"{tiny_models[1]}+lora"), task=str(tiny_task), **sizes))
    config = runner_config(prepared, prepared.candidates[1])
    measured = []
    for own in (runner.CandidateRunner(config), process.CandidateProcess(config)):
        try:
            measured.append(own.measure(job.PretrainedScore("log_me", 40), job.Callbacks()))
        finally:
            own.close()
    in_process, found = measured
    assert found["log_me"] == pytest.approx(in_process["log_me"], rel=1e-5)
    assert (found["positions"], found["classes"]) == (in_process["positions"], in_process["classes"])
    assert found["peak_bytes"] > 0
