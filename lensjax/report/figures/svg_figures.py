"""Figures of a selection as SVG: the curve of each candidate, the ranking, the cost, kernels and traces.

The same as PNG is in `lensjax.report.figures.png_figures`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lensjax._display import flops, number, percent, samples
from lensjax.report.figures.data import costs, describe, eigenvalues, fitted, layers, transition_of
from lensjax.report.figures.svg import Scale, compact, document, escaped, line, shortened, spread
from lensjax.report.predicted_curves import PredictedCurves
from lensjax.selection import Selection

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
HEADING = 22  # pixels for the name over a figure that stands alone
ZERO_SHOT = 30  # pixels for the point at 0 samples, which a logarithmic axis has no place for
CLOSE = 26  # pixels between two labels below which the target's stands alone
CLIP = 3.0  # an interval that ends further above the highest loss than this factor is cut off


@dataclasses.dataclass(frozen=True)
class Frame:
    """The axes that the curves of all candidates share, so that they can be compared at a glance."""

    x: Scale
    y: Scale
    zero: float | None
    unit: str
    target: float


def frame(selection: Selection, found: PredictedCurves) -> Frame:
    """Choose axes that hold all losses and predictions."""
    curves, scores = selection.curves, selection.main
    tuned = curves.sizes[curves.sizes > 0]
    left = LEFT + (ZERO_SHOT if 0 in curves.sizes else 0)
    x = Scale(*spread([*tuned, selection.target, found.sizes[0]], 0.03), left, WIDTH - RIGHT)
    losses = [curves.losses, scores.predicted_loss, found.losses]
    losses += [] if selection.truth is None else [selection.truth]
    known = np.concatenate([np.ravel(v) for v in losses])
    known = known[np.isfinite(known) & (known > 0)]
    if not len(known):
        known = np.ones(1)
    if scores.interval is not None:
        ends = scores.interval[np.isfinite(scores.interval) & (scores.interval > 0)]
        known = np.concatenate([known, np.clip(ends, known.min() / CLIP, known.max() * CLIP)])
    y = Scale(*spread([float(known.min()), float(known.max())]), HEIGHT - BOTTOM, TOP)
    return Frame(
        x, y, LEFT + ZERO_SHOT / 2 if 0 in curves.sizes else None, f"nats per {selection.loss_unit}", selection.target
    )


def curve(
    selection: Selection, row: int, found: PredictedCurves, axes: Frame, *, name: str, alone: bool = False
) -> str:
    """Draw one candidate: what was measured, the curve through it, what is expected at the target."""
    scores, curves = selection.main, selection.curves
    body = [*_axes(axes), f'<clipPath id="{name}-c"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" ']
    body[-1] += f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    body += [f'<g clip-path="url(#{name}-c)">', *_expected(selection, row, found, axes), "</g>"]
    for size, loss, used, cost in zip(
        curves.sizes, curves.losses[row], scores.used[row], selection.flops[row], strict=True
    ):
        if not np.isfinite(loss):
            continue
        x = axes.zero if size == 0 else axes.x(size)
        where = "before fine-tuning" if size == 0 else f"{samples(size)} samples"
        why = "" if used else "; not used by the method"
        spent = "" if np.isnan(cost) or cost == 0 else f", {flops(cost)} FLOPs"
        body.append(
            f'<circle class="{"paid" if used else "spare"}" cx="{x:.1f}" cy="{axes.y(loss):.1f}" r="4">'
            f"<title>{where}: loss {number(loss, 4)}{spent}{why}</title></circle>"
        )
    body += _prediction(selection, row, axes)
    title = f"Loss curve of {curves.names[row]}"
    height, body = _headed(body, curves.names[row]) if alone else (HEIGHT, body)
    return document(WIDTH, height, title, describe(selection, row), body, name=name, alone=alone)


def _headed(body: list[str], heading: str, height: int = HEIGHT) -> tuple[int, list[str]]:
    """Return height and elements of a figure with a name over it, as it stands alone."""
    text = f'<text class="strong" x="{WIDTH / 2}" y="16" text-anchor="middle">{escaped(shortened(heading, 48))}</text>'
    return height + HEADING, [text, f'<g transform="translate(0 {HEADING})">', *body, "</g>"]


def _axes(axes: Frame) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    body = []
    for tick in axes.y.ticks(6):
        y = axes.y(tick)
        body.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{compact(tick)}</text>')
    end = axes.x(axes.target)
    for tick in axes.x.ticks(6):
        x = axes.x(tick)
        body.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        if abs(x - end) > CLOSE:
            body.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{compact(tick)}</text>')
    text = f'<text class="strong" x="{end:.1f}" y="{bottom + 15}" text-anchor="middle">{compact(axes.target)}</text>'
    body += [f'<path class="grid" d="M{end:.1f} {TOP}V{bottom}"/>', text]
    body.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    if axes.zero is not None:
        edge = LEFT + ZERO_SHOT
        body.append(f'<text x="{axes.zero}" y="{bottom + 15}" text-anchor="middle">0</text>')
        # The axis is broken between 0 and the first size.
        body.append(f'<path class="axis" d="M{edge - 3} {bottom + 4}l3 -8M{edge + 1} {bottom + 4}l3 -8"/>')
    middle = (LEFT + right) / 2
    body.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">training samples</text>')
    turned = (TOP + bottom) / 2
    body.append(
        f'<text transform="translate(11 {turned}) rotate(-90)" text-anchor="middle">test loss ({axes.unit})</text>'
    )
    return body


def _expected(selection: Selection, row: int, found: PredictedCurves, axes: Frame) -> list[str]:
    """Draw the band, the fit up to the largest size used, the forecast from there on, the phase transition."""
    body = []
    if found.interval is not None and np.isfinite(found.interval[row]).all() and len(found.sizes) > 1:
        low, high = found.interval[row].T
        edge = [(axes.x(s), axes.y(v)) for s, v in zip(found.sizes, high, strict=True)]
        edge += [(axes.x(s), axes.y(v)) for s, v in zip(found.sizes[::-1], low[::-1], strict=True)]
        body.append(f'<path class="band" d="{line(edge)}Z"/>')
    if np.isfinite(found.losses[row]).all() and len(found.sizes) > 1:
        points = [(axes.x(s), axes.y(v)) for s, v in zip(found.sizes, found.losses[row], strict=True)]
        split = fitted(selection, row, found)
        if split > 1:
            body.append(f'<path class="fit" d="{line(points[:split])}"/>')
        if split < len(points):
            body.append(f'<path class="forecast" d="{line(points[max(split - 1, 0) :])}"/>')
    transition = transition_of(selection.main, row)
    if np.isfinite(transition) and axes.x.inside(transition):
        x = axes.x(transition)
        near_end = x > (axes.x.start + axes.x.stop) / 2
        body.append(f'<path class="phase" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        body.append(
            f'<text class="phase-text" x="{x + (-5 if near_end else 5):.1f}" y="{TOP + 10}" '
            f'text-anchor="{"end" if near_end else "start"}">power phase begins</text>'
        )
    return body


def _prediction(selection: Selection, row: int, axes: Frame) -> list[str]:
    scores, body = selection.main, []
    x = axes.x(selection.target)
    if scores.interval is not None and np.isfinite(scores.interval[row]).all():
        low, high = (min(max(v, axes.y.low), axes.y.high) for v in scores.interval[row])
        body.append(f'<path class="range" d="M{x:.1f} {axes.y(low):.1f}V{axes.y(high):.1f}"/>')
    if np.isfinite(scores.predicted_loss[row]):
        loss = float(scores.predicted_loss[row])
        body.append(f'<circle class="guess" cx="{x:.1f}" cy="{axes.y(loss):.1f}" r="4.5">')
        body[-1] += f"<title>expected at {samples(selection.target)} samples: {number(loss, 4)}</title></circle>"
    if selection.truth is not None and np.isfinite(selection.truth[row]):
        loss = float(selection.truth[row])
        y = axes.y(loss)
        body.append(f'<path class="truth" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6Z">')
        body[-1] += f"<title>measured at {samples(selection.target)} samples: {number(loss, 4)}</title></path>"
    return body


def interval_bar(selection: Selection, row: int, scale: Scale) -> str:
    """Draw a candidate's predicted loss and interval in one row of the ranking; the numbers stand beside it."""
    scores, height = selection.main, 16
    body = [f'<path class="grid" d="M{scale.start} 8H{scale.stop}"/>']
    if scores.interval is not None and np.isfinite(scores.interval[row]).all():
        low, high = (min(max(v, scale.low), scale.high) for v in scores.interval[row])
        body.append(f'<path class="range" d="M{scale(low):.1f} 8H{scale(high):.1f}"/>')
    if np.isfinite(scores.predicted_loss[row]):
        body.append(f'<circle class="guess" cx="{scale(scores.predicted_loss[row]):.1f}" cy="8" r="4"/>')
    if selection.truth is not None and np.isfinite(selection.truth[row]):
        body.append(f'<path class="truth" d="M{scale(selection.truth[row]):.1f} 3l5 5l-5 5l-5 -5Z"/>')
    width = int(scale.stop + scale.start)
    return (
        f'<svg class="fig mini" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true" '
        f'focusable="false">{"".join(body)}</svg>'
    )


