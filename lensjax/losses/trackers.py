"""Runs of experiment trackers: CSV exports of Weights & Biases, stores and CSV files of MLflow."""

from __future__ import annotations

import csv
import datetime
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lensjax._messages import nearby
from lensjax._textfiles import decode
from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.evaluations import FINISHED, Evaluations, curves_of_runs, evaluation
from lensjax.losses.names import PATTERNS, expression_of, fitting, worded
from lensjax.losses.points import Repeats, SameStep, Which, check_metric, listed, named, number_of, short, size_of
from lensjax.losses.stores import Run, is_database, read_database, read_files

MODELS = ("model", "model_name", "model_name_or_path", "_name_or_path", "base_model", "base_model_name_or_path")
SAMPLES = ("samples", "train_samples", "max_train_samples", "num_train_samples", "n_samples", "n_train", "train_size")
LOSSES = ("test_loss", "test/loss", "eval_loss", "eval/loss", "final_eval_loss", "final/eval_loss")
PARAMETERS = ("parameters", "num_parameters", "model/num_parameters", "n_params", "params")
RUN_NAMES = ("name", "run name", "run_name", "tags.mlflow.runname")
STATES = ("state", "status")
STEPS = ("train/global_step", "global_step")
"""Columns of a runs table that say after how many steps its losses were measured."""
COUNTERS = ("step", "_step", "relative time (wall)", "relative time (process)", "_runtime")
"""Axes of charts that begin at 0 with the first thing that was logged, be that before or after training."""
BLANK = ("", "null", "none")
"""Cells in which nothing was written."""


def read_wandb(
    path: str | os.PathLike[str],
    *,
    metric: str | None = None,
    model: str | None = None,
    samples: str | None = None,
    pattern: str | None = None,
    which: Which = "lowest",
    repeats: Repeats = "refuse",
    same_step: SameStep = "refuse",
) -> Curves:
    """Read a CSV file exported from Weights & Biases.

    Parameters
    ----------
    path : path
        The runs table (a row for each run: Name, State, configuration, summary) or a chart (a column for each run:
        Step or another axis, "RUN - METRIC", with or without "RUN - METRIC__MIN" and "__MAX").
    metric : str, optional
        Column, or what stands behind "RUN - ". Default: the first of `LOSSES` there is; a chart's only metric.
    model, samples : str, optional
        Columns of the runs table. Default: the first of `MODELS`, of `SAMPLES`, or else the run's name by `pattern`.
    pattern : str, optional
        How a run's name holds model and samples; ``*`` is what to leave out. Default: see
        `lensjax.losses.points.named`.
    which : {"lowest", "last"}
        Of a chart's values.
    repeats : {"refuse", "mean", "lowest"}
        What to do with several runs of one model on equally many samples.
    same_step : {"refuse", "first", "last"}
        What to do with losses that differ at one step of a chart, see `lensjax.losses.evaluations`.

    Raises
    ------
    InputError
        Not such a file; no column of that name; a name that does not fit the pattern; a value that is no number.

    Notes
    -----
    A run that did not finish (state crashed, failed, killed, running) counts as not measured.
    """
    header, rows = table_of(Path(path))
    notes: list[str] = []
    if is_chart([c.lower() for c in header]):
        runs = _chart_runs(str(path), header, rows, metric, pattern, notes)
    else:
        runs = _table_runs(
            str(path), header, [Run(where, row) for where, row in rows], metric, model, samples, pattern, notes
        )
    return curves_of_runs(runs, str(path), which=which, repeats=repeats, same_step=same_step, notes=notes)


def read_mlflow(
    path: str | os.PathLike[str],
    *,
    metric: str | None = None,
    model: str | None = None,
    samples: str | None = None,
    pattern: str | None = None,
    which: Which = "lowest",
    repeats: Repeats = "refuse",
    same_step: SameStep = "refuse",
) -> Curves:
    """Read the runs of MLflow: a database (``mlflow.db``), a file store (``mlruns``) or a CSV file of runs.

    Parameters
    ----------
    path : path
        The database of SQLite or a directory with ``mlflow.db``; the file store or an experiment in it; or a CSV file
        (``mlflow experiments csv``, ``mlflow.search_runs().to_csv``, the page's download). The prefixes "metrics." and
        "params." may be left out in the names below.
    metric : str, optional
        Default: the first of `LOSSES` there is.
    model, samples : str, optional
        Parameters of the runs. Default: the first of `MODELS`, of `SAMPLES`, or else the run's name by `pattern`.
    pattern : str, optional
        How a run's name holds model and samples; ``*`` is what to leave out. Default: see
        `lensjax.losses.points.named`.
    which : {"lowest", "last"}
        Of a store's values, which are kept for each step.
    repeats : {"refuse", "mean", "lowest"}
        What to do with several runs of one model on equally many samples.
    same_step : {"refuse", "first", "last"}
        What to do with losses that differ at one step of a store, see `lensjax.losses.evaluations`.

    Raises
    ------
    InputError
        Not such a store or file; nothing of that name; a value that is no number.
    """
    source = Path(path)
    notes: list[str] = []
    if is_database(source):
        header, runs = read_database(source)
    elif source.is_dir():
        header, runs = read_files(source)
    else:
        header, rows = table_of(source)
        runs = [Run(where, row) for where, row in rows]
    found = _table_runs(str(path), header, runs, metric, model, samples, pattern, notes)
    return curves_of_runs(found, str(path), which=which, repeats=repeats, same_step=same_step, notes=notes)


