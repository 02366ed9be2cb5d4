"""The decoder-only families on shared layers, against transformers' torch implementations and against themselves."""

import json

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
    load_config,
    load_model,
    save_pretrained,
)
from lensjax.models.checkpoints.saving import export_tensors
from lensjax.models.layers import RMSNorm, Rotary, rotate, window_mask
from lensjax.models.registry import family
from support import golden_decoders
from support.comparing import relative
from support.decoders import losses, make_batch
from support.paths import GOLDEN

CASES = (
    *("llama", "llama-tied", "mistral", "qwen2", "qwen3", "opt", "opt-post", "opt-bare", "phi", "phi-norms"),
    "gemma3",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "phi", "gemma3_text")
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "ffn_dim": 20,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "init_std": 0.2,
}
SMALL = {name: {"model_type": name} | SIZES for name in FAMILIES}
# Half of a head's six features are odd in number.
SMALL["phi"]["partial_rotary_factor"] = 0.7
SMALL["mistral"]["sliding_window"] = 3
SMALL["gemma3_text"] |= {"sliding_window": 3, "num_hidden_layers": 2, "sliding_window_pattern": 2}


@nnx.jit
def logits(model, batch):
    return model(batch["input_ids"], batch["attention_mask"])


def pure(model):
    """Return (loss(params, batch) -> scalar sum, params)."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, batch: nnx.merge(graph, params, rest).loss_sums(batch)[0].sum(), params


def check_against_golden(directory, case):
    golden = load_file(directory / "golden.safetensors")
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    model = load_model(directory)
    real = batch["attention_mask"] != 0
    loss, params = pure(model)

    def everything(params):
        gradient = jax.grad(loss)(params, batch)
        merged = nnx.merge(nnx.graphdef(model), params, nnx.state(model, nnx.Not(nnx.Param)))
        sums, counts = merged.loss_sums(batch)
        return merged(batch["input_ids"], batch["attention_mask"]), sums, counts, gradient

    found, sums, counts, gradient = jax.jit(everything)(params)
    assert relative(np.asarray(found)[real], golden["logits"][real]) < 1e-5
    np.testing.assert_allclose(sums, golden["loss_sums"], rtol=1e-5)
    np.testing.assert_array_equal(counts, (batch["labels"][:, 1:] != -100).sum(1))

    nnx.update(model, gradient)
    ours = export_tensors(model)
    assert {"grad." + name for name in ours} == {name for name in golden if name.startswith("grad.")}
    for name, value in ours.items():
        theirs = golden["grad." + name]
        if case.startswith("opt") and name.endswith("k_proj.bias"):
            # Without rotation, shifting all keys shifts every score of a query alike: this is 0 but for rounding.
            scale = np.abs(golden["grad." + name.replace("k_proj", "q_proj")]).max()
            assert np.abs(value).max() < 1e-5 * scale, name
            continue
        assert relative(value, theirs) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_every_gradient_equal_those_of_transformers(case):
    check_against_golden(GOLDEN / case, case)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own; this test is about numbers
def test_live_parity_both_ways(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    golden_decoders.make_decoders(tmp_path, 7)
    assert {path.name for path in tmp_path.iterdir()} == set(CASES)
    for case in CASES:
        check_against_golden(tmp_path / case, case)
        ours = load_model(tmp_path / case)
        save_pretrained(ours, tmp_path / "saved")
        theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(report.values()), (case, report)
        ids = np.arange(32).reshape(2, 16)
        with torch.no_grad():
            expected = theirs.eval()(input_ids=torch.tensor(ids)).logits.numpy()
        assert relative(ours(jnp.asarray(ids)), expected) < 1e-5, case


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_padding_nor_neighbours_change_a_loss(name):
    model = init_model(SMALL[name], jax.random.key(0))
    batch = make_batch(53)
    expected = np.asarray(losses(model, batch)[0])
    # Each of the three samples with padding on the right, on the left and on both sides, all in one batch.
    fill = {"input_ids": 7, "attention_mask": 0, "labels": 5}  # a label on padding must count for nothing, either
    together = {
        key: np.concatenate(
            [np.pad(value, ((0, 0), side), constant_values=fill[key]) for side in ((0, 4), (4, 0), (2, 2))]
        )
        for key, value in batch.items()
    }
    np.testing.assert_allclose(losses(model, together)[0], np.tile(expected, 3), rtol=5e-6)
    # The same three among other neighbours, in another order.
    other = make_batch(53, samples=9, length=13, seed=1)
    rows = np.array([3, 8, 1])
    for key, value in together.items():
        other[key][rows] = value[[0, 4, 8]]
    np.testing.assert_allclose(losses(model, other)[0][rows], expected, rtol=5e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_see_only_the_past(name):
    model = init_model(SMALL[name], jax.random.key(0))
    batch = make_batch(53)
    changed = batch["input_ids"].copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 53
    before, after = logits(model, batch), logits(model, batch | {"input_ids": changed})
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "opt", "phi"])
def test_the_mask_may_be_left_out(name):
    model = init_model(SMALL[name], jax.random.key(0))
    batch = make_batch(53)
    without = nnx.jit(lambda model, ids: model(ids))(model, batch["input_ids"])
    np.testing.assert_allclose(without, logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3_text"])
def test_a_window_hides_what_is_further_away(name):
    values = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
    one = SMALL[name] | values | {"num_hidden_layers": 1, "sliding_window_pattern": 2}
    model = init_model(one, jax.random.key(0))
    batch = make_batch(53)
    ids = batch["input_ids"].copy()
    ids[:, 2] = (ids[:, 2] + 1) % 53
    before, after = logits(model, batch), logits(model, batch | {"input_ids": ids})
    np.testing.assert_array_equal(before[:, 5:], after[:, 5:])
    assert (np.abs(before[:, 2:5] - after[:, 2:5]).max(axis=(0, 2)) > 1e-4).all()


def make_key(seed):
    """Return a key whose numbers, unlike those of the default kind, compile in no time."""
    return jax.random.key(seed, impl="rbg")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "phi"])
def test_layers_may_be_scanned(name):
    # Two kinds of layers where the family has them; dropout shows that each layer gets its key.
    model = init_model(SMALL[name] | {"num_hidden_layers": 2, "attention_dropout": 0.3}, jax.random.key(0))
    batch = make_batch(53)
    expected = losses(model, batch, make_key(1))[0]
    model.execution = "scan"
    np.testing.assert_allclose(losses(model, batch, make_key(1))[0], expected, rtol=1e-5)


def test_gradients_through_scanned_and_recomputed_layers_of_two_kinds_agree():
    model = init_model(SMALL["gemma3_text"], jax.random.key(0))
    batch = make_batch(53)
    loss, params = pure(model)
    expected = jax.jit(jax.grad(loss))(params, batch)
    model.execution, model.remat = "scan", True
    chex.assert_trees_all_close(jax.jit(jax.grad(pure(model)[0]))(params, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("llama", "attention_dropout"),
        ("gemma3_text", "attention_dropout"),
        ("opt", "attention_dropout"),
        ("opt", "dropout"),
        ("phi", "attention_dropout"),
        ("phi", "resid_pdrop"),
        ("phi", "embd_pdrop"),
    ],
)
def test_each_dropout_rate_acts_alone_and_only_with_a_key(name, place):
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = init_model(SMALL[name] | {"num_hidden_layers": 1} | rates | {place: 0.5}, jax.random.key(0))
    batch = make_batch(53)
    dropped = [losses(model, batch, make_key(seed))[0] for seed in (0, 1, 0)]
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-4
    np.testing.assert_array_equal(dropped[0], dropped[2])
    assert np.abs(losses(model, batch)[0] - dropped[0]).max() > 1e-4


def test_dropout_is_nothing_at_rate_zero():
    model = init_model(SMALL["opt"] | {"dropout": 0.0}, jax.random.key(0))
    batch = make_batch(53)
    np.testing.assert_array_equal(losses(model, batch, make_key(0))[0], losses(model, batch)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_gradient_equals_float64_above_a_million_activations(name):
    # 132 x 32 tokens x 256 inner units: above 2**20 elements in the perceptron.
    sizes = {"vocab_size": 60, "hidden_size": 16, "head_dim": 4, "intermediate_size": 256, "ffn_dim": 256}
    small = {"max_position_embeddings": 32, "initializer_range": 0.05, "init_std": 0.05, "num_hidden_layers": 1}
    small["partial_rotary_factor"] = 0.5
    loss, params = pure(init_model(SMALL[name] | sizes | small, jax.random.key(0)))
    batch = make_batch(60, samples=132, length=32)
    ours = jax.jit(jax.grad(loss))(params, batch)
    with jax.enable_x64(True):
        exact = jax.jit(jax.grad(loss))(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), batch)
        for (path, leaf), other in zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(ours), strict=True):
            assert leaf.dtype == jnp.float64
            if name == "opt" and "key" in str(path) and leaf.ndim == 1:
                continue  # 0 but for rounding, see above
            assert relative(other, np.asarray(leaf)) < 2e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize("case", ["llama-tied", "opt-post", "phi-norms", "gemma3"])
def test_half_precision_keeps_its_dtype_and_accumulates_losses_in_float32(case):
    model = load_model(GOLDEN / case, dtype="bfloat16")
    golden = load_file(GOLDEN / case / "golden.safetensors")
    batch = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    assert jax.eval_shape(model, batch["input_ids"]).dtype == "bfloat16"
    found = losses(model, batch)[0]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, golden["loss_sums"], rtol=5e-2)


@pytest.mark.parametrize("case", CASES)
def test_everything_that_does_not_fit_is_said_at_once(case, tmp_path):
    source = GOLDEN / case
    assert check_checkpoint(source) == load_config(source)
    tensors = load_file(source / "model.safetensors")
    names = sorted(name for name in tensors if "layers.0" in name)
    absent, misshapen = names[0], names[-1]
    del tensors[absent]
    tensors[misshapen] = np.zeros((3, 5, 7), np.float32)
    tensors["model.score.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(InputError, match="3 problems") as error:
        load_model(tmp_path)
    for problem in (f"missing: {absent}", f"wrong shape: {misshapen} has (3, 5, 7)", "unused: model.score.weight"):
        assert f"\n  {problem}" in str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_loading_and_saving_are_inverse_and_every_tensor_has_one_parameter(case, tmp_path):
    model = load_model(GOLDEN / case)
    save_pretrained(model, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (GOLDEN / case, tmp_path))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    table = family(model.config.model_type, "test").table(model.config)
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    sources = [table.full(name) for path in paths for name in table.sources(path)[1]]
    assert sorted(sources) == sorted(before)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        # The published counts of Llama 2 7B, SmolLM2 135M, Mistral 7B v0.1, Qwen2 0.5B, Qwen3 0.6B, OPT 350m and
        # 1.3b, Phi-2, Gemma 3 270m and 1B.
        ("llama", {}, 6_738_415_616),
        (
            "llama",
            {
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "tie_word_embeddings": True,
            },
            134_515_008,
        ),
        ("mistral", {}, 7_241_732_096),
        (
            "qwen2",
            {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
            494_032_768,
        ),
        (
            "qwen3",
            {
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
            },
            596_049_920,
        ),
        (
            "opt",
            {
                "hidden_size": 1024,
                "ffn_dim": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "word_embed_proj_dim": 512,
                "do_layer_norm_before": False,
            },
            331_196_416,
        ),
        (
            "opt",
            {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
            1_315_758_080,
        ),
        (
            "phi",
            {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32},
            2_779_683_840,
        ),
        (
            "gemma3_text",
            {
                "vocab_size": 262144,
                "hidden_size": 640,
                "intermediate_size": 2048,
                "num_hidden_layers": 18,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
            },
            268_098_176,
        ),
        (
            "gemma3_text",
            {
                "vocab_size": 262144,
                "hidden_size": 1152,
                "intermediate_size": 6912,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
            },
            999_885_952,
        ),
    ],
)
def test_parameters_are_counted_as_published(name, values, expected):
    assert count_parameters(load_config({"model_type": name} | values)) == expected


NEW = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("llama", {"rope_theta": 500.0, "rope_scaling": None}, {"rope_theta": 500.0, "rope_type": "default"}),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0},
        ),
        (
            "llama",
            {
                "rope_theta": 500000.0,
                "rope_scaling": {k: v for k, v in NEW.items() if k != "rope_theta"}
                | {"original_max_position_embeddings": 8},
            },
            NEW | {"original_max_position_embeddings": 8},
        ),
        (
            "phi",
            {"rope_theta": 100.0, "partial_rotary_factor": 0.4},
            {"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 0.4},
        ),
        (
            "gemma3_text",
            {
                "rope_theta": 500.0,
                "rope_local_base_freq": 50.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            {
                "full_attention": {"rope_theta": 500.0, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
            },
        ),
    ],
)
def test_old_and_new_ways_of_writing_rotary_parameters_mean_the_same(name, old, new):
    plain = {key: value for key, value in SMALL[name].items() if key != "partial_rotary_factor"}
    configs = [load_config(plain | values) for values in (old, {"rope_parameters": new})]
    found, other = (getattr(config, "ropes", None) or config.rope for config in configs)
    assert found == other
    defaults = load_config(plain | {"partial_rotary_factor": 0.7})
    assert found != (getattr(defaults, "ropes", None) or defaults.rope)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("phi", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("llama", {"hidden_size": 26, "head_dim": None}, "hidden_size 26 is not a multiple of num_attention_heads 4"),
        ("opt", {"hidden_size": 26}, "hidden_size 26 is not a multiple of num_attention_heads 4"),
        ("phi", {"hidden_size": 26}, "hidden_size 26 is not a multiple of num_attention_heads 4"),
        ("llama", {"head_dim": 5}, "rotary embeddings turn 5 features of a head; it must be an even number"),
        ("phi", {"partial_rotary_factor": 0.5}, "rotary embeddings turn 3 features"),
        ("phi", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; it must be above 0 and at most 1"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' is not supported; supported: default, linear"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "rope_type 'llama3' needs a number for low_freq_factor, high_freq_factor",
        ),
        ("llama", {"hidden_act": "mish"}, "activation 'mish' is not supported; supported: gelu, "),
        ("opt", {"activation_function": "mish"}, "activation 'mish' is not supported"),
        ("phi", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x' in config.json; it must be a float"),
        ("opt", {"activation_function": ["relu"]}, "it must be a str such as"),
        ("phi", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1 in config.json; it must be a bool"),
        ("opt", {"layerdrop": 0.1}, "layerdrop is 0.1, which is not supported; set it to 0"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be a positive whole number"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "for each of 1 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"]}, "must name full_attention or sliding_attention"),
        ("qwen3", {"layer_types": ["sliding_attention"]}, "there is no sliding_window; add it"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; only models without it"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; it must be a positive number"),
    ],
)
def test_configurations_that_ask_for_something_else_are_refused(name, values, message):
    with pytest.raises(InputError, match=message):
        load_config(SMALL[name] | values)


@pytest.mark.parametrize("name", FAMILIES)
def test_too_long_an_input_is_refused(name):
    model = nnx.eval_shape(lambda: init_model(SMALL[name], jax.random.key(0)))
    with pytest.raises(InputError, match=f"17 tokens long, but this {name} model has 16 positions"):
        model(np.zeros((1, 17), np.int32))


def test_absent_fields_take_the_family_defaults():
    bare = {name: load_config({"model_type": name}) for name in FAMILIES}
    assert bare["llama"].num_key_value_heads == 32
    assert bare["mistral"].num_key_value_heads == 8
    assert bare["mistral"].windows == (4096,) * 32
    assert load_config({"model_type": "mistral", "sliding_window": None}).windows == (None,) * 32
    assert load_config({"model_type": "mistral", "num_key_value_heads": None}).num_key_value_heads == 32
    assert bare["qwen2"].windows == (None,) * 32
    assert (bare["qwen2"].qkv_bias, bare["qwen2"].out_bias) == (True, False)
    late = load_config({"model_type": "qwen3", "use_sliding_window": True})
    assert late.windows == (None,) * 28 + (4096,) * 4
    assert (bare["qwen3"].head_dim, bare["qwen3"].qk_norm) == (128, True)
    assert bare["opt"].word_embed_proj_dim == 768
    assert not load_config({"model_type": "opt", "_remove_final_layer_norm": True}).final_norm
    assert bare["phi"].rope.features == 32
    assert [i for i, window in enumerate(bare["gemma3_text"].windows) if window is None] == [5, 11, 17, 23]
    assert {rope.theta for rope in bare["gemma3_text"].ropes} == {1e4, 1e6}
    assert bare["gemma3_text"].hidden_act == "gelu_pytorch_tanh"
    assert len({hash(config) for config in bare.values()}) == len(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_initialisation_is_normal_with_norms_at_one(name):
    tensors = export_tensors(init_model(SMALL[name] | {"vocab_size": 300}, jax.random.key(0)))
    for key, value in tensors.items():
        if "norm" in key or key.endswith("bias"):
            start = 0.0 if key.endswith("bias") or name == "gemma3_text" else 1.0
            np.testing.assert_array_equal(value, start, err_msg=key)
        else:
            assert abs(value.std() / 0.2 - 1) < 5 * np.sqrt(0.5 / value.size), key


def test_rms_norm_is_the_formula_in_every_dtype():
    x = np.random.default_rng(0).normal(size=(5, 7)) * 3
    scale = np.random.default_rng(1).normal(size=7)
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2e-2)):
        for offset in (0.0, 1.0):
            norm = RMSNorm(7, 1e-3, dtype, offset)
            np.testing.assert_array_equal(norm.scale[...], 1.0 - offset)
            norm.scale[...] = jnp.asarray(scale, dtype)
            found = norm(jnp.asarray(x, dtype))
            assert found.dtype == dtype
            exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (scale + offset)
            np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=tolerance)


def test_rotation_is_that_of_complex_numbers():
    rope = Rotary(4, 100.0)
    x = np.random.default_rng(0).normal(size=(1, 6, 2, 7)).astype(np.float32)
    tables = rope.tables(jnp.arange(6)[None], jnp.float32)
    turned = np.asarray(rotate(jnp.asarray(x), tables))
    angle = np.arange(6)[:, None] * np.array([1.0, 0.1])
    expected = (x[..., :2] + 1j * x[..., 2:4]) * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(turned[..., :2], expected.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 2:4], expected.imag, atol=1e-6)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])


def test_a_window_counts_the_token_itself():
    mask = np.asarray(window_mask(jnp.ones((1, 5), jnp.int32), 2))[0, 0]
    np.testing.assert_array_equal(mask, np.tril(np.ones((5, 5), bool)) & ~np.tril(np.ones((5, 5), bool), -2))
    np.testing.assert_array_equal(window_mask(jnp.ones((1, 5), jnp.int32), None)[0, 0], np.tril(np.ones((5, 5))))


def test_old_checkpoints_may_hold_frequencies_a_copy_of_the_head_and_bare_names(tmp_path):
    source = GOLDEN / "llama-tied"
    tensors = load_file(source / "model.safetensors")
    changed = {name.removeprefix("model."): value for name, value in tensors.items()}
    changed["lm_head.weight"] = changed["embed_tokens.weight"].copy()
    changed["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(changed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    found = export_tensors(load_model(tmp_path))
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"]
