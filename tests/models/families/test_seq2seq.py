"""T5, mT5, BART, Switch Transformer against transformers' torch models (stored values, and live) and themselves."""

import itertools
import json
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lensjax.errors import InputError
from lensjax.models import (
    check_checkpoint,
    count_parameters,
    init_model,
    layers,
    load_config,
    load_model,
    save_pretrained,
)
from lensjax.models.checkpoints.saving import export_tensors
from lensjax.models.families.switch_transformers import SparseMLP
from lensjax.models.families.t5 import relative_buckets
from support import golden_seq2seq
from support.paths import GOLDEN

CASES = (
    "bart",
    "bart-scaled",
    "mt5-tied",
    "mt5-untied",
    "switch_transformers",
    "switch_transformers-untied",
    "t5-v1.0",
    "t5-v1.1",
)
SIZES = {"vocab_size": 53, "d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 32, "num_layers": 1}
SIZES |= {"num_decoder_layers": 1, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 7}
SMALL = {
    "bart": {"vocab_size": 53, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    | {"decoder_ffn_dim": 32, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 16}
    | {"init_std": 0.3},
    # A capacity of 2 drops some of 9 tokens.
    "switch_transformers": SIZES
    | {"num_experts": 3, "expert_capacity": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": SIZES,
}
SMALL = {name: {"model_type": name} | values for name, values in SMALL.items()}
FAMILIES = tuple(SMALL)  # mT5 is T5 but for defaults and the head, which the golden values cover


def make_batch(vocabulary=53, samples=3, length=9, targets=7, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(6, vocabulary, (samples, length)).astype(np.int32)
    labels = rng.integers(6, vocabulary, (samples, targets)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


# These programs run once or twice: what counts is the time to compile them.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(compiled, static_argnums=0)
def compiled_losses(graph, state, batch, key):
    return nnx.merge(graph, state).loss_sums(batch, dropout_key=key)


def losses(model, batch, key=None):
    """Return `model.loss_sums(batch)`, compiled as one program: op by op it takes seconds."""
    return compiled_losses(*nnx.split(model), batch, key)


def pure(model, function):
    """Return (`function` of (params, batch), params)."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, batch: function(nnx.merge(graph, params, rest), batch), params


def double(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def relative(ours, theirs):
    """Largest difference over the tensor's largest value; where that is 0, the largest value of ours."""
    scale = np.abs(theirs).max()
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / (scale if scale > 0 else 1)


def values_and_gradients(model, batch):
    """Return logits, loss sums, counts and the gradient of all losses, by one compiled program."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def function(params):
        model = nnx.merge(graph, params, rest)
        sums, counts = model.loss_sums(batch)
        logits = model(batch["input_ids"], batch["attention_mask"], model.shift_right(batch["labels"]))
        return sums.sum(), (logits, sums, counts)

    (_, values), gradient = compiled(jax.value_and_grad(function, has_aux=True))(params)
    return *values, export_tensors(nnx.merge(graph, gradient, rest))


def check_against_golden(directory, dtype="float32", tolerance=1e-5):
    golden = load_file(directory / "golden.safetensors")
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    model = load_model(directory, dtype=dtype)
    logits, sums, counts, ours = values_and_gradients(model, batch)
    assert relative(logits, golden["logits"]) < tolerance
    np.testing.assert_allclose(sums, golden["loss_sums"], rtol=tolerance)
    np.testing.assert_array_equal(counts, (batch["labels"] != -100).sum(1))
    fixed = ours.pop("final_logits_bias", np.zeros(1))  # no parameter in torch, so it must not learn here
    np.testing.assert_array_equal(fixed, 0)
    assert {"grad." + name for name in ours} == {name for name in golden if name.startswith("grad.")}
    for name, value in ours.items():
        if name.endswith("k_proj.bias"):
            # Shifting all keys shifts every score of a query alike: 0 but for rounding.
            assert np.abs(value).max() < tolerance * np.abs(ours[name.replace("k_proj", "v_proj")]).max(), name
        else:
            assert relative(value, golden["grad." + name]) < tolerance, name
    if "router_loss" in golden:
        check_router_loss(model, batch, golden, tolerance)


def check_router_loss(model, batch, golden, tolerance):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    function = jax.value_and_grad(lambda params: nnx.merge(graph, params, rest).router_loss(batch).mean())
    value, gradient = compiled(function)(params)
    ours = export_tensors(nnx.merge(graph, gradient, rest))
    assert relative(value, golden["router_loss"]) < tolerance
    theirs = {name.removeprefix("router."): value for name, value in golden.items() if name.startswith("router.")}
    assert len(theirs) > 0
    for name, value in theirs.items():
        assert relative(ours[name], value) < tolerance, name


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_every_gradient_equal_those_of_transformers(case):
    check_against_golden(GOLDEN / case)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own; this test is about numbers
@pytest.mark.parametrize("case", CASES)
def test_live_parity_both_ways(case, tmp_path):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    assert tuple(sorted(golden_seq2seq.CASES)) == CASES
    golden_seq2seq.make(tmp_path, 7, (case,))
    check_against_golden(tmp_path / case)
    with jax.enable_x64(True):
        check_against_golden(tmp_path / case, "float64", 1e-6)  # stored in float32
    ours = load_model(tmp_path / case)
    save_pretrained(ours, tmp_path / "saved")
    if case == "switch_transformers-untied":
        # transformers 5 unties the embedding tables of encoder and decoder, too, and would draw them anew.
        tensors = load_file(tmp_path / "saved" / "model.safetensors")
        tensors |= {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
        save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    theirs = golden_seq2seq.load(tmp_path / "saved")
    batch = make_batch(90, samples=2)
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(array).long() for name, array in batch.items()})
    actual = ours(batch["input_ids"], batch["attention_mask"], ours.shift_right(batch["labels"]))
    assert relative(actual, expected.logits.numpy()) < 1e-5
    sums, counts = losses(ours, batch)
    np.testing.assert_allclose(sums.sum() / counts.sum(), expected.loss, rtol=1e-5)

    distance = np.arange(-600, 601)
    for buckets, furthest, both in itertools.product((8, 32), (20, 128), (False, True)):
        reference = T5Attention._relative_position_bucket(torch.tensor(distance), both, buckets, furthest)
        mine = relative_buckets(distance, bidirectional=both, buckets=buckets, max_distance=furthest)
        np.testing.assert_array_equal(mine, reference)


@cache
def small(family):
    """Return (model, params, step, logits) of a family's small configuration; step and logits are compiled."""
    model = init_model(SMALL[family], jax.random.key(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def total(params, batch):
        sums, _ = nnx.merge(graph, params, rest).loss_sums(batch)
        return sums.sum(), sums

    def logits(params, batch):
        return nnx.merge(graph, params, rest)(batch["input_ids"], batch["attention_mask"], batch["labels"])

    return model, params, compiled(jax.value_and_grad(total, has_aux=True)), compiled(logits)


def pad(batch, left, right, target):
    return {
        "input_ids": np.pad(batch["input_ids"], ((0, 0), (left, right)), constant_values=7),
        "attention_mask": np.pad(batch["attention_mask"], ((0, 0), (left, right))),
        "labels": np.pad(batch["labels"], ((0, 0), (0, target)), constant_values=-100),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_neighbours_change_no_loss_and_no_gradient(family):
    model, params, step, _ = small(family)
    batch = make_batch()
    alone = losses(model, batch)[0]
    # All with 4 more input tokens and 3 more labels: one program.
    expected = step(params, pad(batch, 0, 4, 3))[1]
    for left in (0, 1, 4):
        (_, sums), gradient = step(params, pad(batch, left, 4 - left, 3))
        np.testing.assert_allclose(sums, alone, rtol=3e-6)
        chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-5)
    # Sample 0 again, at another place and beside samples of other lengths.
    other = make_batch(seed=1, length=13, targets=10)
    mine = pad(batch, 2, 2, 3)
    mixed = {name: np.stack([array[0], mine[name][0], array[1]]) for name, array in other.items()}
    mixed["attention_mask"][0, 6:] = 0
    (_, sums), _ = step(params, mixed)
    np.testing.assert_allclose(sums[1], alone[0], rtol=3e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_sees_its_past_and_all_of_the_input_that_the_mask_keeps(family):
    _, params, _, logits = small(family)
    batch = make_batch()
    batch["attention_mask"][:, -2:] = 0
    before = logits(params, batch)

    def after(name, where):
        changed = batch[name].copy()
        changed[:, where] = (changed[:, where] - 6 + 1) % 47 + 6
        return logits(params, batch | {name: changed})

    late = after("labels", slice(4, None))
    np.testing.assert_array_equal(late[:, :4], before[:, :4])
    assert (np.abs(late - before)[:, 4:].max(axis=(0, 2)) > 1e-3).all()
    np.testing.assert_array_equal(after("input_ids", slice(-2, None)), before)
    assert (np.abs(after("input_ids", slice(6, 7)) - before).max(axis=2) > 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_may_be_left_out_and_decoder_padding_may_stand_on_the_left(family):
    model, params, _, logits = small(family)
    batch = make_batch()
    expected = logits(params, batch)
    forward = compiled(lambda ids, mask: model(batch["input_ids"], None, ids, mask))
    mask = np.pad(np.ones_like(batch["labels"]), ((0, 0), (3, 0)))
    left = forward(np.pad(batch["labels"], ((0, 0), (3, 0)), constant_values=9), mask)
    np.testing.assert_allclose(left[:, 3:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_shifted_behind_the_start_token(family):
    model = init_model(SMALL[family] | {"decoder_start_token_id": 5, "pad_token_id": 3}, jax.random.key(0))
    labels = np.array([[7, -100, 8, 9], [10, 11, -100, -100]])
    np.testing.assert_array_equal(model.shift_right(labels), [[5, 7, 3, 8], [5, 10, 11, 3]])
    assert model.config.is_encoder_decoder
    with pytest.raises(InputError, match=f"This {family} model is an encoder-decoder and got no decoder_input_ids"):
        model(labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_ways_of_running_the_layers_agree(family):
    # Sparse and dense layers may alternate; with a step of 1 they are all alike and can be scanned.
    sizes = {"bart": {"encoder_layers": 2, "decoder_layers": 2}}.get(family, {"num_layers": 2, "num_decoder_layers": 2})
    sparse = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    model = init_model(SMALL[family] | sizes | sparse, jax.random.key(0))
    expected = losses(model, make_batch())[0]
    model.execution, model.remat = "scan", True
    np.testing.assert_allclose(losses(model, make_batch())[0], expected, rtol=3e-6)


# How often a layer drops: weights and output of each attention, the inner and outer side of the perceptron; besides
# the embeddings and, in T5, the outputs of encoder and decoder.
DROPS = {
    "bart": {"dropout": 2 + 2 + 3, "attention_dropout": 3, "activation_dropout": 2},
    "switch_transformers": {"dropout_rate": 4 + 4 + 6},
    "t5": {"dropout_rate": 4 + 4 + 6},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_dropout_rate_acts_in_its_places_with_keys_of_their_own(family, monkeypatch):
    keys = []

    def record(x, rate, key):
        keys.extend([key] if rate else [])
        return x

    monkeypatch.setattr(layers, "drop", record)
    batch = make_batch()
    for place, count in DROPS[family].items():
        model = init_model(SMALL[family] | dict.fromkeys(DROPS[family], 0.0) | {place: 0.5}, jax.random.key(0))
        keys.clear()
        jax.eval_shape(lambda key, model=model: model.loss_sums(batch, dropout_key=key), jax.random.key(1))
        assert len(keys) == count
        assert len({id(key) for key in keys} - {id(None)}) == count


def test_dropout_is_off_without_a_key_and_random_with_one():
    model, _, _, _ = small("t5")
    batch = make_batch()
    first, second, again, off = (
        losses(model, batch, key)[0] for key in (jax.random.key(0), jax.random.key(1), jax.random.key(0), None)
    )
    assert (np.abs(first - second) > 1e-4).all()
    assert (np.abs(first - off) > 1e-4).all()
    np.testing.assert_array_equal(first, again)


def test_jitter_moves_the_routers_inputs_only():
    config = load_config(SMALL["switch_transformers"] | {"dropout_rate": 0.0, "router_jitter_noise": 0.02})
    layer = SparseMLP(config, jnp.float32, nnx.Rngs(0))
    x, real = jax.random.normal(jax.random.key(0), (4, 24)), jnp.ones((1, 4), jnp.int32)
    apply = compiled(lambda key: layer(x, real, key)[0])
    calm, shaken = np.asarray(apply(None)), np.asarray(apply(jax.random.key(2)))
    assert np.abs(calm - shaken).max() > 1e-4
    # All tokens keep their experts here: then only the router's probability may change, and no direction does.
    lengths = np.linalg.norm(calm, axis=1), np.linalg.norm(shaken, axis=1)
    kept = lengths[0] > 0
    assert kept.any()
    np.testing.assert_allclose(
        (shaken / lengths[1][:, None])[kept], (calm / lengths[0][:, None])[kept], rtol=1e-4, atol=1e-6
    )


def test_per_example_gradients_sum_to_the_gradient():
    # Of a model that routes: what other families do, vmap does to GPT-2 in its tests.
    _, params, step, _ = small("switch_transformers")
    batch = make_batch()
    one = lambda params, sample: jax.grad(total)(params, jax.tree.map(lambda leaf: leaf[None], sample))  # noqa: E731
    total, _ = pure(small("switch_transformers")[0], lambda model, batch: model.loss_sums(batch)[0].sum())
    each = compiled(jax.vmap(one, (None, 0)))(params, batch)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf.sum(0), each), step(params, batch)[1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_gradient_equals_float64_above_a_million_activations(family):
    # 34 x 128 tokens x 256 inner units: 2**20 elements in the perceptron, and more in scores and logits.
    sizes = {"vocab_size": 300, "d_ff": 256, "d_model": 32, "d_kv": 16, "num_heads": 2, "initializer_factor": 0.5}
    if family == "bart":
        sizes = {"vocab_size": 300, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "d_model": 32}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
        sizes |= {"init_std": 0.1}
    model = init_model(SMALL[family] | sizes | {"expert_capacity": 64}, jax.random.key(0))
    loss, params = pure(model, lambda model, batch: model.loss_sums(batch)[0].sum())
    batch = make_batch(300, samples=34, length=128, targets=16)
    ours = jax.jit(jax.grad(loss))(params, batch)
    with jax.enable_x64(True):
        exact = compiled(jax.grad(loss))(double(params), batch)
        for path, leaf in jax.tree.leaves_with_path(exact):
            other = ours
            for step in path[:-1]:
                other = other[step.key]
            name = jax.tree_util.keystr(path)
            if "'k'" in name and leaf.ndim == 1:
                continue  # a bias of all keys alike has no gradient
            assert relative(other[...], np.asarray(leaf)) < 2e-5, name


@pytest.mark.parametrize("case", ["bart", "switch_transformers", "t5-v1.1"])
def test_bfloat16_keeps_its_dtype_and_accumulates_losses_in_float32(case):
    model = load_model(GOLDEN / case, dtype="bfloat16")
    golden = load_file(GOLDEN / case / "golden.safetensors")
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    shapes = jax.eval_shape(lambda: model(batch["input_ids"], batch["attention_mask"], batch["labels"] % 7))
    assert shapes.dtype == jnp.bfloat16
    sums, _ = losses(model, batch)
    assert sums.dtype == jnp.float32
    # A token near the edge between two experts may go to the other one.
    np.testing.assert_allclose(sums, golden["loss_sums"], rtol=0.5 if "switch" in case else 0.1)


def reference_routing(choice, capacity):
    """Return which tokens of one sample their expert takes: the first `capacity` of each expert's."""
    taken, kept = {}, []
    for expert in choice:
        taken[expert] = taken.get(expert, 0) + 1
        kept.append(taken[expert] <= capacity)
    return np.array(kept)


def test_tokens_over_an_experts_capacity_pass_with_zero():
    config = load_config(SMALL["switch_transformers"])
    layer = SparseMLP(config, jnp.float32, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(4, 9, 24)).astype(np.float32)
    real = np.ones((4, 9), np.int32)
    real[2, :4] = real[3, 5:] = 0
    y = np.asarray(layer(jnp.asarray(x.reshape(-1, 24)), jnp.asarray(real), None)[0]).reshape(4, 9, 24)
    logits = x.astype(np.float64) @ np.asarray(layer.router.kernel[...], np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    choice = logits.argmax(-1)
    dropped = 0
    for n in range(4):
        queue = np.argsort(1 - real[n], kind="stable")  # padding behind the real tokens
        kept = np.empty(9, bool)
        kept[queue] = reference_routing(choice[n][queue], 2)
        dropped += (~kept).sum()
        for t in range(9):
            e = choice[n, t]
            inner = np.maximum(x[n, t] @ np.asarray(layer.inner[...], np.float64)[e], 0)
            expected = inner @ np.asarray(layer.out[...], np.float64)[e] * probability[n, t, e] * kept[t]
            np.testing.assert_allclose(y[n, t], expected, rtol=1e-4, atol=1e-5)
    assert 0 < dropped < 36


def test_router_losses_of_each_sample_stand_alone():
    config = SMALL["switch_transformers"] | {"num_layers": 2, "num_decoder_layers": 2}
    router, params = pure(init_model(config, jax.random.key(0)), lambda model, batch: model.router_loss(batch))
    router = compiled(router)
    batch, other = make_batch(), make_batch(seed=1)
    expected = np.asarray(router(params, batch))
    assert (expected > 0).all()
    mixed = {name: np.stack([other[name][0], array[2], array[0]]) for name, array in batch.items()}
    np.testing.assert_allclose(router(params, mixed)[1:], expected[[2, 0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # The published counts: 60,506,624 for t5-small, 247,577,856 for t5-v1_1-base, 300,176,768 for mt5-small.
        ({"model_type": "t5", "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}, 60_506_624),
        (
            {"model_type": "t5", "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
            | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
            247_577_856,
        ),
        ({"model_type": "mt5", "tie_word_embeddings": False}, 300_176_768),
        # bart-base and bart-large, and the head's bias, which torch does not count.
        (
            {"model_type": "bart", "d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
            | {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12},
            139_420_416 + 50265,
        ),
        ({"model_type": "bart"}, 406_291_456 + 50265),
    ],
)
def test_parameters_are_counted_as_published(config, expected):
    assert count_parameters(load_config(config)) == expected


@pytest.mark.parametrize("case", CASES)
def test_saved_models_load_back_equal(case, tmp_path):
    model = load_model(GOLDEN / case)
    save_pretrained(model, tmp_path)
    original, saved = (load_file(where / "model.safetensors") for where in (GOLDEN / case, tmp_path))
    copies = {name for name in original if "embed_tokens" in name}
    assert saved.keys() == original.keys() - copies
    for name, value in saved.items():
        np.testing.assert_array_equal(value, original[name], err_msg=name)
    again = load_model(tmp_path)
    assert again.config == load_config(json.loads(again.config.raw))


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_a_head_of_its_own_is_kept_although_the_configuration_ties_it(kind, tmp_path):
    # What transformers 5 writes for T5 v1.1, flan-T5 and mT5.
    raw = SMALL["t5"] | {"model_type": kind, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
    model = init_model(raw, jax.random.key(0))
    save_pretrained(model, tmp_path)
    written = {"tie_word_embeddings": True} | ({"scale_decoder_outputs": False} if kind == "t5" else {})
    (tmp_path / "config.json").write_text(json.dumps(raw | written))
    for config in (check_checkpoint(tmp_path), load_model(tmp_path).config):
        assert not config.tie_word_embeddings
        assert not config.scale_decoder_outputs
    loaded, batch = load_model(tmp_path), make_batch()
    np.testing.assert_array_equal(loaded.head_weight(), model.head_weight())
    np.testing.assert_array_equal(loaded.loss_sums(batch)[0], model.loss_sums(batch)[0])
    # Saved again, it is the same once more.
    save_pretrained(loaded, tmp_path / "again")
    np.testing.assert_array_equal(load_model(tmp_path / "again").loss_sums(batch)[0], model.loss_sums(batch)[0])
    # A copy of the table is no head of its own.
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"].copy()}, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path).tie_word_embeddings
    assert load_model(tmp_path).config.tie_word_embeddings


def test_a_table_without_its_first_name_is_found_under_another(tmp_path):
    model = init_model(SMALL["t5"], jax.random.key(0))
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(load_model(tmp_path).head_weight(), model.head_weight())
    save_file(
        tensors | {"encoder.embed_tokens.weight": tensors["decoder.embed_tokens.weight"] + 1},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(InputError, match=r"ties decoder.embed_tokens.weight to shared.weight, but the two differ"):
        load_model(tmp_path)


def test_initialisation_is_that_of_transformers():
    values = {"vocab_size": 200, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2}
    values |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "initializer_factor": 0.7}
    tensors = export_tensors(init_model({"model_type": "switch_transformers"} | values, jax.random.key(0)))
    d = 64**-0.5
    expected = {"shared": 1.0, ".q.": d / 4, ".k.": d, ".v.": d, ".o.": d, "relative": d, "classifier": 1.0, ".wi.": d}
    for name, value in tensors.items():
        if "layer_norm" in name:
            np.testing.assert_allclose(value, 0.7, err_msg=name, rtol=1e-6)
            continue
        std = 0.7 * (
            (d if "expert" in name else 96**-0.5)
            if ".wo." in name
            else next(std for part, std in expected.items() if part in name)
        )
        assert abs(value.std() / std - 1) < 5 * np.sqrt(0.5 / value.size), name
    tensors = export_tensors(init_model({"model_type": "bart"} | SMALL["bart"] | {"init_std": 0.2}, jax.random.key(0)))
    for name, value in tensors.items():
        if "norm" in name or "bias" in name:
            np.testing.assert_array_equal(value, 1.0 if name.endswith("weight") else 0.0, err_msg=name)
        else:
            assert abs(value.std() / 0.2 - 1) < 5 * np.sqrt(0.5 / value.size), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "t5", "feed_forward_proj": "glu-gelu"}, "feed_forward_proj 'glu-gelu' is not known"),
        ({"model_type": "t5", "feed_forward_proj": None}, "feed_forward_proj None is not known"),
        ({"model_type": "mt5", "feed_forward_proj": 4}, "feed_forward_proj 4 is not known"),
        ({"model_type": "t5", "feed_forward_proj": "gated-mish"}, "activation 'mish' is not supported; supported: "),
        (
            {"model_type": "mt5", "relative_attention_num_buckets": 6},
            "relative_attention_num_buckets 6 must be a multi",
        ),
        ({"model_type": "bart", "d_model": 100}, "d_model 100 is not a multiple of encoder_attention_heads 16"),
        ({"model_type": "bart", "normalize_before": True}, "normalize_before is True; only False is supported"),
        ({"model_type": "bart", "tie_word_embeddings": False}, "tie_word_embeddings is False; only True is supported"),
        (
            {"model_type": "switch_transformers", "router_dtype": "bfloat16"},
            "router_dtype is 'bfloat16'; only 'float32'",
        ),
    ],
)
def test_configurations_that_ask_for_something_else_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        load_config(values)


def test_too_long_an_input_is_refused():
    model = init_model(SMALL["bart"], jax.random.key(0))
    for lengths in ((17, 3), (3, 17)):
        ids, labels = (np.zeros((1, length), np.int32) for length in lengths)
        with pytest.raises(InputError, match="17 tokens long, but this bart model has 16 positions"):
            model(ids, None, labels)


def test_the_sparse_layers_are_those_of_the_checkpoint():
    config = load_config({"model_type": "switch_transformers", "num_layers": 12, "num_sparse_encoder_layers": 6})
    assert [i for i in range(12) if config.is_sparse(i, decoder=False)] == [1, 3, 5, 7, 9, 11]
    assert [i for i in range(12) if config.is_sparse(i, decoder=True)] == [1, 5, 9]
    none = load_config({"model_type": "switch_transformers", "num_layers": 4, "encoder_sparse_step": 0})
    assert not any(none.is_sparse(i, decoder=False) for i in range(4))


def test_a_bart_file_without_the_heads_bias_means_zeros(tmp_path):
    model = init_model(SMALL["bart"], jax.random.key(0))
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["final_logits_bias"] += 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    assert float(load_model(tmp_path).head_bias()[0]) == 1.0
    del tensors["final_logits_bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(load_model(tmp_path).head_bias(), np.zeros(SMALL["bart"]["vocab_size"]))
