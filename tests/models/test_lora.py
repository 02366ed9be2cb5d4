"""Low-rank adapters: what they compute against dense float64 matrices, what trains, what is merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lensjax
from lensjax.errors import InputError
from lensjax.models import count_parameters, init_model, layers, load_model, save_pretrained
from lensjax.models.base import Seq2SeqLM
from lensjax.models.checkpoints.adapters import save_lora
from lensjax.models.execution import stack_layers, unstack_layers
from lensjax.models.lora import Frozen, Lora, adaptable, adapters, add_lora, merge_lora, parameter_counts, targets
from support.adapted import make_model, trained
from support.comparing import relative
from support.families import FAMILIES, compiled, flat, make_batch, make_config, pure


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_start_as_nothing_and_end_in_the_weights(name, tmp_path):
    model = make_model(name)
    adapted = add_lora(model, rank=2, alpha=3.0, key=jax.random.key(1))
    batch = make_batch()
    if isinstance(model, Seq2SeqLM):
        outputs = lambda model: model(batch["input_ids"], batch["attention_mask"], batch["input_ids"])  # noqa: E731
    else:
        outputs = lambda model: model(batch["input_ids"], batch["attention_mask"])  # noqa: E731
    graph, adapted_graph = nnx.graphdef(model), nnx.graphdef(adapted)
    plain = compiled(lambda state: outputs(nnx.merge(graph, state)))
    with_adapters = compiled(lambda state: outputs(nnx.merge(adapted_graph, state)))

    before = np.asarray(plain(nnx.state(model)))
    np.testing.assert_array_equal(with_adapters(nnx.state(adapted)), before)
    adapted = trained(adapted)
    after = np.asarray(with_adapters(nnx.state(adapted)))
    assert relative(after, before) > 1e-2
    merged = merge_lora(adapted)
    assert nnx.graphdef(merged) == graph
    assert relative(plain(nnx.state(merged)), after) < 1e-5

    save_pretrained(merged, tmp_path)
    again = flat(nnx.state(load_model(tmp_path)))
    for path, value in flat(nnx.state(merged)).items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_attention_and_perceptrons_has_an_adapter_that_learns(name):
    model = make_model(name)
    adapted = stack_layers(add_lora(model, rank=2, key=jax.random.key(1)))
    adapted.remat = True
    loss, params = pure(adapted, make_batch())
    assert all(type(leaf) is nnx.LoRAParam for _, leaf in nnx.to_flat_state(params))
    graph, _, rest = nnx.split(adapted, nnx.Param, ...)
    gradient = flat(nnx.state(unstack_layers(nnx.merge(graph, compiled(jax.grad(loss))(params), rest)), nnx.Param))
    assert {path.rpartition(".")[0] for path in gradient} == {
        path.removesuffix(".kernel")
        for path, value in flat(nnx.state(model)).items()
        if "layers." in path and value.ndim > 1 and "router" not in path
    }
    for path, value in gradient.items():
        # At the start only the second matrices have a gradient: the first are multiplied by zeros.
        assert (np.abs(value).max() > 1e-7) == path.endswith("lora_b"), path


@pytest.mark.parametrize(("name", "count"), [("gpt2", 1), ("switch_transformers", 2)])
def test_values_and_gradients_are_those_of_the_dense_update_in_float64(name, count):
    batch = make_batch()
    with jax.enable_x64(True):
        adapted = trained(add_lora(make_model(name, count, jnp.float64), rank=2, alpha=3.0, key=jax.random.key(1)))
        loss, params = pure(adapted, batch)
        value, gradient = compiled(jax.value_and_grad(loss))(params)
        dense_loss, dense = pure(merge_lora(adapted), batch)
        expected, weights = compiled(jax.value_and_grad(dense_loss))(dense)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        ours, theirs, matrices = flat(gradient), flat(weights), flat(params)
        for path in adapters(adapted):
            a, b = matrices[f"{path}.lora_a"], matrices[f"{path}.lora_b"]
            of_weight = 1.5 * (theirs[path] if path in theirs else theirs[f"{path}.kernel"])
            assert relative(ours[f"{path}.lora_a"], of_weight @ b.swapaxes(-1, -2)) < 1e-10, path
            assert relative(ours[f"{path}.lora_b"], a.swapaxes(-1, -2) @ of_weight) < 1e-10, path


def test_the_original_model_is_left_alone_and_its_arrays_are_shared():
    model = make_model("gpt2")
    before = flat(nnx.state(model))
    adapted = trained(add_lora(model, rank=2, key=jax.random.key(1)))
    merge_lora(adapted)
    assert parameter_counts(model) == (count_parameters(model.config),) * 2
    for path, value in flat(nnx.state(model, nnx.Param)).items():
        np.testing.assert_array_equal(value, before[path])
    assert adapted.tokens.embedding[...] is model.tokens.embedding[...]
    kernel = adapted.layers[0].attention.qkv.base.kernel
    assert type(kernel) is Frozen
    assert kernel[...] is model.layers[0].attention.qkv.kernel[...]


def test_parameters_are_counted():
    model = add_lora(make_model("gpt2"), rank=2, key=jax.random.key(1))
    # Of each layer: qkv 16 -> 48, out 16 -> 16, perceptron 16 -> 64 -> 16.
    added = 2 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))
    assert parameter_counts(model) == (count_parameters(model.config) + added, added)
    assert parameter_counts(stack_layers(model)) == parameter_counts(model)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama", {"target": ["q_proj", "value"], "layers": 1}, ["1.attention.query", "1.attention.value"]),
        ("llama", {"target": "mlp.*", "layers": 1}, ["1.mlp.gate", "1.mlp.up", "1.mlp.down"]),
        ("gpt2", {"target": "c_proj", "layers": [0]}, ["0.attention.out", "0.mlp_out"]),
        ("gpt2", {"target": "layers.1.mlp_in"}, ["1.mlp_in"]),
    ],
)  # fmt: skip
def test_targets_and_layers_choose(name, settings, expected):
    model = make_model(name)
    adapted = add_lora(model, rank=1, key=jax.random.key(0), **settings)
    assert set(adapters(adapted)) == {f"layers.{end}" for end in expected}


def test_routers_and_projections_outside_the_layers_have_adapters_only_by_name():
    switch = make_model("switch_transformers")
    assert not any("router" in name for name in targets(switch, Lora()))
    assert targets(switch, Lora(target="router")) == [
        f"{stack}.layers.1.mlp.router" for stack in ("decoder", "encoder")
    ]
    assert targets(switch, Lora(target="experts.expert_2.wi", layers=1))[0] == "decoder.layers.1.mlp.inner"
    opt = init_model(make_config("opt", 1) | {"word_embed_proj_dim": 8}, jax.random.key(0))
    assert targets(opt, Lora(target="project_*")) == ["project_in", "project_out"]
    assert "project_in" not in targets(opt, Lora())
    assert "project_in" in adaptable(opt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "LoRA's rank is 0; it must be a whole number of at least 1"),
        ({"rank": 1.5}, "LoRA's rank is 1.5"),
        ({"alpha": 0.0}, "LoRA's alpha is 0.0; it must be a positive number"),
        ({"dropout": 1.0}, "LoRA's dropout is 1.0; it must be at least 0 and less than 1"),
        ({"dropout": -0.1}, "LoRA's dropout is -0.1"),
        ({"target": ["qkv", "q_proj"]}, r"LoRA's target 'q_proj' names no linear map of this gpt2 model; it has: "
         r"attention.out \(c_proj\), attention.qkv \(c_attn\), mlp_in \(c_fc\), mlp_out \(c_proj\)\."),
        ({"target": []}, r"LoRA's target \(\) names no linear map"),
        ({"layers": [0, 2]}, r"LoRA's layers \[2\] are not there: this gpt2 model has layers 0 to 1"),
        ({"target": "layers.0.mlp_in", "layers": 1}, r"is in none of the layers \(1,\)"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        add_lora(make_model("gpt2"), key=jax.random.key(0), **settings)


def test_adapters_are_neither_doubled_nor_merged_where_there_are_none(tmp_path):
    model = make_model("gpt2", 1)
    with pytest.raises(InputError, match="has adapters already"):
        add_lora(add_lora(model, key=jax.random.key(0)), key=jax.random.key(0))
    with pytest.raises(InputError, match="no adapters to merge"):
        merge_lora(model)
    with pytest.raises(InputError, match="no adapters to save"):
        save_lora(model, tmp_path)


def test_each_adapter_drops_its_own_inputs_where_there_is_a_key(monkeypatch):
    found = []

    def record(x, rate, key):
        found.extend([(rate, key)] if key is not None and rate else [])
        return x

    monkeypatch.setattr(layers, "drop", record)
    still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = add_lora(
        init_model(make_config("gpt2", 2) | still, jax.random.key(0)), rank=1, dropout=0.25, key=jax.random.key(0)
    )
    jax.eval_shape(lambda: model.loss_sums(make_batch()))
    assert not found
    jax.eval_shape(lambda key: model.loss_sums(make_batch(), dropout_key=key), jax.random.key(1))
    assert [rate for rate, _ in found] == [0.25] * 8
    assert len({id(key) for _, key in found}) == 8
    assert all(adapter.key is None for adapter in adapters(model).values())  # the keys of a call are not kept


@pytest.mark.parametrize(("name", "rates"), [("gpt2", {}), ("llama", {"attention_dropout": 0.1}), ("t5", {})])
def test_adapters_and_model_never_share_a_dropout_key(name, rates, monkeypatch):
    found = []

    def record(x, rate, key):
        found.extend([jax.random.key_data(key)] if key is not None and rate else [])
        return x

    monkeypatch.setattr(layers, "drop", record)
    model = init_model(make_config(name, 2) | rates, jax.random.key(0))
    model = add_lora(model, rank=1, dropout=0.1, key=jax.random.key(0))

    def keys(key):
        model.loss_sums(make_batch(), dropout_key=key)
        return found

    drawn = [tuple(np.asarray(key).tolist()) for key in compiled(keys)(jax.random.key(1))]
    assert len(drawn) > len(adapters(model))  # the model's own among them
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("execution", ["unroll", "scan"])
def test_dropout_is_random_scaled_and_off_without_a_key(execution):
    config = make_config("llama", 2)
    model = trained(add_lora(init_model(config, jax.random.key(0)), rank=1, dropout=0.5, key=jax.random.key(0)))
    model = stack_layers(model) if execution == "scan" else model
    graph, state = nnx.split(model)
    batch = make_batch()
    run = compiled(lambda state, key: nnx.merge(graph, state).loss_sums(batch, dropout_key=key)[0])
    first, second, again = (np.asarray(run(state, jax.random.key(seed, impl="rbg"))) for seed in (0, 1, 0))
    off = np.asarray(compiled(lambda state: nnx.merge(graph, state).loss_sums(batch)[0])(state))
    assert (np.abs(first - second) > 1e-4).all()
    assert (np.abs(first - off) > 1e-4).all()
    np.testing.assert_array_equal(first, again)


def test_rank_stabilised_scale():
    assert Lora(rank=16, alpha=8.0).scale == 0.5
    assert Lora(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


def test_half_precision_keeps_its_dtype_and_adapters_are_float32():
    model = trained(add_lora(make_model("gemma3_text", dtype=jnp.bfloat16), rank=2, key=jax.random.key(1)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    batch = make_batch()
    assert jax.eval_shape(model, batch["input_ids"]).dtype == "bfloat16"
    merged = merge_lora(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(merged))} == {jnp.dtype("bfloat16")}
    loss, params = pure(stack_layers(model), batch)
    expected, plain = pure(merged, batch)
    np.testing.assert_allclose(compiled(loss)(params), compiled(expected)(plain), rtol=5e-2)


def test_the_kernel_of_a_model_with_adapters_is_theirs():
    model = trained(add_lora(make_model("gpt2", 1), rank=1, key=jax.random.key(1)))
    batch = make_batch(3)
    loss = lambda params, sample: pure(model, jax.tree.map(lambda leaf: leaf[None], sample))[0](params)  # noqa: E731
    _, params = pure(model, batch)
    each = compiled(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    rows = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(each)], axis=1)
    kernel = lensjax.ntk(model, batch, output="loss_sum")
    kernel = np.asarray(kernel).reshape(3, 3)
    assert relative(kernel, rows.astype(np.float64) @ rows.T) < 1e-5


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"has LoRA adapters: merge them first \(lensjax\.models\.merge_lora\)"):
        save_pretrained(add_lora(make_model("gpt2", 1), rank=1, key=jax.random.key(0)), tmp_path / "m")
    assert not (tmp_path / "m").exists()
