"""Where Hutch++ pays: errors of Hutchinson's and of its estimates for the same number of products with the matrix.

The Hessian and the Gauss-Newton matrix of a demo model's loss, as it is and after fine-tuning on one batch until it
knows it. The reference is the mean of many Hutchinson probes; its own standard error is given beside the results.

Run: PYTHONPATH=.:kernels python benchmarks/trace_methods.py [--seeds 12] [--reference 768] [--name trace_methods]
It writes benchmarks/results/trace_methods.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import write_result
from flax import nnx

from lensjax.models import load_model
from lensjax.tangents import hessian_trace, model_loss

DEMO = Path(__file__).parent.parent / "lensjax" / "data" / "demo" / "models" / "bible-tiny"
BUDGETS = (12, 24, 48)
STEPS, RATE = 60, 0.5


def fitted(model: Any, batch: Any) -> tuple[Any, float, float]:
    """Return the model after gradient descent on one batch, with its loss before and after."""
    f, params = model_loss(model)

    @jax.jit
    def step(params: Any) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(f)(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
        scale = RATE / jnp.maximum(norm, 1.0)
        return jax.tree.map(lambda p, g: p - scale * g, params, gradient), value

    losses = []
    for _ in range(STEPS):
        params, value = step(params)
        losses.append(float(value))
    return nnx.merge(nnx.graphdef(model), params), losses[0], losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--reference", type=int, default=768, help="probes of the reference")
    parser.add_argument("--name", default="trace_methods", help="of the result")
    options = parser.parse_args()
    model = load_model(DEMO)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 24)), jnp.int32)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": jnp.ones_like(ids)}
    after, first, last = fitted(model, batch)
    print(f"loss {first:.3f} -> {last:.3f}")
    cases: dict[str, Any] = {}
    for weights, own in (("pre-trained", model), ("fitted to the batch", after)):
        for matrix in ("hessian", "gauss_newton"):
            many = hessian_trace(own, batch, key=jax.random.key(99), probes=options.reference, matrix=matrix)
            entry: dict[str, Any] = {"reference": many.trace, "reference_standard_error": many.standard_error}
            for probes in BUDGETS:
                for method in ("hutchinson", "hutch++"):
                    found = [
                        hessian_trace(own, batch, key=jax.random.key(s), probes=probes, matrix=matrix, method=method)
                        for s in range(options.seeds)
                    ]
                    errors = np.array([e.trace - many.trace for e in found]) / abs(many.trace)
                    rms = float(np.sqrt(np.mean(errors**2)))
                    entry[f"{method}, {probes} products"] = {"relative_rms_error": rms, "errors": errors.tolist()}
                    print(f"{weights:20s} {matrix:13s} {method:10s} {probes:3d} products: {rms:.4f}", flush=True)
            cases[f"{weights}, {matrix}"] = entry
            facts = {"model": DEMO.name, "samples": 8, "tokens": 24, "losses": [first, last], "seeds": options.seeds}
            write_result(options.name, {**facts, "cases": cases})


if __name__ == "__main__":
    main()