def interval_scale(selection: Selection, start: float, stop: float) -> Scale:
    """Return the scale on which predictions and intervals of all candidates lie."""
    scores = selection.main
    known = scores.predicted_loss if selection.truth is None else np.append(scores.predicted_loss, selection.truth)
    known = known[np.isfinite(known) & (known > 0)]
    if not len(known):
        return Scale(1.0, 2.0, start, stop)
    if scores.interval is not None:
        ends = scores.interval[np.isfinite(scores.interval) & (scores.interval > 0)]
        known = np.append(known, np.clip(ends, known.min() / CLIP, known.max() * CLIP))
    return Scale(*spread([float(known.min()), float(known.max())]), start, stop)


def ranking(selection: Selection, *, name: str, alone: bool = True) -> str:
    """Draw the predicted losses of all candidates with their intervals, best first."""
    scores, curves = selection.main, selection.curves
    rows = [int(r) for r in scores.order if np.isfinite(scores.predicted_loss[r])]
    width, step, left, right = 720, 24, 220, 90
    scale = interval_scale(selection, left, width - right)
    height = 34 + step * len(rows) + 40
    body = []
    for tick in scale.ticks(8) if rows else []:
        body.append(f'<path class="grid" d="M{scale(tick):.1f} 26V{height - 36}"/>')
        body.append(f'<text x="{scale(tick):.1f}" y="{height - 22}" text-anchor="middle">{compact(tick)}</text>')
    label = f"test loss expected at {samples(selection.target)} samples (nats per {selection.loss_unit})"
    body.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{label}</text>')
    if scores.best_probability is not None:
        body.append(f'<text x="{width - 10}" y="18" text-anchor="end">P(best)</text>')
    words = []
    for place, row in enumerate(rows):
        y = 34 + step * place + step / 2
        loss = float(scores.predicted_loss[row])
        body.append(f'<text class="strong" x="{left - 12}" y="{y + 4}" text-anchor="end">')
        body[-1] += f"{escaped(shortened(curves.names[row], 32))}</text>"
        if scores.interval is not None and np.isfinite(scores.interval[row]).all():
            low, high = (min(max(v, scale.low), scale.high) for v in scores.interval[row])
            body.append(f'<path class="range" d="M{scale(low):.1f} {y}H{scale(high):.1f}"/>')
        body.append(f'<circle class="guess" cx="{scale(loss):.1f}" cy="{y}" r="4.5"/>')
        if selection.truth is not None and np.isfinite(selection.truth[row]):
            body.append(f'<path class="truth" d="M{scale(selection.truth[row]):.1f} {y - 5}l5 5l-5 5l-5 -5Z"/>')
        if scores.best_probability is not None:
            chance = percent(float(scores.best_probability[row]), 0)
            body.append(f'<text x="{width - 10}" y="{y + 4}" text-anchor="end">{chance} %</text>')
        words.append(f"{place + 1}. {curves.names[row]} {number(loss, 4)}")
    return document(width, height, "Ranking", "; ".join(words) or "No losses.", body, name=name, alone=alone)


