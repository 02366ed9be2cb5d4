"""What a candidate and a task can be: adapters, GGUF files, texts, losses per byte."""

import dataclasses
import hashlib
import json
import os
import shutil

import gguf
import jax
import pytest
from safetensors.numpy import load_file, save_file

from lensjax import models
from lensjax.errors import InputError
from lensjax.jobs import job, runner, tokens
from lensjax.jobs.candidates import find_candidate, find_candidates
from lensjax.models import Lora
from lensjax.models.checkpoints.safetensors_files import INDEX
from lensjax.models.checkpoints.saving import export_tensors
from lensjax.select import request as request_module
from lensjax.select import session
from lensjax.tasks import encode, load_task
from support.journals import journal

SIZES = ("--smallest", 10, "--visible", 20, "--validation", 20, "--test", 20, "--max-length", 24, "--quiet")


def test_full_fine_tuning_and_adapters_are_two_candidates(tiny_models, tiny_task, command, tmp_path):
    one = tiny_models[0]
    training = ("--max-epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--lora-rank", 2, "--lora-dropout", 0.1)
    status, text = command(
        "--models", one, f"{one}+lora", "--task", tiny_task, *SIZES, *training, "--out", tmp_path / "out"
    )
    assert status == 0
    assert f"{one.name}+lora" in text
    full, adapted = (
        [r for r in journal(tmp_path / "out") if r["candidate"] == n] for n in (one.name, f"{one.name}+lora")
    )
    assert full[0]["test_loss"] == pytest.approx(adapted[0]["test_loss"], rel=1e-5)  # before fine-tuning
    facts = adapted[1]["facts"]
    assert facts["lora"] == dataclasses.asdict(Lora(rank=2, dropout=0.1)) | {"alpha": 16.0}
    assert 0 < facts["trainable"] < facts["parameters"] / 4
    frozen = facts["parameters"] - facts["trainable"]
    assert adapted[1]["flops"] == (6 * facts["trainable"] + 4 * frozen) * adapted[1]["tokens"]
    assert adapted[1]["test_loss"] != full[1]["test_loss"]


def test_adapters_change_what_identifies_a_candidate(tiny_models):
    one = str(tiny_models[0])
    plain, small = find_candidates((one, f"{one}+lora"), Lora(rank=1))
    large = find_candidates((one, f"{one}+lora"), Lora(rank=4))[1]
    assert len({plain.fingerprint, small.fingerprint, large.fingerprint}) == 3
    assert plain.tokenizer == small.tokenizer
    assert plain.flops_per_token == 6 * plain.parameters
    assert large.trainable == 4 * small.trainable
    assert large.flops_per_token == 6 * large.trainable + 4 * (large.parameters - large.trainable)


def test_texts_are_packed_and_nothing_is_cut(tiny_models, command, tmp_path, monkeypatch, scripted_run):
    path = tmp_path / "t.txt"
    path.write_text("".join(f"a line of text, the {'very ' * (i % 7)} number {i}\n" for i in range(100)))
    asked = []
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1, asked))
    status, _ = command("--in-process", "--models", *tiny_models, "--task", path, *SIZES, "--out", tmp_path / "out")
    assert status == 0
    tokens = asked[0][2]
    assert {len(row) for row in tokens.train.first(20).rows[0][:-1]} == {24}
    assert sum(len(row) for row in tokens.train.first(20).rows[0]) == tokens.train.first(20).token_counts.sum()
    assert sum(part.truncated for part in tokens.parts) == 0


def test_losses_per_byte(tiny_models, tiny_task, command, tmp_path, monkeypatch, scripted_run):
    asked = []
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1, asked))
    common = ("--in-process", "--models", *tiny_models, "--task", tiny_task, *SIZES)
    command(*common, "--out", tmp_path / "token")
    status, text = command(*common, "--loss-unit", "byte", "--out", tmp_path / "byte")
    assert status == 0
    assert "nats per byte" in text
    per_token, per_byte = (json.loads((tmp_path / unit / "selection.json").read_text()) for unit in ("token", "byte"))
    assert (per_token["loss_unit"], per_byte["loss_unit"]) == ("nats per token", "nats per byte")
    factor = asked[0][2].test.tokens_per_byte
    assert 0.1 < factor < 1
    for one, other in zip(per_token["candidates"], per_byte["candidates"], strict=True):
        assert other["losses"] == pytest.approx([loss * factor for loss in one["losses"]])
    run = journal(tmp_path / "byte")[1]
    assert run["facts"]["test_loss_per_byte"] == pytest.approx(run["test_loss"] * factor)


