"""Package the live benchmark: lensjax/data/live/TASK.csv (losses, `live:TASK`) and TASK.npz (kernels and traces).

    python benchmarks/live/package.py [--rows FILE ...] [--out FOLDER]

Reads results/live/runs.jsonl; candidates that are not measured at every size of a task are left out of it.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lensjax import data
from lensjax.data.live_benchmark import PER_OUTPUT
from lensjax.jobs.pretrained_scores import EXPONENTS
from tangents import OUTPUTS

RESULTS = Path(__file__).parents[1] / "results" / "live"


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the rows of all files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def tables(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], dict[str, dict[tuple[int, int], dict[str, Any]]]]]:
    """Return for each task its sizes and the rows of its complete candidates: candidate -> (size, seed) -> row.

    Raises
    ------
    SystemExit
        If a measurement is there twice.
    """
    found: dict[str, dict[str, dict[tuple[int, int], dict[str, Any]]]] = {}
    for row in rows:
        if row["kind"] not in ("zero", "run") or row["test_loss"] is None:
            continue
        own = found.setdefault(row["task"], {}).setdefault(row["candidate"], {})
        at = row.get("size", 0), row.get("seed", 0)
        if at in own:
            raise SystemExit(f"{row['task']}, {row['candidate']}, size and seed {at}: measured twice; keep one row.")
        own[at] = row
    result = {}
    for task, candidates in found.items():
        sizes = sorted({size for own in candidates.values() for size, _ in own})
        whole = {name: own for name, own in candidates.items() if all((size, 0) in own for size in sizes)}
        left_out = sorted(set(candidates) - set(whole))
        print(f"{task}: {len(whole)} candidates{', without ' + ', '.join(left_out) if left_out else ''}")
        result[task] = sizes, whole
    return result


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the tables of each task."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {row["candidate"]: row for row in rows if row["kind"] == "model"}
    evidence = {(row["candidate"], row["task"]): row["log_me"] for row in rows if row["kind"] == "log_me"}
    for task, (sizes, candidates) in tables(rows).items():
        with (folder / f"{task}.csv").open("w", newline="") as out:
            table = csv.writer(out, lineterminator="\n")
            table.writerow(["model", "family", "parameters", *EXPONENTS, "log_me", *sizes])
            for name, own in candidates.items():
                facts = models[name]
                spectra = [f"{facts['nlp_metrics'][key]:.6g}" for key in EXPONENTS]
                losses = [f"{own[size, 0]['test_loss']:.6f}" for size in sizes]
                log_me = f"{evidence[name, task]:.6f}" if (name, task) in evidence else ""
                table.writerow([name, facts["family"], facts["parameters"], *spectra, log_me, *losses])
        np.savez_compressed(folder / f"{task}.npz", **arrays(sizes, candidates))


def arrays(sizes: list[int], candidates: dict[str, dict[tuple[int, int], dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Arrays of `lensjax.data.live_benchmark.RecordedTangents` by name, those of outputs as NAME.OUTPUT."""

    def collect(get: Any, seed: int = 0) -> np.ndarray:
        return np.array([[get(own.get((size, seed), {})) for size in sizes] for own in candidates.values()], np.float64)

    found = {
        "names": np.array(list(candidates)),
        "sizes": np.array(sizes),
        "outputs": np.array(OUTPUTS),
        "steps": collect(lambda row: row.get("steps", 0)),
        "learning_rate": collect(lambda row: row.get("learning_rate", np.nan)),
        "flops": collect(lambda row: row.get("flops", 0.0)),
        "second_loss": collect(lambda row: row.get("test_loss", np.nan), seed=1),
    }
    for matrix in ("hessian", "gauss_newton"):
        found[f"trace_{matrix}"] = collect(lambda row, m=matrix: row[f"trace_{m}"]["total"])
        found[f"trace_{matrix}_error"] = collect(lambda row, m=matrix: row[f"trace_{m}"]["standard_error"])
    for output in OUTPUTS:
        for key in PER_OUTPUT:
            # What an output lacks (a target to be driven to), it lacks everywhere; change and kept have no size 0.
            everywhere = [own[sizes[-1], 0][f"ntk_{output}"] for own in candidates.values()]
            if all(key in kernel for kernel in everywhere):
                found[f"{key}.{output}"] = collect(lambda row, o=output, k=key: row[f"ntk_{o}"].get(k, np.nan))
    # Kernels are made in float32.
    return {k: v.astype(np.float32) if k.startswith(("eigenvalues", "residual")) else v for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", default=[RESULTS / "runs.jsonl"])
    parser.add_argument("--out", type=Path, default=data.path("live"))
    options = parser.parse_args()
    write(read_rows(options.rows), options.out)


if __name__ == "__main__":
    main()
