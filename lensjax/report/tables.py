"""Tables of the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lensjax._display import escaped, flops, isolated, samples
from lensjax.report.figures import data, svg_figures
from lensjax.selection import CERTAINTY_PERCENT, Selection

SHOWN = 100  # candidates, the best ones, that a report shows in full; the others are in a table that is folded away


def ranking(selection: Selection) -> str:
    """Lay out the candidates, best first, with what is expected of each, how sure that is, and what it took."""
    scores = selection.main
    columns = _columns(selection)
    header = "".join(f'<th role="columnheader" scope="col" class="{css}">{label}</th>' for label, css, _ in columns)
    body = []
    for place, row in enumerate(map(int, scores.order[:SHOWN])):
        cells = "".join(
            f'<td role="cell" class="{css}" data-label="{label}">{values[place]}</td>' for label, css, values in columns
        )
        css = "best" if place == 0 else "" if np.isfinite(scores.score[row]) else "out"
        body.append(
            f'<tr role="row" class="{css}"><td role="cell" class="n rank">{place + 1}</td>'
            f'<th role="rowheader" scope="row">{isolated(selection.curves.names[row])}</th>{cells}</tr>'
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


def ranking_of_others(selection: Selection, remarks: Mapping[str, str]) -> str:
    """Lay out the candidates that `ranking` leaves out, in numbers only; "" if there are none.

    Parameters
    ----------
    selection : Selection
    remarks : mapping of candidate to text
        What to say of some of them.
    """
    scores = selection.main
    others = [int(row) for row in scores.order[SHOWN:]]
    if not others:
        return ""
    titles = {**_titles(), "interval": f"{CERTAINTY_PERCENT} % interval", "best_probability": "P(best)"}
    columns = {titles[key]: cells[SHOWN:] for key, cells in selection.ranking_columns(scores).items()}
    names = [selection.curves.names[row] for row in others]
    columns |= {title: cells[SHOWN:] for title, cells in _work(selection).items()}
    columns["Remarks"] = [remarks.get(name, "") for name in names]
    ranks = [str(SHOWN + place) for place in range(1, len(others) + 1)]
    rows = list(zip(names, ranks, *columns.values(), strict=True))
    return plain(f"Ranks {ranks[0]} to {ranks[-1]}", ["Candidate", "Rank", *columns], rows)


def _titles() -> dict[str, str]:
    return {"predicted_loss": "Expected loss", "score": "Score", "true_loss": "Measured"}


def _work(selection: Selection) -> dict[str, list[str]]:
    """Return how many runs each candidate took and what they cost, best candidate first."""
    scores = selection.main
    return {
        "Runs": [str(selection.runs_used(scores, int(row))) for row in scores.order],
        "FLOPs spent": [flops(selection.spent_on(scores, int(row))) for row in scores.order],
    }


def _columns(selection: Selection) -> list[tuple[str, str, list[str]]]:
    """Return the title, the classes and the cells (HTML) of each column for the best `SHOWN` candidates."""
    scores, columns = selection.main, []
    shown = list(map(int, scores.order[:SHOWN]))
    for key, cells in selection.ranking_columns(scores).items():
        if key == "interval":
            columns.append((f"{CERTAINTY_PERCENT} % interval", "n", cells))
        elif key == "best_probability":
            assert scores.best_probability is not None
            chances = zip(scores.best_probability[shown], cells, strict=False)
            columns.append(("P(best)", "", [_chance(float(share), text) for share, text in chances]))
        else:
            columns.append((_titles()[key], "n", cells))
        if key == "predicted_loss":
            scale = data.ranking_scale(selection).between(6, 134)
            bars = [svg_figures.interval_bar(selection, row, scale) for row in shown]
            columns.append(("Range" if scores.interval is not None else "Position", "", bars))
    return [*columns, *((title, "n minor", cells) for title, cells in _work(selection).items())]


def _chance(share: float, text: str) -> str:
    bar = f'<span class="chance" aria-hidden="true"><i style="width:{100 * share:.0f}%"></i></span>'
    return f'<span class="even">{bar}{text}</span>'


def plain(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out unescaped texts: a row's name, then numbers. A table that is too wide scrolls."""
    first, *others = header
    head = f'<th scope="col">{escaped(first)}</th>' + "".join(
        f'<th scope="col" class="n">{escaped(c)}</th>' for c in others
    )
    body = "".join(
        f'<tr><th scope="row">{isolated(row[0])}</th>{"".join(f"<td class=n>{escaped(c)}</td>" for c in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escaped(caption)}" tabindex="0"><table><caption>'
        f"{escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
