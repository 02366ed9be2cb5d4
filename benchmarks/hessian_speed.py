"""Time and memory of Hessian traces, in units of one `value_and_grad` of the same loss.

A probe is all of it: random signs, the Hessian-vector product and the trace of every block of parameters. Every side
runs in a process of its own that waits for its turn, so that all are interleaved (A B C, A B C, ...): lensjax, and
PyHessian and curvlinops in torch on the GPT-2 of transformers with the same shapes (the demo models: the same
weights), beside a gradient of their own. Beside our gradient stands that of a GPT-2 in JAX as it is usually written.
Peak memory: of one process each that compiles and runs once.

Run: PYTHONPATH=.:kernels python benchmarks/hessian_speed.py [--cases 5M-16 124M-8 ...] [--repeats 7] [--torch PYTHON]
     [--no-memory] [--name hessian_speed]
It writes benchmarks/results/hessian_speed.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import peak_bytes, write_result

DEMO = Path(__file__).parent.parent / "lensjax" / "data" / "demo" / "models"
SMALL = {"vocab_size": 8192, "n_embd": 256, "n_head": 4, "n_layer": 4}
GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12}
CASES: dict[str, tuple[Any, int, int]] = {
    "bible-tiny": ("bible-tiny", 32, 48),
    "novels-medium": ("novels-medium", 32, 48),
    "bible-xl": ("bible-xl", 32, 48),
    "5M-16": (SMALL, 16, 64),
    "124M-8": (GPT2, 8, 64),
}
"""Shapes or demo model, samples, tokens of each."""

PROBES = 4
Run = Callable[[], Any]


def tokens(case: str) -> Any:
    """Return the token ids (N, T)."""
    import numpy as np

    shapes, n, length = CASES[case]
    vocabulary = 2048 if isinstance(shapes, str) else shapes["vocab_size"]
    return np.random.default_rng(0).integers(0, vocabulary, (n, length))


def lensjax_runs(case: str) -> dict[str, Run]:
    """Return the plain gradient, and probes one by one and several at once."""
    import jax
    import jax.numpy as jnp
    from ntk_speed import plain_gpt2

    from lensjax.models import init_model, load_model
    from lensjax.tangents import hessian_trace, model_loss

    shapes, n, length = CASES[case]
    if isinstance(shapes, str):
        model = load_model(DEMO / shapes)
    else:
        model = init_model({"model_type": "gpt2", "n_positions": length, **shapes}, jax.random.key(0))
    f, params = model_loss(model)
    ids = jnp.asarray(tokens(case), jnp.int32)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": jnp.ones_like(ids)}
    gradient = jax.jit(jax.value_and_grad(f))
    key = jax.random.key(1)

    def trace(**options: Any) -> Run:
        return lambda: hessian_trace(f, params, batch, key=key, **options)

    runs = {"gradient": lambda: jax.block_until_ready(gradient(params, batch))}
    if not isinstance(shapes, str):
        plain, plain_params, plain_ids = plain_gpt2(shapes, n, "loss_sum", length)
        plain_gradient = jax.jit(jax.value_and_grad(lambda p: plain(p, plain_ids).sum()))
        runs["plain jax gradient"] = lambda: jax.block_until_ready(plain_gradient(plain_params))
    return runs | {
        "1 probe": trace(probes=1),
        f"{PROBES} probes": trace(probes=PROBES, chunk=PROBES),
        f"{PROBES} probes, one at a time": trace(probes=PROBES, chunk=1),
        "1 probe, Gauss-Newton": trace(probes=1, matrix="gauss_newton"),
    }


def torch_runs(case: str) -> dict[str, Run]:
    """Return one torch gradient, and probes by PyHessian and curvlinops."""
    import torch
    from curvlinops import HessianLinearOperator, hutchinson_trace
    from pyhessian import hessian
    from transformers import GPT2Config, GPT2LMHeadModel

    shapes, _, length = CASES[case]
    torch.manual_seed(0)
    if isinstance(shapes, str):
        inner = GPT2LMHeadModel.from_pretrained(DEMO / shapes, dtype=torch.float32, attn_implementation="eager")
    else:
        off = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "attn_implementation": "eager"}
        inner = GPT2LMHeadModel(GPT2Config(n_positions=length, **off, **shapes))
    inner.eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Any) -> Any:
            return self.inner(ids, use_cache=False).logits[:, :-1].flatten(0, 1)

    model, loss = Logits(), torch.nn.CrossEntropyLoss()
    ids = torch.tensor(tokens(case))
    data = (ids, ids[:, 1:].flatten())
    params = [p for p in model.parameters() if p.requires_grad]

    def gradient() -> Any:
        model.zero_grad()
        loss(model(ids), data[1]).backward()

    def by_pyhessian(probes: int) -> Run:
        # Its gradient is made when it is built, and shared by the probes.
        return lambda: hessian(model, loss, data=data, cuda=False).trace(maxIter=probes, tol=-math.inf)

    def by_curvlinops(probes: int) -> Run:
        operator = HessianLinearOperator(model, loss, params, [data], check_deterministic=False)
        return lambda: float(hutchinson_trace(operator, probes))

    return {
        "torch gradient": gradient,
        "PyHessian, 1 probe": by_pyhessian(1),
        f"PyHessian, {PROBES} probes": by_pyhessian(PROBES),
        "curvlinops, 1 probe": by_curvlinops(1),
        f"curvlinops, {PROBES} probes": by_curvlinops(PROBES),
    }


SIDES = {"lensjax": lensjax_runs, "torch": torch_runs}


def worker_main(side: str, case: str) -> None:
    """Run what the parent asks for, and answer with the seconds it took."""
    runs = SIDES[side](case)
    print(json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        runs[line.strip()]()
        seconds = time.perf_counter() - start
        gc.collect()  # what PyHessian differentiates twice refers to itself, 13 GB of it after some probes
        print(json.dumps(seconds), flush=True)


class Server:
    """A side in a process of its own."""

    def __init__(self, python: str, side: str, case: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--side", side, "--cases", case],
            stdin=subprocess.PIPE,  # errors go where ours go
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(("[", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")):  # libraries print too
                return json.loads(line)
        raise SystemExit("a side ended; its message stands above.")

    def run(self, name: str) -> float:
        """Return the seconds of one run."""
        assert self.process.stdin
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def peak_memory(python: str, side: str, case: str, name: str) -> int:
    """Return the peak bytes of a process that runs once."""
    arguments = [python, __file__, "--side", side, "--cases", case, "--memory-of", name]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def measure(case: str, pythons: dict[str, str], repeats: int, memory: bool) -> dict[str, Any]:
    """Return seconds and ratios of all runs of all sides, interleaved."""
    servers = {side: Server(python, side, case) for side, python in pythons.items()}
    turns = [(side, name) for side, server in servers.items() for name in server.names]
    seconds: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    for repeat in range(repeats + 1):
        for side, server in servers.items():
            server.run(server.names[0])  # after a minute's wait the first run fetches its memory back
            for name in server.names:
                took = server.run(name)
                if repeat:  # the first compiles
                    seconds[side, name].append(took)
    for server in servers.values():
        server.close()
    unit = statistics.median(seconds[turns[0]])
    result: dict[str, Any] = {}
    for side, name in turns:
        median = statistics.median(seconds[side, name])
        own = statistics.median(seconds[side, servers[side].names[0]])
        probes = PROBES if f"{PROBES} probes" in name else 1
        entry = {
            "seconds": seconds[side, name],
            "seconds_per_probe": median / probes,
            "per_probe_over_lensjax_gradient": median / probes / unit,
            "per_probe_over_own_gradient": median / probes / own,
        }
        if memory:
            entry["peak_bytes"] = peak_memory(pythons[side], side, case, name)
        result[name] = entry
        peak = f"{entry['peak_bytes'] / 2**20:8.0f} MiB" if memory else ""
        print(
            f"{case:14s} {name:26s} {median / probes:8.3f} s per probe {median / probes / own:6.2f} own gradients "
            f"{median / probes / unit:6.2f} of lensjax {peak}",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--torch", help="a Python with torch, transformers, pyhessian and curvlinops-for-pytorch")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--name", default="hessian_speed", help="of the result")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side and options.memory_of:
        SIDES[options.side](options.cases[0])[options.memory_of]()
        print(peak_bytes())
        return
    if options.side:
        worker_main(options.side, options.cases[0])
        return
    pythons = {"lensjax": sys.executable} | ({"torch": options.torch} if options.torch else {})
    cases: dict[str, Any] = {}
    for case in options.cases:
        cases[case] = measure(case, pythons, options.repeats, not options.no_memory)
        write_result(options.name, {"unit": "one jit(value_and_grad) of the mean loss", "cases": cases})


if __name__ == "__main__":
    main()
