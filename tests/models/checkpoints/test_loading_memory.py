"""How much memory loading takes at its peak, measured in a process of its own."""

import json
import os
import subprocess
import sys

import gguf
import jax
import pytest

from lensjax.models import init_model, save_pretrained
from lensjax.models.checkpoints.saving import export_tensors
from support.paths import SOURCES

# 43 million parameters, the table of the embedding a fifth of them: 173 MB in float32.
RAW = {
    "model_type": "qwen2",
    "vocab_size": 16_000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
# 41 million parameters, nearly all of them in the table.
TABLE = RAW | {"vocab_size": 79_000, "num_hidden_layers": 1, "intermediate_size": 64}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
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
PROGRAM = """
import json, sys
import jax
from flax import nnx
from lensjax.models import load_model

# Not getrusage: its peak is inherited from the process that started this one.
def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

warm, path, dtype = sys.argv[1:]
load_model(warm, dtype=dtype)
before = memory("VmRSS")
model = load_model(path, dtype=dtype)
after = memory("VmHWM")
leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
sizes = [leaf.nbytes for leaf in leaves]
print(json.dumps({"peak": after - before, "parameters": sum(sizes), "largest": max(sizes)}))
"""


@pytest.fixture(scope="module")
def models():
    small = RAW | {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    return {
        name: init_model(raw, jax.random.key(0)) for name, raw in (("small", small), ("large", RAW), ("table", TABLE))
    }


def write_gguf(path, model, kind):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(64)
    writer.add_embedding_length(model.config.width)
    writer.add_block_count(model.config.layers)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(model.config.heads)
    writer.add_head_count_kv(model.config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, array in export_tensors(model).items():
        stem, ending = name.rsplit(".", 1)
        if ".layers." in stem:
            _, _, number, short = stem.split(".", 3)
            new = f"blk.{number}.{NAMES[short]}.{ending}"
        else:
            new = f"{NAMES[stem]}.{ending}"
        data = gguf.quants.quantize(array, kind) if array.ndim == 2 else array
        writer.add_tensor(new, data, raw_dtype=kind if array.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path, model, stored):
    if stored.startswith("gguf-"):
        path = path.with_suffix(".gguf")
        write_gguf(path, model, gguf.GGMLQuantizationType[stored.removeprefix("gguf-")])
        return path
    dtype, _, shards = stored.partition("-")
    save_pretrained(model, path, dtype=dtype, max_shard_size="50MB" if shards else "5GB")
    assert len(list(path.glob("*.safetensors"))) == (2 if shards else 1)
    return path


@pytest.mark.parametrize(
    ("name", "stored", "wanted"),
    [
        ("large", "float32", "float32"),
        ("large", "bfloat16", "bfloat16"),
        ("large", "float16-shards", "float32"),
        ("large", "gguf-Q8_0", "float32"),
        ("table", "float32", "bfloat16"),
        ("table", "gguf-F32", "bfloat16"),
    ],
)
def test_loading_takes_the_parameters_and_little_more(name, stored, wanted, models, tmp_path):
    paths = [
        write(tmp_path / "small", models["small"], stored.removesuffix("-shards")),
        write(tmp_path / name, models[name], stored),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, SOURCES)),
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths, wanted], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["parameters"] > 80e6
    assert found["peak"] > found["parameters"]  # or nothing was measured
    assert found["peak"] <= 1.3 * found["parameters"] + found["largest"]
