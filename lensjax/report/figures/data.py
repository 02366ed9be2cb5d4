"""TODO"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lensjax._display import number, percent, samples
from lensjax.report.predicted_curves import PredictedCurves
from lensjax.selection import Selection
from lensjax.selectors import CREDIBLE_LEVEL, Scores

Costs = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
"""Label of a bar, and what it is made of: class and FLOPs."""


def fitted(selection: Selection, row: int, found: PredictedCurves) -> int:
    """Return how many points of a candidate's curve are fitted, up to the largest size used; others are forecast."""
    used = selection.curves.sizes[selection.main.used[row]]
    return int(np.searchsorted(found.sizes, used[-1] if len(used) else 0.0, side="right"))


def transition_of(scores: Scores, row: int) -> float:
    """Return the number of samples at which a candidate's power phase begins; NaN if the method knows none."""
    values = scores.details.get("transition")
    return float("nan") if values is None else float(values[row])


def describe(selection: Selection, row: int) -> str:
    """Say in words what the curve of a candidate shows."""
    scores, curves = selection.main, selection.curves
    measured = [
        f"{'before fine-tuning' if size == 0 else samples(size)} {number(loss, 4)}"
        for size, loss in zip(curves.sizes, curves.losses[row], strict=True)
        if np.isfinite(loss)
    ]
    text = f"Test loss by training samples, both axes logarithmic. Measured: {', '.join(measured) or 'nothing'}."
    if np.isfinite(scores.predicted_loss[row]):
        text += f" Expected at {samples(selection.target)}: {number(scores.predicted_loss[row], 4)}"
        if scores.interval is not None:
            low, high = scores.interval[row]
            text += f", with {percent(CREDIBLE_LEVEL, 0)} % between {number(low, 4)} and {number(high, 4)}"
        text += "."
    if selection.truth is not None and np.isfinite(selection.truth[row]):
        text += f" Measured there: {number(selection.truth[row], 4)}."
    if np.isfinite(transition_of(scores, row)):
        text += f" The power phase begins at about {samples(transition_of(scores, row))} samples."
    return text


def costs(selection: Selection) -> Costs:
    """Return the cost of the choice, of it and fine-tuning the winner, of fine-tuning everything; () if unknown."""
    spent = selection.spent(selection.main) + selection.failed_flops
    full = float(selection.full_flops.sum())
    winner = float(selection.full_flops[selection.main.order[0]])
    if not np.isfinite([spent, full, winner]).all() or full <= 0:
        return ()
    return (
        ("this choice", (("bar mark", spent),)),
        ("and the winner", (("bar mark", spent), ("bar", winner))),
        ("all candidates", (("bar", full),)),
    )


def eigenvalues(values: ArrayLike | None) -> tuple[np.ndarray, int]:
    """Return those of a kernel's eigenvalues that are above 0, descending, and how many others there are."""
    values = np.sort(np.asarray([] if values is None else values, np.float64).ravel())[::-1]
    kept = values[np.isfinite(values) & (values > 0)]
    return kept, len(values) - len(kept)


def layers(by_layer: Mapping[str, Any]) -> dict[str, float]:
    """Return the traces by layer that are finite."""
    return {str(layer): float(value) for layer, value in by_layer.items() if np.isfinite(float(value))}


def file_stems(selection: Selection) -> dict[int, str]:
    """Return what the names of each candidate's files end with, best first: its number and name."""
    found = {}
    for row in map(int, selection.main.order):
        safe = re.sub(r"[^A-Za-z0-9.+_-]+", "-", selection.curves.names[row])[:60].strip("-.") or "candidate"
        found[row] = f"{row + 1:02}-{safe}"
    return found


def tangents_by_row(selection: Selection) -> dict[int, Mapping[str, Any]]:
    """Return what was measured of each candidate's kernel and curvature, best candidate first."""
    known = selection.facts.get("tangents")
    known = known if isinstance(known, Mapping) else {}
    names = selection.curves.names
    return {row: known[names[row]] for row in map(int, selection.main.order) if names[row] in known}
