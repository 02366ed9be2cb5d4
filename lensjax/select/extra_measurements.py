"""Scores that need no fine-tuning, NLPmetrics and LogME: measured of each candidate where the method wants them."""

from __future__ import annotations

import time
from typing import Any

from lensjax._display import duration
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.pretrained_scores import MIN_EIGENVALUES, POSITIONS, evidence_flops, samples_for, spectra_flops
from lensjax.jobs.runner import OutOfTimeError, RunFailedError
from lensjax.journal import LOG_ME, NLP_METRICS, PRETRAINED_SCORES, Run, key_of
from lensjax.progress.board import ActiveRun
from lensjax.select.records import common_facts, run_key
from lensjax.select.request import Prepared
from lensjax.select.session import Session

SHOWN = {NLP_METRICS: "pl_alpha", LOG_ME: "log_me"}


def pretrained_scores_of(method: str) -> tuple[str, ...]:
    """Return which of `PRETRAINED_SCORES` a method scores by."""
    return PRETRAINED_SCORES if method == "all" else tuple(what for what in PRETRAINED_SCORES if what == method)


def score_samples(prepared: Prepared, candidate: Candidate, what: str) -> int:
    """Return on how many training samples it is measured; the weights need none."""
    if what == NLP_METRICS:
        return 0
    return samples_for(prepared.tokens[candidate.tokenizer].train, prepared.sizes[-1])


def score_key(prepared: Prepared, candidate: Candidate, what: str) -> str:
    """Return what identifies the measurement in the journal."""
    if what == NLP_METRICS:
        return key_of({what: candidate.fingerprint, "min_eigenvalues": MIN_EIGENVALUES})
    size = score_samples(prepared, candidate, what)
    return key_of({what: run_key(prepared, candidate, size), "positions": POSITIONS})


def score_flops(prepared: Prepared, candidate: Candidate, what: str) -> float:
    """Count its floating-point operations: of a forward pass, or of the products and eigenvalues of the weights."""
    if what == NLP_METRICS:
        return spectra_flops(candidate.config)
    # Adapters are not there yet.
    weights = candidate.parameters - (0 if candidate.lora is None else candidate.trainable)
    size = score_samples(prepared, candidate, what)
    return evidence_flops(weights, prepared.tokens[candidate.tokenizer].train.first(size))


def gauge(made: Session, candidate: Candidate) -> None:
    """Measure of a candidate what the method scores by, unless that was done or the candidate failed.

    Parameters
    ----------
    made : Session
        What is found goes to its `pretrained_scores` and its journal, what cannot be measured to its `scores_unavailable`; where the method
        is asked for by name, that candidate has failed.
    candidate : Candidate
    """
    method = made.prepared.request.method
    for what in pretrained_scores_of(method):
        known = candidate.name in made.pretrained_scores[what] or candidate.name in made.scores_unavailable[what]
        if known or candidate.name in made.failures:
            continue
        try:
            found = _find(made, candidate, what)
            if found.get("problem"):
                raise RunFailedError(found["problem"])
        except RunFailedError as error:
            made.scores_unavailable[what][candidate.name] = str(error)
            if what == method:
                made.failed(candidate, error)
            else:
                made.console.line(f"{made.label(candidate)}: no score by {what}: {error}")
                made.console.detail(f"{made.label(candidate)}: {what}: {error.details or error}")
        else:
            made.pretrained_scores[what][candidate.name] = found


def _find(made: Session, candidate: Candidate, what: str) -> dict[str, Any]:
    """Return what is measured: from the journal, or made now and put there.

    Raises
    ------
    RunFailedError
        If it could not be, or would exceed the budget; it is tried again when the selection is continued.
    """
    prepared, console = made.prepared, made.console
    label = f"{made.label(candidate)}: {what}"
    key, size = score_key(prepared, candidate, what), score_samples(prepared, candidate, what)
    run = made.journal.get(key)
    if run is not None and what in run.facts:
        return dict(run.facts[what])
    cost, budget = score_flops(prepared, candidate, what), made.ledger.budget
    if budget is not None and (made.ledger.left <= 0 or (budget.kind == "flops" and cost > made.ledger.left)):
        raise RunFailedError("not measured, it would exceed the budget")
    made.rank()
    made.board.running = ActiveRun(candidate.name, None, what)
    console.refresh(now=True)
    console.status(label)
    begun = time.monotonic()

    def note(reason: str, **found: Any) -> float:
        """Put into the journal what was found, or that nothing was; return the seconds it took."""
        seconds = time.monotonic() - begun
        facts = common_facts(prepared, candidate)
        if found:
            facts[what] = found | {"seconds": seconds}
        own: dict[str, Any] = {"flops": cost, "seconds": seconds, "reason": reason, "facts": facts}
        made.journal.append(Run(key, candidate.name, size, None, part_of=what, **own))
        made.settle()
        return seconds

    try:
        found = {**made.runner_for(candidate).gauge(what, size, made.deadline(), made.heartbeat), "flops": cost}
    except OutOfTimeError:
        raise
    except RunFailedError as error:
        note(str(error))
        raise
    finally:
        made.board.running = None
    on = "the weights' spectra" if what == NLP_METRICS else f"one forward pass over {size} samples"
    found["seconds"] = seconds = note(on, **found)
    if not found.get("problem"):
        console.line(f"{label}: {SHOWN[what]} {found[SHOWN[what]]:.4f} ({duration(seconds)})")
    return found
