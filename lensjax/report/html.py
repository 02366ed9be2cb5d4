"""A selection as one self-contained HTML file: the answer first, then the evidence for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lensjax._display import duration, escaped, flops, isolated, number, percent, samples
from lensjax.environment import versions
from lensjax.report import tables
from lensjax.report.figures import data, svg_figures
from lensjax.report.figures.scale import compact, shortened
from lensjax.report.predicted_curves import predicted_curves
from lensjax.report.style import STYLE
from lensjax.report.text import comparison_cells, law_columns
from lensjax.selection import CERTAINTY_PERCENT, Selection, losses_fingerprint, transition_of
from lensjax.selectors.methods import METHODS


def render_html(selection: Selection) -> str:
    """Return the whole selection as one HTML file, light and dark, without scripts and without external resources.

    The best hundred candidates have figures; the others are in a table that is folded away.

    Parameters
    ----------
    selection : Selection
        Of its `facts`, all optional, these are shown: `tune_command` (str: fine-tunes the best candidate), `tune_note`
        (str: what to know before), `metric` (str: which metric of the runs the losses are), `command` (str: the one
        that ran this selection), `task` (str: fingerprint of the data), `seed`, `seconds` (float), `versions` (mapping
        package -> version; default: those of this process), `notes` (list of str), `specification` (mapping),
        `directory` (str), and `tangents`: mapping candidate -> {"kernel_spectrum": eigenvalues, "trace_by_layer":
        mapping layer -> number}, either of which may be missing.

    Returns
    -------
    str

    Raises
    ------
    InputError
        If no candidate could be scored.

    Examples
    --------
    >>> from lensjax.select.from_losses import select_from_losses
    >>> selection = select_from_losses("published:wmt19", visible=51200, gamma=3, tau=5.0)
    >>> page = render_html(selection)
    >>> page.startswith("<!doctype html>"), "https://" in page
    (True, False)
    """
    best = selection.best
    parts = [
        _hero(selection),
        _ranking(selection),
        _curves(selection),
        _cost(selection),
        _next(selection),
        _failures(selection),
        _parameters(selection),
        _methods(selection),
        _tangents(selection),
        _provenance(selection),
    ]
    title = f"Fine-tune {shortened(best, 80)} · lensjax"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # Nothing may be loaded or run, whatever a model's name holds.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escaped(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *filter(None, parts),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _paragraph(text: str, css: str = "") -> str:
    return f'<p class="{css}">{text}</p>' if css else f"<p>{text}</p>"


def _answer(selection: Selection) -> str:
    """Say in one sentence what to fine-tune, what to expect, how sure that is, and what finding out cost."""
    return f"Fine-tune <strong>{isolated(selection.best)}</strong>: {escaped(selection.expectation())}"


def _hero(selection: Selection) -> str:
    scores, row = selection.main, int(selection.main.order[0])
    keys = []
    if np.isfinite(scores.predicted_loss[row]):
        keys.append(("Expected test loss", number(float(scores.predicted_loss[row]), 3)))
    if scores.interval is not None:
        keys.append((f"{CERTAINTY_PERCENT} % interval", " to ".join(number(float(v), 3) for v in scores.interval[row])))
    if scores.best_probability is not None:
        keys.append(("Is the best with", f"{percent(float(scores.best_probability[row]), 0)} %"))
    spent = selection.costs().choice
    if np.isfinite(spent):
        keys.append(("Spent", f"{flops(spent)} FLOPs"))
    if isinstance(selection.facts.get("seconds"), (int, float)):
        keys.append(("Time of all runs", duration(selection.facts["seconds"])))
    terms = "".join(f"<div><dt>{k}</dt>\n<dd>{escaped(v)}</dd></div>" for k, v in keys)
    more = []
    names = selection.credible_set(scores)
    if len(names) > 1:
        shown = ", ".join(isolated(n) for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        more.append(f"With {CERTAINTY_PERCENT} % certainty, the best is one of these {len(names)}: {shown}.")
    if scores.remarks and scores.remarks[row]:
        more.append(f"Of this choice, mind: {escaped(scores.remarks[row])}.")
    best = selection.truly_best
    if selection.truth is not None and best is not None:
        chosen, outcome = float(selection.truth[row]), "the choice was right"
        if best != row:
            outcome = f"the best was {isolated(selection.curves.names[best])} with {number(selection.truth[best], 3)}"
            outcome += f", against {number(chosen, 3)} of the choice" if np.isfinite(chosen) else ""
        more.append(f"The losses at {samples(selection.target)} samples have been measured too: {outcome}.")
    return "\n".join(
        [
            '<section class="hero" aria-labelledby="answer">',
            _paragraph("Which model to fine-tune", "eyebrow"),
            f'<h1 id="answer">Fine-tune {isolated(selection.best)}</h1>',
            _paragraph(_answer(selection), "lead"),
            *(_paragraph(text) for text in more),
            f'<dl class="keys">{terms}</dl>',
            "</section>",
        ]
    )


def _ranking(selection: Selection) -> str:
    remarks = _remarks(selection)
    shown = {selection.curves.names[row] for row in selection.main.order[: tables.SHOWN]}
    notes = [f"<li>{isolated(n)}: {escaped(text)}</li>" for n, text in remarks.items() if n in shown]
    others = tables.ranking_of_others(selection, remarks)
    count = len(selection.curves) - tables.SHOWN
    return "\n".join(
        [
            '<section aria-labelledby="ranking">',
            '<h2 id="ranking">Ranking</h2>',
            tables.ranking(selection),
            f'<ul class="small dim">{"".join(notes)}</ul>' if notes else "",
            *([f"<details><summary>The other {count} candidates</summary>{others}</details>"] if others else []),
            "</section>",
        ]
    )


def _remarks(selection: Selection) -> dict[str, str]:
    """Return what a reader should know about some candidates: remarks, and why one has no score."""
    scores, remarks = selection.main, {}
    for row in scores.order:
        if not np.isfinite(scores.score[row]):
            remarks[selection.curves.names[row]] = scores.status[row]
        elif scores.remarks and scores.remarks[row]:
            remarks[selection.curves.names[row]] = scores.remarks[row]
    return remarks


LEGEND = (
    ('<circle class="paid" cx="15" cy="7" r="4"/>', "measured and paid for"),
    ('<circle class="spare" cx="15" cy="7" r="4"/>', "measured, not used by the method"),
    ('<path class="fit" d="M1 7H29"/>', "fit"),
    ('<path class="forecast" d="M1 7H29"/>', "forecast"),
    ('<rect class="band" x="1" y="1" width="28" height="12"/>', f"{CERTAINTY_PERCENT} % interval"),
    ('<circle class="guess" cx="15" cy="7" r="4"/>', "expected at the target"),
    ('<path class="phase" d="M15 0V14"/>', "phase transition"),
    ('<path class="truth" d="M15 1l6 6l-6 6l-6 -6Z"/>', "measured at the target"),
)


def _curves(selection: Selection) -> str:
    scores = selection.main
    rows = scores.order[: tables.SHOWN]
    predicted = predicted_curves(selection, scores, rows)
    axes = data.shared_axes(selection, predicted)
    figures = []
    for rank, row in enumerate(map(int, rows), start=1):
        picture = svg_figures.curve(selection, row, predicted, axes, name=f"curve-{rank}")
        figures.append(f"<figure>{picture}<figcaption>{_caption(selection, rank, row)}</figcaption></figure>")
    shown = {
        "measured, not used by the method": bool((np.isfinite(selection.curves.losses) & ~scores.used).any()),
        "fit": bool(np.isfinite(predicted.losses).any()),
        "forecast": bool(np.isfinite(predicted.losses).any()),
        f"{CERTAINTY_PERCENT} % interval": predicted.interval is not None,
        "expected at the target": bool(np.isfinite(scores.predicted_loss).any()),
        "phase transition": "transition" in scores.details,
        "measured at the target": selection.truth is not None,
    }
    known = METHODS.get(scores.method)
    explanation = f"Method {scores.method}." if known is None else known.description
    legend = "".join(
        f'<li><svg class="fig" viewBox="0 0 30 14" aria-hidden="true" focusable="false">{mark}</svg>{text}</li>'
        for mark, text in LEGEND
        if shown.get(text, True)
    )
    count = len(selection.curves) - len(rows)
    left_out = [_paragraph(f"{count} candidate(s) that rank lower have no figure here.", "dim small")] if count else []
    return "\n".join(
        [
            '<section aria-labelledby="curves">',
            '<h2 id="curves">Loss curves</h2>',
            _paragraph(escaped(explanation)),
            _paragraph(
                "The test loss says how badly a model predicts the answers of the test set: lower is better. All "
                "figures have the same axes, both logarithmic; 0 samples is the model as it came.",
                "dim small",
            ),
            _paragraph(escaped(predicted.reason), "dim small") if predicted.reason else "",
            f'<ul class="legend" aria-label="Legend">{legend}</ul>',
            f'<div class="figures">{"".join(figures)}</div>',
            *left_out,
            "</section>",
        ]
    )


def _caption(selection: Selection, rank: int, row: int) -> str:
    scores, curves = selection.main, selection.curves
    text = [f"<strong>{rank}. {isolated(curves.names[row])}</strong>"]
    used = curves.sizes[scores.used[row]]
    tuned = used[used > 0]
    if len(tuned):
        spent = selection.spent_on(scores, row)
        runs = f"{len(tuned)} run{'s' if len(tuned) > 1 else ''}, up to {samples(tuned[-1])} samples"
        text.append(runs + ("" if np.isnan(spent) else f", {flops(spent)} FLOPs"))
    else:
        text.append("no run of this candidate was used")
    transition = transition_of(scores, row)
    if np.isfinite(transition):
        phase = selection.phase(scores, row)
        where = f"power phase from about {samples(transition)} samples"
        reached = {"power": ", which was reached", "pre-power": ", beyond what was measured"}.get(phase, "")
        text.append(where + reached)
    return "<br>".join([text[0], escaped("; ".join(text[1:]) + ".")])


def _cost(selection: Selection) -> str:
    costs = selection.costs()
    spent, full, best = costs.choice, costs.full, costs.best
    parts = ['<section aria-labelledby="cost">', '<h2 id="cost">What it cost, and what was saved</h2>']
    if not costs.known:
        parts.append(_paragraph(f"The cost is not known ({escaped(selection.cost_note)})."))
        return "\n".join([*parts, "</section>"])
    everything = f"fine-tuning all {len(selection.curves)} candidates on {samples(selection.target)} samples"
    text = f"The choice took {flops(spent)} FLOPs; {everything} would take {flops(full)}."
    saved = 1 - (spent + best) / full if full > 0 else 0.0
    if saved > 0:
        text += f" With the chosen model's own fine-tuning ({flops(best)}), {percent(saved)} % is saved."
    else:
        text += f" With the chosen model's own fine-tuning ({flops(best)}), nothing is saved at this size."
    parts.append(_paragraph(escaped(text)))
    figure = svg_figures.cost(selection, name="cost-figure")
    if figure:
        caption = "Floating-point operations, as shares of fine-tuning all candidates."
        parts.append(f'<figure class="narrow">{figure}<figcaption>{caption}</figcaption></figure>')
    failed = f" {flops(costs.failed)} of them went to candidates that failed." if costs.failed else ""
    parts.append(_paragraph(escaped(f"Counted as {selection.cost_note}.{failed}"), "dim small"))
    return "\n".join([*parts, "</section>"])


def _next(selection: Selection) -> str:
    command, note = (selection.facts.get(name) for name in ("tune_command", "tune_note"))
    parts = ['<section aria-labelledby="next">', '<h2 id="next">Fine-tune the chosen model</h2>']
    if command:
        parts += [
            _paragraph(f"This command does it and saves the model. {escaped(note or '')}".strip()),
            # One click selects it whole.
            f'<pre style="user-select: all"><code>{escaped(command)}</code></pre>',
        ]
    else:
        parts.append(
            _paragraph(
                f"Fine-tune {isolated(selection.best)} on all {samples(selection.target)} samples with the trainer and "
                "the settings that the losses above were measured with; only then does the forecast hold."
            )
        )
    return "\n".join([*parts, "</section>"])


def _failures(selection: Selection) -> str:
    lists: tuple[tuple[str, Mapping[str, str]], ...] = (
        ("Not ranked", selection.failures),
        ("Ranked, but not measured at the target", selection.unverified),
        ("Methods that these losses do not allow", selection.refused),
        ("Without a score by one of the other methods", selection.unscored),
    )
    if not any(reasons for _, reasons in lists):
        return (
            '<section aria-labelledby="failed"><h2 id="failed">What failed</h2>'
            "<p>Nothing: every run that was needed was made.</p></section>"
        )
    css = ' class="bad"' if selection.failures else ""
    parts = [f'<section{css} aria-labelledby="failed">', '<h2 id="failed">What failed, and why</h2>']
    for title, reasons in lists:
        if reasons:
            items = "".join(f"<li><strong>{isolated(n)}</strong>: {escaped(r)}</li>" for n, r in reasons.items())
            parts.append(f"<h3>{title}</h3><ul>{items}</ul>")
    return "\n".join([*parts, "</section>"])


def _fold(name: str, title: str, content: Sequence[str]) -> str:
    inside = "\n".join(content)
    return f'<details class="card"><summary><h2 id="{name}">{title}</h2></summary>\n{inside}\n</details>'


def _parameters(selection: Selection) -> str:
    scores = selection.main
    columns = law_columns(selection, scores)
    if not set(columns) - {"D*", "phase"}:
        return ""
    titles = {"D*": "D* (samples)", "phase": "Phase"}
    header = ["Candidate", *(titles.get(name, name) for name in columns)]
    names = [selection.curves.names[row] for row in scores.order]
    rows = list(zip(names, *columns.values(), strict=True))
    words = (
        "beta says how fast the loss falls with data, E what no amount of data removes. D* is where the pre-power "
        "phase, in which more data help little, gives way to the power phase, in which the loss falls along a straight "
        "line (both axes logarithmic)."
    )
    caption = f"Parameters of the law, method {scores.method}"
    return _fold("law", "The law's parameters", [_paragraph(words), tables.plain(caption, header, rows)])


def _methods(selection: Selection) -> str:
    if len(selection.scores) < 2:
        return ""
    header, rows = comparison_cells(selection)
    return _fold("methods", "All methods", [tables.plain("The methods against each other", header, rows)])


def _tangents(selection: Selection) -> str:
    tangents = selection.facts.get("tangents")
    if not isinstance(tangents, Mapping) or not tangents:
        return ""
    words = (
        "The spectrum of the neural tangent kernel says how many directions of the data a model learns quickly; the "
        "trace of the Hessian says which layers the loss is sensitive to."
    )
    figures = []
    others = {selection.curves.names[row] for row in selection.main.order[tables.SHOWN :]}
    shown = {name: measured for name, measured in tangents.items() if name not in others}
    for place, (name, measured) in enumerate(shown.items(), start=1):
        pictures = [
            ("Kernel spectrum", svg_figures.spectrum(measured.get("kernel_spectrum"), name=f"spectrum-{place}")),
            ("Trace by layer", svg_figures.traces(measured.get("trace_by_layer") or {}, name=f"traces-{place}")),
        ]
        inside = "".join(f"<figure>{p}<figcaption>{c}</figcaption></figure>" for c, p in pictures if p)
        figures.append(
            f'<h3>{isolated(str(name))}</h3><div class="figures">{inside or "<p>Nothing was computed.</p>"}</div>'
        )
    if len(shown) < len(tangents):
        words += f" {len(tangents) - len(shown)} candidate(s) that rank lower have no figure here."
    return _fold("tangents", "Tangents: kernels and curvature", [_paragraph(words), *figures])


def _provenance(selection: Selection) -> str:
    facts, curves = selection.facts, selection.curves
    specification = facts.get("specification")
    seed = facts.get("seed", specification.get("seed") if isinstance(specification, Mapping) else None)
    known = facts.get("versions")
    shown: dict[str, Any] = {
        "Losses from": selection.source,
        "Metric": facts.get("metric"),
        "Candidates": f"{len(curves)} ranked, {len(selection.failures)} failed",
        "Sizes measured": ", ".join(compact(size) for size in curves.sizes),
        "Method": selection.main.method,
        "Data fingerprint": facts.get("task"),
        "Fingerprint of the losses": losses_fingerprint(curves),
        "Seed": seed,
        "Run directory": facts.get("directory"),
        "Versions": ", ".join(f"{k} {v}" for k, v in (known if isinstance(known, Mapping) else versions()).items()),
    }
    terms = "".join(f"<dt>{k}</dt>\n<dd>{escaped(v)}</dd>\n" for k, v in shown.items() if v is not None)
    parts = ['<section aria-labelledby="made">', '<h2 id="made">How this was made</h2>']
    parts.append(f'<dl class="facts">{terms}</dl>')
    if facts.get("notes"):
        notes = "".join(f"<li>{escaped(note)}</li>" for note in facts["notes"])
        parts.append(f"<h3>Notes</h3><ul>{notes}</ul>")
    if facts.get("command"):
        parts.append(f"<h3>Command</h3><pre><code>{escaped(facts['command'])}</code></pre>")
    if specification:
        written = json.dumps(specification, indent=2, ensure_ascii=False, default=str)
        parts.append(
            f"<details><summary>Everything that defines this selection</summary><pre>{escaped(written)}</pre></details>"
        )
    parts.append("</section>")
    return "\n".join(parts)
