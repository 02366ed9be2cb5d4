"""How results show themselves: one short line at a prompt, a small table in a notebook."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


MOST_ROWS = 60


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names and how many more there are, for one line."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{html.escape(str(row[0]))}</th>"
        + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row[1:])
        + "</tr>"
        for row in everything[:MOST_ROWS]
    )
    if len(everything) > MOST_ROWS:
        body += f"<tr><td colspan={len(header)}>and {len(everything) - MOST_ROWS} more</td></tr>"
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def duration(seconds: float) -> str:
    """Format a time span as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plain(text: str) -> str:
    """Return a text without what a terminal would obey: control and format characters become question marks."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


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
