"""Adapters saved under PEFT's names, and loaded back."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lensjax.errors import InputError
from lensjax.models.checkpoints.adapters import load_lora, save_lora
from lensjax.models.execution import stack_layers
from lensjax.models.lora import add_lora
from support.adapted import make_model, trained
from support.families import FAMILIES, flat


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_saved_under_pefts_names_and_load_back_equal(name, tmp_path):
    model = make_model(name)
    adapted = trained(add_lora(model, rank=2, alpha=3.0, dropout=0.1, rank_stabilised=True, key=jax.random.key(1)))
    save_lora(stack_layers(adapted), tmp_path, base="some/model")
    again = load_lora(model, tmp_path)
    assert (again.lora.scale, again.lora.dropout) == (adapted.lora.scale, 0.1)
    expected = flat(nnx.state(adapted))
    found = flat(nnx.state(again))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_the_file_is_what_peft_writes(tmp_path):
    model = make_model("gpt2", 1)
    save_lora(add_lora(model, rank=2, alpha=3.0, key=jax.random.key(1)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert config["fan_in_fan_out"]
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == (
        "LORA",
        "CAUSAL_LM",
        2,
        3.0,
    )
    shapes = {name: value.shape for name, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] == (2, 16)
    assert shapes["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"] == (48, 2)
    assert len(shapes) == 8
    # A short name would mean more modules than have adapters.
    save_lora(add_lora(model, target="attention.out", key=jax.random.key(1)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["transformer.h.0.attn.c_proj"]


def test_adapters_that_do_not_fit_are_refused_with_everything_that_does_not(tmp_path):
    model = make_model("gpt2", 1)
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        load_lora(model, tmp_path)
    save_lora(add_lora(model, rank=2, key=jax.random.key(1)), tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    prefix = "base_model.model.transformer.h.0."
    changed = dict(tensors)
    changed["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 2), np.float32)
    del changed[prefix + "mlp.c_fc.lora_B.weight"]
    save_file(changed, file)
    with pytest.raises(InputError, match="do not fit this gpt2 model, 2 problems:") as error:
        load_lora(model, tmp_path)
    assert f"missing: {prefix}mlp.c_fc.lora_B.weight" in str(error.value)
    assert "unused: base_model.model.lm_head.lora_A.weight" in str(error.value)
    save_file(tensors | {prefix + "mlp.c_fc.lora_A.weight": np.zeros((2, 17), np.float32)}, file)
    with pytest.raises(InputError, match=r"wrong shape: layers\.0\.mlp_in needs \(16, 2\) and the file has \(17, 2\)"):
        load_lora(model, tmp_path)
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"use_dora": True, "bias": "all"}))
    with pytest.raises(InputError, match="bias is 'all', use_dora is True; only plain LoRA adapters are supported"):
        load_lora(model, tmp_path)
    for changes in ({"init_lora_weights": "pissa_niter_4"}, {"alora_invocation_tokens": [1, 2]}):
        config.write_text(json.dumps(settings | changes))
        with pytest.raises(InputError, match=f"{next(iter(changes))} is .*; only plain LoRA adapters are supported"):
            load_lora(model, tmp_path)
    config.write_text(json.dumps(settings))
    file.unlink()
    with pytest.raises(InputError, match=r"adapter_model\.bin\) are not opened"):
        load_lora(model, tmp_path)
