"""Where samples come from: local files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lensjax._files import parse_json
from lensjax._messages import did_you_mean, nearby
from lensjax._textfiles import LFS, POINTER, decode, wrong_delimiter
from lensjax.errors import InputError
from lensjax.tasks.presets import PRESETS

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".txt", ".txt.gz")
KINDS = f"a file ({', '.join(SUFFIXES)}), the id of a data set (owner/name), or one of {', '.join(PRESETS)}"

ROW_FORMAT = 'each line is one object, such as {"input": "2 + 2", "target": "4"}'
REMEDIES = {
    ".json": f"Save it as .jsonl: {ROW_FORMAT}.",
    ".ndjson": "If each line is a JSON object, end its name in .jsonl.",
    ".tsv": "Save it as .csv, with commas between the columns.",
    ".xlsx": "Export the sheet as CSV in UTF-8.",
    ".zip": "Unpack it.",
    ".zst": "Unpack it.",
    ".arrow": "Save it as Parquet.",
}
"""What to do with files of other kinds."""

PARQUET, GZIP = b"PAR1", b"\x1f\x8b"
Row = tuple[str, Mapping[str, Any]]
"""Where a sample is, for messages, and its fields."""


def file_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a local file; each line of a text file is a row with the field `text`, blank lines are skipped.

    Raises
    ------
    InputError
        No such file, a file of another kind, or one that does not parse.
    """
    name = path.name.lower()
    if not path.is_file():
        raise missing(path)
    if not name.endswith(SUFFIXES):
        remedy = REMEDIES.get(Path(name.removesuffix(".gz")).suffix, "")
        raise InputError(f"{path}: unknown kind of file. --task takes {KINDS}.{remedy and ' '}{remedy}")
    if name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    raw = path.read_bytes()
    if name.endswith(".gz") and not raw.startswith((GZIP, LFS)):
        raise InputError(f"{path}: not readable as gzip, for it is not compressed; take .gz off its name.")
    try:
        text = decode(gzip.decompress(raw) if name.endswith(".gz") and not raw.startswith(LFS) else raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: not readable as gzip ({str(error).rstrip('.')}); compress it or download it again."
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not readable: {error}.") from error
    if ".csv" in name:
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if ".txt" in name:
            yield where, {"text": line.removesuffix("\r")}
            continue
        try:
            row = parse_json(line, surrogates=False)
        except ValueError as error:
            reason = f"not JSON ({str(error).partition(': line')[0]})"
            if number == 1 and line.strip() in ("[", "{", "[{"):
                reason += ", for it goes on in the next lines"
            raise InputError(f"{where}: {reason}. Mend it: {ROW_FORMAT}.") from None
        if not isinstance(row, dict):
            what = f"a {type(row).__name__}, not an object with named fields"
            raise InputError(f"{where}: {what}. Write the samples one by one: {ROW_FORMAT}.")
        yield where, row


def missing(path: Path) -> InputError:
    """Return an error that says that there is no such file, and which one may be meant."""
    hint = nearby(path) or did_you_mean(path.name, PRESETS)
    return InputError(f"{path}: no such file. --task takes {KINDS}.{hint}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        start = file.read(len(LFS))
    if not start.startswith(PARQUET):
        reason = POINTER if start == LFS else f"it does not begin with {PARQUET.decode()}: export or download it again"
        raise InputError(f"{path}: cannot be read as Parquet: {reason}.")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{path}: cannot be read as Parquet ({reason}): export or download it again.") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", row


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    separated = wrong_delimiter(text)
    if separated:
        raise InputError(
            f"{path}: {separated} separate its columns ({text.lstrip().splitlines()[0][:60]!r}); save it with commas, "
            "and quotes around texts that hold commas."
        )
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
        raise InputError(
            f"{path}, line {reader.line_num}: not CSV ({error}). Close each quote; one inside a text is doubled."
        ) from None


def cannot_load(dataset: str, config: str | None, split: str, error: Exception) -> InputError:
    """Return an error that says why `datasets` cannot load a data set, and what to check."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    shown = "" if config is None else f", configuration {config!r}"
    return InputError(
        f"--task {dataset}{shown}, split {split!r}: cannot be loaded ({reason}). Check the id, the configuration "
        f"(--dataset-config) and the split (--split), or give a local file{_file_inside(Path(dataset))}."
    )


def _file_inside(place: Path) -> str:
    """Return " such as FILE", a file of samples in a directory, or ""."""
    files = sorted(file for file in place.iterdir() if file.name.endswith(SUFFIXES)) if place.is_dir() else []
    return f" such as {files[0]}" if files else ""


def _words(place: Path, config: str | None) -> dict[str, bool]:
    """Return options for `datasets` with which "null", "NA" and the like in a directory's CSV files stay words.

    So they are read where one such file is given by its name. Files of other kinds have no such setting.
    """
    import datasets

    if not place.is_dir():
        return {}
    try:
        settings = datasets.load_dataset_builder(str(place), config).config
    except Exception:  # of many types; whoever loads the directory meets it again, and tells
        return {}
    return {"keep_default_na": False} if hasattr(settings, "keep_default_na") else {}


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

    place = Path(name)
    if place.is_dir() and not any(place.iterdir()):
        raise InputError(f"--task {name}: the directory is empty. --task takes {KINDS}.")
    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision, **_words(place, config))
    except Exception as error:
        # The library raises many types, depending on the hub's answer, the file's format and the network.
        raise cannot_load(name, config, split, error) from error
    rows = range(len(table))
    if limit is not None and limit < len(table):
        import numpy as np

        rows = np.random.default_rng(seed).permutation(len(table))[:limit].tolist()
    for number in rows:
        yield f"{name}, {split} row {number}", table[number]
