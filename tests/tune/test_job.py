"""A selection's chosen model fine-tuned by the command that the selection ends with; tiny models, a tiny task."""

import dataclasses
import hashlib
import io
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import rich.console
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lensjax import models
from lensjax.commands.options import SHELLS
from lensjax.errors import InputError
from lensjax.finetune import DivergedError, FineTuner, Outcome, Plan, Progress, Search, Trial, Weights, tune
from lensjax.progress.console import Console
from lensjax.report.html import render_html
from lensjax.report.text import render
from lensjax.select import cli as select_cli
from lensjax.select.from_losses import select_from_losses
from lensjax.select.request import Request
from lensjax.tasks import encode, load_task
from lensjax.tune import cli, job
from lensjax.tune.best_checkpoint import RECORD
from lensjax.tune.comparison import SelectionComparison

SIZES = ("--validation", 20, "--test", 20, "--max-length", 24)
TRAINING = ("--max-epochs", 2, "--batch-size", 8)
MODELS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", RECORD)
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", RECORD)


@pytest.fixture(scope="module")
def selected(tiny_models, tiny_task, tmp_path_factory):
    """A selection among a model and adapters: its directory, what it printed and what it found."""
    directory = tmp_path_factory.mktemp("runs") / "mine"
    arguments = ["--models", tiny_models[0], f"{tiny_models[0]}+lora", "--task", tiny_task, *SIZES, *TRAINING]
    arguments += ["--smallest", 10, "--visible", 20, "--learning-rate", 0.03, "--seed", 1, "--in-process"]
    text = io.StringIO()
    assert select_cli.run([str(a) for a in (*arguments, "--out", directory)], text, io.StringIO()) == 0
    return SimpleNamespace(
        directory=directory, text=text.getvalue(), found=json.loads((directory / "selection.json").read_text())
    )


@pytest.fixture(scope="module")
def tuned(selected, tune_command):
    """The chosen model, fine-tuned by the selection's command: where it is, what was printed, the record."""
    python, dash, module, *arguments = shlex.split(selected.found["facts"]["tune_command"])
    assert (python, dash, module) == ("python", "-m", "lensjax.tune")
    status, text, progress = tune_command(*arguments)
    assert status == 0
    directory = selected.directory / f"tuned-{selected.found['best']}"
    return SimpleNamespace(
        directory=directory, text=text, progress=progress, record=json.loads((directory / RECORD).read_text())
    )


@pytest.fixture
def scripted(monkeypatch):
    """Let a list of validation losses, one a step, stand in for training; an exception in it is raised there."""

    def scripted(losses):
        def train(tuner, train, validation, test, *, on_trials, on_progress, on_weights, **_):
            rate, size, best, step = 0.01, 8, 7.0, 0
            for number, loss in enumerate(losses, start=1):
                if isinstance(loss, BaseException):
                    raise loss
                on_progress(Progress(number, len(losses), number, min(loss, best), number / len(losses)))
                if loss < best:
                    best, step = loss, number
                    on_weights(Weights(rate, size, step, best, scaled(tuner.initial, step), False))
            on_weights(Weights(rate, size, step, best, scaled(tuner.initial, step), True))
            counts = {"steps": step, "steps_run": len(losses), "samples": 1, "tokens": 1, "flops": 1.0}
            shared = {"validation_loss": best, "validation_history": ((0, 7.0),), "reason": "scripted", **counts}
            trial = Trial(
                rate, size, "finished", 1.0, steps_per_epoch=1, step_flops=1.0, evaluation_flops=1.0, **shared
            )
            on_trials((trial,))
            rest = {"seconds": 0.1, "trainable": 1, "learning_rate": rate, "batch_size": size, "trials": (trial,)}
            return Outcome(test_loss=1.0, **shared, **rest)

        monkeypatch.setattr(job, "tune", train)

    return scripted


def scaled(params, step):
    return jax.tree.map(lambda x: x * (1 + step), params)


