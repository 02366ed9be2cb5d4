"""Looks at the candidates' kernels and curvatures, as far as the budget goes."""

from __future__ import annotations

import time
from typing import Any

from lensjax._display import duration
from lensjax.jobs.runner import RunFailedError
from lensjax.jobs.tangent_measurements import kernel_residual, tangent_flops
from lensjax.journal import TANGENTS, Run, key_of
from lensjax.progress.board import ActiveRun
from lensjax.select.records import common_facts, run_key
from lensjax.select.session import Session


def measure_tangents(made: Session, samples: int) -> None:
    """Look at each candidate's kernel and curvature, as far as the budget goes; failures are only noted.

    Parameters
    ----------
    made : Session
        What is found goes to its `looks` and its journal.
    samples : int
        Training samples to look on.
    """
    prepared, console = made.prepared, made.console
    for candidate in prepared.candidates:
        if candidate.name in made.failures:
            continue
        what = f"kernel and Hessian trace on {samples} samples"
        label = f"{made.label(candidate)}: {what}"
        key = key_of({"look": run_key(prepared, candidate, samples)})
        known = made.journal.get(key)
        if known is not None:
            made.looks[candidate.name] = known.facts[TANGENTS]
            continue
        tokens = prepared.tokens[candidate.tokenizer].train.first(samples)
        cost = tangent_flops(candidate.parameters, int(tokens.token_counts.sum()), samples)
        budget = made.ledger.budget
        if budget is not None and (made.ledger.left <= 0 or (budget.kind == "flops" and cost > made.ledger.left)):
            console.line(f"{label}: not measured, it would exceed the budget")
            continue
        made.rank()
        made.board.running = ActiveRun(candidate.name, None, what)
        console.refresh(now=True)
        console.status(label)
        begun = time.monotonic()
        try:
            found = made.runner_for(candidate).look(samples, made.deadline(), made.heartbeat)
        except RunFailedError as error:
            made.board.running = None
            console.line(f"{label}: could not be measured: {error}")
            console.detail(f"{label}: {error.details or error}")
            continue
        made.board.running = None
        seconds = time.monotonic() - begun
        made.journal.append(
            Run(
                *(key, candidate.name, samples, None),
                flops=found["flops"],
                seconds=seconds,
                reason="kernel and Hessian trace",
                facts={**common_facts(prepared, candidate), TANGENTS: found},
                part_of=TANGENTS,
            )
        )
        made.settle()
        made.looks[candidate.name] = found
        console.line(
            f"{label}: largest eigenvalue {found['kernel_spectrum'][0]:.3g}, trace {found['trace']:.3g} "
            f"+- {found['trace_error']:.2g} ({duration(seconds)})"
        )


def with_residuals(looks: dict[str, dict[str, Any]], runs: list[Run]) -> dict[str, Any]:
    """Return what was found of each candidate, with F(Theta, t) of eq. 9 at the time each of its runs stopped."""
    found = {}
    for name, seen in looks.items():
        residuals = {
            str(run.size): kernel_residual(seen, run.facts["learning_rate"], run.steps)
            for run in runs
            if run.candidate == name and run.size
        }
        found[name] = {**seen, "kernel_residual": residuals}
    return found
