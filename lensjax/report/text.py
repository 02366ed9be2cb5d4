"""A selection as plain text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lensjax._display import flops, number, percent, samples
from lensjax.selection import Selection
from lensjax.selectors import CREDIBLE_LEVEL, Scores

NAMES_SHOWN = 5  # all are in the JSON
LAW_COLUMNS = ("B", "F", "D_l", "beta", "E", "alpha")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns: the first two left-aligned, numbers right-aligned."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            str(cell).ljust(width) if i == 1 or i == len(header) - 1 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def ranking(selection: Selection, scores: Scores) -> str:
    """Lay out the candidates, best first, with what is expected of each and why."""
    predicts = np.isfinite(scores.predicted_loss).any()
    laws = [c for c in LAW_COLUMNS if c in scores.details]
    header = ["rank", "candidate"]
    header += [f"loss at {samples(selection.target)}"] if predicts else ["score"]
    header += [f"{percent(CREDIBLE_LEVEL, 0)} % interval"] if scores.interval is not None else []
    header += ["P(best)"] if scores.best_probability is not None else []
    header += ["measured"] if selection.truth is not None else []
    header += [*laws]
    header += ["D*", "phase"] if "transition" in scores.details else []
    header += ["based on"]
    rows = []
    for rank, row in enumerate(scores.order, start=1):
        cells = [str(rank), selection.curves.names[row]]
        cells += [number(scores.predicted_loss[row] if predicts else scores.score[row], 4)]
        cells += [interval(scores, int(row))] if scores.interval is not None else []
        cells += [percent(scores.best_probability[row], 0) + " %"] if scores.best_probability is not None else []
        cells += [number(selection.truth[row], 4)] if selection.truth is not None else []
        cells += [number(scores.details[c][row]) for c in laws]
        if "transition" in scores.details:
            cells += [samples(scores.details["transition"][row]), selection.phase(scores, row) or "-"]
        why = [
            _points(selection, scores, int(row)) or scores.status[row],
            scores.remarks[row] if scores.remarks else "",
        ]
        rows.append([*cells, "; ".join(filter(None, why))])
    return table(header, rows)


def _points(selection: Selection, scores: Scores, row: int) -> str:
    """Say which measurements a verdict rests on; the whole story is in `Scores.status`."""
    sizes = selection.curves.sizes[scores.used[row]]
    tuned = sizes[sizes > 0]
    if not len(tuned) or len(scores.details) == 0:
        return ""
    return f"{len(tuned)} sizes, {samples(tuned[0])} to {samples(tuned[-1])}{', zero-shot' if 0 in sizes else ''}"


def comparison_cells(selection: Selection) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the methods against each other: choice, cost, how good it was where that is known."""
    known = selection.truth is not None
    header = ["method", "choice", "FLOPs", *(["PearCorr %", "RelAcc %", "RMSE"] if known else ["predicted"])]
    rows = []
    for name, scores in selection.scores.items():
        best = scores.best if np.isfinite(scores.score).any() else "-"
        cells = [name, best, flops(selection.spent(scores))]
        if known:
            found = selection.metrics(scores)
            cells += [percent(found["PearCorr"]), percent(found["RelAcc"]), number(found["RMSE"])]
        else:
            cells += [number(float(scores.predicted_loss[scores.order[0]]), 4)]
        rows.append(cells)
    return header, rows


def comparison(selection: Selection) -> str:
    """Lay out the methods against each other: choice, cost, and how good the choice was where that is known."""
    header, rows = comparison_cells(selection)
    text = table(["", *header, ""], [["", *r, ""] for r in rows])
    if selection.truth is not None and "model_size" in selection.scores:
        text += (
            "\nmodel_size scores by minus log size, lower is better; the papers print its PearCorr with the other sign."
        )
    return text


def interval(scores: Scores, row: int) -> str:
    """Format the interval of a candidate's predicted loss."""
    assert scores.interval is not None
    return " to ".join(number(float(bound), 4) for bound in scores.interval[row])


