"""What messages about a user's input end with: the name that was probably meant, why a file is no text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

LFS = b"version https://git-lfs"
POINTER = "it is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
"""Byte order marks of UTF-16 and UTF-32; UTF-8's is no harm."""

MAGIC = {
    b"PK\x03\x04": "it is a spreadsheet or a zip archive: export it as CSV, or unpack it",
    b"PAR1": "it is a Parquet file: end its name in .parquet",
    b"\x1f\x8b": "it is compressed by gzip: end its name in .gz, or unpack it with gunzip",
    b"%PDF": "it is a PDF file: save its text",
    LFS: POINTER,
}
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def did_you_mean(given: str, known: Iterable[str], before: str = "") -> str:
    """Return " Did you mean NAME?" for the known name most like the one given, "" if none is.

    What stands before all of them alike, such as the dashes of options, is only put into the hint.

    Examples
    --------
    >>> did_you_mean("Avraged", ["averaged", "lens"])
    ' Did you mean averaged?'
    """
    return _meant(given, {name.casefold(): f"{before}{name}" for name in known})


def packaged_like(given: str, tables: Mapping[str, Iterable[str]]) -> str:
    """Return " Did you mean KIND:NAME?" for the packaged table whose name is most like the one given, "" if none is.

    Examples
    --------
    >>> packaged_like("novel", {"live": ["novels", "packages"], "published": ["flan"]})
    ' Did you mean live:novels?'
    """
    return _meant(given, {name.casefold(): f"{kind}:{name}" for kind, names in tables.items() for name in names})


def _meant(given: str, known: Mapping[str, str]) -> str:
    """Return the hint for the key most like a text, by its value."""
    found = difflib.get_close_matches(given.casefold(), known, n=1)
    return f" Did you mean {known[found[0]]}?" if found else ""


def nearby(path: Path) -> str:
    """Return " Did you mean PATH?" for a name like it in the same directory, "" if there is none."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    folded = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.with_name(folded[0])}?" if folded else ""


def ungrouped(number: str) -> str:
    """Return a number's text without the marks between thousands: 1,600 and 1_600, but not 1,5 and 1,6000.

    Examples
    --------
    >>> ungrouped("1,638,400"), ungrouped("0,5")
    ('1638400', '0,5')
    """
    grouped = re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d*)?", number.strip())
    return (number.replace(",", "") if grouped else number).replace("_", "")


def number_hint(text: str) -> str:
    """Return what may be wrong with a text that is no number, a sentence after a space, or ""."""
    if re.fullmatch(r"\d{1,3}(\.\d{3}){2,}", text.strip()):
        return f" Write {text.strip().replace('.', '')}."
    found = re.fullmatch(r"(\d+(?:[.,]\d+)?(?:[eE][+-]?\d+)?)\s*([kKmMbB%]?)", text.strip())
    if found is None:
        return ""
    number, unit = found[1].replace(",", "."), found[2].upper()
    factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(unit)
    if factor is not None:
        return f" Write {float(number) * factor:.0f}."
    if unit:
        return " It is a percentage."
    return f" Write {number}: the decimal sign is a point." if "," in text else ""


def decode(raw: bytes) -> str:
    """Return a file's contents as text, without UTF-8's byte order mark.

    Raises
    ------
    ValueError
        If it is no UTF-8 text; the message says what it is and how to mend it.
    """
    if raw.startswith(MARKS):
        raise ValueError("it is UTF-16 text: save it as UTF-8")
    for start, reason in MAGIC.items():
        if raw.startswith(start):
            raise ValueError(reason)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = raw[: error.start].count(b"\n") + 1, raw[error.start]
        meant = f", which is {chr(byte)!r} in Latin-1" if byte >= 0xA0 else ""
        raise ValueError(f"line {line} has the byte 0x{byte:02x}{meant}: save it as UTF-8 text") from None
    if "\0" in text:
        raise ValueError("it holds NUL bytes, as UTF-16 text and programs' own files do: save it as UTF-8 text")
    return text


def wrong_delimiter(text: str) -> str:
    """Return what separates the columns in the first line of a CSV file instead of commas, in words, or "".

    Examples
    --------
    >>> wrong_delimiter("model;0;200")
    'semicolons'
    """
    first = text.lstrip().partition("\n")[0]
    if "," in first:
        return ""
    return next((name for mark, name in DELIMITERS.items() if mark in first), "")
