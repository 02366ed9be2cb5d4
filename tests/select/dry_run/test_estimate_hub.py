"""A dry run of models and data sets on the hub: only what the hub says of them is read. It is a stand-in here."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling
from safetensors.numpy import load_file

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import Plan
from lensjax.jobs.candidates import find_candidates
from lensjax.models import Lora
from lensjax.models.checkpoints.hub import listing
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.request import Request, prepare
from support.dry_runs import HERE, SMALL

NAME, COMMIT = "someone/model", "c" * 40
PLAN = Plan(max_epochs=2, batch_size=8)


@pytest.fixture
def hub(tiny_models, tmp_path, monkeypatch):
    """One model on the hub, with a cache as the library keeps it; `hub.fetched` says which patterns were asked for."""
    files = {f.name: f for f in sorted(tiny_models[1].iterdir())}
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    cache = tmp_path / "models--someone--model"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    state = SimpleNamespace(fetched=[], snapshot=snapshot, files=files, weights=True, pickle=True, error=None)

    def place(name):
        (blobs / digests[name]).write_bytes(files[name].read_bytes())
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(blobs / digests[name])

    def model_info(self, repo_id, *, revision=None, files_metadata=False):
        if state.error is not None:
            raise state.error
        assert (repo_id, files_metadata) == (NAME, True)
        large = lambda name: name.endswith(".safetensors")  # noqa: E731
        siblings = [
            RepoSibling(
                name,
                size=file.stat().st_size,
                blob_id=digests[name] if not large(name) else "a pointer",
                lfs=BlobLfsInfo(size=file.stat().st_size, sha256=digests[name], pointer_size=1)
                if large(name)
                else None,
            )
            for name, file in files.items()
            if state.weights or not large(name)
        ]
        others = [RepoSibling("onnx/model.safetensors", size=10**9)]
        others += [RepoSibling("pytorch_model.bin", size=10**9)] if state.pickle else []
        return SimpleNamespace(sha=COMMIT, siblings=[*siblings, *others])

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, ignore_patterns=None, local_files_only=False):
        if local_files_only:
            return str(snapshot)
        state.fetched += allow_patterns
        for name in files:
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                place(name)
        return str(snapshot)

    def get_safetensors_metadata(repo_id, *, revision=None):
        if not state.weights:
            raise NotASafetensorsRepoError("no weights")
        tensors = load_file(files["model.safetensors"])
        infos = {n: SimpleNamespace(shape=list(t.shape), dtype="F32") for n, t in tensors.items()}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=state.change(infos))})

    def cached(repo_id, filename, *, revision=None):
        assert revision == COMMIT
        return str(snapshot / filename) if (snapshot / filename).is_file() else None

    state.change = lambda infos: infos
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    return state


def test_everything_is_known_without_downloading_weights(hub, tiny_models, tiny_task, tmp_path):
    request = Request(models=(str(tiny_models[0]), NAME), task=tiny_task, plan=PLAN, out=tmp_path / "out", **SMALL)
    dry = dry_run(request, request.out, machine=HERE)
    assert "*.safetensors" not in hub.fetched
    assert not list(hub.snapshot.glob("*.safetensors"))
    # Configuration and tokenizer were fetched to be read; the weights are still to come.
    weights = hub.files["model.safetensors"].stat().st_size
    assert dry.needs[1].download == weights
    assert dry.places[0].what == "models, from the hub"
    assert dry.places[0].needed == weights
    before = prepare(request, fetch=False)

    real = prepare(request)
    assert (hub.snapshot / "model.safetensors").is_file()
    # Also what a run is found by in the journal.
    assert before.specification == real.specification
    assert before.candidates[1].parameters == real.candidates[1].parameters
    again = dry_run(request, request.out, machine=HERE)
    assert again.needs[1].download == 0
    assert [p.what for p in again.places] == ["runs, report, programs"]
    assert dataclasses.replace(again.needs[1], download=weights) == dry.needs[1]
    assert again.runs == dry.runs


def test_adapters_of_a_model_on_the_hub_are_downloaded_once(hub, tiny_task, tmp_path):
    request = Request(models=(NAME, f"{NAME}+lora"), task=tiny_task, plan=PLAN, out=tmp_path / "out", **SMALL)
    forecast = dry_run(request, None, machine=HERE)
    assert forecast.needs[0].download == forecast.needs[1].download > 0
    assert forecast.places[0].needed == forecast.needs[0].download


def test_a_listing_says_what_would_be_fetched(hub, tiny_models):
    listed = listing(NAME)
    assert (listed.name, listed.revision) == (NAME, COMMIT)
    assert {f.name for f in listed.files} == set(hub.files)  # no pickle, nothing in folders
    assert not listed.complete
    assert listing(tiny_models[0]) is None
    models.resolve(NAME)
    listed = listing(NAME)
    assert listed.complete
    assert listed.missing == 0


def test_headers_on_the_hub_show_what_does_not_fit(hub):
    def change(infos):
        infos["transformer.extra"] = infos.pop("transformer.ln_f.bias")
        return infos

    hub.change = change
    with pytest.raises(InputError) as dry:
        find_candidates((NAME, f"{NAME}+lora"), Lora(), fetch=False)
    assert "missing: transformer.ln_f.bias" in str(dry.value)
    assert "unused: transformer.extra" in str(dry.value)

    def quantised(infos):
        name = next(iter(infos))
        infos[name].dtype = "I8"
        return infos

    hub.change = quantised
    with pytest.raises(InputError, match="is stored as I8"):
        find_candidates((NAME, f"{NAME}+lora"), Lora(), fetch=False)


def test_a_model_without_weights_to_use_is_refused_as_by_a_selection(hub):
    hub.weights = hub.pickle = False
    with pytest.raises(InputError) as dry:
        find_candidates((NAME, f"{NAME}+lora"), Lora(), fetch=False)
    assert str(dry.value).startswith(f"{NAME}: has no model.safetensors and no model.safetensors.index.json.")


def test_a_model_with_pickled_weights_only_is_listed_with_them(hub):
    hub.weights = False
    found = listing(NAME)
    assert [file.name for file in found.weights] == ["pytorch_model.bin"]
    assert found.missing == 10**9
    assert "*.safetensors" not in hub.fetched
    assert find_candidates((NAME, f"{NAME}+lora"), Lora(), fetch=False)
    assert "pytorch_model*.bin" not in hub.fetched


def test_a_model_that_the_hub_does_not_have_is_refused_as_by_a_selection(hub):
    hub.error = huggingface_hub.errors.LocalEntryNotFoundError("offline mode is on\nand more")
    message = (
        rf"^{NAME}: is no directory here and could not be had from the Hugging Face hub \(offline mode is on\)\. "
        r"Check the id and the network, or download the model and name its directory\.$"
    )
    with pytest.raises(InputError, match=message):
        listing(NAME)
    # What is in the cache is used without the network.
    shutil.copy(hub.files["model.safetensors"], hub.snapshot)
    assert listing(NAME) is None
    with pytest.raises(InputError, match="no such directory; name a model directory or a Hugging Face id"):
        listing("./nowhere")


# Data sets


@pytest.fixture
def dataset(monkeypatch, tmp_path):
    """A data set on the hub of which only the metadata may be read."""
    features = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string"),
                                  "number": datasets.Value("int64"), "text": datasets.Value("string"),
                                  "translation": datasets.Translation(languages=["en", "fr"])})  # fmt: skip
    state = SimpleNamespace(rows={"train": 1000, "validation": 50}, features=features, cache=tmp_path / "not-there")

    def builder(name, config=None, *, revision=None):
        if name != "someone/data":
            raise FileNotFoundError(f"{name} is not there")
        splits = None
        if state.rows is not None:
            splits = datasets.SplitDict()
            for split, rows in state.rows.items():
                splits.add(datasets.SplitInfo(split, num_bytes=90 * rows, num_examples=rows))
        info = datasets.DatasetInfo(features=state.features, splits=splits, download_size=5000, dataset_size=9000)
        return SimpleNamespace(info=info, cache_dir=str(state.cache))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("rows were fetched"))
    return state


@pytest.fixture
def request_of(tiny_models, tmp_path):
    def request_of(**options):
        fields = {"input_field": "question", "target_field": "answer"}
        chosen = {"task": "someone/data", "plan": PLAN, "out": tmp_path / "out", **fields, **SMALL, **options}
        return Request(models=tuple(map(str, tiny_models)), **chosen)

    return request_of


def test_the_hub_says_how_many_rows_there_are(dataset, request_of):
    request = request_of(smallest=50, visible=200)
    forecast = dry_run(request, request.out, machine=HERE)
    assert (forecast.train, forecast.target, forecast.sizes) == (960, 960, (50, 100, 200))
    run = next(r for r in forecast.runs if r.size == 100)
    assert run.tokens == 100 * 24  # every sample as long as can be
    parameters = forecast.needs[0].parameters
    assert run.flops == 6 * parameters * 100 * 24 * 2
    assert any("upper bounds" in note for note in forecast.notes)
    places = {p.what: p.needed for p in forecast.places}
    assert places["data set, from the hub"] == 5000 + 9000
    counted = 4 * 24 * (200 + 20 + 20) + 16 * 240
    assert places["tokens"] == counted
    own = dry_run(request_of(validation_split="validation"), None, machine=HERE)
    assert own.train == 980
    assert own.directory is None
    part = dry_run(request_of(split="train[:30%]", limit=250), None, machine=HERE)
    assert part.train == 210


def test_rows_must_be_given_where_the_hub_does_not_know_them(dataset, request_of):
    dataset.rows = None
    with pytest.raises(InputError, match=r"the hub does not say how many rows its split 'train' has\. Give --limit"):
        dry_run(request_of(), None, machine=HERE)
    forecast = dry_run(request_of(limit=500), None, machine=HERE)
    assert forecast.train == 460
    assert any("--limit 500 is taken for their number" in note for note in forecast.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_field": "questions"}, "no field 'questions'"),
        ({"target_field": "number"}, "field 'number' is 0, not text"),
        ({"split": "testing"}, r"--task someone/data, split 'testing': cannot be loaded"),
        ({"task": "someone/else"}, r"--task someone/else, split 'train': cannot be loaded \(someone/else is not there"),
        ({"template": "no place for it"}, "has no {input}"),
        ({"validation": 60, "validation_split": "validation"}, "its validation split has 50 samples, but 60"),
        ({"validation": 600, "test": 600}, "too few samples to set 600 aside"),
        ({"smallest": 970, "visible": None}, "the task has 960 training samples, fewer than the smallest subset"),
    ],
)
def test_what_a_selection_would_refuse_is_refused(dataset, request_of, options, message):
    with pytest.raises(InputError, match=message):
        dry_run(request_of(**options), None, machine=HERE)


def test_nested_fields_are_found(dataset, request_of):
    forecast = dry_run(request_of(input_field="translation.en", target_field="translation.fr"), None, machine=HERE)
    assert forecast.train == 960


def test_lengths_of_texts_are_estimated_from_their_bytes(dataset, request_of):
    request = request_of(input_field=None, target_field=None, text_field="text")
    forecast = dry_run(request, None, machine=HERE)
    run = next(r for r in forecast.runs if r.size == 20)
    assert run.tokens == 20 * 30  # 90 bytes a text
    assert any("30 tokens are assumed for each" in note for note in forecast.notes)
    prepared = prepare(request, fetch=False)
    assert prepared.summary.tokens == 30


def test_a_data_set_in_the_cache_is_read_as_it_is(dataset, request_of, monkeypatch):
    dataset.cache.mkdir()
    rows = [{"question": f"{n} and {n}", "answer": f"{2 * n}"} for n in range(100)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    request = request_of()
    forecast = dry_run(request, request.out, machine=HERE)
    assert forecast.train == 60
    assert not any("upper bounds" in note for note in forecast.notes)
    real = prepare(request)
    lengths = np.cumsum(next(iter(real.tokens.values())).train.token_counts)
    assert next(r for r in forecast.runs if r.size == 20).tokens == lengths[19]
    assert json.loads(json.dumps(forecast.as_dict()))["train"] == 60
