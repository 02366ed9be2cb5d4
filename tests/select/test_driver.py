"""The command really fine-tuning: tiny models, a tiny task, everything else as for a user."""

import io
import json
import re
import shutil
import sys

import jax
import pytest

import lensjax
from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import FineTuner
from lensjax.jobs import job, runner
from lensjax.journal import JOURNAL
from lensjax.select import cli
from lensjax.select import request as request_module
from support.journals import journal


@pytest.fixture
def options(tiny_models, tiny_task):
    """Options of a selection that takes seconds."""
    sizes = ("--smallest", 10, "--visible", 40, "--validation", 20, "--test", 20)
    training = ("--max-epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--max-length", 24)
    return ["--models", *tiny_models, "--task", tiny_task, *sizes, *training, "--quiet", "--in-process"]


@pytest.fixture(scope="module")
def finished(tiny_models, tiny_task, tmp_path_factory):
    """A finished, verified selection: (run directory, what was printed)."""
    out, err = io.StringIO(), io.StringIO()
    directory = tmp_path_factory.mktemp("runs") / "one"
    sizes = ("--smallest", 10, "--visible", 40, "--validation", 20, "--test", 20)
    training = ("--max-epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--max-length", 24)
    arguments = ["--models", *tiny_models, "--task", tiny_task, *sizes, *training, "--out", directory, "--verify"]
    arguments.append("--in-process")
    assert cli.run([str(a) for a in arguments], out, err) == 0
    return directory, out.getvalue(), err.getvalue()


CONFIG = {"model_type": "gpt2", "n_positions": 64, "n_layer": 1, "n_head": 2}


def test_every_candidate_is_measured_from_zero_shot_to_the_largest_subset(finished, tiny_models):
    runs = journal(finished[0])
    names = [m.name for m in tiny_models]
    assert [(r["candidate"], r["size"]) for r in runs] == [(n, s) for n in names for s in (0, 40, 20, 10, 100)]
    for run in runs:
        assert 0 < run["test_loss"] < 12
        assert run["flops"] == 6 * run["facts"]["parameters"] * run["tokens"]
        assert (run["tokens"] == 0) == (run["size"] == 0)


def test_the_answer_comes_first_and_rests_on_the_runs(finished):
    directory, text, _ = finished
    document = json.loads((directory / "selection.json").read_text())
    ranking = document["methods"]["averaged"]["ranking"]
    assert text.startswith(
        f"Fine-tune {ranking[0]['name']}: expected test loss {ranking[0]['predicted_loss']:.4f} nats"
    )
    assert (directory / "selection.txt").read_text().strip() == text.strip()
    assert document["target"] == 100
    assert document["sizes"] == [0, 10, 20, 40]
    by_key = {(r["candidate"], r["size"]): r for r in journal(directory)}
    for candidate in document["candidates"]:
        for size, loss, flops in zip(document["sizes"], candidate["losses"], candidate["flops"], strict=True):
            assert by_key[candidate["name"], size]["test_loss"] == loss
            assert by_key[candidate["name"], size]["flops"] == flops


def test_verification_judges_the_choice_by_runs_on_all_samples(finished):
    directory, text, _ = finished
    document = json.loads((directory / "selection.json").read_text())
    truth = {r["candidate"]: r["test_loss"] for r in journal(directory) if r["size"] == 100}
    assert {c["name"]: c["true_loss"] for c in document["candidates"]} == truth
    found = document["methods"]["averaged"]
    assert found["metrics"]["RelAcc"] == (1.0 if truth[found["best"]] == min(truth.values()) else 0.0)
    assert f"the best candidate was {min(truth, key=truth.get)}" in text


def test_progress_names_candidate_size_loss_and_time_left(finished, tiny_models):
    _, _, err = finished
    lines = [line for line in err.splitlines() if f"candidate 2/2 {tiny_models[1].name}: 20 samples: test loss" in line]
    assert len(lines) == 1
    assert re.search(r"at most about \d+:\d\d left$", lines[0])


def test_the_same_command_again_trains_nothing_and_says_the_same(finished, options, command, tmp_path, monkeypatch):
    directory = tmp_path / "again"
    shutil.copytree(finished[0], directory)
    before = (directory / JOURNAL).read_bytes()
    monkeypatch.setattr(FineTuner, "__init__", lambda *_: pytest.fail("a finished run was repeated"))
    status, text = command(*options, "--out", directory, "--verify")
    assert status == 0
    assert text.replace(str(directory), str(finished[0])) == finished[1]
    assert (directory / JOURNAL).read_bytes() == before


