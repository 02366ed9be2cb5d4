"""NLPmetrics and LogME in selections: measured once of each candidate, recorded, and scored by."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from lensjax import models
from lensjax.errors import InputError
from lensjax.jobs import job, runner
from lensjax.jobs.pretrained_scores import evidence_flops, spectra_flops
from lensjax.journal import JOURNAL
from lensjax.losses import read_journal
from lensjax.report.schema import problems
from lensjax.select import cli, extra_measurements
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.dry_run.forecast import FEATURES, SPECTRA
from lensjax.select.dry_run.machine import Machine
from lensjax.select.request import Request, prepare
from lensjax.select.session import runner_config
from lensjax.selectors import log_me, nlp_metrics
from lensjax.tasks import encode, load_task
from support.journals import journal

EXPONENTS = ("pl_alpha", "e_tpl_alpha", "e_tpl_lambda")
HERE = Machine("cpu", "test", 1, 2**40, {"float32": 1e11})


@pytest.fixture(scope="module", autouse=True)
def keep_compiled():
    """Let the selections here share what is compiled: they fit the same laws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        yield


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny_models):
    """A model whose matrices are large enough to have spectra: its directory."""
    config = json.loads((tiny_models[0] / "config.json").read_text())
    directory = tmp_path_factory.mktemp("wide") / "wide"
    models.save_pretrained(models.init_model({**config, "n_embd": 52}, jax.random.key(7)), directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_models[0] / file, directory / file)
    return directory


@pytest.fixture(scope="module")
def options(tiny_models, tiny_task, wide):
    """Options of a selection among a wide model, its adapters, and one that has no spectra."""
    sizes = ("--smallest", 10, "--visible", 40, "--validation", 20, "--test", 20, "--max-length", 24)
    training = ("--max-epochs", 1, "--batch-size", 8, "--learning-rate", 0.01, "--in-process")
    return [str(a) for a in ("--models", wide, f"{wide}+lora", tiny_models[0], "--task", tiny_task, *sizes, *training)]


def select(options, directory, *more):
    out, said = io.StringIO(), io.StringIO()
    status = cli.run([*options, *map(str, more), "--out", str(directory)], out, said)
    return status, out.getvalue(), said.getvalue()


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory, scripted_run):
    """A finished selection by all methods, fine-tuning left out.

    (run directory, exit status, what was printed, what was said)
    """
    directory = tmp_path_factory.mktemp("scores") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runner.CandidateRunner, "run", scripted_run(lambda name, size: 3.0 * (1 + size) ** (-0.01 * len(name)))
        )
        return directory, *select(options, directory, "--method", "all")


def document(directory):
    return json.loads((directory / "selection.json").read_text())


def direct_log_me(directory, task):
    """LogME by hand: all samples in one batch, in their own order."""
    model, tokenizer = models.from_pretrained(directory)
    data = load_task(task, input_field="input", target_field="target", validation=20, test=20)
    samples = encode(data.train[:40], tokenizer, 24)
    padded = np.stack([np.pad(ids, (0, 24 - len(ids))) for ids in samples.ids])
    mask = np.arange(24) < samples.token_counts[:, None]
    hidden = np.asarray(model.hidden(padded, mask.astype(np.int32)))
    features, tokens = [], []
    for own, ids, prompt in zip(hidden, samples.ids, samples.prompt_lengths, strict=True):
        features.append(own[prompt - 1 : len(ids) - 1])
        tokens.append(ids[prompt:])
    return log_me(np.concatenate(features), np.concatenate(tokens)), len(np.concatenate(tokens))