def test_a_gguf_file_is_a_candidate(tiny_models, tiny_task, tmp_path):
    source, file = tiny_models[0], tmp_path / "small.gguf"
    model = models.load_model(source)
    tensors = export_tensors(model)
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    special = models.load_tokenizer(source)
    writer.add_eos_token_id(special.eos_token_id)
    if special.bos_token_id is not None:
        writer.add_bos_token_id(special.bos_token_id)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    for name, array in tensors.items():
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array.T.copy() if turned else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    request = request_module.Request(
        models=(str(file), str(tiny_models[1])), task=tiny_task, smallest=10, visible=20, validation=20, test=20
    )
    prepared = request_module.prepare(request)
    found = prepared.candidates[0]
    assert (found.name, found.path) == ("small.gguf", file)
    own = runner.CandidateRunner(session.runner_config(prepared, found))
    plain = request_module.prepare(dataclasses.replace(request, models=tuple(map(str, tiny_models))))
    theirs = runner.CandidateRunner(session.runner_config(plain, plain.candidates[0]))
    losses = [r.run(job.FineTuning(0), job.Callbacks()).outcome.test_loss for r in (own, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_options_of_the_task_reach_it(tiny_models, tmp_path):
    rows = [{"pair": {"en": f"one {i}", "fr": f"un {i}"}} for i in range(80)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = request_module.Request(
        models=tuple(map(str, tiny_models)), task=str(path), input_field="pair.en", target_field="pair.fr",
        template="{input} =>", smallest=10, visible=20, validation=20, test=20,
    )  # fmt: skip
    found = request_module.prepare(request).task
    wanted = load_task(
        path, input_field="pair.en", target_field="pair.fr", template="{input} =>", validation=20, test=20
    )
    assert found.fingerprint == wanted.fingerprint
    assert found.train[0].prompt.endswith(" =>")


def test_a_chat_template_of_its_own_makes_another_tokenizer(tiny_models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_models[0], other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    plain, chatting = find_candidates((str(tiny_models[0]), str(other)), Lora())
    assert plain.tokenizer != chatting.tokenizer
    assert plain.fingerprint != chatting.fingerprint


OTHER_KINDS = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "qwen2": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
}


def test_one_tokenizer_file_makes_another_tokenizer_for_another_kind_of_model(tiny_models, tiny_task, tmp_path):
    vocabulary = json.loads((tiny_models[0] / "config.json").read_text())["vocab_size"]
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    paths = []
    for number, (kind, own) in enumerate([*OTHER_KINDS.items(), ("gpt2", OTHER_KINDS["gpt2"])]):
        config = {"model_type": kind, "vocab_size": vocabulary, **({} if kind == "gpt2" else common), **own}
        directory = tmp_path / f"{kind}-{number}"
        models.save_pretrained(models.init_model(config, jax.random.key(number)), directory)
        shutil.copy(tiny_models[0] / "tokenizer.json", directory)
        paths.append(str(directory))
    gpt2, qwen2, llama, again = found = find_candidates(tuple(paths), Lora())
    assert len({gpt2.tokenizer, qwen2.tokenizer, llama.tokenizer}) == 3
    assert gpt2.tokenizer == again.tokenizer
    # The cache gives each its own, whoever came first: transformers makes no end of text of this file for llama.
    task = load_task(tiny_task, validation=20, test=20)
    for candidate in found:
        found_tokens = tokens.tokens_of(task, candidate, 20, 20, 24)
        own = encode(task.subset(20), models.load_tokenizer(candidate.path), 24)
        assert [ids.tolist() for ids in found_tokens.train.ids] == [ids.tolist() for ids in own.ids]
    last = [models.load_tokenizer(c.path).eos_token_id for c in (gpt2, llama)]
    assert last[0] != last[1]


def test_equal_tokenizers_of_different_files_are_one(tiny_models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_models[1], other)
    file = other / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    assert file.read_bytes() != (tiny_models[0] / "tokenizer.json").read_bytes()
    one, same = find_candidates((str(tiny_models[0]), str(other)), Lora())
    assert one.tokenizer == same.tokenizer
    written = json.loads(file.read_text())
    written["model"]["merges"].pop()
    file.write_text(json.dumps(written))
    assert find_candidate(str(other), Lora()).tokenizer != same.tokenizer


def test_names_are_those_of_directories(tiny_models):
    one, other = map(str, tiny_models)
    found = find_candidates((f"{one}/", f"{one}/+lora", other), Lora())
    assert [c.name for c in found] == ["tiny-8", "tiny-8+lora", "tiny-16"]


def test_a_directory_may_have_any_name(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a,b", "a+b"):
        shutil.copytree(tiny_models[0], tmp_path / name)
        for asked in (tmp_path / name, f"~/{name}"):
            assert find_candidate(str(asked), Lora()).path == tmp_path / name


def scale(file, by):
    save_file({name: array * by for name, array in load_file(file).items()}, file, metadata={"format": "pt"})


def write_index(directory, file):
    names = load_file(directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


def fingerprint(directory):
    return find_candidate(str(directory), Lora()).fingerprint


@pytest.fixture
def copied(tiny_models, tmp_path):
    """Return a copy of a tiny model, in a directory called blobs."""
    return shutil.copytree(tiny_models[0], tmp_path / "blobs")


def test_weights_in_a_directory_called_blobs_are_read(copied, tiny_models):
    before = find_candidate(str(copied), Lora())
    assert before.fingerprint == fingerprint(tiny_models[0])
    scale(copied / "model.safetensors", 30)
    assert fingerprint(copied) != before.fingerprint
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert find_candidate(str(copied), Lora()).tokenizer != before.tokenizer


def test_shards_in_sub_folders_are_read(copied):
    (copied / "weights").mkdir()
    (copied / "model.safetensors").rename(copied / "weights" / "w.safetensors")
    write_index(copied, "weights/w.safetensors")
    before = fingerprint(copied)
    assert fingerprint(copied) == before
    scale(copied / "weights" / "w.safetensors", 30)
    assert fingerprint(copied) != before


def test_it_matters_which_shards_the_index_names(copied):
    (copied / "model.safetensors").rename(copied / "a.safetensors")
    shutil.copy(copied / "a.safetensors", copied / "b.safetensors")
    scale(copied / "b.safetensors", 30)
    found = []
    for file in ("a.safetensors", "b.safetensors"):
        write_index(copied, file)
        found.append(fingerprint(copied))
    assert found[0] != found[1]


def first_fingerprint(directory):
    """As the first versions made it: of all files of the directory itself but the index."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def test_fingerprints_that_were_right_are_what_they_were_in_the_first_journals(copied):
    assert {f.name for f in copied.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert fingerprint(copied) == first_fingerprint(copied)
    (copied / "model.safetensors").rename(copied / "model-00001-of-00001.safetensors")
    write_index(copied, "model-00001-of-00001.safetensors")
    assert fingerprint(copied) == first_fingerprint(copied)


@pytest.mark.parametrize("name", ["/elsewhere/w.safetensors", "../w.safetensors", "a/../../w.safetensors", ""])
def test_an_index_names_no_files_outside_of_its_directory(copied, name):
    scale(copied / "model.safetensors", 1)
    shutil.move(copied / "model.safetensors", copied.parent / "w.safetensors")
    (copied / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    with pytest.raises(InputError, match=r"index\.json: names .* which is not below"):
        find_candidate(str(copied), Lora())


@pytest.mark.parametrize(
    "content", ['{"weight_map": {"a": 5}}', '{"weight_map": {"a": null}}', "[" * 100000, "9" * 5000, "\xe9"]
)
def test_a_damaged_index_is_refused(copied, content):
    (copied / "model.safetensors").unlink()
    (copied / INDEX).write_text(content, "latin-1")
    with pytest.raises(InputError, match="is not a valid index of shards"):
        find_candidate(str(copied), Lora())


def test_only_the_hubs_own_blobs_are_known_by_their_names(copied, tiny_models, tmp_path):
    """A link into the cache costs no reading; one into another directory called blobs does."""
    cache = tmp_path / "hub" / "models--owner--name"
    for place in (cache, tmp_path / "hub" / "mine"):
        (place / "blobs").mkdir(parents=True)
        snapshot = place / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        for file in copied.iterdir():
            blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    own = find_candidate(str(tmp_path / "hub" / "mine" / "snapshots" / "main"), Lora())
    assert own.fingerprint == fingerprint(tiny_models[0])
    listed = find_candidate(str(cache / "snapshots" / "main"), Lora())
    assert listed.fingerprint != own.fingerprint  # made of names, as it always was
    assert listed.tokenizer == own.tokenizer
