"""The generalisation bound on real fine-tuning runs: violated or not, how loose, and whether traces fall as n^-beta.

Fine-tunes demo models on subsets of the demo task as `python -m lensjax.select` does, and at the kept weights takes
distances, Hessian and Gauss-Newton traces, quadratic forms, losses, and the bound both ways. One JSON line for each
finished run in benchmarks/results/bound_runs.jsonl, and none of those is repeated.

Run: PYTHONPATH=.:kernels python benchmarks/bound.py [--models bible-tiny ...] [--sizes 50 100 ...]
It writes benchmarks/results/bound.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import RESULTS, without_nan, write_result

from lensjax import models
from lensjax.bound import compare_phases, fit_power_law, generalization_bound, layer_distances
from lensjax.finetune import FineTuner, Plan, Search, Weights, tune
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.defaults import DEMO_LEARNING_RATE
from lensjax.select.request import Request, prepare
from lensjax.tangents import (
    hessian_trace,
    model_loss,
    per_example_quadratic_forms,
)
from lensjax.tasks import Encoded, batches

MODELS = ("bible-tiny", "lexicon-small", "novels-medium", "mixed-medium")
SIZES = (50, 100, 200, 400, 800)
TRACE_BATCHES, PROBES = 3, 4
EXAMPLES, STEPS = 8, 6
EPSILON = 0.1


def layer(path: str) -> str:
    """Return the paper's layer of a parameter: a block of the transformer, or what stands beside them."""
    parts = path.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def example_losses(sums: Any, params: Any, parts: Iterable[Any]) -> np.ndarray:
    """Return the mean loss of each sample."""
    found = []
    for batch in parts:
        total, tokens = (np.asarray(a, np.float64) for a in sums(params, batch))
        found.append(total[tokens > 0] / tokens[tokens > 0])
    return np.concatenate(found)


