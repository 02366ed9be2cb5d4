"""The packaged live benchmark: losses, kernels and traces are those that were measured."""

import json
import re

import numpy as np
import pytest

import lensjax
from lensjax._messages import packaged_like
from lensjax.data import LIVE
from lensjax.data.live_benchmark import read_tangents
from lensjax.laws import kernel_residual
from support.paths import ROOT

ROWS = ROOT / "benchmarks" / "results" / "live" / "runs.jsonl"


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


@pytest.mark.parametrize("task", LIVE)
def test_the_table_and_the_tangents_of_a_task_are_those_measured(rows, task):
    curves, seen = lensjax.read_losses(f"live:{task}"), read_tangents(f"live:{task}")
    assert seen.names == curves.names
    np.testing.assert_array_equal(seen.sizes, curves.sizes)
    assert len(curves) >= 12
    assert len(set(curves.families)) >= 5
    assert curves.sizes[-1] >= 3_200
    compared = 0
    for row in rows:
        if row.get("task") != task or row["candidate"] not in curves.names:
            continue
        if row["kind"] == "log_me":
            assert curves.facts["log_me"][curves.names.index(row["candidate"])] == pytest.approx(row["log_me"])
            continue
        at = curves.names.index(row["candidate"]), list(curves.sizes).index(row.get("size", 0))
        if row.get("seed", 0) == 1:
            assert seen.second_loss[at] == pytest.approx(row["test_loss"])
            continue
        compared += 1
        assert curves.losses[at] == pytest.approx(row["test_loss"], abs=1e-6)
        assert seen.steps[at] == row.get("steps", 0)
        assert seen.trace_hessian[at] == pytest.approx(row["trace_hessian"]["total"])
        for output in seen.outputs:
            own = row[f"ntk_{output}"]
            np.testing.assert_allclose(seen.eigenvalues[output][at], own["eigenvalues"], rtol=1e-6)
            assert seen.cosine_low[output][at] == pytest.approx(own["cosine_low"])
            assert ("change" in own) == np.isfinite(seen.change[output][at])
    assert compared == curves.losses.size


@pytest.mark.parametrize("task", LIVE)
def test_what_is_recorded_is_possible(task):
    seen = read_tangents(f"live:{task}")
    for output in seen.outputs:
        values = seen.eigenvalues[output]
        assert (np.diff(values, axis=-1) >= 0).all()
        assert (values[..., 0] > -1e-4 * values[..., -1]).all()  # a kernel, but for rounding
        assert (np.abs(seen.cosine[output]) <= 1).all()
        assert np.nanmax(seen.kept[output]) <= 1 + 1e-6
    # The residual of the losses before fine-tuning is the losses: none below 0, none beyond 20 nats.
    squared = (seen.residual["loss"][:, 0] ** 2).sum(axis=-1)
    assert ((squared > 0) & (squared < 32 * 20**2)).all()
    assert ((seen.residual["gold_probability"][:, 0] ** 2).sum(axis=-1) <= 32).all()
    # A quarter of the runs was made twice.
    twice = np.isfinite(seen.second_loss[:, 1:]).mean()
    assert 0.15 < twice < 0.35
    assert np.isnan(seen.second_loss[:, 0]).all()


def test_the_residual_of_eq_9_starts_at_the_squared_losses_and_falls():
    seen = read_tangents("live:novels")
    eigenvalues, residual = np.maximum(seen.eigenvalues["loss"][:, 0], 0), seen.residual["loss"][:, 0]
    at = [np.asarray(kernel_residual(np.full(len(seen.names), t), eigenvalues, residual, 1e-5)) for t in (0, 10, 100)]
    np.testing.assert_allclose(at[0], (residual**2).sum(axis=1), rtol=1e-5)
    assert (at[1] < at[0]).all()
    assert (at[2] < at[1]).all()


def test_a_wrong_name_is_told_with_those_there_are(tmp_path):
    with pytest.raises(lensjax.InputError, match=r"live:novel: nothing is recorded .* Did you mean live:novels\?"):
        read_tangents("live:novel")
    # Of published tables nothing is recorded, so none is meant.
    with pytest.raises(lensjax.InputError, match=r"live:flam: nothing is recorded .* live:packages\.$"):
        read_tangents("live:flam")
    assert packaged_like("Novel", {"a": ["flan"], "live": ["novels"]}) == " Did you mean live:novels?"
    assert packaged_like("mars", {"live": ["novels"]}) == ""
    with pytest.raises(lensjax.InputError, match=r"live:flan: no such live table\. There are: live:definitions"):
        lensjax.read_losses("live:flan")
    other = tmp_path / "other.npz"
    np.savez(other, names=np.array(["a"]))
    with pytest.raises(lensjax.InputError, match=re.escape(f"{other}: cannot be read as recorded tangents (KeyError")):
        read_tangents(other)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(other.read_bytes()[:100])
    with pytest.raises(lensjax.InputError, match=re.escape(f"{cut}: cannot be read as recorded tangents (BadZipFile")):
        read_tangents(cut)
    np.save(tmp_path / "array.npy", np.arange(3))
    with pytest.raises(lensjax.InputError, match=r"array\.npy: cannot be read as recorded tangents"):
        read_tangents(tmp_path / "array.npy")
    missing = tmp_path / "none.npz"
    with pytest.raises(lensjax.InputError, match=re.escape(f"{missing}: cannot be read as recorded tangents (FileNot")):
        read_tangents(missing)


def test_its_repr_is_short():
    text = repr(read_tangents("live:novels"))
    assert text.startswith("RecordedTangents(live:novels, ")
    assert len(text) < 250
