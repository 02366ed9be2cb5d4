"""Finding, checking, reading and writing checkpoints."""

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
    check_checkpoint,
    count_parameters,
    from_pretrained,
    init_model,
    load_config,
    load_model,
    load_tokenizer,
    save_pretrained,
)
from lensjax.models.checkpoints import export_tensors
from lensjax.models.registry import Rule, Table, family, transposed

ROOT = Path(__file__).parents[2]
SMALL = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 6}


@pytest.fixture
def model():
    return init_model(SMALL, jax.random.key(0))


@pytest.fixture
def saved(model, tmp_path):
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def edit(directory, change):
    """Rewrite model.safetensors with `change` applied to its dictionary of tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def assert_same(a, b, dtype=None):
    left, right = export_tensors(a, dtype), export_tensors(b, dtype)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


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
    (saved / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="is not a valid index of shards"):
        load_model(saved)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_buffers_copies_of_the_tied_head_and_bare_names_are_understood(prefix, saved, model):
    def change(tensors):
        old = dict(tensors)
        tensors.clear()
        tensors.update({prefix + name.removeprefix("transformer."): value for name, value in old.items()})
        tensors["lm_head.weight"] = old["transformer.wte.weight"].copy()
        for i in range(2):
            tensors[f"{prefix}h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), np.uint8))
            tensors[f"{prefix}h.{i}.attn.masked_bias"] = np.float32([-1e4])

    edit(saved, change)
    assert_same(load_model(saved), model)


def test_a_tied_head_that_differs_is_refused(saved):
    edit(saved, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    with pytest.raises(InputError, match=r"ties lm_head\.weight to wte\.weight, but the two differ"):
        load_model(saved)


def test_everything_that_does_not_fit_is_said_at_once(saved):
    def change(tensors):
        del tensors["transformer.h.1.mlp.c_fc.bias"]
        tensors["transformer.h.0.ln_1.weight"] = np.ones(9, np.float32)
        tensors["transformer.h.2.ln_1.weight"] = np.ones(8, np.float32)
        tensors["score.weight"] = np.ones((2, 8), np.float32)
        tensors["wpe.weight"] = tensors["transformer.wpe.weight"].copy()

    edit(saved, change)
    with pytest.raises(InputError) as early:
        check_checkpoint(saved)
    with pytest.raises(InputError) as error:
        load_model(saved)
    assert str(early.value) == str(error.value)
    first, *problems = str(error.value).split("\n  ")
    assert first == f"{saved}: the checkpoint does not fit its config.json, 5 problems:"
    assert sorted(problems) == [
        "both transformer.wpe.weight and wpe.weight are there",
        "missing: transformer.h.1.mlp.c_fc.bias",
        "unused: score.weight",
        "unused: transformer.h.2.ln_1.weight",
        "wrong shape: transformer.h.0.ln_1.weight has (9,), which does not make (8,) for layers.0.attention_norm.scale",
    ]


def test_a_checkpoint_that_fits_passes_the_check_without_its_tensors_being_read(saved, monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("lensjax.models.checkpoints._Tensors.read", read)
    assert check_checkpoint(saved) == load_config(saved)


def test_every_family_maps_every_parameter_once():
    for model_type in ("gpt2",):
        raw = {"model_type": model_type, "tie_word_embeddings": False} | SMALL
        model = init_model(raw, jax.random.key(0))
        table = family(model_type, "test").table(model.config)
        paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        sources = [name for path in paths for name in table.sources(path)[1]]
        assert len(sources) == len(set(sources)) >= len(paths)


def test_a_rule_may_join_several_tensors():
    rule = Rule(
        "layers.{i}.qkv.kernel",
        ("l{i}.q.weight", "l{i}.k.weight"),
        lambda arrays: np.concatenate([array.T for array in arrays], 1),
        lambda array: [part.T for part in np.split(array, 2, 1)],
    )
    assert rule.match("layers.12.qkv.kernel") == ("l12.q.weight", "l12.k.weight")
    assert rule.match("layers.x.qkv.kernel") is None
    assert rule.match("layers.1.qkv.kernel2") is None
    kernel = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(rule.load(rule.save(kernel)), kernel)
    np.testing.assert_array_equal(transposed("a", "b").load([kernel]), kernel.T)
    np.testing.assert_array_equal(transposed("a", "b").save(kernel)[0], kernel.T)


@pytest.mark.parametrize(("rules", "count"), [((), 0), ((Rule("a.{i}", "x"), Rule("a.1", "y")), 2)])
def test_a_parameter_with_no_rule_or_two_is_an_error(rules, count):
    with pytest.raises(LookupError, match=rf"{count} rules of the mapping table are about the parameter a\.1"):
        Table(rules).sources("a.1")


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
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "HF_HUB_OFFLINE": "1"}
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json; name a directory in Hugging Face format"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, found list"),
        ("{}", "config.json has no model_type; add it"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported; supported: .*gpt2"),
        ('{"model_type": "gpt2", "auto_map": {"AutoModel": "x.Y"}}', "config.json has auto_map"),
        ('{"model_type": "gpt2", "n_embd": "8"}', "n_embd is '8'; it must be a positive whole number"),
        ('{"model_type": "gpt2", "n_layer": 0}', "n_layer is 0; it must be a positive whole number"),
    ],
)
def test_unusable_configurations_are_refused_by_name(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(pickled, saved):
    (saved / "model.safetensors").rename(saved / pickled)
    with pytest.raises(InputError, match=rf"has only {pickled}, .*can run code\. Convert .*save_pretrained"):
        load_model(saved)


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
