"""Measurements beside fine-tuning runs: pretrained scores (NLPmetrics, LogME), neural tangent kernels, Hessian traces.

Each is described once, by `tangents` or `score`; `measure` carries it out within the budget and journals it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lensjax._display import duration
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.defaults import TANGENTS
from lensjax.jobs.job import Measurement, OutOfTimeError, PretrainedScore, RunFailedError, TangentMeasurement
from lensjax.jobs.pretrained_scores import MIN_EIGENVALUES, POSITIONS, evidence_flops, samples_for, spectra_flops
from lensjax.jobs.tangent_measurements import tangent_flops
from lensjax.journal import Run, key_of
from lensjax.laws import kernel_residual
from lensjax.progress.state import ActiveRun
from lensjax.select.records import common_facts, run_key
from lensjax.select.request import Prepared
from lensjax.select.session import Session
from lensjax.selectors import method
from lensjax.selectors.methods import NLP_METRICS

OVER_BUDGET = "not measured, it would exceed the budget"


@dataclasses.dataclass(frozen=True)
class ExtraMeasurement:
    """One measurement of one candidate, as planned.

    Attributes
    ----------
    name : str
        One of `lensjax.jobs.defaults.EXTRA_MEASUREMENTS`.
    title : str
        For progress lines.
    job : Measurement
    key : str
        Identifies it in the journal.
    samples : int
        Training samples it is measured on; 0: the weights alone.
    flops : float
        What it costs.
    method : str
        How it is measured, for the journal.
    result_text : callable (dict) -> str
        Puts what was found in words.
    records_failures : bool
        Whether a failure is put into the journal too, with its cost.
    """

    name: str
    title: str
    job: Measurement
    key: str
    samples: int
    flops: float
    method: str
    result_text: Callable[[Mapping[str, Any]], str]
    records_failures: bool


def tangents(prepared: Prepared, candidate: Candidate, samples: int) -> ExtraMeasurement:
    """Describe the measurement of a candidate's neural tangent kernel and Hessian trace on some training samples."""
    tokens = prepared.tokens[candidate.tokenizer].train.first(samples)
    return ExtraMeasurement(
        name=TANGENTS,
        title=f"kernel and Hessian trace on {samples} samples",
        job=TangentMeasurement(samples),
        # What journals have called it since the first one.
        key=key_of({"look": run_key(prepared, candidate, samples)}),
        samples=samples,
        flops=tangent_flops(candidate.parameters, int(tokens.token_counts.sum()), samples),
        method="kernel and Hessian trace",
        result_text=lambda found: (
            f"largest eigenvalue {found['kernel_spectrum'][0]:.3g}, trace {found['trace']:.3g} "
            f"+- {found['trace_error']:.2g}"
        ),
        records_failures=False,
    )


def score(prepared: Prepared, candidate: Candidate, name: str) -> ExtraMeasurement:
    """Describe the measurement of one of a candidate's `PRETRAINED_SCORES`."""
    if name == NLP_METRICS:
        samples = 0
        key = key_of({name: candidate.fingerprint, "min_eigenvalues": MIN_EIGENVALUES})
        flops = spectra_flops(candidate.config)
        how, shown = "the weights' spectra", "pl_alpha"
    else:
        train = prepared.tokens[candidate.tokenizer].train
        samples = samples_for(train, prepared.sizes[-1])
        key = key_of({name: run_key(prepared, candidate, samples), "positions": POSITIONS})
        # It is measured before adapters are added.
        weights = candidate.parameters - (0 if candidate.lora is None else candidate.trainable)
        flops = evidence_flops(weights, train.first(samples))
        how, shown = f"one forward pass over {samples} samples", "log_me"
    return ExtraMeasurement(
        name=name,
        title=name,
        job=PretrainedScore(name, samples),
        key=key,
        samples=samples,
        flops=flops,
        method=how,
        result_text=lambda found: f"{shown} {found[shown]:.4f}",
        records_failures=True,
    )


