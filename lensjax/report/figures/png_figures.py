"""The figures of a selection as PNG, render_all by matplotlib from the same data as the SVG ones.

Figures are made by themselves, without pyplot, whose state and settings are the user's.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedLocator, NullLocator

from lensjax._display import flops, percent, samples
from lensjax.report.figures import data, svg_figures
from lensjax.report.figures.svg import Scale, compact, shortened
from lensjax.report.predicted_curves import PredictedCurves, paths
from lensjax.selection import Selection
from lensjax.selectors import CREDIBLE_LEVEL

DPI = 200
INK, SOFT, GRID, LINE, MARK, TRUTH = "#1c2430", "#596579", "#e3e7ee", "#0b62b8", "#b1450c", "#12703c"
FAMILY = "DejaVu Sans"  # matplotlib brings it
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SETTINGS = {"font.family": FAMILY, "font.size": 9, "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT}
SETTINGS |= {"xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False}
SETTINGS |= {"grid.color": GRID, "axes.grid": True, "axes.axisbelow": True, "axes.titleweight": "bold"}
SETTINGS |= {"axes.titlecolor": INK, "axes.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False}
ZERO_SHOT = 0.1  # of the axis for the point at 0 samples, which a logarithmic axis has no place for


def render_all(selection: Selection) -> dict[str, bytes]:
    """Draw all figures.

    Returns
    -------
    dict
        Name of the file without its ending -> PNG.
    """
    # In matplotlib's own style, whatever the user's is, and back to that afterwards.
    with matplotlib.style.context(["default", SETTINGS]):
        return {stem: png(figure) for stem, figure in made(selection)}


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, by Agg."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=DPI, metadata={"Software": "lensjax"})
    return written.getvalue()


def made(selection: Selection) -> Iterator[tuple[str, Figure]]:
    """Yield the figures and the names of their files, as `lensjax.report.figures.export.write_figures` lists them."""
    found = paths(selection, selection.main)
    axes = svg_figures.frame(selection, found)
    yield "ranking", ranking(selection)
    if data.costs(selection):
        yield "cost", cost(selection)
    ends = data.file_stems(selection)
    for row, end in ends.items():
        yield f"curve-{end}", curve(selection, row, found, axes)
    for row, seen in data.tangents_by_row(selection).items():
        name = selection.curves.names[row]
        kept, dropped = data.eigenvalues(seen.get("kernel_spectrum"))
        if len(kept):
            yield f"spectrum-{ends[row]}", spectrum(kept, dropped, name)
        by_layer = data.layers(seen.get("trace_by_layer") or {})
        if by_layer:
            yield f"traces-{ends[row]}", traces(by_layer, name)


@functools.cache
def _known() -> frozenset[int]:
    return frozenset(get_font(findfont(FAMILY)).get_charmap())


def literal(text: str, length: int = 60) -> str:
    """Return a text cut in its middle, with a mark for each character that the font lacks or that moves others."""
    plain = "".join(c if ord(c) in _known() and c.isprintable() else REPLACEMENT for c in text)
    return shortened(plain, length)


def _new(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    # What stands between dollar signs is no formula.
    axes.set_title(title, loc="left", parse_math=False)
    axes.tick_params(length=0)
    return figure, axes


def _logarithmic(axes: Axes, side: str, scale: Scale, also: Mapping[float, str] | None = None) -> None:
    """Give an axis the limits and the round ticks of a scale; some ticks may have names of their own."""
    ticks = {tick: compact(tick) for tick in scale.ticks(6)} | dict(also or {})
    if side == "x":
        axes.set_xscale("log")
        axes.set_xlim(scale.low, scale.high)
    else:
        axes.set_yscale("log")
        axes.set_ylim(scale.low, scale.high)
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_ticklabels(list(ticks.values()))


def curve(selection: Selection, row: int, found: PredictedCurves, frame: svg_figures.Frame) -> Figure:
    """Draw one candidate: what was measured, the curve through it, what is expected at the target."""
    curves, scores = selection.curves, selection.main
    figure, axes = _new(6.4, 4.4, literal(curves.names[row]))
    share = ZERO_SHOT / (1 - ZERO_SHOT) * np.log(frame.x.high / frame.x.low)
    zero = frame.x.low * np.exp(-share / 2)
    also = {frame.target: compact(frame.target)}
    near = np.log(frame.x.high / frame.x.low) / 12
    scale = frame.x
    ticks = [t for t in scale.ticks(6) if abs(np.log(t / frame.target)) > near]
    if frame.zero is not None:
        also = {zero: "0", **also}
        scale = Scale(frame.x.low * np.exp(-share), frame.x.high, 0, 1)
    _logarithmic(axes, "x", scale)
    shown = {**{t: compact(t) for t in ticks}, **also}
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.xaxis.set_ticklabels(list(shown.values()))
    _logarithmic(axes, "y", frame.y)
    axes.set_xlabel("training samples")
    axes.set_ylabel(f"test loss ({frame.unit})")
    _expected(axes, selection, row, found)
    at = np.where(curves.sizes > 0, curves.sizes, zero)
    known = np.isfinite(curves.losses[row])
    for used, label, face, edge in ((True, "measured", LINE, "white"), (False, "measured, not used", "white", SOFT)):
        which = known & (scores.used[row] == used)
        if which.any():
            style: dict[str, Any] = {"mfc": face, "mec": edge, "ms": 6, "ls": "", "marker": "o", "zorder": 4}
            axes.plot(at[which], curves.losses[row][which], label=label, **style)
    _prediction(axes, selection, row, frame)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _expected(axes: Axes, selection: Selection, row: int, found: PredictedCurves) -> None:
    """Draw the band, the fit up to the largest size used, the forecast from there on, the phase transition."""
    if len(found.sizes) > 1:
        if found.interval is not None and np.isfinite(found.interval[row]).all():
            low, high = found.interval[row].T
            label = f"{percent(CREDIBLE_LEVEL, 0)} % interval"
            axes.fill_between(found.sizes, low, high, color=LINE, alpha=0.16, lw=0, label=label)
        if np.isfinite(found.losses[row]).all():
            split = data.fitted(selection, row, found)
            if split > 1:
                axes.plot(found.sizes[:split], found.losses[row][:split], color=LINE, lw=1.8, label="fit")
            if split < len(found.sizes):
                rest = slice(max(split - 1, 0), None)
                dashes: dict[str, Any] = {"ls": (0, (3, 2)), "label": "forecast"}
                axes.plot(found.sizes[rest], found.losses[row][rest], color=LINE, lw=1.8, **dashes)
    transition = data.transition_of(selection.main, row)
    if np.isfinite(transition) and axes.get_xlim()[0] <= transition <= axes.get_xlim()[1]:
        axes.axvline(transition, color=MARK, lw=1.2, ls=(0, (1, 2)))
        left = axes.transAxes.inverted().transform(axes.transData.transform((transition, 1)))[0] > 0.5
        axes.annotate(
            "power phase begins",
            (transition, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            color=MARK,
        )


def _prediction(axes: Axes, selection: Selection, row: int, frame: svg_figures.Frame) -> None:
    scores, target = selection.main, selection.target
    if scores.interval is not None and np.isfinite(scores.interval[row]).all():
        axes.vlines(target, *np.clip(scores.interval[row], frame.y.low, frame.y.high), color=LINE, lw=1.8, zorder=3)
    if np.isfinite(scores.predicted_loss[row]):
        style: dict[str, Any] = {"mfc": "white", "mec": LINE, "mew": 1.8, "ms": 7, "ls": "", "marker": "o", "zorder": 5}
        axes.plot([target], [scores.predicted_loss[row]], label=f"expected at {samples(target)}", **style)
    if selection.truth is not None and np.isfinite(selection.truth[row]):
        label = f"measured at {samples(target)}"
        axes.plot([target], [selection.truth[row]], "D", mfc=TRUTH, mec="white", ms=7, zorder=6, label=label)


def ranking(selection: Selection) -> Figure:
    """Draw the predicted losses of all candidates with their intervals, best first."""
    scores, curves = selection.main, selection.curves
    rows = [int(r) for r in scores.order if np.isfinite(scores.predicted_loss[r])]
    figure, axes = _new(8.0, 1.4 + 0.26 * max(len(rows), 1), f"Ranking, method {scores.method}")
    scale = svg_figures.interval_scale(selection, 0, 1)
    _logarithmic(axes, "x", scale)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([literal(curves.names[row], 32) for row in rows], parse_math=False, color=INK)
    axes.set_xlabel(f"test loss expected at {samples(selection.target)} samples (nats per {selection.loss_unit})")
    places, losses = np.arange(len(rows)), scores.predicted_loss[rows]
    if scores.interval is not None and rows:
        low, high = np.clip(scores.interval[rows], scale.low, scale.high).T
        axes.hlines(places, low, high, color=LINE, lw=1.8, label=f"{percent(CREDIBLE_LEVEL, 0)} % interval")
    axes.plot(losses, places, "o", mfc="white", mec=LINE, mew=1.8, ms=6, label="expected")
    if selection.truth is not None and np.isfinite(selection.truth[rows]).any():
        axes.plot(selection.truth[rows], places, "D", mfc=TRUTH, mec="white", ms=6, label="measured")
    if scores.best_probability is not None:
        beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "color": SOFT}
        axes.text(1.09, -0.9, "P(best)", **beside)
        for place, row in enumerate(rows):
            axes.text(1.09, place, f"{percent(float(scores.best_probability[row]), 0)} %", **beside)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def cost(selection: Selection) -> Figure:
    """Draw what was spent, and what fine-tuning the winner will cost, beside fine-tuning everything."""
    bars = data.costs(selection)
    full = bars[-1][1][0][1]
    figure, axes = _new(6.4, 1.9, "Cost")
    axes.grid(axis="y", visible=False)
    for place, (_, parts) in enumerate(bars):
        start = 0.0
        for kind, value in parts:
            axes.barh(place, value, left=start, height=0.6, color=MARK if "mark" in kind else LINE)
            start += value
        axes.annotate(f"{percent(start / full)} %", (start, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)))
    axes.set_yticklabels([label for label, _ in bars], color=INK)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    ends = [sum(value for _, value in parts) for _, parts in bars]
    axes.set_xlim(0, max(ends) * 1.12)
    ticks = np.linspace(0, max(ends), 3)
    axes.set_xticks(ticks)
    axes.set_xticklabels([f"{flops(tick)} FLOPs" if tick else "0" for tick in ticks])
    return figure


def spectrum(kept: np.ndarray, dropped: int, name: str) -> Figure:
    """Draw the eigenvalues of a candidate's kernel by rank, both axes logarithmic."""
    figure, axes = _new(6.4, 4.0, f"{literal(name)}: kernel spectrum")
    _logarithmic(axes, "x", Scale(*svg_figures.spread([1.0, max(float(len(kept)), 2.0)], 0.03), 0, 1))
    _logarithmic(axes, "y", Scale(*svg_figures.spread([float(kept[-1]), float(kept[0])]), 0, 1))
    axes.plot(np.arange(1, len(kept) + 1), kept, "o-", color=LINE, lw=1.5, ms=4, mec="white")
    left_out = f" ({dropped} not above 0 left out)" if dropped else ""
    axes.set_xlabel(f"rank of the eigenvalue{left_out}")
    axes.set_ylabel("eigenvalue")
    return figure


def traces(by_layer: Mapping[str, float], name: str) -> Figure:
    """Draw the Hessian trace of each of a candidate's layers as a bar."""
    figure, axes = _new(6.4, 1.0 + 0.24 * len(by_layer), f"{literal(name)}: Hessian trace by layer")
    axes.grid(axis="y", visible=False)
    values = list(by_layer.values())
    axes.barh(range(len(values)), values, height=0.65, color=[LINE if value >= 0 else MARK for value in values])
    for place, value in enumerate(values):
        offset = (4, 0) if value >= 0 else (-4, 0)
        side = "left" if value >= 0 else "right"
        axes.annotate(f"{value:.3g}", (value, place), offset, textcoords="offset points", va="center", ha=side)
    axes.set_yticks(range(len(values)))
    axes.set_yticklabels([literal(layer, 32) for layer in by_layer], parse_math=False, color=INK)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.set_xlabel("trace")
    return figure
