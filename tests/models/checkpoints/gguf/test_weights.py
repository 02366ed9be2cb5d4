"""GGUF files, written here with the gguf package's own writer and quantisation as llama.cpp's converter does."""

import json
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import (
    check_checkpoint,
    count_parameters,
    from_pretrained,
    init_model,
    load_config,
    load_model,
    save_pretrained,
)
from lensjax.models.checkpoints.gguf import GGUFFile, load_gguf
from lensjax.models.checkpoints.gguf.config import LLAMA3, llama3_scaling
from lensjax.models.checkpoints.saving import export_tensors
from lensjax.models.families.llama import Llama
from lensjax.models.layers import Rotary

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 0.125,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 64.0, "factor": 4.0},
}
PLAIN = {"rope_type": "default", "rope_theta": 64.0}
GEMMA3 = LLAMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 64.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 53,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "layer_norm_epsilon": 0.125,
    "initializer_range": 0.2,
}
PHI = {name: value for name, value in LLAMA.items() if name != "rms_norm_eps"} | {
    "model_type": "phi",
    "layer_norm_eps": 0.125,
    "partial_rotary_factor": 0.5,
    "rope_parameters": PLAIN,
}
MODELS = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "llama-biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", LLAMA | {"head_dim": 12, "rope_parameters": PLAIN}),
    "qwen2": ("qwen2", LLAMA | {"model_type": "qwen2", "rope_parameters": PLAIN}),
    "qwen3": ("qwen3", LLAMA | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", GEMMA3),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "phi2": ("phi2", PHI),
}


def interleaved(array, heads):
    """Store a head's features 0, h/2, 1, h/2 + 1, ..., as llama.cpp does with queries and keys."""
    parts = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.stack([parts[:, 0], parts[:, 1]], 2).reshape(array.shape)


def stored(name, array, architecture, config):
    """Return name and contents of a Hugging Face tensor in a GGUF file."""
    stem, ending = name.rsplit(".", 1)
    if ".layers." in stem or ".h." in stem:
        _, _, number, short = stem.split(".", 3)
        new = f"blk.{number}.{(BLOCK | (GEMMA if architecture == 'gemma3' else {}))[short]}.{ending}"
    else:
        new = f"{TOP[stem]}.{ending}"
    if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
        array = interleaved(array, config.heads if stem.endswith("q_proj") else config.num_key_value_heads)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        array = array + 1
    if architecture == "gpt2" and stem.split(".")[-1].startswith("c_") and ending == "weight":
        array = array.T
    return new, np.ascontiguousarray(array)


def write_metadata(writer, raw, config):
    writer.add_context_length(16)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_eos_token_id(2)
    if raw["model_type"] == "gpt2":
        writer.add_feed_forward_length(48)
        writer.add_layer_norm_eps(0.125)
        return
    writer.add_feed_forward_length(64)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(64.0)
    if raw["model_type"] == "phi":
        writer.add_layer_norm_eps(0.125)
        writer.add_rope_dimension_count(4)
        return
    writer.add_layer_norm_rms_eps(0.125)
    if "head_dim" in raw:
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
    rope = raw["rope_parameters"].get("full_attention", raw["rope_parameters"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    if raw["model_type"] == "gemma3_text":
        writer.add_sliding_window(4)


def write(
    path,
    raw=LLAMA,
    architecture="llama",
    *,
    model=None,
    quantise=None,
    change=lambda tensors: None,
    fields=lambda writer: None,
):
    """Write a random model; `quantise`: type of the matrices; `change` edits what is stored. Returns the model."""
    if model is None:
        model = init_model(raw, jax.random.key(0))
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, raw, model.config)
    fields(writer)
    tensors = dict(stored(name, array, architecture, model.config) for name, array in export_tensors(model).items())
    change(tensors)
    for name, array in tensors.items():
        if quantise is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def replace(writer, name, value, kind):
    """Change a field that is already there; the writer has no way of its own."""
    writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType[kind])