def test_with_all_methods_each_candidate_is_scored_by_weights_and_features(finished, wide, tiny_models, tiny_task):
    directory, status, text, said = finished
    assert status == 0
    found = document(directory)
    assert problems(found) == []
    assert found["method"] == "averaged"
    spectra = nlp_metrics(nnx.state(models.load_model(wide), nnx.Param))
    assert len(spectra.names) == 6
    by_weights = {entry["name"]: entry for entry in found["methods"]["nlp_metrics"]["ranking"]}
    for name in ("wide", "wide+lora"):  # adapters change no weight
        for metric in EXPONENTS:
            assert by_weights[name][metric] == pytest.approx(spectra.mean(metric), rel=1e-6)
            assert found["facts"]["nlp_metrics"][name][metric] == pytest.approx(spectra.mean(metric), rel=1e-6)
        assert by_weights[name]["score"] == by_weights[name]["pl_alpha"]
        assert by_weights[name]["predicted_loss"] is None
    by_features = {entry["name"]: entry for entry in found["methods"]["log_me"]["ranking"]}
    for name, path in (("wide", wide), ("wide+lora", wide), ("tiny-8", tiny_models[0])):
        score, positions = direct_log_me(path, tiny_task)
        assert by_features[name]["score"] == pytest.approx(-score, rel=1e-4)
        assert by_features[name]["log_me"] == -by_features[name]["score"]
        assert found["facts"]["log_me"][name]["positions"] == positions
    # They rest on no run, but cost something themselves; the choice was made by another method.
    for what in ("nlp_metrics", "log_me"):
        own = [record["flops"] for record in journal(directory) if record["part_of"] == what]
        assert found["methods"][what]["flops"] == pytest.approx(sum(own))
        assert len(own) == 3
        assert min(own) > 0 or what == "nlp_metrics"  # a model too small for spectra costs nothing
    # A run directory is a table that knows the scores.
    table = read_journal(directory)
    at = table.names.index("wide")
    assert table.facts["log_me"][at] == by_features["wide"]["log_me"]
    assert np.isnan(table.facts["pl_alpha"][table.names.index("tiny-8")])
    assert "nlp_metrics and log_me took" in text
    assert "candidate 1/3 wide: nlp_metrics: pl_alpha" in said
    assert "candidate 3/3 tiny-8: log_me: log_me" in said


def test_a_candidate_that_has_no_spectra_only_lacks_that_score(finished):
    directory, _, text, said = finished
    found = document(directory)
    assert found["failures"] == {}
    last = found["methods"]["nlp_metrics"]["ranking"][-1]
    assert (last["name"], last["score"], last["pl_alpha"]) == ("tiny-8", None, None)
    assert last["status"].startswith("no weight matrix has at least 50 rows and columns")
    assert "nlp_metrics" not in found["refused_methods"]
    assert "Without a score by one of the other methods:\n  tiny-8, nlp_metrics: no weight matrix has at" in text
    assert "tiny-8: no score by nlp_metrics: no weight matrix has at least 50" in said
    page = (directory / "report.html").read_text()
    assert "Without a score by one of the other methods" in page
    assert "<bdi>nlp_metrics</bdi>" in page


def test_costs_are_recorded(finished, wide, options):
    runs = {(r["candidate"], r["part_of"]): r for r in journal(finished[0]) if r["part_of"]}
    assert len(runs) == 6
    assert all(r["test_loss"] is None and r["seconds"] > 0 and r["reason"] for r in runs.values())
    config = models.load_config(wide)
    sides = [(config.vocab_size, 52), (64, 52), (52, 3 * 52), (52, 52), (52, 4 * 52), (4 * 52, 52)]
    work = sum(2 * max(s) * min(s) ** 2 + 4 / 3 * min(s) ** 3 for s in sides)
    assert spectra_flops(config) == pytest.approx(work)
    for name in ("wide", "wide+lora"):
        of_weights, of_features = runs[name, "nlp_metrics"], runs[name, "log_me"]
        assert (of_weights["size"], of_weights["tokens"], of_weights["samples"]) == (0, 0, 0)
        assert of_weights["flops"] == pytest.approx(work)
        assert of_features["size"] == 40
        # One forward pass of the weights without adapters.
        tokens = prepare(request(options)).tokens
        train = next(iter(tokens.values())).train.first(40)
        assert of_features["flops"] == 2 * models.count_parameters(config) * train.token_counts.sum()
        assert of_features["flops"] == evidence_flops(models.count_parameters(config), train)


def request(options, **changes):
    at = options.index("--task")
    given = {"smallest": 10, "visible": 40, "validation": 20, "test": 20, "max_length": 24, **changes}
    return Request(models=tuple(options[1:at]), task=options[at + 1], **given)


