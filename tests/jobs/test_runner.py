"""A candidate's jobs in this process: one copy of the weights, nothing left behind."""

import gc
import weakref

import jax
import pytest

from lensjax.finetune import FineTuner
from lensjax.jobs import job, runner
from lensjax.select.request import Request, prepare
from lensjax.select.session import runner_config


@pytest.fixture
def config(tiny_models, tiny_task):
    request = Request(
        models=tuple(map(str, tiny_models)),
        task=str(tiny_task),
        smallest=10,
        visible=20,
        validation=20,
        test=20,
        max_length=24,
    )
    prepared = prepare(request)
    return runner_config(prepared, prepared.candidates[0])


def test_weights_are_held_once(config):
    own = runner.CandidateRunner(config)
    pretrained = weakref.ref(own.pretrained)
    tuner = weakref.ref(own.tuner)
    gc.collect()
    assert pretrained() is None
    assert tuner() is not None
    assert own.pretrained is not None
    gc.collect()
    assert tuner() is None


def test_closing_frees_the_candidate_and_no_other_compiled_code(config):
    double = jax.jit(lambda x: 2 * x)
    double(1.0)
    own = runner.CandidateRunner(config)
    own.run(job.FineTuning(0), job.Callbacks())
    tuner = weakref.ref(own.tuner)
    own.close()
    gc.collect()
    assert tuner() is None
    assert double._cache_size() == 1


def test_a_deadline_that_has_passed_starts_no_measurement(config):
    own = runner.CandidateRunner(config)
    with pytest.raises(job.OutOfTimeError, match="the time is spent"):
        own.measure(job.TangentMeasurement(4), job.Callbacks(), deadline=0.0)


def test_what_goes_wrong_is_one_line_with_its_traceback(config, monkeypatch):
    def fail(*_):
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(FineTuner, "zero_shot", fail)
    with pytest.raises(job.RunFailedError) as failed:
        runner.CandidateRunner(config).run(job.FineTuning(0), job.Callbacks())
    assert str(failed.value) == "ValueError: first line"
    assert failed.value.details.startswith("Traceback")
