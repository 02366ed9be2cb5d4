"""Evaluations that a Hugging Face Trainer keeps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.points import Point, Repeats, Which, chosen_of, curves_of, loss_of, named, number_of, short

TRAINER_STATE = "trainer_state.json"


def read_trainer_states(
    root: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    metric: str = "eval_loss",
    which: Which = "lowest",
    parameters: Mapping[str, float] | None = None,
    repeats: Repeats = "refuse",
) -> Curves:
    """Read the evaluations that a Hugging Face Trainer keeps in ``trainer_state.json``.

    Parameters
    ----------
    root : path
        Directory with one directory for each run; of a run's checkpoints the one furthest on counts.
    pattern : str, optional
        How a run's directory, relative to `root`, names its model and number of samples. Default: the first of
        `PATTERNS` that fits all runs.
    metric : str
        Key of `log_history`. An evaluation at step 0 (``eval_on_start``) is the loss before fine-tuning.
    which : {"lowest", "last"}
        Of the evaluations after step 0.
    parameters : mapping of model to number of weights, optional
    repeats : {"refuse", "mean", "lowest"}
        What to do with several runs of one model on equally many samples.

    Raises
    ------
    InputError
        No such files; a file that is no trainer state or never evaluated; a directory that does not fit the pattern.
    """
    base = Path(root)
    runs: dict[Path, tuple[float, Path, list[Any]]] = {}
    for path in sorted(base.rglob(TRAINER_STATE)):
        step, history = _trainer_state(path)
        run = path.parent.parent if re.fullmatch(r"checkpoint-\d+", path.parent.name) else path.parent
        if run not in runs or step > runs[run][0]:
            runs[run] = (step, path, history)
    if not runs:
        raise InputError(f"{base}: no {TRAINER_STATE} in it. Name the directory that the Trainer's outputs are in.")
    names = named({run.relative_to(base).as_posix(): str(run) for run in runs}, pattern)
    points: list[Point] = []
    before: dict[str, list[Point]] = {}
    for run, (_, path, history) in runs.items():
        model, samples = names[run.relative_to(base).as_posix()]
        found = [(e.get("step", 0), e[metric]) for e in history if isinstance(e, dict) and metric in e]
        if not found:
            raise InputError(
                f"{path}: log_history has no {metric!r}. Evaluate while training (eval_strategy), or say which metric "
                f"to take; there are: {', '.join(_metrics(history)) or 'none'}."
            )
        losses = [(number_of(step, f"{path}: step"), loss_of(loss, f"{path}: {metric}")) for step, loss in found]
        trained = [loss for step, loss in losses if step > 0]
        known = float((parameters or {}).get(model, np.nan))
        if trained:
            points.append(Point(model, samples, chosen_of(trained, which), known, str(path)))
        for step, loss in losses:
            if step == 0:
                before.setdefault(model, []).append(Point(model, 0.0, loss, known, str(path)))
    # Every run of a model starts from the same weights: its losses before training are one.
    points += [same[0] for same in before.values()]
    return curves_of(points, str(base), repeats)


def _trainer_state(path: Path) -> tuple[float, list[Any]]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not readable as JSON ({short(error)}). Leave this run out or make it again."
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise InputError(f"{path}: no list 'log_history', so not a Trainer's state. Leave this file out.")
    return number_of(state.get("global_step", 0), f"{path}: global_step"), state["log_history"]


def _metrics(history: list[Any]) -> list[str]:
    return sorted({k for e in history if isinstance(e, dict) for k in e if "loss" in k})
