"""What to do after a selection: the command that fine-tunes the chosen model."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lensjax.commands.options import LORA_OPTIONS, PLAN_OPTIONS, TASK_OPTIONS
from lensjax.finetune import Plan
from lensjax.jobs.defaults import ADAPTED
from lensjax.journal import Run
from lensjax.models import Lora
from lensjax.select.request import Prepared, Request

TUNE = ("python", "-m", "lensjax.tune")


def tune_command(prepared: Prepared, name: str, runs: Iterable[Run], directory: Path) -> str:
    """Return the command that fine-tunes a candidate on the target, as its runs in the selection were made.

    Learning rate and batch size are those of its largest run, chosen there among several; without a run, those asked
    for. The samples set aside are the same ones, so that the test loss is the one that was predicted.

    Parameters
    ----------
    prepared : Prepared
    name : str
        Of the candidate.
    runs : iterable of Run
        Of all candidates.
    directory : Path
        The selection's; the model goes into a directory there.

    Returns
    -------
    str
        For a POSIX shell (one line, unless the template has several) in the selection's own working directory.
    """
    request = prepared.request
    candidate = next(c for c in prepared.candidates if c.name == name)
    arguments = [*TUNE, "--model", candidate.asked]
    if candidate.lora is not None:
        arguments += _flags(LORA_OPTIONS, candidate.lora, Lora(), cut="lora_")
    arguments += _flags(TASK_OPTIONS, dataclasses.replace(request, max_length=prepared.max_length), Request())
    largest = max((r for r in runs if r.candidate == name and r.size), key=lambda r: r.size, default=None)
    if largest is not None and {"learning_rate", "batch_size"} <= largest.facts.keys():
        rates, sizes = [largest.facts["learning_rate"]], [largest.facts["batch_size"]]
    else:
        sizes, rates = _searched(prepared)
    arguments += ["--learning-rate", *map(_text, rates)]
    arguments += ["--batch-size", *map(_text, sizes)]
    arguments += _flags(PLAN_OPTIONS, request.plan, Plan())
    if prepared.target < len(prepared.task.train):
        arguments += ["--samples", str(prepared.target)]
    out = directory / ("tuned-" + re.sub(r"[^\w.+-]", "_", name))
    return shlex.join([*arguments, "--selection", str(directory), "--out", str(out)])


def tune_note(prepared: Prepared, name: str, directory: Path) -> str:
    """Return what to know before giving that command, empty if it is nothing."""
    request, plan = prepared.request, prepared.request.plan
    candidate = next(c for c in prepared.candidates if c.name == name)
    notes = []
    available = len(prepared.task.train)
    if prepared.target > available:
        notes.append(
            f"The choice is for {prepared.target} training samples, but {available} are at hand: the command trains on "
            "these; add the others to the data first."
        )
    # What only a program can ask for.
    unsaid = [
        f"{n}={getattr(plan, n)}" for n in _others(plan, PLAN_OPTIONS) if n not in ("learning_rate", "batch_size")
    ]
    if candidate.lora is not None:
        unsaid += [f"{n}={getattr(candidate.lora, n)}" for n in _others(candidate.lora, ("rank", "alpha", "dropout"))]
    if unsaid:
        notes.append(f"No option says {', '.join(unsaid)}: use lensjax.finetune.FineTuner for that.")
    base = request.base_directory
    named = [candidate.asked.removesuffix(ADAPTED), *([] if request.task is None else [str(request.task)])]
    paths = [str(directory), *(path for path in named if (base / path).exists())]
    if any(not os.path.isabs(path) for path in paths):
        notes.append(f"Its paths are relative to {base}.")
    return " ".join(notes)


def tune_facts(prepared: Prepared, name: str, runs: Iterable[Run], directory: Path) -> dict[str, str]:
    """Return command and note as facts of a `lensjax.selection.Selection`."""
    # The same words, whether the selection was started here or resumed by a whole path.
    whole, base = directory.absolute(), prepared.request.base_directory
    directory = whole.relative_to(base) if whole.is_relative_to(base) else whole
    facts = {"tune_command": tune_command(prepared, name, runs, directory)}
    note = tune_note(prepared, name, directory)
    return {**facts, "tune_note": note} if note else facts


def _searched(prepared: Prepared) -> tuple[list[int], list[float]]:
    grid = prepared.request.search.grid(prepared.request.plan)
    return [size for size, _ in grid], list(grid[0][1])


def _others(settings: Any, known: Sequence[str]) -> list[str]:
    """Return the names of settings that are not the default and not among the known ones."""
    return [
        f.name
        for f in dataclasses.fields(settings)
        if f.name not in known and getattr(settings, f.name) != getattr(type(settings)(), f.name)
    ]


def _flags(names: Iterable[str], settings: Any, default: Any, *, cut: str = "") -> list[str]:
    """Return the options whose settings are not the default."""
    arguments: list[str] = []
    for name in names:
        value, flag = getattr(settings, name.removeprefix(cut)), "--" + name.replace("_", "-")
        if value == getattr(default, name.removeprefix(cut)):
            continue
        if value is True:
            arguments.append(flag)
        elif _text(value).startswith("-"):
            # It would be taken for an option.
            arguments.append(f"{flag}={_text(value)}")
        else:
            arguments += [flag, _text(value)]
    return arguments


def _text(value: Any) -> str:
    """Return a value so that reading it gives the same one."""
    return repr(value) if isinstance(value, float) else str(value)
