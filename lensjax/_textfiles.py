"""Decoding of users' text files, with a reason and a remedy where a file is not text."""

from __future__ import annotations

from pathlib import Path

LFS = b"version https://git-lfs"
POINTER = "it is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
"""Byte order marks of UTF-16 and UTF-32; that of UTF-8 is skipped."""
MAGIC = {
    b"PK\x03\x04": "it is a spreadsheet or a zip archive: export it as CSV, or unpack it",
    b"PAR1": "it is a Parquet file: end its name in .parquet",
    b"\x1f\x8b": "it is compressed by gzip: end its name in .gz, or unpack it with gunzip",
    b"%PDF": "it is a PDF file: save its text",
    LFS: POINTER,
}
"""First bytes of files of other kinds, and what to do with them."""
DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def decode(raw: bytes) -> str:
    """Return a file's contents as text, without UTF-8's byte order mark.

    Raises
    ------
    ValueError
        If it is no UTF-8 text; the message says what it is and what to do.
    """
    if raw.startswith(BYTE_ORDER_MARKS):
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
    """Return the name of the character that separates columns instead of commas in a CSV file's first line, or "".

    Examples
    --------
    >>> wrong_delimiter("model;0;200")
    'semicolons'
    """
    first = text.lstrip().partition("\n")[0]
    if "," in first:
        return ""
    return next((name for mark, name in DELIMITERS.items() if mark in first), "")


def unreadable(path: Path, error: Exception, remedy: str = "download it again") -> str:
    """Return why a binary file cannot be read, to end a sentence: a Git LFS pointer, or the error and a remedy."""
    with path.open("rb") as file:
        pointer = file.read(len(LFS)) == LFS
    return f": {POINTER}" if pointer else f" ({error}); {remedy}"
