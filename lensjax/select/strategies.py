"""Which runs to make, and in which order: the descent of Algorithm 1, and the race under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lensjax.errors import InputError, SelectionError
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.job import OutOfTimeError, RunFailedError
from lensjax.select.budget import left_out
from lensjax.select.extra_measurements import measure_scores
from lensjax.select.session import Session
from lensjax.selectors import DEFAULT_RACE, method, propose, should_stop


def descend(session: Session) -> None:
    """Train every candidate on what the method needs, one after the other.

    Parameters
    ----------
    session : Session
        Runs in its journal count; those made now are recorded there.

    Raises
    ------
    SelectionError
        If the budget does not pay for what the method needs.
    """
    prepared, budget = session.prepared, session.ledger.budget
    request = prepared.request
    chosen = method(request.method)
    if session.ledger.timed:
        # The speed is not known yet: the smallest subset, which is needed in any case, shows it.
        for candidate in prepared.candidates:
            _descend(session, candidate, prepared.sizes[:1])
        session.update_ledger()
    sizes, needed = _affordable(session), chosen.sizes_needed(request.gamma)
    if len(sizes) < needed:
        raise SelectionError(
            f"the budget pays for {len(sizes)} size(s), --method {request.method} needs {needed}. "
            f"{''.join(f'{n} failed: {r}. ' for n, r in session.failures.items())}Finished runs are in "
            f"{session.directory}; raise --budget and give the same command again."
        )
    for candidate in prepared.candidates:
        if candidate.name not in session.failures:
            _descend(session, candidate, sizes)
        for size in prepared.sizes:
            session.clock.skip(candidate.name, size)
        if budget is None and request.method in chosen.pretrained_scores:
            # First: a candidate without the score that it is ranked by need not be verified.
            measure_scores(session, candidate)
        if request.verify and budget is None:
            # Now, while it is loaded and compiled.
            session.verify(candidate)
        if budget is None:
            measure_scores(session, candidate)
        session.clock.skip(candidate.name, prepared.target)


def _affordable(session: Session) -> tuple[int, ...]:
    """Return the sizes that the budget pays for, if every candidate is trained on all of them; descending."""
    prepared, ledger = session.prepared, session.ledger

    def prices(size: int) -> list[float]:
        counted = [c for c in prepared.candidates if not (ledger.timed and session.known(c, size) is not None)]
        return [ledger.price(c.name, size) for c in counted]

    needed = method(prepared.request.method).sizes_needed(prepared.request.gamma)
    found = ledger.affordable(prepared.sizes, prices, needed)
    if len(found) < len(prepared.sizes):
        first = prepared.sizes[len(found)]
        session.console.line(left_out(first))
    return found[::-1]


def _descend(session: Session, candidate: Candidate, sizes: Sequence[int]) -> None:
    """Measure what the method needs: zero-shot, then from the largest of the sizes (descending) downwards.

    Algorithm 1 and AtS stop where the line ends. A failure here must not lose the other candidates.
    """
    prepared, request = session.prepared, session.prepared.request
    chosen = method(request.method)
    sizes = chosen.sizes(sizes[::-1])[::-1]
    needed = prepared.sizes[: chosen.sizes_needed(request.gamma)]
    downwards = "the largest affordable, then downwards until the line ends"
    why = downwards if chosen.stops_early else "the method needs all"
    try:
        session.loss(candidate, 0, "the model as it is")
        losses: list[float] = []
        for size in sizes:
            if session.refused(candidate, size, needed=size in needed):
                break
            losses.append(session.loss(candidate, size, why))
            if not chosen.stops_early:
                continue
            measured = np.array(sizes[: len(losses)])
            decision = should_stop(measured, np.array(losses), gamma=request.gamma, tau=request.tau)
            if decision.stop:
                session.console.line(f"{candidate.name}: stops here, {decision.reason}")
                break
    except OutOfTimeError as error:
        session.console.line(f"{candidate.name}: {error}")
        for size in (0, *sizes):
            session.load(candidate, size)
    except RunFailedError as error:
        session.failed(candidate, error)


def race(session: Session) -> None:
    """Let the candidates race until the budget is spent or nothing more is worth its cost.

    Candidates that cannot win are not trained on the larger subsets.

    Parameters
    ----------
    session : Session
        Runs in its journal count; those made now are recorded there.
    """
    prepared, ledger = session.prepared, session.ledger
    smallest, largest = prepared.sizes[0], prepared.sizes[-1]
    common, _ = DEFAULT_RACE.sizes(prepared.target, smallest, largest)
    for candidate in prepared.candidates:
        for size in prepared.sizes[::-1]:
            session.load(candidate, size)
    while True:
        left = [c for c in prepared.candidates if c.name not in session.failures]
        if len(left) < 2:
            return
        # Priced by what a run may cost at most, and asked again after each: the answer follows from the journal.
        curves = session.curves(left, prepared.sizes)
        prices = np.array([ledger.prices[c.name] for c in left])
        if ledger.timed and any((c.name, size) not in session.runs for c in left for size in common):
            # Estimates of time decide about nothing that everyone needs.
            prices = np.zeros_like(prices)
        curves = replace(curves, parameters=np.maximum(prices, 1e-300))
        measured = float((prices[:, None] * curves.sizes * np.isfinite(curves.losses)).sum())
        try:
            stage = propose(curves, prepared.target, ledger.left + measured, smallest=smallest, largest=largest)
        except InputError:
            # After failures, what is left may not pay for what everyone needs.
            session.console.line("what is left of the budget does not pay for the subsets that every candidate needs")
            return
        if not stage:
            return
        proposed = stage[0]
        candidate = next(c for c in left if c.name == proposed.name)
        if session.refused(candidate, proposed.size, needed=proposed.size in common):
            return
        try:
            session.loss(candidate, proposed.size, proposed.reason)
        except OutOfTimeError as error:
            session.console.line(f"{candidate.name}: {error}")
            return
        except RunFailedError as error:
            session.failed(candidate, error)
