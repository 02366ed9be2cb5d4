"""Losses from MLflow's file stores."""

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.losses import read, read_mlflow


def mlflow_run(store, identity, params, metrics, *, name="run", stage="active"):
    """Write a run as MLflow's file store does: files of parameters and tags, lines of "timestamp value step"."""
    run = store / "123" / identity
    for kind, values in (("params", params), ("tags", {"mlflow.runName": name, "mlflow.user": "me"})):
        (run / kind).mkdir(parents=True)
        for key, value in values.items():
            (run / kind / key).write_text(str(value))
    for key, values in metrics.items():
        file = run / "metrics" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{1_700_000_000_000 + step} {value} {step}\n" for step, value in values))
    (run / "meta.yaml").write_text(
        f"artifact_uri: file:///x\nend_time: 1\nentry_point_name: ''\nexperiment_id: '123'\nlifecycle_stage: {stage}\n"
        f"run_id: {identity}\nrun_name: {name}\nstatus: 3\n"
    )


@pytest.fixture
def store(tmp_path):
    found = tmp_path / "mlruns"
    (found / "123").mkdir(parents=True)
    (found / "123" / "meta.yaml").write_text("experiment_id: '123'\nlifecycle_stage: active\nname: tuning\n")
    losses = [(20, 3.3), (30, 3.1), (10, 3.0)]  # in the order of their arrival, not of their steps
    for number, (model, size) in enumerate([("gpt2", 200), ("gpt2", 400), ("opt", 200)]):
        params = {"model_name_or_path": model, "max_train_samples": size}
        shifted = [(step, loss + size / 1000) for step, loss in losses]
        mlflow_run(found, f"r{number}", params, {"eval_loss": shifted}, name=f"{model}-{size}")
    mlflow_run(
        found, "r9", {"model_name_or_path": "x", "max_train_samples": 1}, {"eval_loss": [(1, 1)]}, stage="deleted"
    )
    return found


def test_a_store_of_mlflow(store):
    curves = read(store)
    assert curves.names == ("gpt2", "opt")
    np.testing.assert_allclose(curves.losses, [[3.2, 3.4], [3.2, np.nan]])
    np.testing.assert_allclose(read_mlflow(store, which="last").losses, [[3.3, 3.5], [3.3, np.nan]])
    by_name = read_mlflow(store, model="mlflow.runName")
    assert by_name.names == ("gpt2-200", "gpt2-400", "opt-200")


def test_a_store_of_mlflow_with_slashes_in_names_and_runs_named_by_pattern(tmp_path):
    for size in (200, 400):
        for model in ("a", "b"):
            mlflow_run(tmp_path, f"{model}{size}", {}, {"eval/loss": [(1, 2.0)]}, name=f"{model}_{size}")
    np.testing.assert_array_equal(read(tmp_path).losses, np.full((2, 2), 2.0))


def test_malformed_stores_of_mlflow(store, tmp_path):
    (store / "123" / "r0" / "metrics" / "eval_loss").write_text("1700000000000 3.0 1\nnonsense\n")
    with pytest.raises(InputError, match=r"metrics/eval_loss, line 2: 'nonsense' is not 'timestamp value step'"):
        read(store)
    with pytest.raises(InputError, match="no runs of MLflow in it"):
        read_mlflow(tmp_path / "mlruns" / "123" / "r0" / "params")