def random_model(raw):
    """Draw a model in which norms and biases matter too."""
    model = init_model(raw, jax.random.key(0))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(parameters)
    rng = np.random.default_rng(1)
    leaves = [leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32) if leaf.ndim == 1 else leaf for leaf in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


@pytest.mark.parametrize("name", MODELS)
def test_a_written_model_is_read_back_equal(name, tmp_path):
    architecture, raw = MODELS[name]
    model = write(tmp_path / "m.gguf", raw, architecture, model=random_model(raw))
    loaded = load_model(tmp_path / "m.gguf")
    tensors, found = export_tensors(model), export_tensors(loaded)
    assert found.keys() == tensors.keys()
    for tensor, value in tensors.items():
        # 1 is added to Gemma's norms in float32 and taken away again.
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=2e-7 * (name == "gemma3"), err_msg=tensor)
    ids = np.arange(12).reshape(1, 12)
    np.testing.assert_allclose(loaded(ids), model(ids), rtol=0, atol=1e-5 * (name == "gemma3"))
    assert json.loads(loaded.config.raw)["eos_token_id"] == 2
    assert check_checkpoint(tmp_path / "m.gguf") == load_config(tmp_path / "m.gguf") == loaded.config
    assert count_parameters(tmp_path / "m.gguf") == sum(array.size for array in tensors.values())

    save_pretrained(loaded, tmp_path / "saved")
    np.testing.assert_array_equal(load_model(tmp_path / "saved")(ids), loaded(ids))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_transformers_reads_the_same_model_from_the_file(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    architecture, raw = MODELS[name]
    # What transformers does not read from these files: rotary scaling, the width of Qwen3's heads, how Gemma's queries
    # are scaled, the sizes of GPT-2.
    if architecture == "llama":
        raw = raw | {"rope_parameters": PLAIN}
    if architecture == "qwen3":
        raw = raw | {"head_dim": 128, "rope_parameters": PLAIN}
    if architecture == "gemma3":
        raw = raw | {"head_dim": 256, "query_pre_attn_scalar": 256}
        raw["rope_parameters"] = raw["rope_parameters"] | {"full_attention": PLAIN}
    if architecture == "gpt2":
        raw = raw | {"n_inner": 128, "n_positions": 1024, "vocab_size": 50257}
    write(tmp_path / "m.gguf", raw, architecture, model=random_model(raw), fields=metadata_of_transformers)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = np.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    found = np.asarray(load_model(tmp_path / "m.gguf")(ids))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def metadata_of_transformers(writer):
    """Write what transformers wants beside what llama.cpp needs, and the sizes of the case."""
    if writer.arch == "gpt2":
        replace(writer, "gpt2.feed_forward_length", 128, "UINT32")
        replace(writer, "gpt2.context_length", 1024, "UINT32")
    else:
        writer.add_vocab_size(53)


def test_gemma_layers_slide_and_turn_as_its_own_configuration_says(tmp_path):
    write(tmp_path / "m.gguf", GEMMA3, "gemma3")
    found, expected = load_config(tmp_path / "m.gguf"), load_config(GEMMA3)
    assert found.windows == expected.windows == (4, 4, 4, 4, 4, None, 4)
    assert found.ropes == expected.ropes
    assert (found.score_scale, found.embedding_scale, found.norm_offset) == (0.25, 32**0.5, 1.0)
    near = GEMMA3 | {"num_hidden_layers": 3}

    def fields(writer):
        writer.add_array("gemma3.attention.sliding_window_pattern", [False, True, False])
        writer.add_float32("gemma3.rope.freq_base_swa", 100.0)

    write(tmp_path / "m.gguf", near, "gemma3", fields=fields)
    found = load_config(tmp_path / "m.gguf")
    assert found.windows == (None, 4, None)
    assert [rope.theta for rope in found.ropes] == [64.0, 100.0, 64.0]


def test_the_one_large_gemma_scales_its_queries_otherwise(tmp_path):
    def fields(writer):
        replace(writer, "gemma3.block_count", 62, "UINT32")

    write(tmp_path / "m.gguf", GEMMA3, "gemma3", fields=fields)
    assert load_config(tmp_path / "m.gguf").score_scale == 8**-0.5  # hidden_size / heads


@pytest.mark.parametrize("name", ["llama.rope.scaling.factor", "llama.rope.scale_linear"])
def test_a_rotary_factor_without_a_type_scales_linearly_and_a_type_of_none_does_not(name, tmp_path):
    def untyped(writer):
        del writer.kv_data[0]["llama.rope.scaling.type"], writer.kv_data[0]["llama.rope.scaling.factor"]
        writer.add_float32(name, 4.0)

    def unscaled(writer):
        untyped(writer)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)

    write(tmp_path / "m.gguf", fields=untyped)
    assert load_config(tmp_path / "m.gguf").ropes == load_config(LLAMA).ropes
    write(tmp_path / "m.gguf", fields=unscaled)
    assert load_config(tmp_path / "m.gguf").ropes == load_config(LLAMA | {"rope_parameters": PLAIN}).ropes