def cost(selection: Selection, *, name: str, alone: bool = False) -> str:
    """Draw what was spent, and what fine-tuning the winner will cost, beside fine-tuning everything; "" if unknown."""
    rows = costs(selection)
    if not rows:
        return ""
    width, height, left, right = WIDTH, 92, 104, 62
    full = rows[-1][1][0][1]
    longest = max(sum(value for _, value in parts) for _, parts in rows)
    body, words = [], []
    for place, (label, parts) in enumerate(rows):
        y, x = 6 + 30 * place, float(left)
        body.append(f'<text class="strong" x="{left - 10}" y="{y + 14}" text-anchor="end">{label}</text>')
        for css, value in parts:
            length = max(value / longest * (width - left - right), 1.5 if value else 0.0)
            body.append(f'<rect class="{css}" x="{x:.1f}" y="{y}" width="{length:.1f}" height="20"/>')
            x += length
        total = sum(value for _, value in parts)
        body.append(f'<text x="{x + 8:.1f}" y="{y + 14}">{percent(total / full)} %</text>')
        words.append(f"{label}: {flops(total)} FLOPs, {percent(total / full)} %")
    return document(width, height, "Cost", "; ".join(words) + ".", body, name=name, alone=alone)


def spectrum(values: ArrayLike | None, *, name: str, of: str = "") -> str:
    """Draw the eigenvalues of a kernel by rank, both axes logarithmic; "" if none is above 0.

    With the name `of` a candidate the figure stands alone.
    """
    kept, dropped = eigenvalues(values)
    if not len(kept):
        return ""
    left, bottom = LEFT + 8, HEIGHT - BOTTOM
    x = Scale(*spread([1.0, max(float(len(kept)), 2.0)], 0.03), left, WIDTH - RIGHT)
    y = Scale(*spread([float(kept[-1]), float(kept[0])]), bottom, TOP)
    body = []
    for tick in y.ticks(6):
        body.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        body.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{compact(tick)}</text>')
    for tick in x.ticks(6):
        body.append(f'<text x="{x(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{compact(tick)}</text>')
    body.append(f'<path class="axis" d="M{left} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    points = [(x(rank), y(float(v))) for rank, v in enumerate(kept, start=1)]
    body.append(f'<path class="fit" d="{line(points)}"/>')
    body += [f'<circle class="paid" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in points]
    body.append(f'<text x="{(left + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">rank of the eigenvalue</text>')
    words = f"{len(kept)} eigenvalues from {kept[0]:.3g} down to {kept[-1]:.3g}"
    words += f"; {dropped} that are not above 0 are left out." if dropped else "."
    title = f"Kernel spectrum of {of}" if of else "Kernel spectrum"
    height, body = _headed(body, f"{of}: kernel spectrum") if of else (HEIGHT, body)
    return document(WIDTH, height, title, words, body, name=name, alone=bool(of))


def traces(by_layer: Mapping[str, Any], *, name: str, of: str = "") -> str:
    """Draw the trace of each layer as a bar; "" if there is none. `of`: see `spectrum`."""
    found = layers(by_layer)
    if not found:
        return ""
    step, left = 18, 150
    height = 10 + step * len(found)
    largest = max(map(abs, found.values())) or 1.0
    body = []
    for place, (layer, value) in enumerate(found.items()):
        y = 5 + step * place
        length = abs(value) / largest * (WIDTH - left - 70)
        body.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escaped(shortened(layer, 22))}</text>')
        css = "bar" if value >= 0 else "bar mark"
        body.append(f'<rect class="{css}" x="{left}" y="{y + 2}" width="{max(length, 1):.1f}" height="{step - 5}"/>')
        body.append(f'<text x="{left + max(length, 1) + 6:.1f}" y="{y + 12}">{value:.3g}</text>')
    words = "; ".join(f"{layer} {value:.3g}" for layer, value in found.items())
    title = f"Hessian trace of {of} by layer" if of else "Trace by layer"
    height, body = _headed(body, f"{of}: Hessian trace by layer", height) if of else (height, body)
    return document(WIDTH, height, title, words, body, name=name, alone=bool(of))
