"""Finding, checking, reading and writing checkpoints."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from lensjax.errors import InputError
from lensjax.models import (
    Lora,
    abstract_model,
    add_lora,
    check_checkpoint,
    count_parameters,
    from_pretrained,
    init_model,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    save_pretrained,
)
from lensjax.models.checkpoints.mapping import parameter_shapes
from lensjax.models.checkpoints.saving import export_tensors
from lensjax.models.families.gpt2 import GPT2
from support.checkpoints import LLAMA, SMALL, T5, assert_same, edit_config, make_tokenizer
from support.families import FAMILIES, flat, make_config
from support.paths import SOURCES


@pytest.mark.parametrize("tied", [True, False])
def test_saved_models_load_back_equal(tied, tmp_path):
    model = init_model(SMALL | {"tie_word_embeddings": tied, "n_inner": 12}, jax.random.key(0))
    save_pretrained(model, tmp_path / "new" / "model")
    loaded = load_model(tmp_path / "new" / "model")
    assert_same(loaded, model)
    assert loaded.config == load_config(json.loads(loaded.config.raw))
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "model" / "model.safetensors")) is not tied
    save_pretrained(loaded, tmp_path / "new" / "model")  # over itself
    assert_same(load_model(tmp_path / "new" / "model"), model)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_any_stored_dtype_is_loaded_as_any_other(stored, wanted, model, tmp_path):
    save_pretrained(model, tmp_path, dtype=stored)
    assert {str(array.dtype) for array in load_file(tmp_path / "model.safetensors").values()} == {stored}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == stored
    loaded = export_tensors(load_model(tmp_path, dtype=wanted))
    for name, value in export_tensors(model).items():
        assert loaded[name].dtype == jnp.dtype(wanted)
        np.testing.assert_array_equal(loaded[name], value.astype(jnp.dtype(stored)).astype(jnp.dtype(wanted)), name)


def test_shards_are_found_by_their_index(saved, model):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, saved / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(load_model(saved), model)

    (saved / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"are missing: model-00002-of-00002\.safetensors"):
        load_model(saved)
    shutil.copy(saved / "model-00001-of-00002.safetensors", saved / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="is in two shards"):
        load_model(saved)
    for text in ("{}", "[]", "{", '{"weight_map": null}'):
        (saved / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match="is not a valid index of shards"):
            load_model(saved)


@pytest.mark.parametrize(("limit", "shards"), [(1500, 7), ("2KB", 5), ("1MB", 1), (1, 28), (10**9, 1)])
def test_a_model_is_saved_in_shards_no_larger_than_asked(limit, shards, model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_size=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    assert not list(tmp_path.glob("*.tmp"))
    assert_same(load_model(tmp_path), model)
    index = tmp_path / "model.safetensors.index.json"
    tensors = export_tensors(model)
    if shards == 1:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not index.exists()
        return
    assert [file.name for file in files] == [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    found = json.loads(index.read_text())
    assert found["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert found["weight_map"].keys() == tensors.keys()
    for file in files:
        part = load_file(file)
        assert {name for name, where in found["weight_map"].items() if where == file.name} == part.keys()
        limit_bytes = 2000 if limit == "2KB" else limit
        assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= limit_bytes


def test_saving_again_leaves_nothing_of_the_model_before(model, tmp_path):
    other = init_model(SMALL, jax.random.key(1))
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"kept")
    for first, second in ((1500, 10**9), (10**9, 1500), (1500, 2000), (2000, 1500)):
        save_pretrained(other, tmp_path, max_shard_size=first)
        save_pretrained(model, tmp_path, max_shard_size=second)
        assert_same(load_model(tmp_path), model)
        names = {file.name for file in tmp_path.glob("*.safetensors")} - {"model-of-mine.safetensors"}
        index = tmp_path / "model.safetensors.index.json"
        assert index.exists() == (len(names) > 1)
        assert names == (set(json.loads(index.read_text())["weight_map"].values()) if len(names) > 1 else names)
    assert (tmp_path / "model-of-mine.safetensors").read_bytes() == b"kept"


@pytest.mark.parametrize("size", ["large", "5 apples", -1, 0])
def test_a_shard_size_that_is_none_is_refused(size, model, tmp_path):
    with pytest.raises(InputError, match=rf"max_shard_size is {size!r}; give a positive number of bytes"):
        save_pretrained(model, tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parity
def test_transformers_loads_saved_shards(model, tmp_path):
    from transformers import AutoModelForCausalLM

    save_pretrained(model, tmp_path, max_shard_size=1500)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found = theirs.state_dict()
    for name, value in export_tensors(model).items():
        np.testing.assert_array_equal(found[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # The published counts; a tied head counts once.
        ({"model_type": "gpt2"}, 124_439_808),
        ({"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
        (SMALL, 11 * 8 + 6 * 8 + 2 * 8 + 2 * (12 * 8 * 8 + 13 * 8)),
        (SMALL | {"tie_word_embeddings": False}, 2 * 11 * 8 + 6 * 8 + 2 * 8 + 2 * (12 * 8 * 8 + 13 * 8)),
    ],
)
def test_parameters_are_counted_without_weights(config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert count_parameters(tmp_path) == expected
    assert count_parameters(load_config(tmp_path)) == expected


def test_parameters_of_large_models_are_counted_from_shapes():
    config = load_config({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25})
    assert count_parameters(config) == 1_557_611_200  # gpt2-xl, as published


@pytest.mark.parametrize("name", FAMILIES)
def test_abstract_models_have_the_shapes_of_real_ones(name):
    config = load_config(make_config(name, 2))
    lora = Lora(rank=2)
    key = jax.random.key(0)
    real = add_lora(init_model(config, key), key=key, **dataclasses.asdict(lora))
    describe = lambda tree: [(path, leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(tree))]  # noqa: E731
    assert describe(abstract_model(config, lora)) == describe(real)
    sizes = {path: leaf.shape for path, leaf in flat(nnx.state(init_model(config, key), nnx.Param)).items()}
    assert parameter_shapes(config) == sizes


def test_the_tokenizer_comes_with_the_model(model, tmp_path):
    save_pretrained(model, tmp_path, make_tokenizer())
    loaded, tokenizer = from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert tokenizer("two one three")["input_ids"] == [2, 1, 0]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, None)


def test_a_model_without_tokenizer_is_refused_by_from_pretrained(saved):
    with pytest.raises(InputError, match=r"its tokenizer cannot be loaded .*put tokenizer\.json"):
        from_pretrained(saved)


def test_loading_prints_nothing_and_leaves_the_environment_alone(model, tmp_path):
    save_pretrained(model, tmp_path, make_tokenizer())
    program = (
        "import os, sys\nfrom lensjax.models import from_pretrained\n"
        "assert 'transformers' not in sys.modules\n"
        "model, tokenizer = from_pretrained(sys.argv[1])\n"
        "assert 'TRANSFORMERS_NO_ADVISORY_WARNINGS' not in os.environ\nprint(tokenizer('two')['input_ids'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, SOURCES)), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "[2]\n", "")


def test_ids_are_fetched_from_the_hub_without_pickles(saved, model, monkeypatch):
    calls = []

    def fetch(name, **options):
        calls.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(load_model("someone/model", revision="v2"), model)
    assert [name for name, _ in calls] == ["someone/model"] * 2
    config_call, weights_call = (options for _, options in calls)
    assert config_call["revision"] == weights_call["revision"] == "v2"
    assert "*.safetensors" not in config_call["allow_patterns"]
    assert set(weights_call["allow_patterns"]) == {"*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"}
    assert weights_call["ignore_patterns"] == ["*/*"]


def test_a_model_the_hub_does_not_give_is_named_with_the_remedy(monkeypatch):
    def fetch(name, **options):
        raise LocalEntryNotFoundError("offline mode is on\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    expected = (
        r"^someone/model: is no directory here and could not be had from the Hugging Face hub \(offline mode is on\)\. "
        r"Check the id and the network, or download the model and name its directory\.$"
    )
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(InputError, match=expected):
            load("someone/model")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", Path("nowhere")])
def test_paths_that_do_not_exist_are_not_looked_up_on_the_hub(name):
    with pytest.raises(InputError, match="no such directory; name a model directory or a Hugging Face id"):
        load_config(name)


def test_a_file_is_not_a_model_directory(saved):
    with pytest.raises(InputError, match="is a file; name the directory"):
        load_config(saved / "config.json")
    (saved / "m.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"m\.gguf: is a GGUF file, but here a directory is needed: .*save_pretrained"):
        resolve(saved / "m.gguf")


@pytest.mark.parametrize("layers", [65, 10000])
def test_layers_are_held_against_the_weights_before_any_is_built(saved, monkeypatch, layers):
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**raw, "n_layer": layers}))
    monkeypatch.setattr(GPT2, "__init__", lambda *_: pytest.fail("a model was built"))
    for load in (check_checkpoint, load_model):
        with pytest.raises(InputError, match=rf"says {layers} layers, but its weight files hold \d+ tensors"):
            load(saved)


@pytest.mark.parametrize("pickled", ["pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(pickled, saved):
    (saved / "model.safetensors").rename(saved / pickled)
    with pytest.raises(
        InputError, match=rf"has only {pickled}, .*can run code\. Convert .*ForCausalLM.*save_pretrained"
    ):
        load_model(saved)


@pytest.mark.parametrize("pickled", ["model.pt", None])
def test_the_way_to_convert_names_the_class_that_fits(pickled, saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(T5))
    if pickled:
        (tmp_path / pickled).write_bytes(b"")
    for load in (load_model, check_checkpoint):
        with pytest.raises(InputError, match=r"transformers\.AutoModelForSeq2SeqLM\.from_pretrained\(SOURCE\)"):
            load(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"transformers\.AutoModelForCausalLM\.from_pretrained\(SOURCE\)"):
        load_model(saved)


def test_code_that_comes_with_a_tokenizer_is_not_run(model, tmp_path):
    save_pretrained(model, tmp_path, make_tokenizer())
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_byt5_has_a_tokenizer_without_a_vocabulary_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(T5 | {"vocab_size": 384}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}))
    # The bytes of UTF-8 after the three tokens <pad>, </s> and <unk>, then </s>.
    text = "Hé 你"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == [byte + 3 for byte in text.encode()] + [1]
    for settings in ('{"tokenizer_class": "T5Tokenizer"}', "[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(
            InputError, match=r"its tokenizer cannot be loaded \(none of tokenizer\.json, .* is there\)"
        ):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "kind", "tokenizer_class", "special"),
    [
        ("spiece.model", "unigram", "T5Tokenizer", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
        ("tokenizer.model", "bpe", "LlamaTokenizer", {"unk_id": 0, "bos_id": 1, "eos_id": 2, "byte_fallback": True}),
    ],
)
def test_a_tokenizer_that_is_only_a_sentencepiece_model_is_loaded(file, kind, tokenizer_class, special, tmp_path):
    import sentencepiece

    lines = [f"the quick brown fox {i} jumps over lazy dogs in the garden" for i in range(200)]
    with (tmp_path / file).open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=stream,
            model_type=kind,
            vocab_size=320 if kind == "bpe" else 50,
            hard_vocab_limit=False,
            minloglevel=2,
            **special,
        )
    (tmp_path / "config.json").write_text(json.dumps(T5 if kind == "unigram" else LLAMA))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, "extra_ids": 0}))
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
    for text in ("The quick fox", "dogs 12 in the garden"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_a_missing_sentencepiece_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr("lensjax.models.checkpoints.pretrained.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"only in spiece\.model, .* needs the sentencepiece package"):
        load_tokenizer(tmp_path)


def test_a_model_without_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    assert load_config(saved).layers == 2
    with pytest.raises(InputError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        load_model(saved)


def test_a_truncated_file_is_refused(saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(InputError, match=r"cannot be read as safetensors .*; download it again"):
        load_model(saved)


def test_a_configuration_of_another_size_shows_as_wrong_shapes(saved):
    edit_config(saved, vocab_size=12, n_positions=7)
    with pytest.raises(
        InputError, match=r"2 problems:\n  wrong shape: transformer\.w.*\n  wrong shape: transformer\.w"
    ):
        load_model(saved)
