"""Where samples come from: local files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lensjax.errors import InputError
from lensjax.tasks.presets import PRESETS

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".txt", ".txt.gz")
KINDS = f"a file ({', '.join(SUFFIXES)}), the id of a data set (owner/name), or one of {', '.join(PRESETS)}"

Row = tuple[str, Mapping[str, Any]]
"""Where a sample is, for messages, and its fields."""


def file_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a local file; each line of a text file is a row with the field `text`, blank ones are left out.

    Raises
    ------
    InputError
        No such file, a file of another kind, or one that does not parse.
    """
    name = path.name.lower()
    if not path.is_file():
        raise InputError(f"{path}: no such file. --task takes {KINDS}.")
    if not name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown kind of file. --task takes {KINDS}.")
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable ({error}); save it as UTF-8 text.") from error
    if ".csv" in name:
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if ".txt" in name:
            yield where, {"text": line}
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({str(error).partition(': line')[0]}).") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: a {type(row).__name__}, not an object with named fields.")
        yield where, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}).") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", row


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        repeated = next((name for name in header if header.count(name) > 1), None)
        if repeated is not None:
            raise InputError(f"{path}: the header names {repeated!r} twice; rename one column.")
        for cells in reader:
            if not cells:
                continue
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells, but the header has {len(header)} columns. "
                    "Put quotes around texts with commas."
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error}).") from None


def dataset_rows(
    name: str, config: str | None, split: str, revision: str | None, *, limit: int | None = None, seed: int = 0
) -> Iterator[Row]:
    """Read the rows of a data set through the `datasets` library, which never runs a repository's code.

    Parameters
    ----------
    name : str
        Id on the hub, or a local directory that `datasets` reads.
    config, revision : str or None
    split : str
        Name of the split; slices such as ``train[:10%]`` are the library's.
    limit : int, optional
        Rows that are read, drawn by `seed`.
    seed : int

    Raises
    ------
    InputError
        If there is no such data set, configuration, split or revision, or it cannot be reached.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:
        # What the library raises has many types: by the hub's answer, by the file's format, by the network.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        of = "" if config is None else f", configuration {config!r}"
        raise InputError(
            f"--task {name}{of}, split {split!r}: cannot be loaded ({reason}). Check the id, the configuration "
            "(--dataset-config) and the split (--split), or give a local file."
        ) from error
    order = range(len(found))
    if limit is not None and limit < len(found):
        import numpy as np

        order = np.random.default_rng(seed).permutation(len(found))[:limit].tolist()
    for number in order:
        yield f"{name}, {split} row {number}", found[number]
