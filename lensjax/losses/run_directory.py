"""Runs that lensjax has made itself."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from lensjax.errors import InputError
from lensjax.losses.curves import FACT_COLUMNS, Curves
from lensjax.losses.points import Point, Repeats, curves_of, loss_of, number_of

JOURNAL = "runs.jsonl"


def read_journal(*paths: str | os.PathLike[str], metric: str = "test_loss", repeats: Repeats = "refuse") -> Curves:
    """Read runs that lensjax has made itself.

    Parameters
    ----------
    *paths : path
        Run directories, or their ``runs.jsonl``.
    metric : str
        "test_loss" (per token), or a fact of the runs such as "test_loss_per_byte".
    repeats : {"refuse", "mean", "lowest"}
        What to do with runs of one candidate on equally many samples that differ otherwise (in seed or plan).

    Raises
    ------
    InputError
        No such file; a line that is no run.
    """
    points: dict[str, Point] = {}
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
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
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
            value = np.nan if loss is None else loss_of(loss, f"{where}: {metric}")
            known = facts.get("parameters")
            weights = np.nan if known is None else number_of(known, f"{where}: parameters")
            points[key] = Point(model, samples, value, weights, where)  # a run that failed may have been made again
    curves = curves_of(points.values(), ", ".join(os.fspath(p) for p in paths), repeats)
    columns = {fact: np.array([own.get(name, np.nan) for name in curves.names]) for fact, own in known_facts.items()}
    return dataclasses.replace(curves, facts=columns)
