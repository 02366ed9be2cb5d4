"""Which configurations are read, and which are refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lensjax.errors import InputError
from lensjax.models import (
    check_checkpoint,
    from_pretrained,
    init_model,
    load_config,
    load_model,
    save_pretrained,
)
from lensjax.models.checkpoints.saving import export_tensors
from support.checkpoints import LLAMA, edit_config, make_tokenizer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json; name a directory in Hugging Face format"),
        ("{", "is not valid JSON"),
        ("[" * 100000, "is not valid JSON .*nested"),
        ('{"n_embd": ' + "9" * 5000 + "}", "is not valid JSON .*an integer of 5000 digits"),
        ("\N{GREEK SMALL LETTER ALPHA}", "is not valid JSON"),
        ('{"model_type": "gpt2", "n_layer": 1000000}', "n_layer is 1000000; no model has more than 10000"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000000}', "num_hidden_layers is 1000000000000; no model"),
        ('{"model_type": "qwen2", "num_hidden_layers": 10001}', "num_hidden_layers is 10001; no model has more"),
        ('{"model_type": "mistral", "num_hidden_layers": 10001}', "num_hidden_layers is 10001; no model has more"),
        ('{"model_type": "gemma3_text", "num_hidden_layers": 10001}', "num_hidden_layers is 10001; no model has more"),
        ('{"model_type": "opt", "num_hidden_layers": 10001}', "num_hidden_layers is 10001; no model has more"),
        ('{"model_type": "phi", "num_hidden_layers": 10001}', "num_hidden_layers is 10001; no model has more"),
        ('{"model_type": "t5", "num_layers": 10001}', "num_layers is 10001; no model has more"),
        ('{"model_type": "switch_transformers", "num_layers": 10001}', "num_layers is 10001; no model has more"),
        ('{"model_type": "bart", "decoder_layers": 10001}', "decoder_layers is 10001; no model has more"),
        ('{"model_type": "gpt2", "vocab_size": 2147483648}', "vocab_size is 2147483648; no size is more than"),
        ("[]", "must hold a JSON object, found list"),
        ("{}", "config.json has no model_type; add it"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported; supported: .*gpt2"),
        (
            '{"model_type": "phi3", "auto_map": {"AutoModel": "x.Y"}}',
            r"model_type 'phi3' is not supported, and the code that comes with the model \(auto_map .*\) is not run",
        ),
        ('{"model_type": "gpt2", "n_embd": "8"}', "n_embd is '8'; it must be a positive whole number"),
        ('{"model_type": "gpt2", "n_layer": 0}', "n_layer is 0; it must be a positive whole number"),
    ],
)
def test_unusable_configurations_are_refused_by_name(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_config(tmp_path)
    assert len(str(error.value)) < 1000
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        {"AutoTokenizer": ["evil.Tokenizer", None]},
    ],
)
def test_code_that_comes_with_a_model_of_a_supported_family_is_ignored(auto_map, saved, model, tmp_path):
    save_pretrained(model, saved, make_tokenizer())
    edit_config(saved, auto_map=auto_map)
    (saved / "evil.py").write_text("raise SystemExit('it ran')")
    loaded, tokenizer = from_pretrained(saved)
    assert tokenizer("a b")["input_ids"] == make_tokenizer()("a b")["input_ids"]
    left, right = export_tensors(loaded), export_tensors(model)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name])
    save_pretrained(loaded, tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_code_that_comes_with_a_model_of_another_family_is_not_run(saved):
    edit_config(saved, model_type="phi3", auto_map={"AutoModel": "evil.Model"})
    (saved / "evil.py").write_text("raise SystemExit('it ran')")
    for load in (load_config, load_model, from_pretrained):
        with pytest.raises(
            InputError, match=r"model_type 'phi3' is not supported, and .* is not run; supported: bart,"
        ):
            load(saved)


GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "sliding_window": 4,
}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_checkpoint_is_loaded_alone(prefix, tmp_path):
    model = init_model(GEMMA, jax.random.key(0))
    expected = export_tensors(model)
    tensors = {prefix + name.removeprefix("model."): value for name, value in expected.items()}
    head = "model." if prefix.startswith("model.") else ""
    for part in ("vision_tower.vision_model.embeddings.bias", "multi_modal_projector.mm_input_projection_weight"):
        tensors[head + part] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    text = {name: value for name, value in GEMMA.items() if name != "vocab_size"}
    outer = {"model_type": "gemma3", "text_config": text | {"vocab_size": 11}, "vision_config": {}, "eos_token_id": [1]}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    config = check_checkpoint(tmp_path)
    assert (config.model_type, config.layers, config.head_dim) == ("gemma3_text", 2, 4)
    loaded = load_model(tmp_path)
    assert export_tensors(loaded).keys() == expected.keys()
    for name, value in export_tensors(loaded).items():
        np.testing.assert_array_equal(value, expected[name])
    save_pretrained(loaded, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert saved["eos_token_id"] == [1]
    assert "vision_config" not in saved
    tensors[prefix + "extra"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 problem:\n  unused: model\.extra"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su"])
@pytest.mark.parametrize("old", [True, False])
def test_rotary_scalings_that_are_not_computed_are_refused(kind, old, tmp_path):
    scaling = {"type" if old else "rope_type": kind, "factor": 2.0}
    config = LLAMA | ({"rope_scaling": scaling} if old else {"rope_parameters": scaling | {"rope_theta": 1e4}})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"rope_type '{kind}' is not supported; supported: default, linear, llama3"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_capping_is_refused(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", name: 30.0}))
    with pytest.raises(InputError, match=rf"{name} is 30\.0; only models without it are supported"):
        load_config(tmp_path)
