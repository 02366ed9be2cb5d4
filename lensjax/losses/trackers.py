"""Runs of experiment trackers: CSV exports of Weights & Biases, stores and CSV files of MLflow."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lensjax._messages import nearby
from lensjax._textfiles import decode
from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.points import (
    Point,
    Repeats,
    Which,
    chosen_of,
    curves_of,
    listed,
    loss_of,
    named,
    number_of,
    short,
    size_of,
)

MODELS = ("model", "model_name", "model_name_or_path", "_name_or_path", "base_model", "base_model_name_or_path")
SAMPLES = ("samples", "train_samples", "max_train_samples", "num_train_samples", "n_samples", "n_train", "train_size")
LOSSES = ("test_loss", "test/loss", "eval_loss", "eval/loss", "final_eval_loss", "final/eval_loss")
PARAMETERS = ("parameters", "num_parameters", "model/num_parameters", "n_params", "params")
RUN_NAMES = ("name", "run name", "run_name", "tags.mlflow.runname")
STATES = ("state", "status")
FINISHED = ("finished", "")
STEPS = ("step", "_step", "relative time (wall)", "relative time (process)", "wall time", "epoch", "train/global_step")


def read_wandb(
    path: str | os.PathLike[str],
    *,
    metric: str | None = None,
    model: str | None = None,
    samples: str | None = None,
    pattern: str | None = None,
    which: Which = "lowest",
    repeats: Repeats = "refuse",
) -> Curves:
    """Read a CSV file exported from Weights & Biases.

    Parameters
    ----------
    path : path
        The runs table (a row for each run: Name, State, configuration, summary) or a chart (a column for each run:
        Step, "RUN - METRIC", with or without "RUN - METRIC__MIN" and "__MAX").
    metric : str, optional
        Column, or what stands behind "RUN - ". Default: the first of `LOSSES` there is; a chart's only metric.
    model, samples : str, optional
        Columns of the runs table. Default: the first of `MODELS`, of `SAMPLES`, or else the run's name by `pattern`.
    pattern : str, optional
        How a run's name holds model and samples. Default: the first of `PATTERNS` that fits all runs.
    which : {"lowest", "last"}
        Of a chart's values.
    repeats : {"refuse", "mean", "lowest"}
        What to do with several runs of one model on equally many samples.

    Raises
    ------
    InputError
        Not such a file; no column of that name; a name that does not fit the pattern; a value that is no number.

    Notes
    -----
    A run that did not finish (state crashed, failed, killed, running) counts as not measured.
    """
    header, rows = table_of(Path(path))
    if is_chart([c.lower() for c in header]):
        return curves_of(_chart_points(str(path), header, rows, metric, pattern, which), str(path), repeats)
    return curves_of(_run_points(str(path), header, rows, metric, model, samples, pattern), str(path), repeats)


def read_mlflow(
    path: str | os.PathLike[str],
    *,
    metric: str | None = None,
    model: str | None = None,
    samples: str | None = None,
    pattern: str | None = None,
    which: Which = "lowest",
    repeats: Repeats = "refuse",
) -> Curves:
    """Read the runs of MLflow: a file store (``mlruns``) or a CSV file of runs.

    Parameters
    ----------
    path : path
        The store, an experiment in it, or a CSV file (``mlflow experiments csv``, ``mlflow.search_runs().to_csv``, the
        page's download): the prefixes "metrics." and "params." may be left out in the names below.
    metric : str, optional
        Default: the first of `LOSSES` there is.
    model, samples : str, optional
        Parameters of the runs. Default: the first of `MODELS`, of `SAMPLES`, or else the run's name by `pattern`.
    pattern : str, optional
        How a run's name holds model and samples. Default: the first of `PATTERNS` that fits all runs.
    which : {"lowest", "last"}
        Of a store's values, which are kept for each step.
    repeats : {"refuse", "mean", "lowest"}
        What to do with several runs of one model on equally many samples.

    Raises
    ------
    InputError
        Not such a store or file; nothing of that name; a value that is no number.
    """
    source = Path(path)
    if source.is_dir():
        header, rows = _store(source, which)
    else:
        header, rows = table_of(source)
    return curves_of(_run_points(str(path), header, rows, metric, model, samples, pattern), str(path), repeats)


def _store(root: Path, which: Which) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Read an MLflow file store as the table that ``search_runs`` would make of it."""
    found: list[tuple[str, dict[str, str]]] = []
    for meta in sorted(root.rglob("meta.yaml")):
        run = meta.parent
        text = meta.read_text(encoding="utf-8", errors="replace")
        if not (run / "metrics").is_dir() or ".trash" in meta.parts or "lifecycle_stage: deleted" in text:
            continue
        cells = {}
        for kind in ("params", "tags"):
            for file in sorted(p for p in (run / kind).rglob("*") if p.is_file()):
                name = file.relative_to(run / kind).as_posix()
                cells[f"{kind}.{name}"] = file.read_text(encoding="utf-8", errors="replace").strip()
        for file in sorted(p for p in (run / "metrics").rglob("*") if p.is_file()):
            values = [_metric_line(file, n, line) for n, line in enumerate(file.read_text().splitlines(), 1) if line]
            if values:
                last = [value for _, value in sorted(values)]
                cells[f"metrics.{file.relative_to(run / 'metrics').as_posix()}"] = repr(chosen_of(last, which))
        found.append((str(run), cells))
    if not found:
        raise InputError(f"{root}: no runs of MLflow in it (meta.yaml beside metrics/). Name the directory mlruns.")
    header = sorted({name for _, cells in found for name in cells})
    return header, [(where, [cells.get(name, "") for name in header]) for where, cells in found]


def _metric_line(file: Path, number: int, line: str) -> tuple[tuple[float, float], float]:
    """Read "timestamp value step" as ((step, timestamp), value)."""
    parts = line.split()
    try:
        return (float(parts[2]) if len(parts) > 2 else 0.0, float(parts[0])), float(parts[1])
    except (ValueError, IndexError):
        raise InputError(
            f"{file}, line {number}: {line!r} is not 'timestamp value step'. Remove the line or leave the run out."
        ) from None


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
    """Whether a header, in lower case, is that of a chart of Weights & Biases: steps, then a column for each run."""
    return bool(lower) and lower[0] in STEPS and all(" - " in c for c in lower[1:] if c)


def _chart_points(
    source: str,
    header: list[str],
    rows: list[tuple[str, list[str]]],
    metric: str | None,
    pattern: str | None,
    which: Which,
) -> list[Point]:
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
            f"there are: {', '.join(metrics) or 'none'}. Name one: metric=..."
        )
    kept = {i: run for i, (run, of) in columns.items() if of == wanted}
    names = named({run: f"{source}: run {run!r}" for run in kept.values()}, pattern)
    points = []
    for i, run in kept.items():
        values = [loss_of(row[i], f"{where}: {header[i]}") for where, row in rows if row[i].strip()]
        model, samples = names[run]
        loss = chosen_of(values, which) if values else np.nan
        points.append(Point(model, samples, loss, np.nan, f"{source}: run {run!r}"))
    return points


