"""A selection as plain text for the terminal.

Names and messages come from users' files. Each is made printable before it is put into a line, so that none can hold an
escape sequence, or a line break that makes a line of its own.
"""

from __future__ import annotations

import numpy as np

from lensjax._display import flops, number, percent, printable, printable_command, samples, text_table
from lensjax.selection import CERTAINTY_PERCENT, Selection, format_interval
from lensjax.selectors import Scores

NAMES_SHOWN, NOTES_SHOWN = 5, 12  # all are in the JSON
LAW_COLUMNS = ("B", "F", "D_l", "beta", "E", "alpha")


def ranking(selection: Selection, scores: Scores) -> str:
    """Lay out the candidates, best first, with what is expected of each and why."""
    titles = {
        "predicted_loss": f"loss at {samples(selection.target)}",
        "interval": f"{CERTAINTY_PERCENT} % interval",
        "best_probability": "P(best)",
        "true_loss": "measured",
    }
    columns = {
        "rank": [str(rank) for rank in range(1, len(scores.order) + 1)],
        "candidate": [selection.curves.names[row] for row in scores.order],
        **{titles.get(name, name): cells for name, cells in selection.ranking_columns(scores).items()},
        **law_columns(selection, scores),
        "based on": [_basis(selection, scores, int(row)) for row in scores.order],
    }
    return text_table(list(columns), list(zip(*columns.values(), strict=True)), left=(1, len(columns) - 1))


def law_columns(selection: Selection, scores: Scores) -> dict[str, list[str]]:
    """Return the parameters of a method's law, with the phases it implies, formatted, best candidate first."""
    columns = {
        name: [number(float(scores.details[name][row])) for row in scores.order]
        for name in LAW_COLUMNS
        if name in scores.details
    }
    if "transition" in scores.details:
        columns["D*"] = [samples(float(scores.details["transition"][row])) for row in scores.order]
        columns["phase"] = [selection.phase(scores, int(row)) or "-" for row in scores.order]
    return columns


def _basis(selection: Selection, scores: Scores, row: int) -> str:
    why = _points(selection, scores, row) or scores.status[row]
    return "; ".join(filter(None, [why, scores.remarks[row] if scores.remarks else ""]))


def _points(selection: Selection, scores: Scores, row: int) -> str:
    """Say which measurements a score rests on; `Scores.status` says more."""
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
            metrics = selection.metrics(scores)
            cells += [percent(metrics["PearCorr"]), percent(metrics["RelAcc"]), number(metrics["RMSE"])]
        else:
            cells += [number(float(scores.predicted_loss[scores.order[0]]), 4)]
        rows.append(cells)
    return header, rows


def comparison(selection: Selection) -> str:
    """Lay out the methods against each other: choice, cost, and how good the choice was where that is known."""
    header, rows = comparison_cells(selection)
    text = text_table(["", *header, ""], [["", *r, ""] for r in rows], left=(1, len(header) + 1))
    if selection.truth is not None and "model_size" in selection.scores:
        text += (
            "\nmodel_size scores by minus log size, lower is better; the papers print its PearCorr with the other sign."
        )
    return text


def answer(selection: Selection) -> str:
    """Say in one sentence which candidate to fine-tune and what to expect of it."""
    scores = selection.main
    order = scores.order
    text = f"Fine-tune {scores.best}"
    predicted = float(scores.predicted_loss[order[0]])
    if np.isfinite(predicted):
        unit = f"nats per {selection.loss_unit}"
        text += f": expected test loss {number(predicted, 4)} {unit} at {samples(selection.target)} samples"
    else:
        text += f" for {samples(selection.target)} samples (method {scores.method} predicts no loss)"
    if len(order) > 1 and np.isfinite(scores.score[order[1]]):
        text += f"; next {selection.curves.names[order[1]]}"
        if np.isfinite(scores.predicted_loss[order[1]]):
            text += f" ({number(float(scores.predicted_loss[order[1]]), 4)})"
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
        f"{CERTAINTY_PERCENT} % interval {format_interval(scores, row)}; {scores.best} is the best of all with "
        f"probability {percent(float(scores.best_probability[row]), 0)} %. The best is, with at least "
        f"{CERTAINTY_PERCENT} %, {which}."
    )


def cost(selection: Selection) -> str:
    """Say what finding out cost, beside fine-tuning every candidate on all samples."""
    costs = selection.costs()
    if np.isnan(costs.used) or np.isnan(costs.full):
        return f"Cost: unknown ({selection.cost_note})."
    return (
        f"Cost: {flops(costs.used)} FLOPs, {percent(costs.used / costs.full)} % of fine-tuning all "
        f"{len(selection.curves)} candidates on {samples(selection.target)} samples ({flops(costs.full)}); "
        f"{selection.cost_note}."
        + (f" {flops(costs.failed)} more went to candidates that failed." if costs.failed else "")
    )


def judgement(selection: Selection) -> str:
    """Say how good the choice was, where the losses at the target are known."""
    best = selection.truly_best
    if best is None:
        return ""
    metrics = selection.metrics(selection.main)
    known = [f"{n} {percent(metrics[n])} %" for n in ("RelAcc", "PearCorr") if np.isfinite(metrics[n])]
    known += [f"RMSE {metrics['RMSE']:.4f}"] if np.isfinite(metrics["RMSE"]) else []
    text = f"Against the losses measured at {samples(selection.target)}: {', '.join(known)}"
    return f"{text}; the best candidate was {selection.curves.names[best]}."


def metric(selection: Selection) -> str:
    """Say which metric the losses are, where one was chosen."""
    name = selection.facts.get("metric")
    return f"The losses are the metric {name} of {selection.source}." if name else ""


def next_step(selection: Selection) -> list[str]:
    """Say how to fine-tune the best candidate: a sentence, and where it is known the command on a line of its own."""
    command, note = (selection.facts.get(name) for name in ("tune_command", "tune_note"))
    if command:
        return [
            f"Next, this fine-tunes it and saves the model{f'. {note}' if note else ':'}",
            printable_command(command),
        ]
    return [
        f"Next: fine-tune {selection.best} on all {samples(selection.target)} samples with the trainer and the "
        "settings that the losses were measured with; only then does the forecast hold."
    ]


def notes(selection: Selection) -> list[str]:
    """Return the lines that say what to know of the losses: what was left out, or taken for something."""
    if selection.facts.get("seconds") is not None:
        return []  # losses that were measured here; their notes stand in the page
    found = [f"  {note}." for note in selection.facts.get("notes", ())]
    more = [f"  and {len(found) - NOTES_SHOWN} more, which --json has."] if len(found) > NOTES_SHOWN else []
    return ["", "Mind, of these losses:", *found[:NOTES_SHOWN], *more] if found else []


def render(selection: Selection) -> str:
    """Return the whole selection as text, the answer first."""
    sentences = [say(selection) for say in (answer, metric, certainty, cost, judgement)]
    head = [*filter(None, sentences), *next_step(selection)]
    parts = [*map(printable, head), "", ranking(selection, selection.main)]
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
            parts += ["", title, *(printable(f"  {name}: {reason}") for name, reason in reasons.items())]
    parts += [printable(line) for line in notes(selection)]
    return "\n".join(parts)