def test_nothing_is_measured_twice(finished, options, tmp_path, monkeypatch):
    directory = tmp_path / "again"
    shutil.copytree(finished[0], directory)
    before = (directory / JOURNAL).read_bytes()
    monkeypatch.setattr(runner.CandidateRunner, "run", lambda *_: pytest.fail("a run was repeated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.CandidateRunner, "measure", lambda *_: pytest.fail("a score was measured again"))
        status, text, _ = select(options, directory, "--method", "all")
    assert status == 0
    assert text.replace(str(directory), str(finished[0])) == finished[2]
    assert (directory / JOURNAL).read_bytes() == before
    # Killed while writing the last one, which alone is made again, and gives the same.
    lines = before.splitlines(keepends=True)
    last = json.loads(lines[-1])
    assert (last["candidate"], last["part_of"]) == ("tiny-8", "log_me")
    (directory / JOURNAL).write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    made, whole = [], runner.CandidateRunner.measure
    monkeypatch.setattr(runner.CandidateRunner, "measure", lambda *asked: made.append(asked[1]) or whole(*asked))
    assert select(options, directory, "--method", "all")[0] == 0
    assert made == [job.PretrainedScore("log_me", 40)]
    again = journal(directory)[-1]
    assert again["key"] == last["key"]
    assert again["facts"]["log_me"]["log_me"] == pytest.approx(last["facts"]["log_me"]["log_me"], rel=1e-6)


def test_asked_for_by_name_a_candidate_without_the_score_has_failed(finished, options, tmp_path, monkeypatch):
    directory = tmp_path / "again"
    shutil.copytree(finished[0], directory)
    monkeypatch.setattr(runner.CandidateRunner, "run", lambda *_: pytest.fail("a run was repeated"))
    status, text, _ = select(options, directory, "--method", "nlp_metrics")
    assert status == 1
    assert text.startswith("Fine-tune wide")
    assert "Not ranked:\n  tiny-8: no weight matrix has at least 50 rows and columns" in text
    found = document(directory)
    assert list(found["methods"]) == ["nlp_metrics"]
    assert set(found["failures"]) == {"tiny-8"}
    assert found["failed_flops"] > 0
    assert "ranked by their weights alone" in (directory / "report.html").read_text()
    status, text, _ = select(options, directory, "--method", "log_me")
    assert status == 0
    assert document(directory)["best"] in text.splitlines()[0]


def test_only_what_the_method_needs_is_measured(options, tmp_path, monkeypatch, scripted_run):
    made, asked = [], []
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1, made))

    def measure(own, work, *_):
        asked.append((own.config.name, work.name))
        return {"log_me": float(len(asked)), "pl_alpha": float(len(asked))}

    monkeypatch.setattr(runner.CandidateRunner, "measure", measure)
    names = ("wide", "wide+lora", "tiny-8")
    for method, whats in (("log_me", ["log_me"]), ("nlp_metrics", ["nlp_metrics"]), ("zero_shot", [])):
        made.clear()
        asked.clear()
        status, text, _ = select(options, tmp_path / method, "--method", method)
        assert status == 0
        assert [size for _, size, _ in made] == [0] * 3
        assert asked == [(name, what) for name in names for what in whats]
        # The highest evidence, the lowest exponent, the first of equal losses.
        assert text.startswith(f"Fine-tune {'tiny-8' if method == 'log_me' else 'wide '}")


def test_a_crash_is_said_and_tried_again(options, tmp_path, monkeypatch, scripted_run):
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1))

    def failing(own, work, *_):
        if work.name == "log_me" and own.config.name != "wide":
            raise job.RunFailedError("MemoryError: no room")
        return {"log_me": -0.5, "pl_alpha": 2.0}

    monkeypatch.setattr(runner.CandidateRunner, "measure", failing)
    status, _, said = select(options, tmp_path / "out", "--method", "all")
    assert status == 0
    assert said.count("no score by log_me: MemoryError: no room") == 2
    # With one of three, there is nothing to choose between.
    found = document(tmp_path / "out")
    assert found["refused_methods"]["log_me"] == "wide+lora: MemoryError: no room; tiny-8: MemoryError: no room"
    assert "log_me" not in found["methods"]
    monkeypatch.setattr(runner.CandidateRunner, "measure", lambda *_: {"log_me": -0.5, "pl_alpha": 2.0})
    assert select(options, tmp_path / "out", "--method", "all")[0] == 0
    # The two that crashed were noted with their cost, and made again.
    records = [r for r in journal(tmp_path / "out") if r["part_of"] == "log_me"]
    assert [(r["candidate"], "log_me" in r["facts"]) for r in records] == [
        *(("wide", True), ("wide+lora", False), ("tiny-8", False)),
        *(("wide+lora", True), ("tiny-8", True)),
    ]
    assert all(r["flops"] > 0 for r in records)


