"""Seconds to compile loss and gradient of a model of 24 layers and of one of 4, scanned and unrolled, every family.

    python benchmarks/compile_time.py [FAMILY ...]

Widths are small: what is measured is how the program grows with the layers. The two depths are compiled by turns.
Other programs on the machine lengthen the wall time; the processor's time is what this one took.
"scan" is `stack_layers`' storage; "scan_apart" stacks the parameters of layers stored one by one in each call.
"""

from __future__ import annotations

import statistics
import sys
import time

import jax
import numpy as np
from environment import write_result
from flax import nnx

from lensjax.models import FAMILIES, init_model
from lensjax.models.execution import stack_layers

ROUNDS = 3
DEPTHS = (4, 24)
WAYS = {"gpt2": ("scan", "scan_apart", "unroll")}
"""Ways to measure, of other families "scan" alone: unrolled, 24 layers take a minute."""
DECODER = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "max_position_embeddings": 32,
    "sliding_window": 8,
    "sliding_window_pattern": 6,
}
T5 = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64}


def make_config(name: str, layers: int) -> dict[str, object]:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    inner = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sparse = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    own = {
        "gpt2": {"vocab_size": 256, "n_embd": 32, "n_head": 4, "n_positions": 32, "n_layer": layers},
        "bart": {"vocab_size": 256, "d_model": 32, "encoder_layers": layers, "decoder_layers": layers}
        | {"max_position_embeddings": 32, **heads, **inner},
        "t5": T5 | {"num_layers": layers},
        "mt5": T5 | {"num_layers": layers, "feed_forward_proj": "gated-gelu"},
        "switch_transformers": T5 | sparse | {"num_layers": layers},
    }
    return {"model_type": name} | own.get(name, DECODER | {"num_hidden_layers": layers})


def measure(name: str, layers: int, way: str) -> dict[str, float]:
    """Return seconds to trace and lower, to compile, of processor in both, characters of the program, its memory."""

    def build() -> nnx.Module:
        model = init_model(make_config(name, layers), jax.random.key(0))
        if way == "scan":
            return stack_layers(model)
        model.execution = "unroll" if way == "unroll" else "scan"
        return model

    graph, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    ids = jax.ShapeDtypeStruct((2, 16), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}

    def loss(params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        return nnx.merge(graph, params, rest).loss_sums(batch)[0].sum()

    cpu, start = time.process_time(), time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, batch)
    middle = time.perf_counter()
    program = lowered.compile()
    end, cpu = time.perf_counter(), time.process_time() - cpu
    temporary = program.memory_analysis().temp_size_in_bytes
    arguments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return {
        "lower_seconds": middle - start,
        "compile_seconds": end - middle,
        "cpu_seconds": cpu,
        "characters": len(lowered.as_text()),
        "temporary_bytes": temporary,
        "parameter_bytes": arguments,
    }


def main(names: list[str]) -> None:
    families = {}
    for name in names or sorted(FAMILIES, key=lambda name: name in WAYS):
        families[name] = {}
        for way in WAYS.get(name, ("scan",)):
            rounds = [[measure(name, layers, way) for layers in DEPTHS] for _ in range(ROUNDS if way == "scan" else 1)]
            few, many = (
                {key: statistics.median(row[depth][key] for row in rounds) for key in rounds[0][depth]}
                for depth in range(len(DEPTHS))
            )
            ratios = {key: many[key] / few[key] for key in few}
            total = [row["lower_seconds"] + row["compile_seconds"] for row in (few, many)]
            families[name][way] = {"4": few, "24": many, "ratios": ratios, "total_ratio": total[1] / total[0]}
            print(
                f"{name:20} {way:10} compile {few['compile_seconds']:6.2f} s -> {many['compile_seconds']:6.2f} s "
                f"({ratios['compile_seconds']:5.2f}x), with lowering {total[1] / total[0]:5.2f}x, "
                f"processor {few['cpu_seconds']:6.2f} s -> {many['cpu_seconds']:6.2f} s "
                f"({ratios['cpu_seconds']:5.2f}x), "
                f"program {ratios['characters']:5.2f}x, temporary {many['temporary_bytes'] / 1e6:.2f} MB",
                flush=True,
            )
            jax.clear_caches()
        write_result("compile_time", {"rounds": ROUNDS, "depths": DEPTHS, "families": families})


if __name__ == "__main__":
    main(sys.argv[1:])
