"""Tables of the HTML report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lensjax._display import flops, number, percent, samples
from lensjax.report.figures import svg_figures
from lensjax.report.figures.svg import escaped
from lensjax.report.text import interval
from lensjax.selection import Selection
from lensjax.selectors import CREDIBLE_LEVEL, Scores

SURE = percent(CREDIBLE_LEVEL, 0)


def name_of(name: str) -> str:
    """Isolate a name: letters that are written from right to left must not reorder what stands around them."""
    return f"<bdi>{escaped(name)}</bdi>"


def ranking(selection: Selection) -> str:
    """Lay out the candidates, best first, with what is expected of each, how sure that is, and what it took."""
    scores = selection.main
    predicts = bool(np.isfinite(scores.predicted_loss).any())
    header, body = "", []
    for rank, r in enumerate(scores.order, start=1):
        row = int(r)
        cells = _cells(selection, row, predicts)
        header = "".join(f'<th role="columnheader" scope="col" class="{css}">{label}</th>' for label, css, _ in cells)
        text = "".join(
            f'<td role="cell" class="{css}" data-label="{label}">{value}</td>' for label, css, value in cells
        )
        css = "best" if rank == 1 else "" if np.isfinite(scores.score[row]) else "out"
        body.append(
            f'<tr role="row" class="{css}"><td role="cell" class="n rank">{rank}</td>'
            f'<th role="rowheader" scope="row">{name_of(selection.curves.names[row])}</th>{text}</tr>'
        )
    caption = f"Best first, for fine-tuning on {samples(selection.target)} samples; a lower loss is better."
    expected = scores.predicted_loss[scores.order]
    if (np.diff(expected[np.isfinite(expected)]) < 0).any():
        caption += " The order is by the method's score, which weighs more than the expected loss."
    if scores.interval is None:
        caption += f" Method {scores.method} knows no intervals and no probabilities; the default, averaged, does."
    # The roles stay where a phone's style sheet turns cells into blocks.
    return (
        f'<table class="cards" role="table"><caption>{escaped(caption)}</caption><thead role="rowgroup"><tr role="row">'
        '<th role="columnheader" scope="col" class="n rank">Rank</th>'
        f'<th role="columnheader" scope="col">Candidate</th>{header}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table>'
    )


def _cells(selection: Selection, row: int, predicts: bool) -> list[tuple[str, str, str]]:
    """Return label, classes and content of a candidate's cells."""
    scores = selection.main
    cells = []
    if predicts:
        scale = svg_figures.interval_scale(selection, 6, 134)
        cells.append(("Expected loss", "n", number(float(scores.predicted_loss[row]), 4)))
        cells.append(
            (
                "Range" if scores.interval is not None else "Position",
                "",
                svg_figures.interval_bar(selection, row, scale),
            )
        )
    else:
        cells.append(("Score", "n", number(float(scores.score[row]), 4)))
    if scores.interval is not None:
        cells.append((f"{SURE} % interval", "n", interval(scores, row)))
    if scores.best_probability is not None:
        share = float(scores.best_probability[row])
        bar = f'<span class="chance" aria-hidden="true"><i style="width:{100 * share:.0f}%"></i></span>'
        cells.append(("P(best)", "", f'<span class="even">{bar}{percent(share, 0)} %</span>'))
    if selection.truth is not None:
        cells.append(("Measured", "n", number(float(selection.truth[row]), 4)))
    runs = int((scores.used[row] & (selection.curves.sizes > 0)).sum())
    return [*cells, ("Runs", "n minor", str(runs)), ("FLOPs spent", "n minor", flops(spent(selection, scores, row)))]


def spent(selection: Selection, scores: Scores, row: int) -> float:
    """FLOPs of the measurements of a candidate that a method used; NaN if any of them is unknown."""
    return float(np.where(scores.used[row], selection.flops[row], 0.0).sum())


def plain(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out unescaped texts: a row's name, then numbers. A table that is too wide scrolls."""
    first, *others = header
    head = f'<th scope="col">{escaped(first)}</th>' + "".join(
        f'<th scope="col" class="n">{escaped(c)}</th>' for c in others
    )
    body = "".join(
        f'<tr><th scope="row">{name_of(row[0])}</th>{"".join(f"<td class=n>{escaped(c)}</td>" for c in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escaped(caption)}" tabindex="0"><table><caption>'
        f"{escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