def measure_scores(session: Session, candidate: Candidate) -> None:
    """Measure the pretrained scores that the method ranks by, unless they are known or the candidate failed.

    Parameters
    ----------
    session : Session
        Gets what is found in its `pretrained_scores` and its journal, and reasons in its `scores_unavailable`; where
        the method is asked for by name, a candidate without its score has failed.
    candidate : Candidate
    """
    asked = session.prepared.request.method
    for name in method(asked).pretrained_scores:
        known = candidate.name in session.pretrained_scores[name] or candidate.name in session.scores_unavailable[name]
        if known or candidate.name in session.failures:
            continue
        try:
            found = measure(session, candidate, score(session.prepared, candidate, name))
            if found.get("problem"):
                raise RunFailedError(found["problem"])
        except RunFailedError as error:
            session.scores_unavailable[name][candidate.name] = str(error)
            if name == asked:
                session.failed(candidate, error)
            else:
                label = session.label(candidate)
                session.console.line(f"{label}: no score by {name}: {error}")
                session.console.detail(f"{label}: {name}: {error.details or error}")
        else:
            session.pretrained_scores[name][candidate.name] = found


def measure_tangents(session: Session, samples: int) -> None:
    """Measure every candidate's kernel and Hessian trace, as far as the budget goes; failures are only reported.

    Parameters
    ----------
    session : Session
        Gets what is found in its `tangents` and its journal.
    samples : int
        Training samples to measure on.
    """
    for candidate in session.prepared.candidates:
        if candidate.name in session.failures:
            continue
        planned = tangents(session.prepared, candidate, samples)
        label = f"{session.label(candidate)}: {planned.title}"
        try:
            session.tangents[candidate.name] = measure(session, candidate, planned)
        except RunFailedError as error:
            said = str(error)
            session.console.line(f"{label}: {said if said == OVER_BUDGET else f'could not be measured: {said}'}")
            session.console.detail(f"{label}: {error.details or error}")


def measure(session: Session, candidate: Candidate, planned: ExtraMeasurement) -> dict[str, Any]:
    """Return a measurement: from the journal, or made now and put there.

    Raises
    ------
    RunFailedError
        If it failed, or would exceed the budget; it is tried again when the selection is continued.
    """
    console = session.console
    label = f"{session.label(candidate)}: {planned.title}"
    known = session.journal.get(planned.key)
    if known is not None and planned.name in known.facts:
        return dict(known.facts[planned.name])
    if not session.ledger.pays(planned.flops):
        raise RunFailedError(OVER_BUDGET)
    session.rank()
    session.state.running = ActiveRun(candidate.name, None, planned.title)
    console.refresh(now=True)
    console.status(label)
    begun = time.monotonic()

    def record(reason: str, found: Mapping[str, Any] | None) -> None:
        facts = common_facts(session.prepared, candidate)
        if found is not None:
            facts[planned.name] = found
        session.journal.append(
            Run(
                *(planned.key, candidate.name, planned.samples, None),
                flops=planned.flops,
                seconds=time.monotonic() - begun,
                reason=reason,
                facts=facts,
                part_of=planned.name,
            )
        )
        session.update_ledger()

    try:
        found = session.runner_for(candidate).measure(planned.job, session.callbacks, session.deadline())
    except OutOfTimeError:
        raise
    except RunFailedError as error:
        if planned.records_failures:
            record(str(error), None)
        raise
    finally:
        session.state.running = None
    found = {**found, "flops": planned.flops, "seconds": time.monotonic() - begun}
    record(planned.method, found)
    if not found.get("problem"):
        console.line(f"{label}: {planned.result_text(found)} ({duration(found['seconds'])})")
    return found


def with_residuals(measured: Mapping[str, Mapping[str, Any]], runs: Iterable[Run]) -> dict[str, Any]:
    """Return the candidates' kernel measurements with F(Theta, t) of LensLLM's eq. 9 at the time each run stopped.

    Negative eigenvalues, which only rounding makes, count as 0. The unit is nats^2.
    """
    runs, found = list(runs), {}
    for name, own in measured.items():
        eigenvalues, residual = np.maximum(np.array(own["kernel_spectrum"]), 0.0), np.array(own["residual"])
        with jax.enable_x64(True):
            residuals = {
                str(run.size): float(kernel_residual(run.steps, eigenvalues, residual, run.facts["learning_rate"]))
                for run in runs
                if run.candidate == name and run.size and "learning_rate" in run.facts
            }
        found[name] = {**own, "kernel_residual": residuals}
    return found