def test_an_interrupted_selection_goes_on_where_it_was(finished, options, command, tmp_path, monkeypatch):
    directory = tmp_path / "resumed"
    shutil.copytree(finished[0], directory)
    lines = (directory / JOURNAL).read_bytes().splitlines(keepends=True)
    (directory / JOURNAL).write_bytes(b"".join(lines[:7]) + lines[7][:50])  # killed while writing the eighth run
    made = []
    whole = runner.CandidateRunner.run

    def counted(own, work, *rest):
        made.append((own.config.name, work.size))
        return whole(own, work, *rest)

    monkeypatch.setattr(runner.CandidateRunner, "run", counted)
    status, _ = command(*options, "--out", directory, "--verify")
    assert status == 0
    assert made == [("tiny-16", 20), ("tiny-16", 10), ("tiny-16", 100)]
    want = {r["key"]: r["test_loss"] for r in journal(finished[0])}
    for run in journal(directory):
        assert run["test_loss"] == pytest.approx(want[run["key"]], rel=1e-5)


def test_a_candidate_that_fails_is_reported_and_the_others_go_on(
    options, command, tiny_models, tmp_path, monkeypatch, capsys
):
    third = tmp_path / "third"
    shutil.copytree(tiny_models[1], third)
    config = json.loads((third / "config.json").read_text())
    (third / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    whole = runner.CandidateRunner.run

    def failing(own, work, *rest):
        name, size = own.config.name, work.size
        if name == "third" and size == 20:
            raise job.RunFailedError("MemoryError: no room")
        if name == "tiny-8" and size == 100:
            raise job.RunFailedError("RuntimeError: only the verification fails")
        return whole(own, work, *rest)

    monkeypatch.setattr(runner.CandidateRunner, "run", failing)
    options[options.index("--task") : options.index("--task")] = [third]
    status, text = command(*options, "--out", tmp_path / "out", "--verify")
    assert status == 1
    assert "Not ranked:\n  third: MemoryError: no room" in text
    assert "Not verified:\n  tiny-8: RuntimeError: only the verification fails" in text
    assert "more went to candidates that failed" in text
    document = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert document["failures"] == {"third": "MemoryError: no room"}
    assert {c["name"] for c in document["candidates"]} == {m.name for m in tiny_models}
    # The runs of the failed candidate that did finish are kept.
    third = {r["size"]: (r["test_loss"], r["reason"]) for r in journal(tmp_path / "out") if r["candidate"] == "third"}
    assert third[40][0] > 0
    assert third[20] == (None, "MemoryError: no room")


def test_algorithm_1_stops_where_the_line_ends(options, command, tmp_path, monkeypatch, scripted_run):
    """With losses that leave the line at 10 samples, 5 is never trained on."""
    losses = {0: 5.0, 80: 1.0, 40: 2.0, 20: 4.001, 10: 4.1, 5: 4.2}
    made = []

    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: losses[size], made))
    options[options.index("--smallest") + 1] = 5
    options[options.index("--visible") + 1] = 80
    status, _ = command(*options, "--method", "lens", "--target", "1000", "--out", tmp_path / "out")
    assert status == 0
    assert [size for _, size, _ in made] == [0, 80, 40, 20, 10] * 2


def test_with_a_budget_the_candidates_race(options, command, tmp_path, monkeypatch, scripted_run):
    """The larger subset is bought for the candidate with the lower prediction only, and nothing is bought twice."""
    made = []

    slopes = {"tiny-8": 0.1, "tiny-16": 0.4}
    monkeypatch.setattr(
        runner.CandidateRunner, "run", scripted_run(lambda name, size: 3.0 * size ** -slopes[name], made)
    )
    for flag in ("--visible", "--smallest"):
        at = options.index(flag)
        del options[at : at + 2]
    race = (*options, "--smallest", 10, "--target", 800, "--budget", 0.14, "--out", tmp_path / "out")
    status, text = command(*race)
    assert status == 0
    assert [run[:2] for run in made] == [
        ("tiny-8", 20),
        ("tiny-8", 10),
        ("tiny-16", 20),
        ("tiny-16", 10),
        ("tiny-16", 100),
    ]
    assert text.startswith("Fine-tune tiny-16: ")
    assert command(*race)[1] == text
    assert len(made) == 5


@pytest.mark.parametrize(
    ("method", "sizes"),
    [("zero_shot", [0]), ("model_size", [0]), ("subtuning", [0, 40]), ("rectified", [0, 40, 20, 10])],
)
def test_a_method_trains_only_what_it_needs(options, command, tmp_path, monkeypatch, method, sizes, scripted_run):
    made = []

    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1, made))
    status, text = command(*options, "--method", method, "--out", tmp_path / "out")
    assert status == 0
    assert [size for _, size, _ in made] == sizes * 2
    assert f"Cost: {2 * sum(sizes):.2e} FLOPs" in text


