"""Losses from the states that transformers' Trainer saves."""

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.losses import read, read_trainer_states
from support.trainer_states import trainer_state


def test_trainer_states_of_several_checkpoints_are_one_run(tmp_path):
    for model, base in (("facebook/opt", 3.0), ("gpt2", 2.5)):
        for size in (200, 400):
            run = tmp_path / model / str(size)
            first, second = (50, base + 0.2), (100, base - size / 1000)
            trainer_state(run / "checkpoint-50", [(0, base + 1), first])
            trainer_state(run / "checkpoint-100", [(0, base + 1), first, second, (150, base + 0.5)])
    curves = read_trainer_states(tmp_path, parameters={"gpt2": 124e6})
    assert curves.names == ("facebook/opt", "gpt2")
    np.testing.assert_array_equal(curves.sizes, [0, 200, 400])
    np.testing.assert_allclose(curves.losses, [[4.0, 2.8, 2.6], [3.5, 2.3, 2.1]])
    np.testing.assert_array_equal(curves.parameters, [np.nan, 124e6])
    last = read_trainer_states(tmp_path, which="last")
    np.testing.assert_allclose(last.losses[:, 1], [3.5, 3.0])
    assert last.parameters is None
    np.testing.assert_array_equal(read(tmp_path).losses, curves.losses)


def test_trainer_states_by_name(tmp_path):
    for name in ("opt-125m_seed1_n1.6k", "pythia_seed1_n200"):
        trainer_state(tmp_path / name, [(10, 2.0)], metric="eval_test_loss")
    curves = read_trainer_states(tmp_path, pattern="{model}_n{samples}", metric="eval_test_loss")
    assert curves.names == ("opt-125m_seed1", "pythia_seed1")
    np.testing.assert_array_equal(curves.sizes, [200, 1600])
    np.testing.assert_array_equal(curves.losses, [[np.nan, 2.0], [2.0, np.nan]])


def test_training_that_did_harm_is_no_zero_shot_loss(tmp_path):
    trainer_state(tmp_path / "a-n200", [(0, 1.0), (10, 2.0)])
    trainer_state(tmp_path / "b-n200", [(0, 3.0), (10, 2.5)])
    np.testing.assert_array_equal(read(tmp_path).losses, [[1.0, 2.0], [3.0, 2.5]])


def test_runs_that_diverged_are_not_measured(tmp_path):
    trainer_state(tmp_path / "a-n200", [(10, float("nan"))])
    trainer_state(tmp_path / "a-n400", [(10, 2.0), (20, float("inf"))])
    trainer_state(tmp_path / "b-n400", [(10, 2.5)])
    curves = read(tmp_path)
    np.testing.assert_array_equal(curves.losses, [[np.nan, 2.0], [np.nan, 2.5]])
    np.testing.assert_array_equal(read(tmp_path, which="last").losses, [[np.nan, np.nan], [np.nan, 2.5]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a-n200/trainer_state.json: not readable as JSON (Expecting property name"),
        ("[" * 100_000, "a-n200/trainer_state.json: not readable as JSON (maximum recursion depth"),
        ("[]", "a-n200/trainer_state.json: no list 'log_history', so not a Trainer's state. Leave this file out."),
        (
            '{"log_history": [{"loss": 2.0, "step": 10}], "global_step": 10}',
            "a-n200/trainer_state.json: log_history has no 'eval_loss'. Evaluate while training (eval_strategy), or "
            "say which metric to take; there are: loss.",
        ),
        (
            '{"log_history": [{"eval_loss": "low", "step": 10}]}',
            "a-n200/trainer_state.json: eval_loss is 'low', not a number. Mend it or leave the run out.",
        ),
        (
            '{"log_history": [{"eval_loss": -1.5, "step": 10}]}',
            "a-n200/trainer_state.json: eval_loss is -1.5; losses are positive (nats per token). Is it the right",
        ),
        ('{"log_history": [{"eval_loss": 1.5, "step": null}]}', "a-n200/trainer_state.json: step is 'None', not a num"),
        ('{"log_history": [], "global_step": {}}', "a-n200/trainer_state.json: global_step is '{}', not a number"),
    ],
)
def test_malformed_trainer_states(tmp_path, content, message):
    trainer_state(tmp_path / "b-n200", [(10, 2.0)])
    (tmp_path / "a-n200").mkdir()
    (tmp_path / "a-n200" / "trainer_state.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_trainer_states(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/{message}")