def test_weights_that_cannot_be_read_now_are_read_another_time(options, monkeypatch):
    prepared = prepare(request(options))
    own = runner.CandidateRunner(runner_config(prepared, prepared.candidates[0]))
    monkeypatch.setattr(runner.models, "load_model", lambda path: (_ for _ in ()).throw(InputError("half a file")))
    with pytest.raises(job.RunFailedError, match="InputError: half a file"):
        own.measure(job.PretrainedScore("nlp_metrics", 0), job.Callbacks())


def test_with_a_budget_they_are_measured_last_and_within_it(options, tmp_path, monkeypatch, scripted_run):
    order = []
    scripted = scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1)
    monkeypatch.setattr(runner.CandidateRunner, "run", lambda *asked: order.append("run") or scripted(*asked))

    def measure(_, work, *rest):
        order.append(work.name)
        return {"log_me": -0.5, "pl_alpha": 2.0}

    monkeypatch.setattr(runner.CandidateRunner, "measure", measure)
    assert select(options, tmp_path / "one", "--method", "all", "--budget", "1e12")[0] == 0
    assert order == [*["run"] * 12, *["nlp_metrics", "log_me"] * 3]
    monkeypatch.setattr(extra_measurements, "evidence_flops", lambda *_: 1e30)
    status, _, said = select(options, tmp_path / "two", "--method", "all", "--budget", "1e12")
    assert status == 0
    assert said.count("no score by log_me: not measured, it would exceed the budget") == 3


def test_other_tokenizers_are_pointed_out(options, tmp_path, monkeypatch, scripted_run, wide, tiny_models):
    other = tmp_path / "other"
    shutil.copytree(tiny_models[1], other)
    written = json.loads((other / "tokenizer.json").read_text())
    written["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(written))
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1))
    monkeypatch.setattr(runner.CandidateRunner, "measure", lambda *_: {"log_me": -0.5})
    changed = ["--models", str(wide), str(other), *options[options.index("--task") :]]
    _, text, said = select(changed, tmp_path / "out", "--method", "log_me")
    assert text.count("its classes are its own tokens, and the candidates have different tokenizers") == 2
    assert "note: the candidates have different tokenizers: LogME's classes are each candidate's own tokens" in said
    _, text, _ = select(options, tmp_path / "same", "--method", "log_me")
    assert "different tokenizers" not in text


def test_a_dry_run_lists_them(finished, options):
    asked = request(options, method="all")
    found = dry_run(asked, None, machine=HERE)
    prepared = prepare(asked)
    train = next(iter(prepared.tokens.values())).train
    for candidate in prepared.candidates:
        (weights,) = [r for r in found.runs if (r.candidate, r.purpose) == (candidate.name, SPECTRA)]
        (features,) = [r for r in found.runs if (r.candidate, r.purpose) == (candidate.name, FEATURES)]
        assert (weights.size, weights.tokens, weights.flops) == (0, 0, spectra_flops(candidate.config))
        assert (features.size, features.tokens) == (40, train.first(40).token_counts.sum())
        assert weights.sure
        assert features.sure
        assert weights.seconds > 0
        assert not weights.done
    text = found.render()
    assert "NLPmetrics of the weights" in text
    assert "LogME of the features" in text
    assert "log_me: 2 for each weight and token it reads" in found.basis["FLOPs"]
    alone = dry_run(request(options, method="log_me"), None, machine=HERE)
    assert {r.purpose for r in alone.runs} == {"the models as they are", FEATURES}
    assert "method log_me tells without" in " ".join(alone.render().split())


def test_what_was_measured_costs_a_dry_run_nothing(finished, options):
    status, text, _ = select(options, finished[0], "--method", "all", "--dry-run")
    assert status == 0
    assert "Every run is done already" in text