def llama3(factor=8.0, **values):
    return {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor} | LLAMA3 | values


def factors(rope, features):
    scaled = load_config(LLAMA | {"head_dim": features, "rope_parameters": rope}).ropes[0].frequencies()
    return (Rotary(features, rope["rope_theta"]).frequencies() / scaled).astype(np.float32)


@pytest.mark.parametrize(
    "rope",
    [
        llama3(),
        llama3(32.0),
        llama3(3.0, high_freq_factor=6.0, original_max_position_embeddings=500),
        llama3(low_freq_factor=2.0, high_freq_factor=9.0, original_max_position_embeddings=4096),
    ],
    ids=str,
)
def test_the_rotary_scaling_of_llama_3_is_recovered_from_its_factors(rope, tmp_path):
    raw = LLAMA | {"head_dim": 64, "rope_parameters": rope}
    plain = raw | {"rope_parameters": PLAIN}
    write(
        tmp_path / "m.gguf",
        plain,
        model=init_model(raw, jax.random.key(0)),
        change=lambda tensors: tensors.update({"rope_freqs.weight": factors(rope, 64)}),
        fields=lambda writer: replace(writer, "llama.rope.freq_base", 500_000.0, "FLOAT32"),
    )
    found = load_model(tmp_path / "m.gguf")
    np.testing.assert_allclose(found.config.ropes[0].frequencies(), load_config(raw).ropes[0].frequencies(), rtol=1e-5)
    saved = json.loads(found.config.raw)["rope_parameters"]
    if rope["high_freq_factor"] == 4.0:
        assert saved == rope
    # As transformers spells it, so that a saved model is the same there.
    assert saved.keys() == rope.keys()


def test_factors_that_are_not_llama_3s_are_refused():
    assert llama3_scaling(np.ones(8, np.float32), 64.0, 16, "m") == {}
    with pytest.raises(InputError, match=r"^m: rope_freqs\.weight .* is not the rotary scaling of Llama 3"):
        llama3_scaling(np.linspace(1, 3, 8), 64.0, 16, "m")
    with pytest.raises(InputError, match="is not the rotary scaling"):
        llama3_scaling(np.ones(7), 64.0, 16, "m")


QUANTISED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 3}