def by_hand(tiny_models, tiny_task, plan, search=None, seed=0, samples=100):
    """The same run by the library: outcome, fine-tuner and test samples."""
    task = load_task(tiny_task, validation=20, test=20, seed=seed)
    tokenizer = models.load_tokenizer(tiny_models[0])
    sets = [encode(part, tokenizer, 24) for part in (task.subset(samples), task.validation, task.test)]
    request = Request(models=(str(tiny_models[0]),), task=tiny_task, validation=20, test=20, max_length=24, seed=seed)
    buckets = job.prepare_job(request, tiny_task.parent / "none", samples=samples).tokens.buckets
    tuner = FineTuner(models.load_model(tiny_models[0]), plan, buckets, 0)
    return tune(tuner, *sets, search=search or Search(), seed=seed), sets[2], buckets


def reloaded_loss(model, test, buckets):
    """The test loss of a model by a new fine-tuner."""
    again = FineTuner(model, Plan(batch_size=8), buckets, 0)
    return again.loss(again.initial, test)


def test_the_selections_command_gives_what_the_fine_tuner_gives(selected, tuned, tiny_models, tiny_task):
    assert selected.found["best"] == "tiny-8"
    runs = [json.loads(line) for line in (selected.directory / "runs.jsonl").read_text().splitlines()]
    largest = next(r for r in runs if (r["candidate"], r["size"], r["part_of"]) == ("tiny-8", 20, ""))
    rate = largest["facts"]["learning_rate"]
    want, _, _ = by_hand(tiny_models, tiny_task, Plan(learning_rate=rate, batch_size=8, max_epochs=2), seed=1)
    assert tuned.record["test_loss"] == pytest.approx(want.test_loss, rel=1e-6)
    assert tuned.record["validation_loss"] == pytest.approx(want.validation_loss, rel=1e-6)
    assert (tuned.record["learning_rate"], tuned.record["steps"]) == (rate, want.steps)
    # The samples set aside are the selection's.
    assert tuned.record["task_fingerprint"] == selected.found["facts"]["task"]
    assert tuned.record["samples"] == selected.found["target"] == 100


def test_what_is_saved_is_the_model_with_that_loss(tuned, tiny_models, tiny_task):
    assert sorted(e.name for e in tuned.directory.iterdir()) == sorted(MODELS)
    model, tokenizer = models.from_pretrained(tuned.directory)
    task = load_task(tiny_task, validation=20, test=20, seed=1)
    test = encode(task.test, tokenizer, 24)
    assert reloaded_loss(model, test, (16,)) == pytest.approx(tuned.record["test_loss"], rel=1e-5)
    before = reloaded_loss(models.load_model(tiny_models[0]), test, (16,))
    assert before > tuned.record["test_loss"] + 0.1


def test_the_record_says_what_was_done(tuned, selected):
    record = tuned.record
    assert record["status"] == "finished"
    assert record["saved"]["step"] == record["steps"]
    assert record["saved"]["validation_loss"] == record["validation_loss"]
    digest = hashlib.sha256((tuned.directory / "model.safetensors").read_bytes()).hexdigest()
    assert record["saved"]["sha256"] == digest
    assert record["flops"] == 6 * record["parameters"] * record["tokens_trained_on"]
    assert record["seconds"] > 0
    assert record["versions"]["jax"]
    assert sorted([*record["files"], RECORD]) == sorted(MODELS)
    assert shlex.join(["python", "-m", "lensjax.tune", *record["arguments"]]) == selected.found["facts"]["tune_command"]
    assert record["plan"]["max_epochs"] == 2


def test_the_result_is_said_and_held_against_the_selections_interval(tuned, selected):
    low, high = selected.found["methods"]["averaged"]["ranking"][0]["interval"]
    loss = tuned.record["test_loss"]
    assert tuned.text.startswith(f"Fine-tuned tiny-8 on 100 samples: test loss {loss:.4f}, validation loss")
    where = "within" if low <= loss <= high else "ABOVE" if loss > high else "BELOW"
    assert f"90 % interval {low:.4f} to {high:.4f}): the loss is {where} it." in tuned.text
    assert " But " not in tuned.text
    assert f"lensjax.from_pretrained({str(tuned.directory)!r})" in tuned.text
    saved = [line for line in tuned.progress.splitlines() if line.endswith(": saved")]
    improved = np.minimum.accumulate([v for _, v in tuned.record["validation_history"]])
    assert len(saved) == len(set(improved)) - 1
    assert f"step {tuned.record['steps']}, validation loss {tuned.record['validation_loss']:.4f}: saved" in saved[-1]


