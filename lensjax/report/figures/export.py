"""TODO"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lensjax._files import write_atomically
from lensjax._messages import did_you_mean
from lensjax.errors import InputError
from lensjax.report.figures.data import file_stems, tangents_by_row
from lensjax.report.figures.formats import FORMATS
from lensjax.report.figures.svg_figures import cost, curve, frame, ranking, spectrum, traces
from lensjax.report.predicted_curves import paths
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
        for stem, content in (_svg(selection) if name == "svg" else _png(selection)).items():
            write_atomically(directory / f"{stem}.{name}", content)
            written.append(directory / f"{stem}.{name}")
    return written


def _png(selection: Selection) -> dict[str, bytes]:
    from lensjax.report.figures.png_figures import render_all

    return render_all(selection)


def _svg(selection: Selection) -> dict[str, str]:
    found = paths(selection, selection.main)
    axes = frame(selection, found)
    files = {"ranking": ranking(selection, name="ranking"), "cost": cost(selection, name="cost", alone=True)}
    ends = file_stems(selection)
    for row, end in ends.items():
        files[f"curve-{end}"] = curve(selection, row, found, axes, name=f"curve-{row + 1}", alone=True)
    for row, seen in tangents_by_row(selection).items():
        values, by_layer = seen.get("kernel_spectrum"), seen.get("trace_by_layer") or {}
        of = selection.curves.names[row]
        files[f"spectrum-{ends[row]}"] = spectrum(values, name=f"spectrum-{row + 1}", of=of)
        files[f"traces-{ends[row]}"] = traces(by_layer, name=f"traces-{row + 1}", of=of)
    return {stem: f"{content}\n" for stem, content in files.items() if content}
