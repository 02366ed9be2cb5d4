"""Agreement of `lensjax.ntk` with neural-tangents 0.6.5 and torch.func, on the same GPT-2 weights and batch.

A small GPT-2 with random weights is written as safetensors; each peer reads the file in a process and an environment of
its own, and computes the kernel in float64: of the summed loss of each example, and of four projections of its mean
logits. lensjax computes it in float64 and in float32.

Run: PYTHONPATH=.:kernels python benchmarks/ntk_agreement.py --torch PYTHON --neural-tangents PYTHON
It writes benchmarks/results/ntk_agreement.json and fails where a peer differs by more than 1e-5 of the largest entry.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"vocab_size": 101, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 16}
EXAMPLES, OUTPUTS = 6, 4
TOLERANCE = 1e-5


def ours(directory: Path) -> dict[str, Any]:
    """Write model and batch, and return the kernels by lensjax."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lensjax.models import init_model, save_pretrained
    from lensjax.tangents import ntk

    model = init_model(
        {"model_type": "gpt2", "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, **SHAPES},
        jax.random.key(0),
    )
    save_pretrained(model, directory)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, SHAPES["vocab_size"], (EXAMPLES, SHAPES["n_positions"]))
    signs = rng.choice([-1.0, 1.0], (SHAPES["vocab_size"], OUTPUTS))
    np.savez(directory / "batch.npz", ids=ids, signs=signs)

    def kernels(dtype: Any) -> dict[str, Any]:
        cast = jax.tree.map(lambda a: a.astype(dtype), nnx.state(model, nnx.Param))
        graph = nnx.graphdef(model)

        def projected(params: Any, one: Any) -> Any:
            logits = nnx.merge(graph, params)(one["input_ids"][None])[0, :-1]
            return logits.mean(0) @ signs.astype(dtype)

        tokens = jnp.asarray(ids)
        batch = {"input_ids": tokens, "labels": tokens, "attention_mask": jnp.ones_like(tokens)}
        return {
            "loss_sum": np.asarray(ntk(nnx.merge(graph, cast), batch, output="loss_sum", method="transform")),
            "projections": np.asarray(ntk(projected, cast, batch, method="transform")),
        }

    single = kernels(jnp.float32)
    with jax.enable_x64(True):
        double = kernels(jnp.float64)
    return {"lensjax float64": double, "lensjax float32": single}


