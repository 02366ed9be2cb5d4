"""Writing the figures of a selection to files, in the formats that can be made here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from lensjax._files import write_atomically
from lensjax._messages import did_you_mean
from lensjax.errors import InputError
from lensjax.report.figures import svg_figures
from lensjax.report.figures.formats import FORMATS
from lensjax.selection import Selection


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that cannot be written here, before any long work.

    Raises
    ------
    InputError
        If there is no such format, or one needs a library that is not installed.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(
                f"--figure-format {name}: no such format; choose {' or '.join(FORMATS)}.{did_you_mean(name, FORMATS)}"
            )
    if "png" in formats and importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--figure-format png: needs matplotlib, which is not installed: pip install 'lensjax[figures]', or choose "
            "svg."
        )


def write_figures(selection: Selection, directory: Path, formats: Sequence[str] = ("svg",)) -> list[Path]:
    """Write the figures: the ranking, the cost, and for each candidate its curve, kernel spectrum and traces.

    Parameters
    ----------
    selection : Selection
    directory : Path
        Made if it does not exist; files of the same names are replaced.
    formats : sequence of {"svg", "png"}
        PNG, at 200 dots per inch, needs matplotlib.

    Returns
    -------
    list of Path
        In each format ``ranking``, ``cost`` (unless the cost is unknown), and ``curve-NUMBER-NAME``, the best first;
        where there are tangents ``spectrum-NUMBER-NAME`` and ``traces-NUMBER-NAME``. The numbers are the candidates'
        own, so that a later ranking leaves no file behind.

    Raises
    ------
    InputError
        See `check_formats`.
    """
    check_formats(formats)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name in dict.fromkeys(formats):
        for stem, content in _render(selection, name).items():
            write_atomically(directory / f"{stem}.{name}", content)
            written.append(directory / f"{stem}.{name}")
    return written


def _render(selection: Selection, name: str) -> Mapping[str, str | bytes]:
    if name == "svg":
        return svg_figures.render_all(selection)
    # matplotlib is optional, and takes half a second to import.
    from lensjax.report.figures import png_figures

    return png_figures.render_all(selection)
