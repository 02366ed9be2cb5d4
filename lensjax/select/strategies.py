"""The descent: every candidate is trained on what the method needs, from the largest subset downwards."""

from __future__ import annotations

import numpy as np

from lensjax.errors import SelectionError
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.runner import OutOfTimeError, RunFailedError
from lensjax.journal import PRETRAINED_SCORES
from lensjax.select.extra_measurements import gauge
from lensjax.select.request import UNTRAINED, sizes_needed
from lensjax.select.session import Session
from lensjax.selectors import should_stop


def descend_all(made: Session) -> None:
    """Train every candidate on what the method needs, one after the other.

    Parameters
    ----------
    made : Session
        What is in its journal counts; the runs are made and noted there.

    Raises
    ------
    SelectionError
        If the budget does not pay for what the method needs.
    """
    prepared, budget = made.prepared, made.ledger.budget
    request = prepared.request
    if budget is not None and budget.kind == "seconds":
        # The speed is not known yet: the smallest subset, needed in any case, shows it.
        for candidate in prepared.candidates:
            _descend(made, candidate, prepared.sizes[:1])
        made.settle()
    sizes = _affordable(made)
    needed = sizes_needed(request.method, request.gamma)
    if len(sizes) < needed:
        raise SelectionError(
            f"the budget pays for {len(sizes)} size(s), --method {request.method} needs {needed}. "
            f"{''.join(f'{n} failed: {r}. ' for n, r in made.failures.items())}Finished runs are in "
            f"{made.directory}; raise --budget and give the same command again."
        )
    for candidate in prepared.candidates:
        if candidate.name not in made.failures:
            _descend(made, candidate, sizes)
        for size in prepared.sizes:
            made.clock.skip(candidate.name, size)
        if budget is None and request.method in PRETRAINED_SCORES:
            # First, for without it there is nothing to verify.
            gauge(made, candidate)
        if request.verify and budget is None:
            # Now, while it is loaded and compiled.
            made.verify(candidate)
        if budget is None:
            gauge(made, candidate)
        made.clock.skip(candidate.name, prepared.target)


def _affordable(made: Session) -> tuple[int, ...]:
    """Return the sizes that the budget pays for, if every candidate is trained on all of them; descending.

    Prices in FLOPs and samples do not change, and a resumed selection must come to the same answer: all runs count,
    against all of the budget. Prices in seconds do: those still to be made count, against what is left.
    """
    prepared, ledger, total = made.prepared, made.ledger, 0.0
    found: list[int] = []
    timed = ledger.budget is not None and ledger.budget.kind == "seconds"
    needed = sizes_needed(prepared.request.method, prepared.request.gamma)
    for size in prepared.sizes:
        left = [c for c in prepared.candidates if not (timed and made.known(c, size) is not None)]
        total += sum(ledger.price(c.name, size) for c in left)
        free = timed and (not left or len(found) < needed)
        if not free and ledger.budget is not None and total > (ledger.left if timed else ledger.amount):
            made.console.line(f"subsets of {size} samples and more may cost more than --budget and are left out")
            break
        found.append(size)
    return tuple(found[::-1])


def _descend(made: Session, candidate: Candidate, sizes: tuple[int, ...]) -> None:
    """Measure what the method needs: zero-shot, then from the largest affordable subset downwards.

    Algorithm 1 and AtS stop where the line ends; the laws need all sizes, SubTuning the largest, the others none.
    Its failure must not lose the other candidates.
    """
    request = made.prepared.request
    sizes = () if request.method in UNTRAINED else sizes[:1] if request.method == "subtuning" else sizes
    stops = request.method in ("lens", "ats")
    needed = sizes_needed(request.method, request.gamma)
    why = "the largest affordable, then downwards until the line ends" if stops else "the method needs all"
    try:
        made.measure(candidate, 0, "the model as it is")
        losses: list[float] = []
        for size in sizes:
            if made.refused(candidate, size, needed=size in made.prepared.sizes[:needed]):
                break
            losses.append(made.measure(candidate, size, why))
            if not stops:
                continue
            measured = np.array(sizes[: len(losses)])
            decision = should_stop(measured, np.array(losses), gamma=request.gamma, tau=request.tau)
            if decision.stop:
                made.console.line(f"{candidate.name}: stops here, {decision.reason}")
                break
    except OutOfTimeError as error:
        made.console.line(f"{candidate.name}: {error}")
        for size in (0, *sizes):
            if made.known(candidate, size) is not None:
                made.measure(candidate, size, "")
    except RunFailedError as error:
        made.failed(candidate, error)