def torch_kernels(directory: Path) -> dict[str, Any]:
    """Return the kernels by torch.func over the GPT-2 of transformers."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager", dtype=torch.float64).eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    with np.load(directory / "batch.npz") as saved:
        ids, signs = torch.from_numpy(saved["ids"]), torch.from_numpy(saved["signs"])

    def logits(params: Any, one: Any) -> Any:
        return torch.func.functional_call(model, params, (one[None],), {"use_cache": False}).logits[0, :-1]

    def loss(params: Any, one: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits(params, one), one[1:], reduction="sum")[None]

    def projected(params: Any, one: Any) -> Any:
        return logits(params, one).mean(0) @ signs

    found = {}
    for name, f in (("loss_sum", loss), ("projections", projected)):
        jacobian = torch.func.vmap(torch.func.jacrev(f), (None, 0))(params, ids)
        rows = torch.cat([j.flatten(2) for j in jacobian.values()], 2)
        found[name] = torch.einsum("ick,jdk->icjd", rows, rows).numpy()
    return {"torch.func float64": found}


def neural_tangents_kernels(directory: Path) -> dict[str, Any]:
    """Return the kernels by neural-tangents over a GPT-2 in plain JAX (its JAX is too old for ours)."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import neural_tangents as nt
    from safetensors.numpy import load_file

    raw = load_file(directory / "model.safetensors")
    p = {name.removeprefix("transformer."): jnp.asarray(value, jnp.float64) for name, value in raw.items()}
    heads = SHAPES["n_head"]
    with np.load(directory / "batch.npz") as saved:
        ids, signs = jnp.asarray(saved["ids"]), jnp.asarray(saved["signs"])

    def norm(p: Any, name: str, x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(p: Any, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def logits_of(p: Any, ids: Any) -> Any:
        x = p["wte.weight"][ids] + p["wpe.weight"][: ids.shape[-1]]
        mask = jnp.tril(jnp.ones((ids.shape[-1],) * 2, bool))
        for number in range(SHAPES["n_layer"]):
            block = f"h.{number}"
            qkv = dense(p, f"{block}.attn.c_attn", norm(p, f"{block}.ln_1", x))
            q, k, v = (a.reshape(*ids.shape, heads, -1) for a in jnp.split(qkv, 3, -1))
            scores = jnp.einsum("nthk,nshk->nhts", q, k) / jnp.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
            mixed = jnp.einsum("nhts,nshk->nthk", weights, v).reshape(x.shape)
            x = x + dense(p, f"{block}.attn.c_proj", mixed)
            hidden = jax.nn.gelu(dense(p, f"{block}.mlp.c_fc", norm(p, f"{block}.ln_2", x)), approximate=True)
            x = x + dense(p, f"{block}.mlp.c_proj", hidden)
        return norm(p, "ln_f", x) @ p["wte.weight"].T

    def loss(p: Any, ids: Any) -> Any:
        logits = jax.nn.log_softmax(logits_of(p, ids)[:, :-1])
        return -jnp.take_along_axis(logits, ids[:, 1:, None], 2).sum((1, 2))[:, None]

    def projected(p: Any, ids: Any) -> Any:
        return logits_of(p, ids)[:, :-1].mean(1) @ signs

    found: dict[str, Any] = {}
    for method in ("JACOBIAN_CONTRACTION", "STRUCTURED_DERIVATIVES"):
        found[f"neural-tangents {method.lower()} float64"] = kernels = {}
        for name, f in (("loss_sum", loss), ("projections", projected)):
            kernel = nt.empirical_ntk_fn(
                f, trace_axes=(), vmap_axes=0, implementation=getattr(nt.NtkImplementation, method)
            )
            # neural-tangents puts the examples' axes first: (i, j, c, d).
            kernels[name] = np.asarray(jax.jit(kernel)(ids, None, p)).transpose(0, 2, 1, 3)
    return found


SIDES = {"torch": torch_kernels, "neural-tangents": neural_tangents_kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="a Python with torch and transformers")
    parser.add_argument("--neural-tangents", help="a Python with neural-tangents, its old JAX and safetensors")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, directory = options.side
        for name, kernels in SIDES[side](Path(directory)).items():
            np.savez(Path(directory) / f"{name}.npz", **kernels)
        return
    pythons = {"torch": options.torch, "neural-tangents": options.neural_tangents}
    if not any(pythons.values()):
        parser.error("name at least one peer's Python: --torch or --neural-tangents")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = ours(directory)
        for side, python in pythons.items():
            if python:
                subprocess.run([python, __file__, "--side", side, name], check=True)
        for file in directory.glob("*float64.npz"):
            with np.load(file) as saved:
                found[file.stem] = dict(saved)
    reference = found.pop("lensjax float64")
    differences: dict[str, dict[str, float]] = {}
    for side, kernels in found.items():
        differences[side] = {}
        for output, kernel in kernels.items():
            want = reference[output]
            difference = float(np.abs(kernel.reshape(want.shape) - want).max() / np.abs(want).max())
            differences[side][output] = difference
            print(f"{side:50s} {output:12s} {difference:.1e}")
    from environment import write_result

    write_result(
        "ntk_agreement",
        {
            "unit": "largest difference from lensjax in float64, relative to the largest entry",
            "differences": differences,
        },
    )
    if not all(d <= TOLERANCE for by_output in differences.values() for d in by_output.values()):  # NaN fails too
        raise SystemExit(f"a kernel differs by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
