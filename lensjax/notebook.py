"""How results show themselves: one short line at a prompt, a small table in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

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