def test_the_selection_shows_the_command_in_text_and_report(selected):
    command = selected.found["facts"]["tune_command"]
    assert selected.text.split("\n\n")[0].splitlines()[-1] == command
    page = (selected.directory / "report.html").read_text()
    assert f'<pre style="user-select: all"><code>{command}</code></pre>' in page


def test_a_selection_from_losses_says_what_to_do_where_no_model_is_at_hand():
    selection = select_from_losses("published:wmt19", gamma=3, tau=5.0)
    assert f"\nNext: fine-tune {selection.best} on all " in render(selection)
    noted = dataclasses.replace(selection, facts={"tune_command": "tune 'a<b'", "tune_note": "Mind & heed."})
    assert "\nNext, this fine-tunes it and saves the model. Mind & heed.\ntune 'a<b'\n" in render(noted)
    page = render_html(noted)
    assert "Mind &amp; heed." in page
    assert "<code>tune &#x27;a&lt;b&#x27;</code>" in page


def test_adapters_are_saved_in_pefts_format_and_searched_rates_kept(tiny_models, tiny_task, tune_command, tmp_path):
    """Two rates: what is saved is the better one's, whichever came last."""
    out = tmp_path / "adapters"
    model = ("--model", f"{tiny_models[0]}+lora", "--lora-rank", 2)
    rest = ("--samples", 20, "--learning-rate", 0.05, 1e-7, "--out", out)
    status, text, progress = tune_command(*model, "--task", tiny_task, *SIZES, *TRAINING, *rest)
    assert status == 0
    assert sorted(e.name for e in out.iterdir()) == sorted(ADAPTERS)
    record = json.loads((out / RECORD).read_text())
    losses = {t["learning_rate"]: t["test_loss"] for t in record["trials"]}
    assert losses[0.05] < losses[1e-7]
    assert (record["test_loss"], record["learning_rate"]) == (losses[0.05], 0.05)
    assert "learning rate 0.05, batch size 8" in text
    assert "learning rate 1e-07, batch size 8: finished" in progress
    task = load_task(tiny_task, validation=20, test=20)
    test = encode(task.test, models.load_tokenizer(out), 24)
    model = models.load_lora(models.load_model(tiny_models[0]), out)
    assert reloaded_loss(model, test, (16,)) == pytest.approx(record["test_loss"], rel=1e-5)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (2, str(tiny_models[0].resolve()))


@pytest.fixture
def arguments(tiny_models, tiny_task, tmp_path):
    """Of a run that goes into the directory `out`."""
    task = ("--model", tiny_models[0], "--task", tiny_task, *SIZES, *TRAINING)
    return (*task, "--samples", 20, "--learning-rate", 0.01, "--out", tmp_path / "out")


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_an_interrupted_run_says_what_it_keeps(arguments, tiny_models, tune_command, tmp_path, scripted):
    scripted([6.0, 5.0, 5.5, KeyboardInterrupt()])
    status, text, progress = tune_command(*arguments)
    out = tmp_path / "out"
    assert (status, text) == (130, "")
    assert f"interrupted. {out} holds the best weights so far (step 2, validation loss 5.0000)." in progress
    record = json.loads((out / RECORD).read_text())
    assert (record["status"], record["saved"]["step"]) == ("interrupted", 2)
    assert sorted(e.name for e in out.iterdir()) == sorted(MODELS)
    for name, tensor in weights(tiny_models[0]).items():
        np.testing.assert_allclose(weights(out)[name], 3 * tensor, rtol=1e-6)


def test_a_run_interrupted_before_anything_was_saved_leaves_nothing(arguments, tune_command, tmp_path, scripted):
    scripted([8.0, KeyboardInterrupt()])
    status, _, progress = tune_command(*arguments)
    assert status == 130
    assert "interrupted. No weights were saved" in progress
    assert not (tmp_path / "out").exists()


