"""How results are shown: one line at a prompt, a table in a notebook, text that is safe on a terminal and in HTML."""

from __future__ import annotations

import html
import math
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Sequence

import numpy as np

MOST_ROWS = 60
# What XML 1.0 allows; anything else in a name would make a document malformed.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names and how many more there are, for one line."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def escaped(text: object) -> str:
    """Return text that is safe inside of HTML and XML, attributes included."""
    return html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(text)), quote=True)


def isolated(name: str) -> str:
    """Return a name for HTML that cannot reorder the text around it, as letters written from right to left would."""
    return f"<bdi>{escaped(name)}</bdi>"


def cell(value: object) -> str:
    """Return a value as a table shows it: numbers to four digits, what is missing as nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:#.4g}".removesuffix(".") if isinstance(value, float) else str(value)


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table of unescaped values, the first of each row its name; long ones are cut and say so.

    Parameters
    ----------
    caption : str
    header : sequence of str
    rows : iterable of sequences as long as the header
        Strings, ints, and floats (NaN and None are shown empty).
    """
    everything = list(rows)
    head = "".join(f"<th>{escaped(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{escaped(row[0])}</th>" + "".join(f"<td>{escaped(cell(value))}</td>" for value in row[1:]) + "</tr>"
        for row in everything[:MOST_ROWS]
    )
    if len(everything) > MOST_ROWS:
        body += f"<tr><td colspan={len(header)}>and {len(everything) - MOST_ROWS} more</td></tr>"
    return f"<table><caption>{escaped(caption)}</caption><tr>{head}</tr>{body}</table>"


def duration(seconds: float) -> str:
    """Format a time span as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """Return text as one line that a terminal only shows.

    Control and format characters (escape sequences, line breaks, marks that reverse the direction of writing) and
    halves of surrogate pairs become question marks.
    """
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Lay out cells in columns: those whose numbers are in `left` are aligned left, the others right."""
    lines = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def printable_lines(text: str) -> str:
    """Return a message that may have several lines, each of which a terminal only shows.

    All but the first are indented, so that a line break in a name cannot make a line that passes for another message.
    """
    first, *others = map(printable, text.splitlines() or [""])
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in others)])


def printable_command(command: str) -> str:
    """Return a shell command as one line that a terminal only shows, and that does the same.

    Words that hold control or format characters are written as ``$'...'`` with octal escapes, which bash, ksh, zsh and
    POSIX.1-2024 shells read; any other command is returned as it is.
    """
    if printable(command) == command:
        return command
    return " ".join(map(_quoted, shlex.split(command)))


def _quoted(word: str) -> str:
    if printable(word) == word:
        return shlex.quote(word)
    return "$'" + "".join(map(_octal, word)) + "'"


def _octal(character: str) -> str:
    """Return a character as it stands between ``$'`` and ``'``."""
    if character in "\\'":
        return "\\" + character
    if printable(character) == character:
        return character
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogatepass"))


def number(value: float, digits: int = 3) -> str:
    """Format a number of a law: short, and a dash where there is none."""
    if np.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:.1e}"


def samples(value: float) -> str:
    """Format a number of samples."""
    if not np.isfinite(value):
        return "-"
    if value >= 1e9:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1 else f"{value:.2g}"


def percent(value: float, digits: int = 1) -> str:
    """Format a share in percent."""
    return "-" if np.isnan(value) else f"{100 * value:.{digits}f}"


def flops(value: float) -> str:
    """Format a count of floating-point operations."""
    return "unknown" if np.isnan(value) else f"{value:.2e}"
