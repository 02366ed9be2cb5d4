"""The race: with a budget, candidates that cannot win are not trained on the larger subsets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lensjax.errors import InputError
from lensjax.jobs.runner import OutOfTimeError, RunFailedError
from lensjax.select.session import Session
from lensjax.selectors import RACE, propose


def race(made: Session) -> None:
    """Let the candidates race until the budget is spent or nothing more is worth it.

    Parameters
    ----------
    made : Session
        What is in its journal counts; the runs are made and noted there.
    """
    prepared, ledger = made.prepared, made.ledger
    smallest, largest = prepared.sizes[0], prepared.sizes[-1]
    common, _ = RACE.sizes(prepared.target, smallest, largest)
    for candidate in prepared.candidates:
        for size in prepared.sizes[::-1]:
            if made.known(candidate, size) is not None:
                made.measure(candidate, size, "")
    while True:
        left = [c for c in prepared.candidates if c.name not in made.failures]
        if len(left) < 2:
            return
        # Priced by what a run may cost at most, and asked again after each: the answer follows from the journal.
        curves = made.curves(left, prepared.sizes)
        prices = np.array([ledger.prices[c.name] for c in left])
        if any((c.name, size) not in made.found for c in left for size in common):
            # Estimates of time decide about nothing that everyone needs.
            prices = prices * (ledger.budget is None or ledger.budget.kind != "seconds")
        curves = replace(curves, parameters=np.maximum(prices, 1e-300))
        measured = float((prices[:, None] * curves.sizes * np.isfinite(curves.losses)).sum())
        try:
            stage = propose(curves, prepared.target, ledger.left + measured, smallest=smallest, largest=largest)
        except InputError:
            # After failures, what is left may not pay for what everyone needs.
            made.console.line("what is left of the budget does not pay for the subsets that every candidate needs")
            return
        if not stage:
            return
        proposed = stage[0]
        candidate = next(c for c in left if c.name == proposed.name)
        if made.refused(candidate, proposed.size, needed=proposed.size in common):
            return
        try:
            made.measure(candidate, proposed.size, proposed.reason)
        except OutOfTimeError as error:
            made.console.line(f"{candidate.name}: {error}")
            return
        except RunFailedError as error:
            made.failed(candidate, error)