def answer(selection: Selection) -> str:
    """Say in one sentence which candidate to fine-tune and what to expect of it."""
    scores = selection.main
    order = scores.order
    text = f"Fine-tune {scores.best}"
    predicted = float(scores.predicted_loss[order[0]])
    if np.isfinite(predicted):
        unit = f"nats per {selection.loss_unit}"
        text += f": expected test loss {predicted:.4f} {unit} at {samples(selection.target)} samples"
    else:
        text += f" for {samples(selection.target)} samples (method {scores.method} predicts no loss)"
    if len(order) > 1 and np.isfinite(scores.score[order[1]]):
        text += f"; next {selection.curves.names[order[1]]}"
        if np.isfinite(scores.predicted_loss[order[1]]):
            text += f" ({scores.predicted_loss[order[1]]:.4f})"
    return text + "."


def certainty(selection: Selection) -> str:
    """Say how sure the choice is, for methods that know."""
    scores = selection.main
    if scores.interval is None or scores.best_probability is None:
        return ""
    row = int(scores.order[0])
    names = selection.credible_set(scores)
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    which = names[0] if len(names) == 1 else f"one of {len(names)}: {shown}"
    return (
        f"{percent(CREDIBLE_LEVEL, 0)} % interval {interval(scores, row)}; {scores.best} is the best of all with "
        f"probability {percent(float(scores.best_probability[row]), 0)} %. The best is, with at least "
        f"{percent(CREDIBLE_LEVEL, 0)} %, {which}."
    )


def cost(selection: Selection) -> str:
    """Say what finding out cost, beside fine-tuning every candidate on all samples."""
    spent, full = selection.spent(selection.main), float(selection.full_flops.sum())
    if np.isnan(spent) or np.isnan(full):
        return f"Cost: unknown ({selection.cost_note})."
    return (
        f"Cost: {flops(spent)} FLOPs, {percent(spent / full)} % of fine-tuning all {len(selection.curves)} candidates "
        f"on {samples(selection.target)} samples ({flops(full)}); {selection.cost_note}."
        + (f" {flops(selection.failed_flops)} more went to candidates that failed." if selection.failed_flops else "")
    )


def judgement(selection: Selection) -> str:
    """Say how good the choice was, where the losses at the target are known."""
    if selection.truth is None:
        return ""
    found = selection.metrics(selection.main)
    truly = selection.curves.names[int(np.nanargmin(selection.truth))]
    known = [f"{n} {percent(found[n])} %" for n in ("RelAcc", "PearCorr") if np.isfinite(found[n])]
    known += [f"RMSE {found['RMSE']:.4f}"] if np.isfinite(found["RMSE"]) else []
    text = f"Against the losses measured at {samples(selection.target)}: {', '.join(known)}"
    return f"{text}; the best candidate was {truly}."


def metric(selection: Selection) -> str:
    """Say which metric the losses are, where one was chosen."""
    name = selection.facts.get("metric")
    return f"The losses are the metric {name} of {selection.source}." if name else ""


def next_step(selection: Selection) -> str:
    """Say how to fine-tune the winner: the command on a line of its own, or a sentence where none is known."""
    command, note = (selection.facts.get(name) for name in ("tune_command", "tune_note"))
    if command:
        return f"Next, this fine-tunes it and saves the model{f'. {note}' if note else ':'}\n{command}"
    return (
        f"Next: fine-tune {selection.best} on all {samples(selection.target)} samples with the trainer and the "
        "settings that the losses were measured with; only then does the forecast hold."
    )


def render(selection: Selection) -> str:
    """Return the whole selection as text, the answer first."""
    said = (answer, metric, certainty, cost, judgement, next_step)
    parts = [*filter(None, (say(selection) for say in said)), "", ranking(selection, selection.main)]
    if len(selection.scores) > 1:
        parts += ["", "All methods:", comparison(selection)]
    lists = {
        "Methods that these losses do not allow:": selection.refused,
        "Without a score by one of the other methods:": selection.unscored,
        "Not ranked:": selection.failures,
        "Not verified:": selection.unverified,
    }
    for title, reasons in lists.items():
        if reasons:
            parts += ["", title, *(f"  {name}: {reason}" for name, reason in reasons.items())]
    return "\n".join(parts)
