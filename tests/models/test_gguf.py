"""GGUF files, written here with the gguf package's own writer and quantisation."""

import gguf
import jax
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.models import init_model, load_config
from lensjax.models.checkpoints import export_tensors
from lensjax.models.gguf import load_gguf, load_gguf_config

CONFIG = {
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
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(array):
    """Store a head's features 0, h/2, 1, h/2 + 1, ..., as llama.cpp does with queries and keys; heads of 8."""
    heads = array.reshape(-1, 8, *array.shape[1:])
    return heads[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(array.shape)


def rename(name):
    stem, ending = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, number, short = stem.split(".", 3)
        return f"blk.{number}.{NAMES[short]}.{ending}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem] + "." + ending


def write(path, model, *, quantise=None, change=lambda tensors: None, architecture="llama", fields=lambda writer: None):
    """Write a model; `quantise`: type of the matrices; `change` edits what is stored. Returns the tensors to read."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(0.125)
    writer.add_rope_freq_base(64.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_eos_token_id(2)
    fields(writer)
    tensors = export_tensors(model)
    stored = {rename(n): interleaved(t) if "q_proj" in n or "k_proj" in n else t for n, t in tensors.items()}
    change(stored)
    for name, array in stored.items():
        if quantise is not None and array.ndim == 2:
            data = gguf.quants.quantize(array, quantise)
            writer.add_tensor(name, data, raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize(
    "values", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_a_written_model_is_read_back_equal(values, tmp_path):
    model = init_model(CONFIG | values, jax.random.key(0))
    bias = "attention_bias" in values
    for layer in model.layers if bias else ():
        layer.attention.query.bias[...] = jax.random.normal(jax.random.key(1), 32)
    tensors = write(tmp_path / "m.gguf", model)
    loaded = load_gguf(tmp_path / "m.gguf")
    found = export_tensors(loaded)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    expected = load_config(CONFIG | values)
    for name in ("ropes", "rms_norm_eps", "tie_word_embeddings", "qkv_bias", "mlp_bias", "max_length", "score_scale"):
        assert getattr(loaded.config, name) == getattr(expected, name), name
    ids = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(loaded(ids), model(ids))
    assert '"eos_token_id": 2' in loaded.config.raw


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantised_matrices_are_dequantised(kind, tmp_path):
    model, quantisation = init_model(CONFIG, jax.random.key(0)), gguf.GGMLQuantizationType[kind]
    tensors = write(tmp_path / "m.gguf", model, quantise=quantisation)
    found = export_tensors(load_gguf(tmp_path / "m.gguf"))
    for name, value in tensors.items():
        if value.ndim == 2:  # each row is quantised by itself: its place does not matter
            quantised = gguf.quants.quantize(value, quantisation)
            value = gguf.quants.dequantize(quantised, quantisation).reshape(value.shape)
            assert not np.array_equal(value, tensors[name])
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_everything_that_does_not_fit_is_said_at_once(tmp_path):
    def change(tensors):
        del tensors["blk.1.ffn_up.weight"]
        tensors["output_norm.weight"] = np.ones(9, np.float32)
        tensors["blk.0.attn_q_norm.weight"] = np.ones(8, np.float32)

    write(tmp_path / "m.gguf", init_model(CONFIG, jax.random.key(0)), change=change)
    with pytest.raises(InputError, match="3 problems") as error:
        load_gguf(tmp_path / "m.gguf")
    for problem in (
        r"missing: model.layers.1.mlp.up_proj.weight",
        r"wrong shape: model.norm.weight has (9,), which does not make (32,) for norm.scale",
        r"unused: model.layers.0.attn_q_norm.weight",
    ):
        assert f"\n  {problem}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "GGUF architecture 'mamba' is not supported; supported: llama"),
        (
            {"change": lambda tensors: tensors.update({"rope_freqs.weight": np.ones(4, np.float32)})},
            r"has rope_freqs\.weight, the rotary scaling of Llama 3\.1 .*use the model's safetensors",
        ),
        ({"fields": lambda writer: writer.add_rope_dimension_count(4)}, "only 4 of 8 features of a head turn"),
    ],
)
def test_files_that_ask_for_something_else_are_refused(options, message, tmp_path):
    write(tmp_path / "m.gguf", init_model(CONFIG, jax.random.key(0)), **options)
    with pytest.raises(InputError, match=message):
        load_gguf_config(tmp_path / "m.gguf")


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"no model at all, only words, and a few more of them")
    with pytest.raises(InputError, match=r"cannot be read as GGUF .*; download it again"):
        load_gguf(tmp_path / "m.gguf")
