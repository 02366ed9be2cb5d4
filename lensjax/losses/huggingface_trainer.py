"""Evaluations that a Hugging Face Trainer keeps."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.evaluations import Evaluations, curves_of_runs, evaluation
from lensjax.losses.points import Repeats, SameStep, Which, check_metric, listed, named, number_of, short

TRAINER_STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-\d+")


def read_trainer_states(
    root: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    metric: str = "eval_loss",
    which: Which = "lowest",
    parameters: Mapping[str, float] | None = None,
    repeats: Repeats = "refuse",
    same_step: SameStep = "refuse",
) -> Curves:
    """Read the evaluations that a Hugging Face Trainer keeps in ``trainer_state.json``.

    Parameters
    ----------
    root : path
        Directory with one directory for each run. The run's own state (``Trainer.save_state``) counts; without one,
        that of its latest checkpoint.
    pattern : str, optional
        How a run's directory, relative to `root`, names its model and number of samples; ``*`` is what to leave out.
        Default: see `lensjax.losses.points.named`.
    metric : str
        Key of `log_history`; with several data sets the Trainer calls it ``eval_NAME_loss``.
    which : {"lowest", "last"}
        Of the evaluations after step 0.
    parameters : mapping of model to number of weights, optional
    repeats : {"refuse", "mean", "lowest"}
        What to do with several runs of one model on equally many samples.
    same_step : {"refuse", "first", "last"}
        What to do with losses that differ at one step, see `lensjax.losses.evaluations`.

    Raises
    ------
    InputError
        No such files; a file that is no trainer state or never evaluated; a directory that does not fit the pattern;
        checkpoints of two runs in one directory; several losses at one step.

    Notes
    -----
    A run that left only checkpoints, the last of them before the last step, counts as not measured: it was killed or is
    still running, unless it was stopped early.
    """
    base = Path(root)
    check_metric(metric, str(base))
    runs: dict[Path, list[State]] = {}
    for path in sorted(base.rglob(TRAINER_STATE)):
        state = _trainer_state(path, metric)
        runs.setdefault(path.parent.parent if state.checkpoint else path.parent, []).append(state)
    if not runs:
        raise InputError(f"{base}: no {TRAINER_STATE} in it. Name the directory that the Trainer's outputs are in.")
    notes: list[str] = []
    names = named({run.relative_to(base).as_posix(): str(run) for run in runs}, pattern, notes=notes)
    found = []
    for run, states in runs.items():
        model, samples = names[run.relative_to(base).as_posix()]
        state = _counting(run, states, metric, notes)
        if not state.found:
            raise InputError(
                f"{state.path}: log_history has no {metric!r}. Evaluate while training (eval_strategy), or say which "
                f"metric to take; there are: {', '.join(_metrics(state.history)) or 'none'}."
            )
        losses = [evaluation(step, loss, str(state.path), metric) for step, loss in state.found]
        known = float((parameters or {}).get(model, np.nan))
        found.append(Evaluations(model, samples, losses, str(state.path), _status(state), parameters=known))
    return curves_of_runs(found, str(base), which=which, repeats=repeats, same_step=same_step, notes=notes)


@dataclasses.dataclass(frozen=True)
class State:
    """What one ``trainer_state.json`` says; `found` are steps and values of the metric, as they stand there."""

    path: Path
    step: float
    last: float
    history: list[Any]
    found: list[tuple[Any, Any]]
    content: Mapping[str, Any]

    @property
    def checkpoint(self) -> bool:
        """Whether it is in a checkpoint, not in the run's own directory."""
        return CHECKPOINT.fullmatch(self.path.parent.name) is not None


