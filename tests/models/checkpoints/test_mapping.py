"""Checking a checkpoint against a model, and filling the model from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.models import (
    check_checkpoint,
    init_model,
    load_config,
    load_model,
    save_pretrained,
)
from lensjax.models.checkpoints.mapping import parameter_shapes
from lensjax.models.registry import Rule, Table, family, transposed
from support.checkpoints import LLAMA, assert_same, edit, edit_config
from support.families import FAMILIES, make_config


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


def test_a_tied_table_may_stand_under_its_other_name(saved, model):
    edit(saved, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    assert check_checkpoint(saved) == load_config(saved)
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
    listed, _, remedy = str(error.value).rpartition("\n")
    assert remedy == "Use the config.json that these weights were saved with, or download both again."
    first, *problems = listed.split("\n  ")
    assert first == f"{saved}: the checkpoint does not fit its config.json, 5 problems:"
    assert sorted(problems) == [
        "both transformer.wpe.weight and wpe.weight are there",
        "missing: transformer.h.1.mlp.c_fc.bias",
        "unused: score.weight",
        "unused: transformer.h.2.ln_1.weight",
        "wrong shape: transformer.h.0.ln_1.weight has (9,), which does not make (8,) for layers.0.attention_norm.scale",
    ]


def test_a_wrong_shape_is_compared_with_the_one_in_the_file(tmp_path):
    save_pretrained(init_model(LLAMA, jax.random.key(0)), tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"  # stored as (out, in), loaded as (in, out)
    edit(tmp_path, lambda tensors: tensors.update({name: np.ones((6, 8), np.float32)}))
    edit_config(tmp_path, num_key_value_heads=1)
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert f"wrong shape: {name} has (6, 8) and needs (4, 8) for layers.0.attention.key.kernel" in str(error.value)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (
            lambda tensors: {**tensors, "transformer.h.0.attn.c_attn.lora_A.weight": np.ones((2, 8), np.float32)},
            "It has adapters that are not merged: merge them with peft's merge_and_unload() and save the result.",
        ),
        (
            lambda tensors: {f"_orig_mod.{name}": value for name, value in tensors.items()},
            "All names begin with _orig_mod., which a wrapper around the model adds: save the model inside it.",
        ),
        (
            lambda tensors: {**tensors, "score.weight": np.ones((2, 8), np.float32)},
            "It is a model for another task, with a head that a language model does not have; name its base model.",
        ),
    ],
)
def test_the_advice_fits_what_is_wrong_with_a_checkpoint(change, remedy, saved):
    def apply(tensors):
        changed = change(dict(tensors))
        tensors.clear()
        tensors.update(changed)

    edit(saved, apply)
    with pytest.raises(InputError) as error:
        load_model(saved)
    assert str(error.value).rpartition("\n")[2] == remedy


def test_a_checkpoint_that_fits_passes_the_check_without_its_tensors_being_read(saved, monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("lensjax.models.checkpoints.safetensors_files.SafeTensors.rows", read)
    assert check_checkpoint(saved) == load_config(saved)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_maps_every_parameter_once(name):
    config = load_config(make_config(name, 2))
    table = family(name, "test").table(config)
    paths = parameter_shapes(config)
    sources = [source for path in paths for source in table.sources(path)[1]]
    assert len(sources) == len(set(sources)) >= len(paths) > 10


@pytest.mark.parametrize("dtype", ["int8", jnp.int32, bool])
def test_a_dtype_that_holds_no_weights_is_refused(dtype, saved):
    with pytest.raises(InputError, match=rf"dtype is {jnp.dtype(dtype).name}; parameters need a floating-point one"):
        load_model(saved, dtype=dtype)


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