def test_divergence_and_a_full_disk_end_with_one_line(arguments, tune_command, tmp_path, scripted, monkeypatch):
    scripted([6.0, DivergedError("the training loss is not finite")])
    status, text, progress = tune_command(*arguments)
    assert (status, text) == (1, "")
    assert "lensjax.tune: the training loss is not finite. " in progress
    assert "holds the best weights so far (step 1, validation loss 6.0000)." in progress
    assert json.loads((tmp_path / "out" / RECORD).read_text())["status"] == "failed"
    scripted([5.0])
    out = tmp_path / "out"
    message = f"lensjax.tune: {out}: No space left on device. Make room and give the same command again. No weights "
    in_rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for full in (OSError(28, "No space left on device"), in_rust):
        monkeypatch.setattr(models, "save_pretrained", lambda *_, full=full, **__: (_ for _ in ()).throw(full))
        status, text, progress = tune_command(*arguments, "--overwrite", "--verbose")
        assert (status, text) == (1, "")
        assert f"{message}were saved.\n" in progress
        assert "Traceback" in progress
    assert json.loads((tmp_path / "out" / RECORD).read_text())["saved"]["step"] == 1  # the earlier run's


def test_training_that_helps_nothing_saves_the_model_as_it_was(
    arguments, tiny_models, tune_command, tmp_path, scripted
):
    scripted([7.5, 8.0])
    status, text, _ = tune_command(*arguments)
    assert status == 0
    assert "No step lowered the validation loss: what is saved is the model as it was." in text
    want, found = weights(tiny_models[0]), weights(tmp_path / "out")
    assert set(want) == set(found)
    for name, tensor in want.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_a_finished_model_is_not_overwritten_unless_asked_for(tuned, selected, refused, tmp_path):
    arguments = shlex.split(selected.found["facts"]["tune_command"])[3:]
    message = refused(*arguments)
    assert message == (
        f"--out {tuned.directory}: holds a fine-tuned model already. Name a new directory, or replace it with "
        "--overwrite."
    )
    (tmp_path / "thesis.tex").write_text("")
    arguments[-1] = str(tmp_path)
    assert "is not empty and holds no model of lensjax.tune" in refused(*arguments, "--overwrite")


def test_doubts_about_the_forecast_are_said(selected, tiny_models, tiny_task, tmp_path):
    request = Request(models=(str(tiny_models[0]),), task=tiny_task, validation=20, test=20, max_length=24)
    request = dataclasses.replace(request, plan=Plan(batch_size=8, max_epochs=3))
    found = job.prepare_job(request, tmp_path / "out", samples=50, selection=selected.directory).comparison
    assert found.caveats == (
        "the data, the samples set aside or the seed are others",
        "it was made for another max_epochs",
        "it is for 100 samples",
    )
    assert " But the data, the samples" in found.compare(1.0)
    changed = tmp_path / "tiny-8"
    shutil.copytree(tiny_models[0], changed)
    (changed / "tokenizer_config.json").write_text((changed / "tokenizer_config.json").read_text() + " ")
    request = dataclasses.replace(request, models=(str(changed),), seed=1, plan=Plan(batch_size=8, max_epochs=2))
    found = job.prepare_job(request, tmp_path / "out", selection=selected.directory / "selection.json").comparison
    assert found.caveats == ("the model's files or its adapters' settings have changed since",)


def test_forecasts_are_judged_in_their_own_unit():
    sure = SelectionComparison("m", 2.0, (1.5, 2.5), 0.9, False, 100.0)
    assert sure.compare(2.5) == "The selection expected 2.0000 (90 % interval 1.5000 to 2.5000): the loss is within it."
    assert "ABOVE" in sure.compare(2.6)
    assert "BELOW" in sure.compare(1.4)
    bare = dataclasses.replace(sure, interval=None)
    assert bare.compare(2.5) == "The selection expected 2.0000: 0.5000 too low."
    assert bare.compare(1.5) == "The selection expected 2.0000: 0.5000 too high."
    assert "predicts no loss" in dataclasses.replace(sure, loss=None).compare(1.0)


