"""The data behind the figures, the same for SVG and PNG: axes, bars, eigenvalues, traces, descriptions, file names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lensjax._display import number, samples
from lensjax.report.figures.scale import Scale, padded
from lensjax.report.predicted_curves import PredictedCurves
from lensjax.selection import CERTAINTY_PERCENT, Selection, transition_of

CLIP = 3.0  # an interval that ends further above the highest loss than this factor is cut off


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes that the curves of all candidates share, so that they can be compared at a glance.

    Attributes
    ----------
    sizes, losses : Scale
        Training samples above 0, and test losses.
    zero_shot : bool
        Whether there is a place for losses before fine-tuning, beside the axis of sizes.
    unit : str
        Of the losses.
    target : float
        Training samples.
    """

    sizes: Scale
    losses: Scale
    zero_shot: bool
    unit: str
    target: float


@dataclasses.dataclass(frozen=True)
class CostBar:
    """A bar of the cost figure.

    Attributes
    ----------
    label : str
    parts : tuple of ({"choice", "training"}, FLOPs)
        Its parts from left to right: the cost of the choice, and of fine-tuning on the target.
    """

    label: str
    parts: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        """The whole bar, FLOPs."""
        return sum(flops for _, flops in self.parts)


def shared_axes(selection: Selection, predicted: PredictedCurves) -> Axes:
    """Choose axes that hold all losses and predictions."""
    curves = selection.curves
    tuned = curves.sizes[curves.sizes > 0]
    sizes = padded([*map(float, tuned), selection.target, float(predicted.sizes[0])], 0.03)
    losses = _loss_scale(selection, curves.losses, predicted.losses) or padded([1.0])
    return Axes(sizes, losses, 0 in curves.sizes, f"nats per {selection.loss_unit}", selection.target)


def ranking_scale(selection: Selection) -> Scale:
    """Return a scale that holds the predictions and intervals of all candidates."""
    return _loss_scale(selection) or Scale(1.0, 2.0)


def _loss_scale(selection: Selection, *losses: np.ndarray) -> Scale | None:
    """Return a scale that holds these losses, the predictions and the true losses; None if there are none."""
    scores = selection.main
    truth = [] if selection.truth is None else [selection.truth]
    known = np.concatenate([np.ravel(values) for values in (*losses, scores.predicted_loss, *truth)])
    known = known[np.isfinite(known) & (known > 0)]
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    if scores.interval is not None:
        ends = scores.interval[np.isfinite(scores.interval) & (scores.interval > 0)]
        ends = np.clip(ends, low / CLIP, high * CLIP)
        low, high = min([low, *map(float, ends)]), max([high, *map(float, ends)])
    return padded([low, high])


def has_position(value: float) -> bool:
    """Whether a loss has a place on a logarithmic axis."""
    return bool(np.isfinite(value) and value > 0)


def fitted_points(selection: Selection, row: int, predicted: PredictedCurves) -> int:
    """Return how many points of a candidate's curve are fitted, up to the largest size used; others are forecast."""
    used = selection.curves.sizes[selection.main.used[row]]
    return int(np.searchsorted(predicted.sizes, used[-1] if len(used) else 0.0, side="right"))


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
            text += f", with {CERTAINTY_PERCENT} % between {number(low, 4)} and {number(high, 4)}"
        text += "."
    if selection.truth is not None and np.isfinite(selection.truth[row]):
        text += f" Measured there: {number(selection.truth[row], 4)}."
    transition = transition_of(scores, row)
    if np.isfinite(transition):
        text += f" The power phase begins at about {samples(transition)} samples."
    return text


def cost_bars(selection: Selection) -> tuple[CostBar, ...]:
    """Return the costs of the choice, of it and fine-tuning the best candidate, of fine-tuning all; () if unknown."""
    costs = selection.costs()
    if not costs.known or costs.full <= 0:
        return ()
    return (
        CostBar("this choice", (("choice", costs.choice),)),
        CostBar("and fine-tuning it", (("choice", costs.choice), ("training", costs.best))),
        CostBar("all candidates", (("training", costs.full),)),
    )


def eigenvalues(values: ArrayLike | None) -> tuple[np.ndarray, int]:
    """Return the eigenvalues of a kernel that are above 0, descending, and how many there are besides."""
    values = np.sort(np.asarray([] if values is None else values, np.float64).ravel())[::-1]
    kept = values[np.isfinite(values) & (values > 0)]
    return kept, len(values) - len(kept)


def layers(by_layer: Mapping[str, Any]) -> dict[str, float]:
    """Return the traces by layer that are finite."""
    return {str(layer): float(value) for layer, value in by_layer.items() if np.isfinite(float(value))}


def file_stems(selection: Selection) -> dict[int, str]:
    """Return the end of the names of each candidate's files, best candidate first: its number and name."""
    stems = {}
    for row in map(int, selection.main.order):
        safe = re.sub(r"[^A-Za-z0-9.+_-]+", "-", selection.curves.names[row])[:60].strip("-.") or "candidate"
        stems[row] = f"{row + 1:02}-{safe}"
    return stems


def tangents_by_row(selection: Selection) -> dict[int, Mapping[str, Any]]:
    """Return the kernel spectra and traces that were measured, by the candidate's position, best candidate first."""
    known = selection.facts.get("tangents")
    known = known if isinstance(known, Mapping) else {}
    names = selection.curves.names
    return {row: known[names[row]] for row in map(int, selection.main.order) if names[row] in known}