def _run_points(
    source: str,
    header: list[str],
    rows: list[tuple[str, list[str]]],
    metric: str | None,
    model: str | None,
    samples: str | None,
    pattern: str | None,
) -> list[Point]:
    """Read a table with a row for each run."""
    loss_at = _find(source, header, ("metrics.",), metric, LOSSES, "metric")
    if loss_at is None:
        raise InputError(
            f"{source}: no column of losses ({', '.join(LOSSES)}). Name it: metric=...; there are: {listed(header)}."
        )
    model_at = _find(source, header, ("params.", "tags."), model, MODELS, "model")
    samples_at = _find(source, header, ("params.", "metrics.", "tags."), samples, SAMPLES, "samples")
    parameters_at = _find(source, header, ("params.", "metrics."), None, PARAMETERS, "parameters")
    name_at = _find(source, header, ("tags.",), None, (*RUN_NAMES, "mlflow.runname"), "name")
    state_at = _find(source, header, (), None, STATES, "state")
    names: dict[str, tuple[str, float]] = {}
    if model_at is None or samples_at is None:
        if name_at is None:
            missing = "the model" if model_at is None else "the number of training samples"
            raise InputError(
                f"{source}: no column says {missing}, and runs have no names. Name it: model=..., samples=...; there "
                f"are: {listed(header)}."
            )
        names = named({row[name_at].strip(): where for where, row in rows}, pattern)
    points = []
    for where, row in rows:
        by_name = names.get(row[name_at].strip()) if name_at is not None else None
        name = row[model_at].strip() if model_at is not None else by_name[0] if by_name else ""
        size = size_of(row[samples_at], where) if samples_at is not None else by_name[1] if by_name else np.nan
        if not name:
            raise InputError(f"{where}: the run has no model; fill {header[model_at or 0]!r} or remove the run.")
        done = state_at is None or row[state_at].strip().lower() in FINISHED
        loss = loss_of(row[loss_at], f"{where}: {header[loss_at]}") if row[loss_at].strip() and done else np.nan
        known = row[parameters_at].strip() if parameters_at is not None else ""
        weights = number_of(known, f"{where}: {header[parameters_at or 0]}") if known else np.nan
        points.append(Point(name, size, loss, weights, where))
    return points


def _find(
    source: str, header: list[str], prefixes: tuple[str, ...], given: str | None, known: tuple[str, ...], what: str
) -> int | None:
    """Return the column that is asked for, or the first that is known by its name; prefixes may be left out."""
    lower = [c.lower() for c in header]
    for name in (given,) if given is not None else known:
        for candidate in (name, *(prefix + name for prefix in prefixes)):
            if candidate.lower() in lower:
                return lower.index(candidate.lower())
    if given is not None:
        raise InputError(f"{source}: no column {given!r} ({what}); there are: {listed(header)}.")
    return None