def test_bad_input_is_refused_in_one_line(refused, arguments, tiny_models, selected, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for more, message in (
        (("--samples", 101), "--samples 101: the task has 100 training samples; lower it."),
        (("--out", file), f"--out {file}: is a file; name a directory."),
        (("--out", tiny_models[0]), "is not empty and holds no model of lensjax.tune"),
        (("--selection", tmp_path), "holds no selection.json of a finished selection (FileNotFoundError)"),
        (("--selection", selected.directory, "--model", tiny_models[1]), "ranks no tiny-16 (but tiny-8, tiny-8+lora)"),
        (("--lora-rank", 4), f"--lora-rank: the model has no adapters; name it {tiny_models[0]}+lora"),
        (("--learning-rate", 0), "the learning rate is 0; it must be positive and finite."),
        (("--learning-rate", 0.1, 0.1), "one is named twice"),
        (("--model", tmp_path / "nowhere"), "no such directory"),
        (("--sampels", 4), "unrecognized arguments: --sampels 4. Did you mean --samples? See python -m lensjax.tune"),
        (("--task", "none.jsonl"), "no such file"),
        (("--task", "b\udcffd.jsonl"), r"'b\udcffd.jsonl': is not UTF-8; rename the file"),
        (("--out", file / "x"), f"--out {file / 'x'}: nothing can be made in {file}; name another."),
    ):
        assert message in refused(*arguments, *more)
    assert "the following arguments are required: --model" in refused("--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "specification"),
    [
        ({}, {}),
        ({"predicted_loss": "low"}, {}),
        ({"predicted_loss": 1.0, "interval": [1.0]}, {}),
        ({"predicted_loss": 1.0}, {"plan": 3}),
    ],
)
def test_a_damaged_selection_is_refused(refused, arguments, tmp_path, entry, specification):
    method, facts = {"ranking": [{"name": "tiny-8", **entry}]}, {"specification": specification}
    document = {"schema": 2, "method": "m", "methods": {"m": method}, "target": 20, "facts": facts}
    document["loss_unit"] = "nats per token"
    (tmp_path / "selection.json").write_text(json.dumps(document))
    message = refused(*arguments, "--selection", tmp_path)
    assert message.startswith(f"--selection {tmp_path}: holds no selection.json of a finished selection (")


def test_a_model_is_not_written_over_itself(tuned, tiny_task):
    request = Request(models=(str(tuned.directory),), task=tiny_task, validation=20, test=20, max_length=24)
    with pytest.raises(InputError, match="is the model that is fine-tuned"):
        job.prepare_job(request, tuned.directory, overwrite=True)


def test_losses_per_byte_are_held_against_an_expectation_per_byte(
    arguments, tune_command, tmp_path, scripted, monkeypatch
):
    entry = {"name": "tiny-8", "predicted_loss": 0.0, "interval": [0.0, 0.0]}
    method = {"ranking": [entry], "certainty": 0.9}
    document = {"schema": 2, "method": "m", "methods": {"m": method}, "target": 20, "facts": {}}
    document["loss_unit"] = "nats per byte"
    (tmp_path / "selection.json").write_text(json.dumps(document))
    scripted([6.0])
    status, text, _ = tune_command(*arguments, "--selection", tmp_path)
    assert status == 0
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert f"{record['test_loss_per_byte']:.4f} nats per byte. The selection expected 0.0000" in text
    assert 0 < record["test_loss_per_byte"] < record["test_loss"]
    monkeypatch.setattr(job.Tuning, "per_byte", lambda *_: None)
    status, text, _ = tune_command(*arguments, "--selection", tmp_path, "--overwrite")
    assert status == 0
    assert "The selection expected a loss per byte, but" in text


def test_help_begins_with_what_it_does_and_examples():
    text = cli.parser().format_help()
    assert text.index("Fine-tunes one model") < text.index("examples:") < text.index("options:")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_option_and_needs_no_other(tune_command, shell):
    status, script, _ = tune_command("--completion", shell)
    assert status == 0
    # fish writes long options without their dashes.
    assert all(action.option_strings[-1].removeprefix("--") in script for action in cli.parser().options)
    assert "lensjax-tune" in script or "lensjax_tune" in script
    assert "lensjax-select" not in script


def test_steps_losses_and_time_left_are_shown_on_a_terminal(tiny_models, tiny_task, tmp_path, scripted):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    scripted([6.0, 5.0])
    screen = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120, height=30, color_system=None)
    request = Request(models=(str(tiny_models[0]),), task=tiny_task, validation=20, test=20, max_length=24)
    tuning = job.Tuning(job.prepare_job(request, tmp_path / "out", samples=20), Console(Terminal(), screen=screen))
    tuning.execute()
    shown = screen.file.getvalue()
    assert "Fine-tuning on 20 samples of parity; losses in nats per token" in shown
    assert "now: tiny-8, 20 samples: step 2 of at most 2, epoch 2, validation loss 5.0000" in shown
    assert re.search(r"so far; at most about \d+:\d\d left", shown)
    assert "1.0000" in shown
