"""Figures of a selection as SVG: the curve of each candidate, the ranking, the cost, kernels and traces.

The same as PNG is in `lensjax.report.figures.png_figures`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lensjax._display import escaped, flops, number, percent, samples
from lensjax.report.figures import data
from lensjax.report.figures.scale import Scale, compact, padded, shortened
from lensjax.report.figures.svg import document, line
from lensjax.report.predicted_curves import PredictedCurves, predicted_curves
from lensjax.selection import Selection, transition_of

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
HEADING = 22  # pixels for the name over a figure that stands alone
ZERO_SHOT = 30  # pixels for the point at 0 samples, which a logarithmic axis has no place for
CLOSE = 26  # pixels between two labels below which the target's stands alone


@dataclasses.dataclass(frozen=True)
class _Frame:
    """`data.Axes` in pixels; `zero` is where losses before fine-tuning lie."""

    x: Scale
    y: Scale
    zero: float | None
    unit: str
    target: float


def _frame(axes: data.Axes) -> _Frame:
    left = LEFT + (ZERO_SHOT if axes.zero_shot else 0)
    x = axes.sizes.between(left, WIDTH - RIGHT)
    y = axes.losses.between(HEIGHT - BOTTOM, TOP)
    return _Frame(x, y, LEFT + ZERO_SHOT / 2 if axes.zero_shot else None, axes.unit, axes.target)


def render_all(selection: Selection) -> dict[str, str]:
    """Draw all figures.

    Returns
    -------
    dict
        Name of the file without its ending -> SVG, as `lensjax.report.figures.export.write_figures` lists them.
    """
    predicted = predicted_curves(selection, selection.main)
    axes = data.shared_axes(selection, predicted)
    files = {"ranking": ranking(selection, name="ranking"), "cost": cost(selection, name="cost", alone=True)}
    stems = data.file_stems(selection)
    for row, stem in stems.items():
        files[f"curve-{stem}"] = curve(selection, row, predicted, axes, name=f"curve-{row + 1}", alone=True)
    for row, tangents in data.tangents_by_row(selection).items():
        values, by_layer = tangents.get("kernel_spectrum"), tangents.get("trace_by_layer") or {}
        candidate = selection.curves.names[row]
        files[f"spectrum-{stems[row]}"] = spectrum(values, name=f"spectrum-{row + 1}", candidate=candidate)
        files[f"traces-{stems[row]}"] = traces(by_layer, name=f"traces-{row + 1}", candidate=candidate)
    return {stem: f"{content}\n" for stem, content in files.items() if content}


def curve(
    selection: Selection,
    row: int,
    predicted: PredictedCurves,
    shared: data.Axes,
    *,
    name: str,
    alone: bool = False,
) -> str:
    """Draw one candidate: the losses measured, the curve through them, the loss expected at the target."""
    scores, curves, axes = selection.main, selection.curves, _frame(shared)
    body = [*_axes(axes), f'<clipPath id="{name}-c"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" ']
    body[-1] += f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    body += [f'<g clip-path="url(#{name}-c)">', *_expected(selection, row, predicted, axes), "</g>"]
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
    return document(WIDTH, height, title, data.describe(selection, row), body, name=name, alone=alone)


def _headed(body: list[str], heading: str, height: int = HEIGHT) -> tuple[int, list[str]]:
    """Return height and elements of a figure with a name over it, as it stands alone."""
    text = f'<text class="strong" x="{WIDTH / 2}" y="16" text-anchor="middle">{escaped(shortened(heading, 48))}</text>'
    return height + HEADING, [text, f'<g transform="translate(0 {HEADING})">', *body, "</g>"]


def _axes(axes: _Frame) -> list[str]:
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


def _expected(selection: Selection, row: int, predicted: PredictedCurves, axes: _Frame) -> list[str]:
    """Draw the band, the fit up to the largest size used, the forecast from there on, the phase transition."""
    body = []
    if predicted.interval is not None and np.isfinite(predicted.interval[row]).all() and len(predicted.sizes) > 1:
        low, high = predicted.interval[row].T
        edge = [(axes.x(s), axes.y(v)) for s, v in zip(predicted.sizes, high, strict=True)]
        edge += [(axes.x(s), axes.y(v)) for s, v in zip(predicted.sizes[::-1], low[::-1], strict=True)]
        body.append(f'<path class="band" d="{line(edge)}Z"/>')
    if np.isfinite(predicted.losses[row]).all() and len(predicted.sizes) > 1:
        points = [(axes.x(s), axes.y(v)) for s, v in zip(predicted.sizes, predicted.losses[row], strict=True)]
        split = data.fitted_points(selection, row, predicted)
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


def _prediction(selection: Selection, row: int, axes: _Frame) -> list[str]:
    scores, body = selection.main, []
    x = axes.x(selection.target)
    if scores.interval is not None and np.isfinite(scores.interval[row]).all():
        low, high = map(axes.y.clip, scores.interval[row])
        body.append(f'<path class="range" d="M{x:.1f} {axes.y(low):.1f}V{axes.y(high):.1f}"/>')
    if data.has_position(scores.predicted_loss[row]):
        loss = float(scores.predicted_loss[row])
        body.append(f'<circle class="guess" cx="{x:.1f}" cy="{axes.y(loss):.1f}" r="4.5">')
        body[-1] += f"<title>expected at {samples(selection.target)} samples: {number(loss, 4)}</title></circle>"
    if selection.truth is not None and data.has_position(selection.truth[row]):
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
        low, high = map(scale.clip, scores.interval[row])
        body.append(f'<path class="range" d="M{scale(low):.1f} 8H{scale(high):.1f}"/>')
    if data.has_position(scores.predicted_loss[row]):
        body.append(f'<circle class="guess" cx="{scale(scores.predicted_loss[row]):.1f}" cy="8" r="4"/>')
    if selection.truth is not None and data.has_position(selection.truth[row]):
        body.append(f'<path class="truth" d="M{scale(selection.truth[row]):.1f} 3l5 5l-5 5l-5 -5Z"/>')
    width = int(scale.stop + scale.start)
    return (
        f'<svg class="fig mini" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true" '
        f'focusable="false">{"".join(body)}</svg>'
    )


def ranking(selection: Selection, *, name: str, alone: bool = True) -> str:
    """Draw the predicted losses of all candidates with their intervals, best first."""
    scores, curves = selection.main, selection.curves
    rows = [int(r) for r in scores.order if data.has_position(scores.predicted_loss[r])]
    width, step, left, right = 720, 24, 220, 90
    scale = data.ranking_scale(selection).between(left, width - right)
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
            low, high = map(scale.clip, scores.interval[row])
            body.append(f'<path class="range" d="M{scale(low):.1f} {y}H{scale(high):.1f}"/>')
        body.append(f'<circle class="guess" cx="{scale(loss):.1f}" cy="{y}" r="4.5"/>')
        if selection.truth is not None and data.has_position(selection.truth[row]):
            body.append(f'<path class="truth" d="M{scale(selection.truth[row]):.1f} {y - 5}l5 5l-5 5l-5 -5Z"/>')
        if scores.best_probability is not None:
            chance = percent(float(scores.best_probability[row]), 0)
            body.append(f'<text x="{width - 10}" y="{y + 4}" text-anchor="end">{chance} %</text>')
        words.append(f"{place + 1}. {curves.names[row]} {number(loss, 4)}")
    return document(width, height, "Ranking", "; ".join(words) or "No losses.", body, name=name, alone=alone)


def cost(selection: Selection, *, name: str, alone: bool = False) -> str:
    """Draw the cost of the choice, and of fine-tuning the best candidate, beside fine-tuning all; "" if unknown."""
    bars = data.cost_bars(selection)
    if not bars:
        return ""
    width, height, left, right = WIDTH, 92, 104, 62
    full = bars[-1].total
    longest = max(bar.total for bar in bars)
    body, words = [], []
    for place, bar in enumerate(bars):
        y, x = 6 + 30 * place, float(left)
        body.append(f'<text class="strong" x="{left - 10}" y="{y + 14}" text-anchor="end">{bar.label}</text>')
        for part, value in bar.parts:
            css = "bar mark" if part == "choice" else "bar"
            length = max(value / longest * (width - left - right), 1.5 if value else 0.0)
            body.append(f'<rect class="{css}" x="{x:.1f}" y="{y}" width="{length:.1f}" height="20"/>')
            x += length
        body.append(f'<text x="{x + 8:.1f}" y="{y + 14}">{percent(bar.total / full)} %</text>')
        words.append(f"{bar.label}: {flops(bar.total)} FLOPs, {percent(bar.total / full)} %")
    return document(width, height, "Cost", "; ".join(words) + ".", body, name=name, alone=alone)


def spectrum(values: ArrayLike | None, *, name: str, candidate: str = "") -> str:
    """Draw the eigenvalues of a kernel by rank, both axes logarithmic; "" if none is above 0.

    With the name of a `candidate` the figure stands alone.
    """
    kept, dropped = data.eigenvalues(values)
    if not len(kept):
        return ""
    left, bottom = LEFT + 8, HEIGHT - BOTTOM
    x = padded([1.0, max(float(len(kept)), 2.0)], 0.03).between(left, WIDTH - RIGHT)
    y = padded([float(kept[-1]), float(kept[0])]).between(bottom, TOP)
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
    title = f"Kernel spectrum of {candidate}" if candidate else "Kernel spectrum"
    height, body = _headed(body, f"{candidate}: kernel spectrum") if candidate else (HEIGHT, body)
    return document(WIDTH, height, title, words, body, name=name, alone=bool(candidate))


def traces(by_layer: Mapping[str, Any], *, name: str, candidate: str = "") -> str:
    """Draw the trace of each layer as a bar; "" if there is none. `candidate`: see `spectrum`."""
    values = data.layers(by_layer)
    if not values:
        return ""
    step, left = 18, 150
    height = 10 + step * len(values)
    largest = max(map(abs, values.values())) or 1.0
    body = []
    for place, (layer, value) in enumerate(values.items()):
        y = 5 + step * place
        length = abs(value) / largest * (WIDTH - left - 70)
        body.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escaped(shortened(layer, 22))}</text>')
        css = "bar" if value >= 0 else "bar mark"
        body.append(f'<rect class="{css}" x="{left}" y="{y + 2}" width="{max(length, 1):.1f}" height="{step - 5}"/>')
        body.append(f'<text x="{left + max(length, 1) + 6:.1f}" y="{y + 12}">{value:.3g}</text>')
    words = "; ".join(f"{layer} {value:.3g}" for layer, value in values.items())
    title = f"Hessian trace of {candidate} by layer" if candidate else "Trace by layer"
    height, body = _headed(body, f"{candidate}: Hessian trace by layer", height) if candidate else (height, body)
    return document(WIDTH, height, title, words, body, name=name, alone=bool(candidate))