def _counting(run: Path, states: list[State], metric: str, notes: list[str]) -> State:
    """Return the state that counts, and check that the others are of the same run."""
    own = [state for state in states if not state.checkpoint]
    counting = own[0] if own else max(states, key=lambda state: state.step)
    strangers = []
    for state in states:
        differs = _contradiction(counting, state, metric)
        if differs is None and own and state.step > counting.step:
            differs = f"it goes on to step {state.step:g}, after {counting.step:g}"
        if differs is not None and not own:
            raise InputError(
                f"{run}: {state.path.parent.name} and {counting.path.parent.name} are of two runs: {metric} is "
                f"{differs}. Remove those of one run."
            )
        if differs is not None:
            strangers.append((state.path.parent.name, differs))
    if strangers:
        shown = listed([name for name, _ in strangers], 3)
        notes.append(
            f"{counting.path} counts, and what other runs left beside it does not: {shown} ({strangers[0][1]}). If "
            "those are meant, move that file away"
        )
    return counting


def _contradiction(counting: State, state: State, metric: str) -> str | None:
    """Return what two states of one directory disagree on: one run has one loss at one step."""
    one, other = _values(counting, metric), _values(state, metric)
    for step in one.keys() & other.keys():
        # A later evaluation at the same step may be missing in the earlier file.
        if not any(np.isclose(a, b, rtol=1e-6, atol=0, equal_nan=True) for a in one[step] for b in other[step]):
            return f"{other[step][0]:g} at step {step:g} there and {one[step][0]:g} here"
    return None


def _values(state: State, metric: str) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for step, loss in state.found:
        if loss is not None:
            at = number_of(step, f"{state.path}: step")
            found.setdefault(at, []).append(number_of(loss, f"{state.path}: {metric}"))
    return found


def _status(state: State) -> str:
    """Return "" for a run that has finished, else its state.

    Only a finished run leaves a state of its own, or logs its run time. Old versions of the Trainer leave no checkpoint
    at the last step unless it is a multiple of `save_steps`.
    """
    ended = any(isinstance(entry, dict) and "train_runtime" in entry for entry in state.history)
    if not state.checkpoint or ended or state.last <= 0 or state.step >= state.last or _stopped_early(state.content):
        return ""
    every = state.content.get("save_steps")
    if isinstance(every, int | float) and every >= 1 and state.step % every == 0 and state.step + every > state.last:
        return ""
    return (
        f"killed or running (step {state.step:g} of {state.last:g}); if it did finish, put this file into the "
        "directory above"
    )


def _stopped_early(content: Mapping[str, Any]) -> bool:
    """Return whether the Trainer was to stop early: by its own flag, or by the patience of early stopping."""
    callbacks = content.get("stateful_callbacks")
    known = callbacks if isinstance(callbacks, dict) else {}
    control, stopping = known.get("TrainerControl"), known.get("EarlyStoppingCallback")
    told = control.get("args") if isinstance(control, dict) else None
    if isinstance(told, dict) and told.get("should_training_stop") is True:
        return True
    if not isinstance(stopping, dict):
        return False
    limit, counted = (
        part.get(name) if isinstance(part, dict) else None
        for part, name in (
            (stopping.get("args"), "early_stopping_patience"),
            (stopping.get("attributes"), "early_stopping_patience_counter"),
        )
    )
    return isinstance(limit, int) and isinstance(counted, int) and counted >= limit > 0


def _trainer_state(path: Path, metric: str) -> State:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not readable as JSON ({short(error)}). Leave this run out or make it again."
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise InputError(f"{path}: no list 'log_history', so not a Trainer's state. Leave this file out.")
    step = number_of(state.get("global_step", 0), f"{path}: global_step")
    last = state.get("max_steps")
    history = state["log_history"]
    return State(
        path,
        step,
        number_of(last, f"{path}: max_steps") if last is not None else 0.0,
        history,
        [(e.get("step", 0), e[metric]) for e in history if isinstance(e, dict) and metric in e],
        state,
    )


def _metrics(history: list[Any]) -> list[str]:
    return sorted({k for e in history if isinstance(e, dict) for k in e if "loss" in k})