def measure(tuner: FineTuner, f: Any, sums: Any, tokens: Any, size: int) -> dict[str, Any]:
    """Fine-tune on `size` samples and take everything the bound needs."""
    start = time.perf_counter()
    train = tokens.train.first(size)
    kept: list[Any] = []

    def keep(found: Weights) -> None:
        if found.finished:
            kept[:] = [jax.tree.map(jnp.copy, found.params)]

    outcome = tune(tuner, train, tokens.validation, tokens.test, search=Search(), seed=0, on_weights=keep)
    (params,) = kept
    tuned = time.perf_counter()

    options: dict[str, Any] = {"batch_size": tuner.plan.batch_size, "buckets": tuner.buckets, "pad_id": tuner.pad_id}
    # The last bucket holds every sample: one shape for all, for compiling takes longer than computing here.
    one = {**options, "buckets": tuner.buckets[-1:]}
    own = list(batches(train, rng=np.random.default_rng(0), **one))[:TRACE_BATCHES]
    parts = [jax.tree.map(jnp.asarray, b) for b in own]
    traces = {
        matrix: hessian_trace(
            f, params, parts, key=jax.random.key(0), probes=PROBES, chunk=PROBES, matrix=matrix, by_layer=layer
        )
        for matrix in ("hessian", "gauss_newton")
    }
    few = Encoded(train.ids[:EXAMPLES], train.prompt_lengths[:EXAMPLES], 0, train.separate)
    (examples,) = batches(few, **{**one, "batch_size": EXAMPLES})
    moved = jax.tree.map(jnp.subtract, params, tuner.initial)
    forms = per_example_quadratic_forms(
        f, params, moved, jax.tree.map(jnp.asarray, examples), steps=STEPS, by_layer=layer
    )
    largest_form = {name: float(values.max()) for name, values in forms.items()}
    distances = layer_distances(params, tuner.initial, by_layer=layer)
    # The bound speaks of the loss of a sample, which is the mean over its tokens; its means are over samples.
    losses = [example_losses(sums, params, batches(part, **options)) for part in (train, tokens.test)]
    train_loss, test_loss = (float(a.mean()) for a in losses)
    facts = {
        "loss_bound": float(max(a.max() for a in losses)),
        "epsilon": EPSILON,
        "test_loss": test_loss,
    }
    curvature = traces["gauss_newton"].by_layer
    bounds = {
        "hessian": generalization_bound(train_loss, size, distances, quadratic_forms=largest_form, **facts),
        "isotropic": generalization_bound(train_loss, size, distances, traces=curvature, **facts),
    }
    return {
        "train_loss": train_loss,
        "test_loss": test_loss,
        "token_test_loss": outcome.test_loss,
        "steps": outcome.steps,
        "learning_rate": outcome.learning_rate,
        "distances": distances,
        "traces": {
            name: {"trace": t.trace, "standard_error": t.standard_error, "by_layer": t.by_layer}
            for name, t in traces.items()
        },
        "trace_samples": int(sum((b["labels"] != -100).any(1).sum() for b in own)),
        "bounds": {
            name: {**dataclasses.asdict(b), "violated": b.violated, "looseness": b.looseness}
            for name, b in bounds.items()
        },
        "seconds": {"fine-tuning": tuned - start, "curvature": time.perf_counter() - tuned},
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the runs say."""
    result: dict[str, Any] = {"runs": len(runs)}
    for form in ("hessian", "isotropic"):
        own = [r["bounds"][form] for r in runs]
        looseness = np.array([b["looseness"] for b in own])
        result[form] = {
            "violated": sum(b["violated"] for b in own),
            "looseness": {"least": looseness.min(), "median": float(np.median(looseness)), "most": looseness.max()},
            "complexity_over_gap": [
                b["complexity"] / (b["test_loss"] - b["train_loss"]) if b["test_loss"] > b["train_loss"] else None
                for b in own
            ],
        }
    by_model: dict[str, Any] = {}
    for name in dict.fromkeys(r["model"] for r in runs):
        # A run that kept its initial weights says nothing of fine-tuning.
        own = sorted((r for r in runs if r["model"] == name and r["steps"]), key=lambda r: r["size"])
        sizes = [r["size"] for r in own]
        if len(sizes) < 3:
            continue
        entry: dict[str, Any] = {"sizes": sizes}
        for matrix in ("hessian", "gauss_newton"):
            values = [r["traces"][matrix]["trace"] for r in own]
            entry[matrix] = {
                "traces": values,
                "fall": dataclasses.asdict(fit_power_law(sizes, values)) if min(values) > 0 else None,
                "worst_relative_standard_error": max(
                    r["traces"][matrix]["standard_error"] / abs(r["traces"][matrix]["trace"]) for r in own
                ),
            }
        for form in ("hessian", "isotropic"):
            values = [r["bounds"][form]["complexity"] for r in own]
            entry[f"{form} complexity"] = {"values": values, "fall": dataclasses.asdict(fit_power_law(sizes, values))}
        losses = [r["test_loss"] for r in own]
        entry["test_losses"] = losses
        entry["train_losses"] = [r["train_loss"] for r in own]
        phases = compare_phases(sizes, entry["gauss_newton"]["traces"], losses)
        entry["phases"] = {**dataclasses.asdict(phases), "fall": None}
        by_model[name] = entry
    return {**result, "models": by_model}


def measure_candidate(candidate: Candidate, tokens: Any, sizes: Iterable[int], plan: Plan, path: Path) -> None:
    """Measure one model at several sizes, a line for each."""
    model = models.load_model(candidate.path)
    tuner, f = FineTuner(model, plan, tokens.buckets, tokens.pad_id), model_loss(model)[0]
    sums = jax.jit(f.sample_sums)
    for size in sizes:
        run = {"model": candidate.name, "size": size, **measure(tuner, f, sums, tokens, size)}
        with path.open("a") as file:
            file.write(json.dumps(without_nan(run)) + "\n")
        bound = run["bounds"]["hessian"]
        print(
            f"{candidate.name:14s} {size:5d} train {run['train_loss']:.3f} test {run['test_loss']:.3f} bound "
            f"{bound['value']:.3f} / {run['bounds']['isotropic']['value']:.3f} traces "
            f"{run['traces']['hessian']['trace']:.4g} {run['traces']['gauss_newton']['trace']:.4g} "
            f"{sum(run['seconds'].values()):.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--runs", type=Path, default=RESULTS / "bound_runs.jsonl")
    parser.add_argument("--name", default="bound", help="of the result")
    options = parser.parse_args()
    plan = Plan(learning_rate=DEMO_LEARNING_RATE)
    prepared = prepare(Request(plan=plan, smallest=SIZES[0], visible=SIZES[-1]))
    done = set()
    if options.runs.exists():
        done = {(r["model"], r["size"]) for r in map(json.loads, options.runs.read_text().splitlines())}
    for candidate in prepared.candidates:
        missing = [n for n in options.sizes if (candidate.name, n) not in done]
        if candidate.name in options.models and missing:
            measure_candidate(candidate, prepared.tokens[candidate.tokenizer], missing, plan, options.runs)
            jax.clear_caches()
    runs = [json.loads(line) for line in options.runs.read_text().splitlines()]
    rate = plan.learning_rate
    settings = {
        "epsilon": EPSILON,
        "trace_batches_of_32": TRACE_BATCHES,
        "probes": PROBES,
        "examples_in_the_maximum": EXAMPLES,
        "lanczos_steps": STEPS,
        "loss_bound": "largest mean loss of a sample of the run's training and test sets",
        "losses": "means over samples of the mean over a sample's tokens, as are C and the forms",
        "runs_with_means_over_tokens_instead": sum("token_test_loss" not in run for run in runs),
        # Where training diverges `tune` tries a lower rate; runs from before it was recorded had the plan's.
        "runs_at_a_lower_learning_rate": sum("learning_rate" in run and run["learning_rate"] < rate for run in runs),
        "not_in_the_bound": "its remainder xi = O(n^(-3/4))",
    }
    write_result(options.name, {"settings": settings, **summary(runs), "each": runs})


if __name__ == "__main__":
    main()
