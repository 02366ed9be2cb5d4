"""Search over hyper-parameters, tangents, resuming: what one command can be asked for beside the plain selection."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from lensjax.errors import SelectionError
from lensjax.finetune import FineTuner, Trial
from lensjax.jobs import job, runner, tokens
from lensjax.journal import JOURNAL
from lensjax.models import Lora
from lensjax.select import cli, extra_measurements, request
from support.journals import journal


@pytest.fixture
def options(tiny_models, tiny_task):
    sizes = ("--smallest", 10, "--visible", 20, "--validation", 20, "--test", 20, "--max-length", 24)
    training = ("--max-epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--quiet", "--in-process")
    return ["--models", *tiny_models, "--task", tiny_task, *sizes, *training]


@pytest.fixture
def scripted_trials(monkeypatch):
    """No training: the loss falls with the samples and the rate; absurd rates diverge."""

    def trials(tuner, train, validation, test, *, rates, batch_size, **_):
        found = []
        for rate in rates:
            fine = rate < 1e20
            loss = (3.0 + len(str(tuner.parameters))) * (1 + len(train)) ** -0.1 - rate if fine else None
            given = {"test_loss": loss, "validation_loss": loss, "steps": 1, "steps_run": 2, "steps_per_epoch": 1}
            costs = {"samples": 2 * len(train), "tokens": 9 * len(train), "flops": 1.0 * len(train)}
            rest = {"step_flops": 1.0, "evaluation_flops": 1.0, "validation_history": ((0, 9.0),), "reason": "scripted"}
            status = "finished" if fine else "diverged"
            found.append(Trial(learning_rate=rate, batch_size=batch_size, status=status, **given, **costs, **rest))
        return tuple(found)

    monkeypatch.setattr(FineTuner, "trials", trials)


def test_tangents_are_recorded_counted_and_not_repeated(options, command, tmp_path, tiny_models, monkeypatch):
    out = tmp_path / "out"
    models_given = [*options[1:3], f"{tiny_models[0]}+lora"]
    options[1:3] = models_given
    status, text = command(*options, "--tangents", 8, "--out", out)
    assert status == 0
    assert "kernels and Hessian traces took" in text
    document = json.loads((out / "selection.json").read_text())
    seen = document["facts"]["tangents"]
    assert set(seen) == {"tiny-8", "tiny-16", "tiny-8+lora"}
    runs = journal(out)
    for name, found in seen.items():
        assert len(found["kernel_spectrum"]) == 8
        assert set(found["kernel_residual"]) == {"10", "20"}
        start = sum(r**2 for r in found["residual"])
        assert all(0 <= left <= start for left in found["kernel_residual"].values())
        (record,) = [r for r in runs if r["candidate"] == name and r["part_of"]]
        assert record["flops"] == found["flops"] > 0
        assert record["test_loss"] is None
    assert "Tangents: kernels and curvature" in (out / "report.html").read_text()
    monkeypatch.setattr(runner.CandidateRunner, "measure", lambda *_: pytest.fail("a measurement was repeated"))
    monkeypatch.setattr(FineTuner, "__init__", lambda *_: pytest.fail("a run was repeated"))
    assert command(*options, "--tangents", 8, "--out", out)[1] == text
    assert len(journal(out)) == len(runs)


def test_tangents_that_fail_or_cost_too_much_leave_the_ranking(options, tmp_path, monkeypatch, scripted_run):
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1))

    def failing(*_):
        raise job.RunFailedError("MemoryError: no room")

    monkeypatch.setattr(runner.CandidateRunner, "measure", failing)
    options.remove("--quiet")
    said = io.StringIO()
    arguments = [str(a) for a in (*options, "--tangents", 8, "--out", tmp_path / "one")]
    assert cli.run(arguments, io.StringIO(), said) == 0
    assert said.getvalue().count("could not be measured: MemoryError: no room") == 2
    said = io.StringIO()
    monkeypatch.setattr(extra_measurements, "tangent_flops", lambda *_: 1e30)
    arguments = [str(a) for a in (*options, "--tangents", 8, "--budget", "1e9", "--out", tmp_path / "two")]
    assert cli.run(arguments, io.StringIO(), said) == 0
    assert said.getvalue().count("not measured, it would exceed the budget") == 2


def test_several_rates_and_batch_sizes_are_searched_and_paid_for(options, command, tmp_path):
    at = options.index("--learning-rate")
    options[at + 1 : at + 2] = [0.01, 0.0001]
    at = options.index("--batch-size")
    options[at + 1 : at + 2] = [8, 4]
    out = tmp_path / "out"
    assert command(*options, "--out", out)[0] == 0
    runs = [r for r in journal(out) if not r["part_of"] and r["size"]]
    assert len(runs) == 4
    for run in runs:
        trials = [r for r in journal(out) if r["part_of"] == run["key"]]
        assert {(t["facts"]["trial"]["learning_rate"], t["facts"]["trial"]["batch_size"]) for t in trials} == {
            (rate, size) for rate in (0.01, 0.0001) for size in (4, 8)
        }
        assert run["flops"] == pytest.approx(sum(t["flops"] for t in trials))
        finished = [t["facts"]["trial"] for t in trials if t["facts"]["trial"]["status"] == "finished"]
        best = min(finished, key=lambda t: t["validation_loss"])
        assert run["test_loss"] == best["test_loss"]
        assert (run["facts"]["learning_rate"], run["facts"]["batch_size"]) == (
            best["learning_rate"],
            best["batch_size"],
        )
        assert run["facts"]["step_flops"] > 0
    # Killed after two trials of the last run: they are not made again, and the run is what it was.
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(b"".join(lines[:-3]))
    made = []
    whole = FineTuner.trials

    def counted(tuner, *args, **kwargs):
        made.append((kwargs["rates"], kwargs["batch_size"]))
        return whole(tuner, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "trials", counted)
        assert command("--resume", out)[0] == 0
    assert len(made) == 2
    again = journal(out)[-1]
    assert again["key"] == runs[-1]["key"]
    assert again["test_loss"] == pytest.approx(runs[-1]["test_loss"], rel=1e-6)
    assert again["flops"] == runs[-1]["flops"]


def test_with_a_budget_a_killed_search_goes_on_as_if_nothing_had_been(options, command, tmp_path, scripted_trials):
    """What its trials cost is in its run's price: they must not leave too little for it."""
    at = options.index("--learning-rate")
    options[at + 1 : at + 2] = [0.001, 0.003, 0.01]
    out = tmp_path / "out"
    # 2 epochs x (3 trials and a retry) x (10 + 20 + 40) samples x 2 candidates, and not one more.
    status, text = command(*options, "--method", "rectified", "--visible", 40, "--budget", "1120samples", "--out", out)
    assert status == 0
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    for kept in range(0, len(lines), 3):
        (out / JOURNAL).write_bytes(b"".join(lines[:kept]))
        assert command("--resume", out) == (0, text)
        again = (out / JOURNAL).read_bytes().splitlines(keepends=True)
        assert [json.loads(line)["key"] for line in again] == [json.loads(line)["key"] for line in lines]