@pytest.mark.parametrize("kind", QUANTISED)
def test_matrices_the_gguf_package_quantises_are_dequantised(kind, tmp_path):
    quantisation = gguf.GGMLQuantizationType[kind]
    raw = WIDE | {"num_attention_heads": 2, "rope_parameters": PLAIN}

    def fields(writer):
        replace(writer, "llama.feed_forward_length", 256, "UINT32")

    model = write(tmp_path / "m.gguf", raw, quantise=quantisation, fields=fields)
    found = export_tensors(load_gguf(tmp_path / "m.gguf"))
    for name, value in export_tensors(model).items():
        if value.ndim == 2:  # each row is quantised by itself: its place does not matter
            quantised = gguf.quants.quantize(value, quantisation)
            exact, value = value, gguf.quants.dequantize(quantised, quantisation).reshape(value.shape)
            assert np.array_equal(value, exact) == (kind == "F32")
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def can_be_dequantised(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind for kind in gguf.GGMLQuantizationType if can_be_dequantised(kind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_the_gguf_package_dequantises_passes_through(kind, tmp_path):
    rng = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60 make half-precision scales that are finite.
    data = rng.integers(0, 60, (5, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("first", rng.random(3, np.float32))
    writer.add_tensor("table", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile.open(tmp_path / "m.gguf")
    expected = gguf.quants.dequantize(data, kind)
    assert file.tensors["table"].shape == expected.shape == (5, 512)
    np.testing.assert_array_equal(file.read("table"), expected)
    np.testing.assert_array_equal(file.read("table", 2, 4), expected[2:4])


def test_the_kinds_in_use_are_among_them():
    common = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", *QUANTISED}
    assert common <= {kind.name for kind in KINDS}


def test_a_kind_that_cannot_be_dequantised_is_named(tmp_path):
    def change(tensors):
        tensors["output_norm.weight"] = np.ones(32, np.int32)

    write(tmp_path / "m.gguf", change=change)
    with pytest.raises(InputError, match=r"the tensor output_norm\.weight is stored as I32, which the gguf package"):
        load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_have_the_dtype_asked_for(dtype, tmp_path):
    model = write(tmp_path / "m.gguf")
    found = export_tensors(load_model(tmp_path / "m.gguf", dtype=dtype))
    for name, value in export_tensors(model).items():
        assert found[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(found[name], value.astype(jnp.dtype(dtype)), err_msg=name)


def test_tensors_of_many_slabs_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("lensjax.models.checkpoints.mapping.SLAB", 70)
    model = write(tmp_path / "m.gguf", quantise=gguf.GGMLQuantizationType.Q8_0)
    few = export_tensors(load_gguf(tmp_path / "m.gguf"))
    monkeypatch.undo()
    for name, value in export_tensors(load_gguf(tmp_path / "m.gguf")).items():
        np.testing.assert_array_equal(few[name], value, err_msg=name)
    assert few["model.embed_tokens.weight"].shape == (53, 32) == model.tokens.embedding.shape


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    def fields(writer):
        writer.add_token_list(["a", "b c", "ä"])
        writer.add_token_scores([0.5, -1.0, 2.0])
        writer.add_token_types([1, 3, 6])
        writer.add_add_bos_token(True)
        writer.add_int8("general.small", -3)
        writer.add_float64("general.double", 0.1)
        writer.add_custom_alignment(64)

    write(tmp_path / "m.gguf", fields=fields, quantise=gguf.GGMLQuantizationType.Q5_1)
    reader, file = gguf.GGUFReader(tmp_path / "m.gguf"), GGUFFile.open(tmp_path / "m.gguf")
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.fields == theirs
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert (ours.kind, ours.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.bytes_of(tensor.n_elements) == tensor.n_bytes
    assert len(file.tensors) == len(reader.tensors)


def test_everything_that_does_not_fit_is_said_at_once(tmp_path):
    def change(tensors):
        del tensors["blk.1.ffn_up.weight"]
        tensors["output_norm.weight"] = np.ones(9, np.float32)
        tensors["blk.0.attn_q_norm.weight"] = np.ones(8, np.float32)

    write(tmp_path / "m.gguf", change=change)
    for load in (load_gguf, check_checkpoint):
        with pytest.raises(InputError, match="does not fit its metadata, 3 problems") as error:
            load(tmp_path / "m.gguf")
        for problem in (
            r"missing: model.layers.1.mlp.up_proj.weight",
            r"wrong shape: model.norm.weight has (9,), which does not make (32,) for norm.scale",
            r"unused: blk.0.attn_q_norm.weight",
        ):
            assert f"\n  {problem}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "mamba"},
            "GGUF architecture 'mamba' is not supported; supported: gemma3, gpt2, llama, phi2, qwen2, qwen3",
        ),
        ({"fields": lambda writer: writer.add_rope_dimension_count(4)}, "only 4 of 8 features of a head turn"),
        ({"fields": lambda writer: writer.add_expert_count(8)}, "is a mixture of 8 experts; only dense"),
        ({"fields": lambda writer: writer.add_uint16("split.count", 2)}, "is one of 2 parts of a model; join them"),
        (
            {"fields": lambda writer: replace(writer, "llama.rope.scaling.type", "yarn", "STRING")},
            "rope.scaling.type 'yarn' is not supported; supported: none, linear, and Llama 3's",
        ),
        ({"change": lambda tensors: tensors.pop("token_embd.weight")}, r"has no tensor token_embd\.weight"),
        (
            {"raw": GEMMA3, "architecture": "gemma3", "fields": lambda w: w.add_final_logit_softcapping(30.0)},
            r"final_logit_softcapping is 30\.0; only models without it are supported",
        ),
        ({"fields": lambda writer: writer.add_string("split.count", "x")}, "is one of 'x' parts of a model"),
        (
            {"fields": lambda writer: replace(writer, "llama.block_count", 2**64 - 1, "UINT64")},
            "block_count is 18446744073709551615; it must be a number of layers up to 10000: download",
        ),
        (
            {
                "raw": GEMMA3,
                "architecture": "gemma3",
                "fields": lambda writer: replace(writer, "gemma3.block_count", 10**12, "UINT64"),
            },
            "block_count is 1000000000000; it must be a number of layers up to 10000: download",
        ),
        (
            {"fields": lambda writer: writer.kv_data[0].pop("llama.block_count")},
            r"has no field llama\.block_count; convert the model again",
        ),
    ],
)
def test_files_that_ask_for_something_else_are_refused(options, message, tmp_path):
    write(tmp_path / "m.gguf", **options)
    for load in (load_config, load_model, check_checkpoint, count_parameters):
        with pytest.raises(InputError, match=message) as error:
            load(tmp_path / "m.gguf")
        assert str(tmp_path / "m.gguf") in str(error.value)


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    for load in (load_gguf, from_pretrained, load_config):
        with pytest.raises(InputError, match=r"m\.gguf: no such file"):
            load(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"no model at all, only words, and a few more of them")
    with pytest.raises(InputError, match=r"cannot be read as GGUF \(it does not begin with GGUF\); download it again"):
        load_gguf(tmp_path / "m.gguf")


def test_layers_are_held_against_the_tensors_before_any_is_built(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", fields=lambda writer: replace(writer, "llama.block_count", 10000, "UINT32"))
    monkeypatch.setattr(Llama, "__init__", lambda *_: pytest.fail("a model was built"))
    for load in (check_checkpoint, load_model):
        with pytest.raises(InputError, match=r"says 10000 layers, but its weight files hold \d+ tensors"):
            load(tmp_path / "m.gguf")


def test_arrays_nested_too_deep_are_refused(tmp_path):
    array = struct.pack("<IQ", 9, 1) * 100_000
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + array
    (tmp_path / "m.gguf").write_bytes(header)
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        load_gguf(tmp_path / "m.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    for length in (3, 10, 30, 200, 1000, len(content) // 2, len(content) - 40):
        (tmp_path / "m.gguf").write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cannot be read as GGUF \(it (ends|does not begin)"):
            load_gguf(tmp_path / "m.gguf")
    swapped = content[:4] + content[4:8][::-1] + content[8:]
    (tmp_path / "m.gguf").write_bytes(swapped)
    with pytest.raises(InputError, match=r"version 50331648 is not one of \(2, 3\), little-endian"):
        load_gguf(tmp_path / "m.gguf")
