"""Tables of test losses: packaged ones, and CSV files, wide or long."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from lensjax import data
from lensjax._messages import nearby, number_hint, packaged_like, ungrouped
from lensjax._textfiles import decode, wrong_delimiter
from lensjax.errors import InputError
from lensjax.losses.curves import FACT_COLUMNS, Curves

NAME_COLUMNS = ("config name", "model", "name", "candidate")
PARAMETER_COLUMNS = ("parameters", "params", "size")
FAMILY_COLUMNS = ("family",)
SIZE_LIKE = re.compile(r"\d.*|zero.?shot|(n|d|size|samples?|train|loss)[ _=-]*\d[\d_,.]*[km]?", re.IGNORECASE)
"""Names of columns that are meant as numbers of samples; those that are numbers are read."""
UNSUPPORTED_SUFFIXES = {
    ".xlsx": "export the sheet as CSV in UTF-8",
    ".xls": "export the sheet as CSV in UTF-8",
    ".ods": "export the sheet as CSV in UTF-8",
    ".json": "write its losses as CSV",
    ".parquet": "save it as CSV",
}
"""What to do with tables of other kinds."""
SAMPLE_COLUMNS = ("samples", "n_samples", "train_samples", "d")


def read_losses(source: str | os.PathLike[str], *, repeats: str = "refuse") -> Curves:
    """Read a table of test losses.

    Parameters
    ----------
    source : str or path
        ``published:flan``, ``published:gigaword``, ``published:wmt19``, ``live:definitions``, ``live:novels``,
        ``live:packages`` (packaged: 30 models of ICML 2024, and small ones of our own, fine-tuned here on up to 3,200
        samples), or a CSV file (tab-separated if it ends in ``.tsv``), either wide (one row per model, one column per
        number of samples) or long (one row per measurement, with the columns model, samples, loss).
        Optional columns: parameters (or ``size``, as in the published tables), family, and those in `FACT_COLUMNS`. An
        empty cell is a point that was not measured.
    repeats : {"refuse", "mean", "lowest"}
        What to do with several rows of a long table for one model and equally many samples, of other seeds say.

    Returns
    -------
    Curves

    Raises
    ------
    InputError
        No such file or packaged table; no size column; fewer than two models; a repeated model or size; a loss or
        parameter count that is not a positive, finite number, or another fact that is not finite. The message names
        the file, the row and the column.

    Examples
    --------
    >>> curves = read_losses("published:flan")
    >>> len(curves), curves.names[0], curves.sizes[-1]
    (30, 'MBZUAI/LaMini-GPT-124M', np.float64(1638400.0))
    """
    if repeats not in ("refuse", "mean", "lowest"):
        raise InputError(f"repeats={repeats!r} is not known; choose 'refuse', 'mean' or 'lowest'.")
    text = os.fspath(source)
    kind, colon, name = text.partition(":")
    if not colon or kind not in data.TABLES:
        return _read_csv(Path(text), text, repeats)
    names = data.TABLES[kind]
    if name not in names:
        known = ", ".join(f"{kind}:{n}" for n in names)
        raise InputError(f"{text}: no such {kind} table. There are: {known}.{packaged_like(name, data.TABLES)}")
    return _read_csv(data.path(kind, f"{name}.csv"), text, repeats)


def _read_csv(path: Path, source: str, repeats: str) -> Curves:
    if path.is_dir():
        raise InputError(f"{source}: is a directory; name a CSV file of losses.")
    if not path.exists():
        packaged = ", ".join(f"{kind}:{name}" for kind, names in data.TABLES.items() for name in names)
        raise InputError(
            f"{source}: no such file. Give a CSV file of losses or one of {packaged}."
            f"{nearby(path) or packaged_like(path.name, data.TABLES)}"
        )
    lines = _lines(path, source)
    if not lines:
        raise InputError(f"{source}: the file is empty; it needs a header and at least two models.")
    header, rows = [c.strip() for c in lines[0][1]], lines[1:]
    for number, row in rows:
        if len(row) != len(header):
            raise InputError(
                f"{source}, row {number}: {len(row)} cells, but the header has {len(header)} columns. Leave a cell "
                "empty, not out, where nothing was measured."
            )
    lower = [c.lower() for c in header]
    if "loss" in lower and _sample_column(lower) is not None:
        return _from_long(source, lower, rows, repeats)
    return _from_wide(source, header, [row for _, row in rows])


def _lines(path: Path, source: str) -> list[tuple[int, list[str]]]:
    """Return the number of each line that is not empty, and its cells."""
    if path.suffix in UNSUPPORTED_SUFFIXES:
        raise InputError(
            f"{source}: {UNSUPPORTED_SUFFIXES[path.suffix]}; a table of losses is a CSV file (.csv, or .tsv with tabs)."
        )
    try:
        text = decode(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{source}: not a readable CSV file: {error}.") from error
    delimiter = "\t" if path.suffix == ".tsv" else ","
    separated = wrong_delimiter(text)
    if separated and delimiter == ",":
        raise InputError(
            f"{source}: {separated} separate its columns ({text.lstrip().splitlines()[0][:60]!r}); save it with commas "
            "between columns and points in numbers."
        )
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return [(reader.line_num, line) for line in reader if any(c.strip() for c in line)]
    except csv.Error as error:
        raise InputError(f"{source}: not a readable CSV file ({error}); save it again.") from error


def _sample_column(lower: list[str]) -> int | None:
    """Return the column of a long table that holds numbers of samples; "size" is one if there is no better name."""
    return _column(lower, (*SAMPLE_COLUMNS, "size"))


def _column(header: list[str], candidates: tuple[str, ...]) -> int | None:
    lower = [c.lower() for c in header]
    return next((lower.index(c) for c in candidates if c in lower), None)


def _size(text: str) -> float | None:
    """Return the number of samples that a text names (1600, 1,600, 1_600 or 1.6e3), or None if it names none."""
    try:
        return float(ungrouped(text))
    except ValueError:
        return None


def _number(text: str, what: str, unit: str) -> float:
    """Return a positive finite number, NaN for an empty cell."""
    text = text.strip()
    if not text:
        return np.nan
    try:
        value = float(text)
    except ValueError:
        raise InputError(
            f"{what} is {text!r}, not a number. Use {unit}; leave the cell empty if it was not measured."
            f"{number_hint(text)}"
        ) from None
    if not (np.isfinite(value) and value > 0):
        raise InputError(
            f"{what} is {text}; it must be positive and finite ({unit}). Leave the cell empty if it was not measured."
        )
    return value


def _fact(text: str, what: str) -> float:
    """Return a finite number of any sign, NaN for an empty cell."""
    text = text.strip()
    try:
        value = float(text) if text else np.nan
    except ValueError:
        raise InputError(
            f"{what} is {text!r}, not a number; leave the cell empty if it is not known.{number_hint(text)}"
        ) from None
    if text and not np.isfinite(value):
        raise InputError(f"{what} is {text}; it must be finite. Leave the cell empty if it is not known.")
    return value


def _fact_columns(header: list[str]) -> dict[str, int]:
    """Return the columns that hold facts."""
    lower = [c.lower() for c in header]
    return {name: lower.index(name) for name in FACT_COLUMNS if name in lower}


def _whole(value: float, what: str) -> float:
    if not np.isfinite(value) or value < 0 or value != int(value):
        hint = " Does the first line name the columns?" if value > 0 and np.isfinite(value) else ""
        raise InputError(f"{what} is {value:g}; a number of training samples is a whole number, 0 or more.{hint}")
    return value


def _from_wide(source: str, header: list[str], rows: list[list[str]]) -> Curves:
    sized = [(i, _size(c)) for i, c in enumerate(header)]
    unclear = next((c for i, c in enumerate(header) if sized[i][1] is None and SIZE_LIKE.fullmatch(c)), None)
    if unclear is not None:
        number = "0" if "shot" in unclear.lower() else "the number alone, e.g. 1600"
        raise InputError(f"{source}: column {unclear!r} is not a number of samples; write {number}.")
    columns = [(i, _whole(s, f"{source}: column {header[i]!r}")) for i, s in sized if s is not None]
    if not columns:
        raise InputError(
            f"{source}: no size column. Name columns after the number of training samples (0, 200, 400, ...), or use "
            f"the columns model, samples, loss. Found: {', '.join(header)}."
            + (" If its columns are models, turn it: a row for each model." if _sample_column(header) == 0 else "")
        )
    sizes = [s for _, s in columns]
    repeated = [s for s, count in Counter(sizes).items() if count > 1]
    if repeated:
        raise InputError(f"{source}: size {repeated[0]:g} has more than one column; keep one.")
    name_at, facts_at = _column(header, NAME_COLUMNS), _fact_columns(header)
    if name_at is None:
        name_at = next((i for i, s in sized if s is None and i not in facts_at.values()), None)
    if name_at is None:
        raise InputError(f"{source}: no column with the models' names; add a column 'model'.")
    parameters_at, family_at = _column(header, PARAMETER_COLUMNS), _column(header, FAMILY_COLUMNS)
    columns.sort(key=lambda c: c[1])
    names = _names(source, [row[name_at] for row in rows])
    losses = [
        [_number(row[i], f"{source}: loss of {name} at {s:g} samples", "nats per token") for i, s in columns]
        for name, row in zip(names, rows, strict=True)
    ]
    parameters = None
    if parameters_at is not None:
        parameters = np.array(
            [
                _number(row[parameters_at], f"{source}: {header[parameters_at]} of {name}", "number of weights")
                for name, row in zip(names, rows, strict=True)
            ]
        )
    return Curves(
        names=names,
        sizes=np.array([s for _, s in columns]),
        losses=np.array(losses, np.float64).reshape(len(names), len(columns)),
        parameters=parameters,
        families=None if family_at is None else tuple(row[family_at].strip() for row in rows),
        source=source,
        facts={
            fact: np.array(
                [_fact(row[i], f"{source}: {header[i]} of {name}") for name, row in zip(names, rows, strict=True)]
            )
            for fact, i in facts_at.items()
        },
    )


def _from_long(source: str, header: list[str], rows: list[tuple[int, list[str]]], repeats: str) -> Curves:
    name_at = _column(header, NAME_COLUMNS)
    if name_at is None:
        raise InputError(f"{source}: no column with the models' names; add a column 'model'.")
    sample_at, loss_at = _sample_column(header), header.index("loss")
    assert sample_at is not None
    parameters_at, family_at = _column(header, PARAMETER_COLUMNS), _column(header, FAMILY_COLUMNS)
    parameters_at = None if parameters_at == sample_at else parameters_at
    facts_at = _fact_columns(header)
    others: dict[str, dict[str, float]] = {}
    points: dict[str, dict[float, list[float]]] = {}
    facts: dict[str, tuple[float, str]] = {}
    for number, row in rows:
        where = f"{source}, row {number}"
        name = row[name_at].strip()
        if not name:
            raise InputError(f"{where}: the model has no name; fill the column {header[name_at]!r}.")
        size = _size(row[sample_at])
        if size is None:
            hint = number_hint(row[sample_at])
            raise InputError(f"{where}: samples is {row[sample_at]!r}, not a number of training samples.{hint}")
        curve = points.setdefault(name, {})
        if _whole(size, f"{where}: samples") in curve and repeats == "refuse":
            raise InputError(
                f"{where}: {name} at {size:g} samples is there twice; keep one row (or their mean: --repeats mean)."
            )
        loss = _number(row[loss_at], f"{where}: loss of {name} at {size:g} samples", "nats per token")
        curve.setdefault(size, []).extend([] if np.isnan(loss) else [loss])
        parameters = np.nan
        if parameters_at is not None:
            parameters = _number(row[parameters_at], f"{where}: parameters of {name}", "number of weights")
        fact = (parameters, "" if family_at is None else row[family_at].strip())
        known = facts.setdefault(name, fact)
        if not (np.isnan(fact[0]) or np.isnan(known[0]) or fact[0] == known[0]):
            raise InputError(f"{where}: {name} has {fact[0]:g} parameters here and {known[0]:g} above; use one number.")
        own = others.setdefault(name, {})
        for column, i in facts_at.items():
            value = _fact(row[i], f"{where}: {column} of {name}")
            if not np.isnan(value) and own.setdefault(column, value) != value:
                raise InputError(f"{where}: {column} of {name} is {value:g} here and {own[column]:g} above; use one.")
    names = _names(source, list(points))

    def together(losses: list[float] | None) -> float:
        if not losses:
            return float("nan")
        return min(losses) if repeats == "lowest" else float(np.mean(losses))

    sizes = sorted({s for curve in points.values() for s in curve})
    return Curves(
        names=names,
        sizes=np.array(sizes),
        losses=np.array([[together(points[n].get(s)) for s in sizes] for n in names]).reshape(len(names), len(sizes)),
        parameters=None if parameters_at is None else np.array([facts[n][0] for n in names]),
        families=None if family_at is None else tuple(facts[n][1] for n in names),
        source=source,
        facts={column: np.array([others[n].get(column, np.nan) for n in names]) for column in facts_at},
    )


def _names(source: str, names: list[str]) -> tuple[str, ...]:
    names = [n.strip() for n in names]
    if "" in names:
        raise InputError(f"{source}, row {names.index('') + 2}: the model has no name.")
    repeated = [n for n, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{source}: model {repeated[0]} has more than one row; give each candidate one name.")
    if len(names) < 2:
        raise InputError(f"{source}: {len(names)} model(s); choosing needs at least two candidates.")
    return tuple(names)