def table_of(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return header and rows, each with where it stands."""
    if not path.is_file():
        raise InputError(f"{path}: no such file. Name a CSV file of runs.{nearby(path)}")
    try:
        text = decode(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not a readable CSV file: {error}.") from None
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        lines = [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except csv.Error as error:
        raise InputError(f"{path}: not a readable CSV file ({short(error)}); export it again.") from None
    if len(lines) < 2:
        raise InputError(f"{path}: no runs in it; it needs a header and a row for each run or step.")
    header = [c.strip() for c in lines[0][1]]
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(row)} cells, but the header has {len(header)} columns. Export it again."
            )
    return header, [(f"{path}, row {number}", row) for number, row in lines[1:]]


def is_chart(lower: Sequence[str]) -> bool:
    """Return whether a lower-case header is that of a Weights & Biases chart: an axis, then a column for each run."""
    return len(lower) > 1 and " - " not in lower[0] and any(lower[1:]) and all(" - " in c for c in lower[1:] if c)


def _chart_runs(
    source: str,
    header: list[str],
    rows: list[tuple[str, list[str]]],
    metric: str | None,
    pattern: str | None,
    notes: list[str],
) -> list[Evaluations]:
    columns = {}
    for i, name in enumerate(header[1:], start=1):
        if " - " in name and not name.endswith(("__MIN", "__MAX")):
            run, _, of = name.rpartition(" - ")
            if of == "_step":
                continue
            columns[i] = (run.strip(), of.strip())
    metrics = sorted({of for _, of in columns.values()})
    wanted = metrics[0] if metric is None and len(metrics) == 1 else metric
    if wanted not in metrics:
        raise InputError(
            f"{source}: {'it is not clear which metric is the loss' if wanted is None else f'no metric {wanted!r}'}; "
            f"there are: {', '.join(metrics) or 'none'}. Name one: metric=... (--metric)."
        )
    check_metric(wanted, source)
    kept = {i: run for i, (run, of) in columns.items() if of == wanted}
    names = named({run: f"{source}: run {run!r}" for run in kept.values()}, pattern, notes=notes)
    found = []
    for i, run in kept.items():
        cells = [(row[0], row[i], where) for where, row in rows if not _blank(row[i])]
        values = [evaluation(_place(at, where, header[0]), cell, where, header[i]) for at, cell, where in cells]
        model, samples = names[run]
        if header[0].lower() in COUNTERS and any(step == 0 for step, _ in values):
            raise InputError(
                f"{source}: run {run!r} has a loss at {header[0]} 0, where its log begins: that may be before training "
                "or after. Export the chart over train/global_step, or the table of runs, or remove the row."
            )
        found.append(Evaluations(model, samples, values, f"{source}: run {run!r}"))
    return found


def _place(cell: str, where: str, axis: str) -> float:
    """Return where a row of a chart stands on its axis: a number, or for dates the time."""
    try:
        return float(cell)
    except ValueError:
        pass
    try:
        return datetime.datetime.fromisoformat(cell.strip()).timestamp()
    except ValueError:
        raise InputError(
            f"{where}: {axis} is {cell[:40]!r}, neither a number nor a date. Export the chart over a step."
        ) from None


def _blank(cell: str) -> bool:
    return cell.strip().lower() in BLANK


def _table_runs(
    source: str,
    header: list[str],
    runs: list[Run],
    metric: str | None,
    model: str | None,
    samples: str | None,
    pattern: str | None,
    notes: list[str],
) -> list[Evaluations]:
    """Read a table with a row for each run."""
    loss_at = _find(source, header, ("metrics.",), metric, LOSSES, "metric")
    if loss_at is None:
        raise InputError(
            f"{source}: no column of losses ({', '.join(LOSSES)}). Name it: metric=... (--metric); there are: "
            f"{listed(header)}."
        )
    check_metric(header[loss_at], source)
    model_at = _find(source, header, ("params.", "tags."), model, MODELS, "model")
    samples_at = _find(source, header, ("params.", "metrics.", "tags."), samples, SAMPLES, "samples")
    if pattern is not None and samples is None:
        samples_at = None  # who says how names are made, wants the samples from there
    parameters_at = _find(source, header, ("params.", "metrics."), None, PARAMETERS, "parameters")
    name_at = _find(source, header, ("tags.",), None, (*RUN_NAMES, "mlflow.runname"), "name")
    state_at = _find(source, header, (), None, STATES, "state")
    step_at = _find(source, header, ("metrics.",), None, STEPS, "step")
    names: dict[str, tuple[str, float]] = {}
    if model_at is None or samples_at is None:
        if name_at is None:
            missing = "the model" if model_at is None else "the number of training samples"
            raise InputError(
                f"{source}: no column says {missing}, and runs have no names. Name it: model=..., samples=... "
                f"(--model-column, --samples-column); there are: {listed(header)}."
            )
        standing = {run.cells[name_at].strip(): run.where for run in runs}
        if samples_at is None:
            at = name_at if model_at is None else model_at
            models = {run.cells[name_at].strip(): run.cells[at].strip() for run in runs} if at != name_at else None
            names = named(standing, pattern, models=models, notes=notes)
        else:
            names = _models(standing, pattern, {run.cells[name_at].strip(): run.cells[samples_at] for run in runs})
    found = []
    for run in runs:
        where, row = run.where, run.cells
        by_name = names.get(row[name_at].strip()) if name_at is not None else None
        name = row[model_at].strip() if model_at is not None else by_name[0] if by_name else ""
        said = by_name[1] if by_name else math.nan
        size = said if samples_at is None else size_of(row[samples_at], where)
        if not name:
            raise InputError(f"{where}: the run has no model; fill {header[model_at or 0]!r} or remove the run.")
        state = row[state_at].strip().lower() if state_at is not None else ""
        series = run.series.get(header[loss_at])
        losses: list[tuple[float, float]] = []
        if state in FINISHED and series is not None:
            losses = [evaluation(step, loss, where, header[loss_at]) for step, loss in series]
        elif state in FINISHED and not _blank(row[loss_at]):
            step = row[step_at] if step_at is not None and not _blank(row[step_at]) else None
            losses = [evaluation(0 if step is None else step, row[loss_at], where, header[loss_at])]
        stepped = series is None and step_at is not None and not _blank(row[step_at])
        known = "" if parameters_at is None or _blank(row[parameters_at]) else row[parameters_at].strip()
        weights = number_of(known, f"{where}: {header[parameters_at or 0]}") if known else math.nan
        found.append(Evaluations(name, size, losses, where, state, stepped, weights))
    return found


def _models(runs: Mapping[str, str], pattern: str | None, samples: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    """Return the models that runs' names say, where a column holds the samples: the two must agree.

    Raises
    ------
    InputError
        Names that do not hold the number of samples: what they end in may be part of the model's name, or none of it.
    """
    found = {}
    for name, (model, size) in _ends(runs, pattern).items():
        true = size_of(samples[name], runs[name])
        if size != true:
            raise InputError(
                f"{runs[name]}: no column says the model, and the name {name!r} ends in {size:g}, not in the number of "
                f"samples, {true:g}. Name the column of the model: model=... (--model-column)."
            )
        found[name] = (model, true)
    return found


def _ends(runs: Mapping[str, str], pattern: str | None) -> dict[str, tuple[str, float]]:
    """Return models and samples as names have them, taking every number for one of samples."""
    if pattern is not None or worded(runs) is not None:
        return named(runs, pattern)
    fits = next((p for p in PATTERNS if fitting(runs, [expression_of(p)]) is not None), None)
    return named(runs, fits)


def _find(
    source: str, header: list[str], prefixes: tuple[str, ...], given: str | None, known: tuple[str, ...], what: str
) -> int | None:
    """Return the column that was asked for, or the first with a known name; prefixes may be left out."""
    lower = [c.lower() for c in header]
    for name in (given,) if given is not None else known:
        for candidate in (name, *(prefix + name for prefix in prefixes)):
            if candidate.lower() in lower:
                return lower.index(candidate.lower())
    if given is not None:
        raise InputError(f"{source}: no column {given!r} ({what}); there are: {listed(header)}.")
    return None
