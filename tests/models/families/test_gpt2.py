"""GPT-2 against transformers' torch implementation (stored values, and live where asked) and against itself."""

import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lensjax.errors import InputError
from lensjax.models import init_model, load_config, load_model, save_pretrained
from lensjax.models.checkpoints.saving import export_tensors
from support import golden_decoders
from support.comparing import relative
from support.decoders import losses, make_batch
from support.paths import GOLDEN

CASES = ("gpt2-tied", "gpt2-unscaled", "gpt2-untied")
SMALL = {"model_type": "gpt2", "vocab_size": 53, "n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 16}


def pure(model):
    """Return (loss(params, batch) -> scalar sum, params)."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return jax.jit(lambda params, batch: nnx.merge(graph, params, rest).loss_sums(batch)[0].sum()), params


def double(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def check_against_golden(directory):
    golden = load_file(directory / "golden.safetensors")
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    model = load_model(directory)
    real = batch["attention_mask"] != 0
    assert relative(model(batch["input_ids"], batch["attention_mask"])[real], golden["logits"][real]) < 1e-5
    sums, counts = losses(model, batch)
    np.testing.assert_allclose(sums, golden["loss_sums"], rtol=1e-5)
    np.testing.assert_array_equal(counts, (batch["labels"][:, 1:] != -100).sum(1))

    loss, params = pure(model)
    nnx.update(model, jax.jit(jax.grad(loss))(params, batch))
    ours = export_tensors(model)
    assert {"grad." + name for name in ours} == {name for name in golden if name.startswith("grad.")}
    for name, gradient in ours.items():
        if name.endswith("c_attn.bias"):
            # Shifting all keys shifts every score of a query alike: the key part is 0 but for rounding.
            queries, keys, values = np.split(gradient, 3)
            gradient = np.concatenate([queries, np.zeros_like(keys), values])
            assert np.abs(keys).max() < 1e-5 * np.abs(gradient).max()
        assert relative(gradient, golden["grad." + name]) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_every_gradient_equal_those_of_transformers(case):
    check_against_golden(GOLDEN / case)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own; this test is about numbers
def test_live_parity_both_ways(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    golden_decoders.make(tmp_path, 7)
    for case in CASES:
        check_against_golden(tmp_path / case)
        ours = load_model(tmp_path / case)
        save_pretrained(ours, tmp_path / "saved")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
        ids = np.arange(20).reshape(2, 10)
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
        assert relative(ours(jnp.asarray(ids)), expected) < 1e-5


def test_padding_changes_no_loss_and_no_gradient():
    loss, params = pure(init_model(SMALL, jax.random.key(0)))
    step = jax.jit(jax.value_and_grad(loss))
    batch = make_batch(53)
    expected = step(params, batch)
    # A label on padding must count for nothing, either.
    for width, pad_label in itertools.product(((4, 0), (0, 4)), (-100, 5)):
        fill = {"input_ids": 7, "attention_mask": 0, "labels": pad_label}
        padded = {name: np.pad(array, ((0, 0), width), constant_values=fill[name]) for name, array in batch.items()}
        chex.assert_trees_all_close(step(params, padded), expected, rtol=1e-5, atol=1e-6)


def test_a_sample_does_not_depend_on_its_neighbours():
    model = init_model(SMALL, jax.random.key(0))
    batch = make_batch(53, samples=4)
    together = losses(model, batch)[0]
    alone = [losses(model, {name: array[i : i + 1] for name, array in batch.items()})[0][0] for i in range(4)]
    np.testing.assert_allclose(together, alone, rtol=2e-6)


def test_tokens_see_only_the_past():
    model = init_model(SMALL, jax.random.key(0))
    ids = make_batch(53)["input_ids"]
    changed = ids.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 53
    before, after = model(ids), model(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 1e-3


def test_the_mask_may_be_left_out():
    model = init_model(SMALL, jax.random.key(0))
    batch = make_batch(53)
    np.testing.assert_array_equal(model(batch["input_ids"]), model(batch["input_ids"], batch["attention_mask"]))
    mask = batch.pop("attention_mask")
    np.testing.assert_array_equal(losses(model, batch)[0], losses(model, batch | {"attention_mask": mask})[0])


def test_losses_are_the_cross_entropy_of_the_logits():
    model = init_model(SMALL | {"tie_word_embeddings": False}, jax.random.key(3))
    batch = make_batch(53)
    logits = np.asarray(model(batch["input_ids"]), np.float64)[:, :-1]
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gold = np.take_along_axis(probability, batch["labels"][:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(losses(model, batch)[0], -np.log(gold).sum(1), rtol=1e-6)


def test_ways_of_running_the_layers_agree():
    # Random numbers take long to compile: one place of dropout is enough to see that each layer gets its key.
    config = SMALL | {"n_layer": 2, "scale_attn_by_inverse_layer_idx": True, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = init_model(config, jax.random.key(0))
    batch = make_batch(53)

    def gradient():
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda params: nnx.merge(graph, params, rest).loss_sums(batch, dropout_key=jax.random.key(1))[0].sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradient()
    for model.execution, model.remat in (("unroll", True), ("scan", False), ("scan", True)):
        chex.assert_trees_all_close(gradient(), expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_way_of_running_the_layers_is_refused():
    model = init_model(SMALL, jax.random.key(0))
    model.execution = "loop"
    with pytest.raises(InputError, match="execution 'loop' is not known; choose 'unroll' or 'scan'"):
        model(make_batch(53)["input_ids"])


def test_dropout_is_off_without_a_key_and_random_with_one():
    model = init_model(SMALL | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}, jax.random.key(0))
    batch = make_batch(53)
    np.testing.assert_array_equal(losses(model, batch)[0], losses(model, batch)[0])
    first, second = (losses(model, batch, jax.random.key(i))[0] for i in range(2))
    assert (np.abs(first - second) > 1e-4).all()
    np.testing.assert_array_equal(first, losses(model, batch, jax.random.key(0))[0])


@pytest.mark.parametrize("place", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_rate_acts_alone(place):
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    batch = make_batch(53)
    without = init_model(SMALL | rates, jax.random.key(0))
    np.testing.assert_array_equal(losses(without, batch, jax.random.key(5))[0], losses(without, batch)[0])
    model = init_model(SMALL | rates | {place: 0.5, "initializer_range": 0.3}, jax.random.key(0))
    assert np.abs(losses(model, batch, jax.random.key(5))[0] - losses(model, batch)[0]).max() > 1e-3


def test_per_example_gradients_sum_to_the_gradient():
    loss, params = pure(init_model(SMALL, jax.random.key(0)))
    batch = make_batch(53)
    one = lambda params, sample: loss(params, jax.tree.map(lambda leaf: leaf[None], sample))  # noqa: E731
    each = jax.jit(jax.vmap(jax.grad(one), (None, 0)))(params, batch)
    whole = jax.jit(jax.grad(loss))(params, batch)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf.sum(0), each), whole, rtol=1e-4, atol=1e-6)


def test_forward_mode_and_hessian_vector_product_agree_with_finite_differences():
    with jax.enable_x64(True):
        loss, params = pure(init_model(SMALL | {"initializer_range": 0.2}, jax.random.key(0)))
        params, batch = double(params), make_batch(53)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        direction = tree.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])
        length = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(direction)) ** 0.5
        direction = jax.tree.map(lambda leaf: leaf / length, direction)
        gradient = jax.jit(jax.grad(loss))
        slope = jax.jvp(lambda params: loss(params, batch), (params,), (direction,))[1]
        hvp = jax.jit(lambda p, v: jax.jvp(lambda p: jax.grad(loss)(p, batch), (p,), (v,))[1])(params, direction)
        step = 1e-5
        ahead = jax.tree.map(lambda p, v: p + step * v, params, direction)
        behind = jax.tree.map(lambda p, v: p - step * v, params, direction)
        np.testing.assert_allclose(slope, (loss(ahead, batch) - loss(behind, batch)) / (2 * step), rtol=1e-7)
        numeric = jax.tree.map(lambda a, b: (a - b) / (2 * step), gradient(ahead, batch), gradient(behind, batch))
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(numeric))
        chex.assert_trees_all_close(hvp, numeric, rtol=0, atol=1e-7 * scale)


def test_float32_gradient_equals_float64_above_a_million_activations():
    # 34 x 128 tokens x 256 inner units: 2**20 elements in the perceptron, and more in scores and logits.
    config = SMALL | {"n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 512}
    loss, params = pure(init_model(config, jax.random.key(0)))
    batch = make_batch(512, samples=34, length=128)
    ours = jax.jit(jax.grad(loss))(params, batch)
    with jax.enable_x64(True):
        exact = jax.jit(jax.grad(loss))(double(params), batch)
        for path, leaf in jax.tree.leaves_with_path(exact):
            other = ours
            for step in path[:-1]:
                other = other[step.key]
            if leaf.ndim == 1 and leaf.shape[0] == 3 * 64:
                continue  # the key part of this bias has no gradient; its neighbours are covered by the golden values
            assert relative(other[...], np.asarray(leaf)) < 2e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 5e-2), ("float16", 5e-3)])
def test_half_precision_keeps_its_dtype_and_accumulates_losses_in_float32(dtype, tolerance):
    model = load_model(GOLDEN / "gpt2-tied", dtype=dtype)
    golden = load_file(GOLDEN / "gpt2-tied" / "golden.safetensors")
    assert model(golden["input_ids"]).dtype == dtype
    sums, _ = losses(model, {name: golden[name] for name in ("input_ids", "attention_mask", "labels")})
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(sums, golden["loss_sums"], rtol=tolerance)


def test_initialisation_is_that_of_gpt2():
    config = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 32}
    tensors = export_tensors(init_model(config, jax.random.key(0)))
    for name, value in tensors.items():
        if "ln_" in name or name.endswith("bias"):
            np.testing.assert_array_equal(value, 1.0 if name.endswith("weight") else 0.0, err_msg=name)
        else:
            expected = 0.02 / np.sqrt(8) if name.endswith("c_proj.weight") else 0.02
            assert abs(value.std() / expected - 1) < 5 * np.sqrt(0.5 / value.size), name
            assert abs(value.mean()) < 5 * expected / np.sqrt(value.size), name
    other = export_tensors(init_model(config, jax.random.key(1)))
    assert not np.array_equal(other["transformer.wte.weight"], tensors["transformer.wte.weight"])


def test_too_long_an_input_is_refused():
    model = init_model(SMALL, jax.random.key(0))
    with pytest.raises(InputError, match="17 tokens long, but this gpt2 model has 16 positions"):
        model(np.zeros((1, 17), np.int32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_head": 5}, "n_embd 24 is not a multiple of n_head 5"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"activation_function": "mish"}, "activation 'mish' is not supported; supported: gelu, "),
    ],
)
def test_configurations_that_ask_for_something_else_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        load_config(SMALL | values)


def test_config_fields_are_read_from_the_file():
    raw = json.loads((GOLDEN / "gpt2-untied" / "config.json").read_text())
    config = load_config(raw)
    assert (config.n_inner, config.heads, config.width, config.layers, config.max_length) == (24, 2, 16, 2, 12)
    assert config.scale_attn_by_inverse_layer_idx
    assert not config.tie_word_embeddings
    assert config.layer_norm_epsilon == 1e-3
    assert hash(config) == hash(load_config(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": ["gelu"]}, "activation_function is ['gelu'] in config.json; it must be a str such as"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x' in config.json; it must be a float such as 1e-05."),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1 in config.json; it must be a bool such as True."),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_when_the_configuration_is_read(change, message):
    with pytest.raises(InputError) as error:
        load_config({"model_type": "gpt2", **change})
    assert message in str(error.value)