def test_a_search_that_diverged_is_not_paid_for_again(options, command, tmp_path, scripted_trials):
    at = options.index("--learning-rate")
    options[at + 1 : at + 2] = [1e29, 1e30]
    out = tmp_path / "out"
    with pytest.raises(SelectionError, match="0 candidate"):
        command(*options, "--out", out)
    before = (out / JOURNAL).read_bytes()
    with pytest.raises(SelectionError, match="0 candidate"):
        command("--resume", out)
    assert (out / JOURNAL).read_bytes() == before


def test_resuming_needs_only_the_directory(options, command, tmp_path, monkeypatch, scripted_run):
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1))
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(options[4], here / "task.jsonl")
    options[4] = "task.jsonl"
    monkeypatch.chdir(here)
    status, text = command(*options, "--out", "run")
    assert status == 0
    (here / "run" / "selection.txt").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(runner.CandidateRunner, "run", lambda *_: pytest.fail("a finished run was repeated"))
    for resume in (("--resume", here / "run"), (f"--resume={here / 'run'}",)):
        assert command(*resume, "--json", "found.json", "--html", "found.html", "--figures", "drawn") == (0, text)
    assert (here / "run" / "selection.txt").exists()
    assert json.loads((elsewhere / "found.json").read_text())["target"] == 100
    assert (elsewhere / "found.html").read_text().startswith("<!doctype html>")
    assert list((elsewhere / "drawn").glob("*.svg"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no command.json of a selection; name its run directory"),
        ("[]", "holds no command.json of a selection"),
        ('{"arguments": ["--quiet"], "directory": "/no/such/place"}', "was started in /no/such/place, which is no"),
    ],
)
def test_what_cannot_be_resumed_is_refused(refused, tmp_path, content, message):
    if content is not None:
        (tmp_path / "command.json").write_text(content)
    assert message in refused("--resume", tmp_path)


def test_a_tokenizer_reads_a_task_once(tiny_models, tiny_task, monkeypatch, tmp_path):
    monkeypatch.setenv("LENSJAX_CACHE", str(tmp_path))
    counted = []
    whole = tokens.encode

    def encode_counted(examples, *args, **kwargs):
        counted.append(len(examples))
        return whole(examples, *args, **kwargs)

    monkeypatch.setattr(tokens, "encode", encode_counted)
    given = {"task": tiny_task, "smallest": 10, "visible": 20, "validation": 20, "test": 20}
    one, two = (request.prepare(request.Request(models=tuple(map(str, tiny_models)), **given)) for _ in range(2))
    assert counted == [20, 20, 20]  # two models with one tokenizer: training, validation and test samples once
    (first,), (second,) = one.tokens.values(), two.tokens.values()
    for a, b in zip((*first.train.ids, *first.test.ids), (*second.train.ids, *second.test.ids), strict=True):
        np.testing.assert_array_equal(a, b)
    assert Lora() == one.request.lora


def test_what_a_failed_search_cost_is_reported_as_lost(options, command, tmp_path, scripted_trials, tiny_models):
    at = options.index("--learning-rate")
    options[at + 1 : at + 2] = [0.001, 0.01]
    options[1:1] = [f"{tiny_models[0]}+lora"]
    whole = FineTuner.trials

    def failing(tuner, *data, **given):
        found = whole(tuner, *data, **given)
        if tuner.plan.lora is None:
            return found
        return tuple(dataclasses.replace(t, status="diverged", test_loss=None, validation_loss=None) for t in found)

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "trials", failing)
        status, _ = command(*options, "--out", out)
    assert status == 1
    lost = [r["flops"] for r in journal(out) if r["part_of"] and "+lora" in r["candidate"]]
    assert len(lost) == 3  # two rates and the retry, at the first size
    assert json.loads((out / "selection.json").read_text())["failed_flops"] == sum(lost) > 0
