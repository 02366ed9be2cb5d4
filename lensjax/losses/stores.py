"""MLflow's own stores of runs: a SQLite database, today's default, or files, the default of earlier versions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lensjax.errors import InputError
from lensjax.losses.points import short

DATABASE, MAGIC = "mlflow.db", b"SQLite format 3\0"
STATES = {1: "running", 2: "scheduled", 3: "finished", 4: "failed", 5: "killed"}
"""States of runs by the numbers that stand for them in a file store (RunStatus in MLflow's protocol)."""
INFINITE = 1.7976931348623157e308
"""What MLflow's database has for infinity: the largest float."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of a table of runs.

    Attributes
    ----------
    where : str
        For messages.
    cells : sequence of str
        One for each column of the table, "" where there is none.
    series : mapping of column to sequence of (step, value)
        All values of a metric in the order in which they were logged, where the source keeps them.
    """

    where: str
    cells: Sequence[str]
    series: Mapping[str, Sequence[tuple[float, float]]] = dataclasses.field(default_factory=dict)


def is_database(path: Path) -> bool:
    """Whether a path is a database of SQLite, or a directory with MLflow's."""
    file = path / DATABASE if path.is_dir() else path
    if not file.is_file():
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # the reader says why


def read_database(path: Path) -> tuple[list[str], list[Run]]:
    """Read MLflow's database as the table that ``search_runs`` would make of it; it is opened for reading only.

    Raises
    ------
    InputError
        A database without MLflow's tables or one that cannot be read; no runs; a file store beside it.
    """
    file = path / DATABASE if path.is_dir() else path
    if path.is_dir() and any(path.rglob("meta.yaml")):
        raise InputError(f"{path}: holds both {DATABASE} and a file store of MLflow. Name the one you mean.")
    try:
        with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            database.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
            runs = database.execute(
                "SELECT r.run_uuid, r.name, r.status FROM runs r LEFT JOIN experiments e USING (experiment_id) "
                "WHERE r.lifecycle_stage = 'active' AND COALESCE(e.lifecycle_stage, 'active') = 'active' "
                "ORDER BY r.start_time, r.rowid"
            ).fetchall()
            texts = {
                kind: database.execute(f"SELECT run_uuid, key, value FROM {kind}").fetchall()
                for kind in ("params", "tags")
            }
            values = database.execute(
                "SELECT run_uuid, key, step, value, is_nan FROM metrics ORDER BY timestamp, step, rowid"
            ).fetchall()
    except sqlite3.Error as error:
        raise InputError(
            f"{file}: not readable as a database of MLflow ({short(error)}). Stop what writes to it, or export its "
            "runs: mlflow experiments csv."
        ) from None
    cells: dict[str, dict[str, str]] = {}
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run, name, status in runs:
        cells[run] = {"tags.mlflow.runName": str(name or ""), "status": str(status or "")}
        series[run] = {}
    for kind, rows in texts.items():
        for run, key, value in rows:
            if run in cells:
                cells[run][f"{kind}.{key}"] = "" if value is None else str(value)
    for run, key, step, value, is_nan in values:
        if run in cells:
            if not isinstance(step, int | float) or not isinstance(value, int | float):
                raise InputError(
                    f"{file}: run {run}: {key} is {str(value)[:40]!r} at step {str(step)[:40]!r}, not a number."
                )
            loss = math.nan if is_nan or abs(value) >= INFINITE else float(value)
            series[run].setdefault(f"metrics.{key}", []).append((float(step), loss))
    if not cells:
        raise InputError(f"{file}: no runs of MLflow in it. Name the database that the runs were logged to.")
    return _table((f"{file}, run {run}", cells[run], series[run]) for run in cells)


def read_files(root: Path) -> tuple[list[str], list[Run]]:
    """Read an MLflow file store as the table that ``search_runs`` would make of it.

    Raises
    ------
    InputError
        No runs; a line that is none of a metric.
    """
    found: list[tuple[str, dict[str, str], dict[str, list[tuple[float, float]]]]] = []
    for meta in sorted(root.rglob("meta.yaml")):
        run = meta.parent
        text = meta.read_text(encoding="utf-8", errors="replace")
        if not (run / "metrics").is_dir() or ".trash" in meta.parts or "lifecycle_stage: deleted" in text:
            continue
        if re.search(r"^run_(id|uuid):", text, re.MULTILINE) is None:
            continue  # a model that was logged has metrics too
        cells = {"status": _state(text)}
        for kind in ("params", "tags"):
            for file in sorted(p for p in (run / kind).rglob("*") if p.is_file()):
                name = file.relative_to(run / kind).as_posix()
                cells[f"{kind}.{name}"] = file.read_text(encoding="utf-8", errors="replace").strip()
        series = {}
        for file in sorted(p for p in (run / "metrics").rglob("*") if p.is_file()):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            values = sorted(
                (_metric_line(file, n, line) for n, line in enumerate(lines, 1) if line), key=lambda found: found[0]
            )
            if values:
                series[f"metrics.{file.relative_to(run / 'metrics').as_posix()}"] = [
                    (step, value) for (_, step), value in values
                ]
        found.append((str(run), cells, series))
    if not found:
        raise InputError(f"{root}: no runs of MLflow in it (meta.yaml beside metrics/). Name the directory mlruns.")
    return _table(found)


def _table(
    runs: Iterable[tuple[str, dict[str, str], Mapping[str, Sequence[tuple[float, float]]]]],
) -> tuple[list[str], list[Run]]:
    """Lay out runs as a table; the cell of a metric is its last value."""
    found = list(runs)
    header = sorted({name for _, cells, series in found for name in (*cells, *series)})
    rows = []
    for where, cells, series in found:
        last = {name: repr(values[-1][1]) for name, values in series.items()}
        rows.append(Run(where, [cells.get(name, last.get(name, "")) for name in header], series))
    return header, rows


def _state(meta: str) -> str:
    """Return the state in a run's ``meta.yaml``, "" if it has none."""
    match = re.search(r"^status:\s*['\"]?(\w+)", meta, re.MULTILINE)
    if match is None:
        return ""
    return STATES.get(int(match[1]), match[1]) if match[1].isdecimal() else match[1].lower()


def _metric_line(file: Path, number: int, line: str) -> tuple[tuple[float, float], float]:
    """Read "timestamp value step" as ((timestamp, step), value)."""
    parts = line.split()
    try:
        return (float(parts[0]), float(parts[2]) if len(parts) > 2 else 0.0), float(parts[1])
    except (ValueError, IndexError):
        raise InputError(
            f"{file}, line {number}: {line!r} is not 'timestamp value step'. Remove the line or leave the run out."
        ) from None
