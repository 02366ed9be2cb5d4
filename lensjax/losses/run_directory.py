"""Loss curves from lensjax's own run directories."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from lensjax.errors import InputError
from lensjax.journal import JOURNAL
from lensjax.losses.curves import FACT_COLUMNS, Curves
from lensjax.losses.evaluations import Evaluations, curves_of_runs, evaluation
from lensjax.losses.points import Repeats, SameStep, check_metric, number_of


def read_journal(
    *paths: str | os.PathLike[str],
    metric: str = "test_loss",
    repeats: Repeats = "refuse",
    same_step: SameStep = "refuse",
) -> Curves:
    """Read the runs in lensjax's own run directories.

    Parameters
    ----------
    *paths : path
        Run directories, or their ``runs.jsonl``.
    metric : str
        "test_loss" (per token), or a fact of the runs such as "test_loss_per_byte".
    repeats : {"refuse", "mean", "lowest"}
        What to do with runs of one candidate on equally many samples that differ otherwise (in seed or plan).
    same_step : {"refuse", "first", "last"}
        What to do with a run that was recorded twice with different losses.

    Raises
    ------
    InputError
        No such file; a line that is no run.
    """
    check_metric(metric, ", ".join(os.fspath(p) for p in paths))
    runs: dict[str, Evaluations] = {}
    kept: dict[str, list[tuple[float, float]]] = {}
    known_facts: dict[str, dict[str, float]] = {}
    for given in paths:
        path = Path(given) / JOURNAL if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise InputError(f"{path}: no such file. Name a run directory of lensjax.select or its {JOURNAL}.")
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                run = json.loads(line)
                facts = run["facts"] if isinstance(run.get("facts"), dict) else {}
                loss = run["test_loss"] if metric == "test_loss" else facts.get(metric)
                key, model, samples = str(run["key"]), str(run["candidate"]), float(run["size"])
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                if number == len(lines):
                    continue  # a kill in the middle of a write leaves a line without its end
                raise InputError(f"{path}, line {number}: not a run record. Remove that line.") from None
            for fact in FACT_COLUMNS:
                own = facts.get(run.get("part_of") or "")
                if isinstance(own, dict) and isinstance(own.get(fact), float):
                    known_facts.setdefault(fact, {})[model] = own[fact]
            if run.get("part_of"):
                continue  # one of several learning rates or batch sizes; the run itself stands elsewhere
            where = f"{path}, line {number}"
            known = facts.get("parameters")
            weights = np.nan if known is None else number_of(known, f"{where}: parameters")
            # A run that failed may have been made again: one that has a loss stands for all of the same key.
            losses = kept.setdefault(key, [])
            losses += [] if loss is None else [evaluation(samples, loss, where, metric)]
            lacking = "failed" if run["test_loss"] is None else f"without {metric}"
            runs[key] = Evaluations(model, samples, losses, where, "" if losses else lacking, parameters=weights)
    source = ", ".join(os.fspath(p) for p in paths)
    curves = curves_of_runs(runs.values(), source, repeats=repeats, same_step=same_step)
    columns = {fact: np.array([own.get(name, np.nan) for name in curves.names]) for fact, own in known_facts.items()}
    return dataclasses.replace(curves, facts=columns)