def test_when_fewer_than_two_candidates_can_be_measured_the_selection_fails_and_says_why(
    options, tmp_path, monkeypatch, capsys
):
    def failing(*_):
        raise job.RunFailedError("MemoryError: no room")

    monkeypatch.setattr(runner.CandidateRunner, "run", failing)
    assert cli.main([str(a) for a in (*options, "--out", tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "0 candidate(s) could be fine-tuned, choosing needs two (tiny-8: MemoryError: no room; tiny-16:" in message
    assert message.count("\n") == 1


def test_a_renamed_model_keeps_its_runs(finished, options, command, tiny_models, tmp_path, monkeypatch):
    directory = tmp_path / "again"
    shutil.copytree(finished[0], directory)
    moved = tmp_path / "elsewhere" / tiny_models[0].name
    shutil.copytree(tiny_models[0], moved)
    options[options.index("--models") + 1] = moved
    monkeypatch.setattr(FineTuner, "__init__", lambda *_: pytest.fail("a finished run was repeated"))
    assert command(*options, "--out", directory, "--verify")[0] == 0


def test_results_go_to_a_directory_of_their_own_by_default(options, command, tmp_path, monkeypatch, scripted_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1))
    command(*options)
    command(*options, "--seed", "1")
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert all(p.name.startswith("parity-") for p in (tmp_path / "runs").iterdir())


def edit(directory, target, change):
    """Copy a model directory and change its config.json."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **change}))
    return target


def test_bad_models_get_one_clear_message_before_any_training(refused, options, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(FineTuner, "__init__", lambda *_: pytest.fail("training began"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good, rest = tiny_models[0], options[options.index("--task") :]

    def message(*paths):
        return refused("--models", *paths, *rest, "--out", tmp_path / "out")

    assert "choosing needs at least two candidates" in message(good)
    assert "tiny-8 and " in message(good, good)
    assert "no such directory" in message(good, tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(good, copy)
    assert "tiny-8 and copy are the same model; name each candidate once." in message(good, copy)
    assert "are the same model" in message(good, f"{good}/")
    other = edit(tiny_models[1], tmp_path / "other", {"model_type": "mamba"})
    assert "model_type 'mamba' is not supported; supported: " in message(good, other)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in message(good, empty)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_models[1], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin: cannot be read as weights of PyTorch" in message(good, pickled)
    (pickled / "pytorch_model.bin").rename(pickled / "model.pt")
    assert "has only model.pt, which lensjax does not open" in message(good, pickled)
    small = tmp_path / "small"
    model = models.init_model({**CONFIG, "n_embd": 8, "vocab_size": 50}, jax.random.key(0))
    models.save_pretrained(model, small)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good / file, small / file)
    assert "but the model knows 50 tokens" in message(good, small)
    misfit = edit(tiny_models[1], tmp_path / "misfit", {"n_embd": 24})
    with pytest.raises(InputError, match=r"the checkpoint does not fit its config\.json"):  # a list, several lines
        cli.run([str(a) for a in ("--models", good, misfit, *rest, "--out", tmp_path / "out")], sys.stdout, sys.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input-field", "question"], "line 1: no field 'question' (found: 'input', 'target')."),
        (["--smallest", 200], "the task has 100 training samples, fewer than the smallest subset (200)."),
        (["--visible", 400], "--visible 400: the task has 100 training samples; lower it."),
        (["--visible", 5], "--visible 5 is below the smallest subset (10)"),
        (["--visible", 20, "--method", "lens"], "2 subset size(s) (10, 20) are too few: method lens needs 3"),
        (["--visible", 10], "1 subset size(s) (10) are too few: method averaged needs 2"),
        (["--target", 40], "--target 40 is not above the largest visible subset (40)."),
        (["--target", 500, "--verify"], "--verify: the target is 500 samples, but the task has 100"),
        (["--test", 139], "140 distinct samples, but 20 are set aside for validation and 139 for the test loss."),
        (["--learning-rate", 0], "--learning-rate is 0; it must be positive and finite."),
        (["--learning-rate", "inf"], "--learning-rate is inf; it must be positive and finite."),
        (["--seed", -1], "argument --seed: -1 is not a whole number, 0 or more"),
        (["--seed", "x"], "argument --seed: x is not a whole number, 0 or more"),
        (["--method", "power"], "3 subset size(s) (10, 20, 40) are too few: method power needs 4."),
        (["--method", "ats", "--visible", 10], "1 subset size(s) (10) are too few: method ats needs 2."),
        (
            ["--method", "rectified", "--visible", 20],
            "2 subset size(s) (10, 20) are too few: method rectified needs 3.",
        ),
        (
            ["--budget", 0.01],
            "--budget (0.01 of fine-tuning all on all samples): training every candidate on 10, 20 samples alone may "
            "cost up to 0.3 of",
        ),
        (["--budget", "50%", "--method", "lens"], "training every candidate on 10, 20, 40 samples alone may cost up"),
        (
            ["--budget", "1e6"],
            "--budget (1e+06 FLOPs): training every candidate on 10, 20 samples alone may cost up to",
        ),
        (["--budget", "100samples"], "alone may cost up to 240 samples. Raise --budget, or lower --smallest or"),
        (["--budget", "120%"], "argument --budget: 120% is no amount that can be spent; give it as 0.05 or 5%"),
        (["--budget", "3 weeks"], "argument --budget: 3 weeks is no amount that can be spent"),
        (["--learning-rate", 0.1, 0.1], "learning rates 0.1, 0.1: one is named twice"),
        (["--micro-batch", 3], "micro-batch 3 does not divide the batch size 8"),
        (["--schedule", "step"], "argument --schedule: invalid choice: 'step'"),
        (["--weight-decay", -1], "--weight-decay is -1; it must be 0 or more"),
        (["--max-length", 3], "tokens, but at most 3 tokens fit"),
        (["--tokens-per-sample", 3], "--tokens-per-sample needs --losses"),
    ],
)
def test_bad_options_get_one_clear_message(refused, options, tmp_path, change, message):
    assert message in refused(*options, *change, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_task_gets_one_clear_message(refused, options, tmp_path):
    at = options.index("--task") + 1
    options[at] = tmp_path / "nowhere.jsonl"
    assert "nowhere.jsonl: no such file." in refused(*options)
    options[at] = tmp_path / "empty.jsonl"
    options[at].write_text('{"input": "a", "target": ""}\n')
    assert "line 1: field 'target' is empty." in refused(*options)


def test_a_directory_of_another_run_is_refused(refused, options, finished):
    before = (finished[0] / JOURNAL).read_bytes()
    assert "holds another run (plan, seed, task differ)" in refused(
        *options, "--out", finished[0], "--seed", 3, "--max-epochs", 3
    )
    assert (finished[0] / JOURNAL).read_bytes() == before


def test_different_tokenizers_are_pointed_out(options, tiny_models, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(tiny_models[1], changed)
    written = json.loads((changed / "tokenizer.json").read_text())
    written["model"]["merges"].pop()
    (changed / "tokenizer.json").write_text(json.dumps(written))
    request = request_module.Request(
        models=(str(tiny_models[0]), str(changed)), task=options[options.index("--task") + 1], smallest=10, visible=40,
        validation=20, test=20,
    )  # fmt: skip
    assert any("different tokenizers" in note for note in request_module.prepare(request).notes)


def test_cost_of_everything_is_measured_by_verification_and_estimated_without(finished, options, command, tmp_path):
    document = json.loads((finished[0] / "selection.json").read_text())
    runs = journal(finished[0])
    for candidate in document["candidates"]:
        full = next(r for r in runs if r["candidate"] == candidate["name"] and r["size"] == 100)
        assert candidate["full_flops"] == full["flops"]  # --verify measured it
    assert document["methods"]["averaged"]["flops"] == pytest.approx(sum(r["flops"] for r in runs if r["size"] <= 40))
    shutil.copytree(finished[0], tmp_path / "copy")
    command(*options, "--out", tmp_path / "copy")
    estimate = json.loads((tmp_path / "copy" / "selection.json").read_text())
    # Two epochs each, as at the largest subset.
    assert estimate["full_flops"] == pytest.approx(document["full_flops"], rel=0.05)
    assert "estimated at 2.0 passes" in estimate["cost_note"]
    assert runs[0]["facts"]["device"] == jax.devices()[0].device_kind


def test_the_same_from_python(settings, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models, task = settings.pop("models"), settings.pop("task")
    selection = lensjax.run_selection(models, task, isolate=False, out="out", target=100, budget="50%", **settings)
    assert isinstance(selection, lensjax.Selection)
    assert selection.best in ("tiny-8", "tiny-16")
    assert "python -m lensjax.tune" in selection.facts["tune_command"]
    assert (tmp_path / "out" / "runs.jsonl").exists()
    assert selection.best in selection._repr_html_()
    with pytest.raises(InputError, match="run_selection: no setting visibel; there are: "):
        lensjax.run_selection(models, task, visibel=3)
    with pytest.raises(InputError, match="is one model; give a list"):
        lensjax.run_selection(models[0], task)
