"""Time and memory of the ports' loss and gradient beside the torch models of transformers, in float32.

One process, the same weights and the same batch, interleaved (A B, A B, ...): GPT-2 small (124M) and SmolLM2-135M with
random weights, 8 x 64 and 16 x 128 tokens, loss (forward) and loss with all parameter gradients (backward). Losses are
compared before anything is timed. Peak memory: of one process each, that makes the model and runs once.

Run, in an environment that has torch and transformers too:
    PYTHONPATH=.:kernels python benchmarks/model_speed.py [--models gpt2 smollm2] [--shapes 8x64 16x128] [--repeats 9]
It writes benchmarks/results/model_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from environment import peak_bytes, write_result

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
}
"""As in the published config.json files, without dropout."""

Run = Callable[[], float]


def batch_of(model: str, shape: str) -> Any:
    """Return int64 token ids (N, T), the same for both sides."""
    import numpy as np

    samples, length = map(int, shape.split("x"))
    return np.random.default_rng(0).integers(0, CONFIGS[model]["vocab_size"], (samples, length))


def torch_model(model: str) -> Any:
    """Return the torch model of transformers with random weights, as its own class makes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[model])).eval()


def torch_runs(network: Any, ids: Any) -> dict[str, Run]:
    """Return the mean token loss, alone and with gradients, by torch."""
    import torch

    tokens = torch.from_numpy(ids)

    def forward() -> float:
        with torch.no_grad():
            return float(network(input_ids=tokens, labels=tokens, use_cache=False).loss)

    def backward() -> float:
        network.zero_grad(set_to_none=True)
        loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return {"forward": forward, "backward": backward}


def lensjax_runs(network: Any, ids: Any) -> dict[str, Run]:
    """Return the mean token loss, alone and with gradients, by lensjax."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graph, params, rest = nnx.split(network, nnx.Param, ...)
    tokens = jnp.asarray(ids, jnp.int32)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        sums, counts = nnx.merge(graph, params, rest).loss_sums({"input_ids": tokens, "labels": tokens})
        return sums.sum() / counts.sum()

    value, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    return {
        "forward": lambda: float(value(params, tokens)),
        "backward": lambda: float(jax.block_until_ready(both(params, tokens))[0]),
    }


def both_sides(model: str, shape: str) -> dict[str, dict[str, Run]]:
    """Return the runs of both sides, on the same weights."""
    from lensjax.models import load_model

    ids, network = batch_of(model, shape), torch_model(model)
    with tempfile.TemporaryDirectory() as directory:
        network.save_pretrained(directory)
        port = load_model(directory)
    return {"torch": torch_runs(network, ids), "lensjax": lensjax_runs(port, ids)}


def peak_of(side: str, model: str, shape: str, direction: str) -> int:
    """Return the peak memory of a process that makes the model and runs once."""
    command = [sys.executable, __file__, "--memory-of", side, model, shape, direction]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def run_once(side: str, model: str, shape: str, direction: str) -> None:
    """Make one side's model with random weights, run once, print the peak memory in bytes."""
    ids = batch_of(model, shape)
    if side == "torch":
        torch_runs(torch_model(model), ids)[direction]()
    else:
        import jax

        from lensjax.models import init_model

        lensjax_runs(init_model(CONFIGS[model], jax.random.key(0)), ids)[direction]()
    print(json.dumps(peak_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--shapes", nargs="+", default=["8x64", "16x128"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        run_once(*options.memory_of)
        return
    import os

    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    results: dict[str, Any] = {}
    for model in options.models:
        for shape in options.shapes:
            sides = both_sides(model, shape)
            for direction in ("forward", "backward"):
                runs = {side: runs[direction] for side, runs in sides.items()}
                losses = {side: run() for side, run in runs.items()}  # compiles, and is not timed
                if abs(losses["lensjax"] / losses["torch"] - 1) > 1e-5:
                    raise SystemExit(f"{model} {shape}: the losses differ: {losses}")
                seconds: dict[str, list[float]] = {side: [] for side in runs}
                for _ in range(options.repeats):
                    for side, run in runs.items():
                        start = time.perf_counter()
                        run()
                        seconds[side].append(time.perf_counter() - start)
                entry: dict[str, Any] = {"loss": losses, "seconds": seconds}
                medians = {side: statistics.median(times) for side, times in seconds.items()}
                entry["over_torch"] = medians["lensjax"] / medians["torch"]
                text = f"{model:8s} {shape:7s} {direction:9s} torch {medians['torch']:7.3f} s"
                text += f"  lensjax {medians['lensjax']:7.3f} s  ratio {entry['over_torch']:5.2f}"
                if not options.no_memory:
                    entry["peak_bytes"] = {side: peak_of(side, model, shape, direction) for side in runs}
                    text += "  peak " + " ".join(f"{s} {b / 2**20:.0f} MiB" for s, b in entry["peak_bytes"].items())
                print(text, flush=True)
                results[f"{model} {shape} {direction}"] = entry
    write_result("model_speed", {"unit": "median seconds, float32, same weights and batch", "cases": results})


if __name__ == "__main__":
    main()
