"""Hints that end messages about a user's input: a similar name that exists, or how to write a number."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path


def did_you_mean(given: str, known: Iterable[str], before: str = "") -> str:
    """Return " Did you mean NAME?" for the known name most like the one given, "" if none is alike.

    Parameters
    ----------
    given : str
    known : iterable of str
    before : str
        Put before the name in the hint, such as the dashes of an option; it is not compared.

    Examples
    --------
    >>> did_you_mean("Avraged", ["averaged", "lens"])
    ' Did you mean averaged?'
    """
    return _similar(given, {name.casefold(): f"{before}{name}" for name in known})


def packaged_like(given: str, tables: Mapping[str, Iterable[str]]) -> str:
    """Return " Did you mean KIND:NAME?" for the packaged table most like the name given, "" if none is alike.

    Examples
    --------
    >>> packaged_like("novel", {"live": ["novels", "packages"], "published": ["flan"]})
    ' Did you mean live:novels?'
    """
    return _similar(given, {name.casefold(): f"{kind}:{name}" for kind, names in tables.items() for name in names})


def _similar(given: str, known: Mapping[str, str]) -> str:
    """Return the hint for the key most similar to a text; the hint shows the key's value."""
    found = difflib.get_close_matches(given.casefold(), known, n=1)
    return f" Did you mean {known[found[0]]}?" if found else ""


def nearby(path: Path) -> str:
    """Return " Did you mean PATH?" for a similar name in the same directory, "" if there is none."""
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    folded = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.with_name(folded[0])}?" if folded else ""


def ungrouped(number: str) -> str:
    """Return a number's text without separators of thousands: those of 1,600 and 1_600, not those of 1,5 and 1,6000.

    Examples
    --------
    >>> ungrouped("1,638,400"), ungrouped("0,5")
    ('1638400', '0,5')
    """
    grouped = re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d*)?", number.strip())
    return (number.replace(",", "") if grouped else number).replace("_", "")


def number_hint(text: str) -> str:
    """Return how to write a text that is no number, as a sentence after a space; "" if that is not known."""
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
