"""Selection by fine-tuning: runs a prepared request from its first job to the result."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from lensjax.environment import versions
from lensjax.errors import InputError, SelectionError
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.defaults import EXTRA_MEASUREMENTS, TANGENTS
from lensjax.jobs.process import PROCESS_NAME
from lensjax.journal import Run
from lensjax.losses.curves import Curves
from lensjax.progress.console import Console
from lensjax.select.budget import Budget, charged_records
from lensjax.select.extra_measurements import measure_scores, measure_tangents, with_residuals
from lensjax.select.from_losses import score_all
from lensjax.select.records import by_xla, version_notes
from lensjax.select.request import Request, prepare
from lensjax.select.session import COMPILED, LOGS, Session
from lensjax.select.strategies import descend, race
from lensjax.select.tune_command import tune_facts
from lensjax.selection import Selection
from lensjax.selectors import Scores, method
from lensjax.selectors.methods import LOG_ME


def run_selection(
    models: Sequence[str | os.PathLike[str]] = (),
    task: str | os.PathLike[str] | None = None,
    *,
    progress: TextIO | None = None,
    isolate: bool = True,
    **settings: Any,
) -> Selection:
    """Choose among models by fine-tuning each on small subsets of a task, as ``python -m lensjax.select`` does.

    Parameters
    ----------
    models : sequence of str or path
        Checkpoint directories, GGUF files or Hugging Face ids; ``MODEL+lora`` is fine-tuned by low-rank adapters. The
        small demo models by default.
    task : str or path, optional
        Data to fine-tune on, see `lensjax.tasks.load_task`. The demo's WordNet definitions by default.
    progress : text stream, optional
        Gets lines of progress, ``sys.stderr`` for instance. None: no progress is shown.
    isolate : bool
        Whether each candidate is trained in a process of its own, so that a crash there does not end the others. A
        script that does so must be importable, with the call under ``if __name__ == "__main__":``.
    **settings
        Fields of `lensjax.select.request.Request`: ``out``, ``target``, ``method``, ``plan``, ``search`` and so on.
        ``budget`` may be text, such as "5%" or "3h".

    Returns
    -------
    Selection
        Its `facts["directory"]` is the run directory; the same call continues there.

    Raises
    ------
    InputError
        Before any long work, if something given cannot be used.
    SelectionError
        If fewer than two candidates could be measured.

    Notes
    -----
    With `isolate`, JAX's accelerators are best left to the candidates' processes: set ``JAX_PLATFORMS=cpu`` for this
    one, or pass ``isolate=False`` where this process holds the only device.
    """
    if multiprocessing.current_process().name == PROCESS_NAME:
        raise InputError(
            "run_selection is called again by a candidate's process, which imports your script; put the call under "
            '`if __name__ == "__main__":`, or pass isolate=False.'
        )
    known = set(Request.__dataclass_fields__) - {"models", "task"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InputError(f"run_selection: no setting {', '.join(unknown)}; there are: {', '.join(sorted(known))}.")
    if isinstance(settings.get("budget"), str):
        settings["budget"] = Budget.parse(settings["budget"])
    if settings.get("out") is not None:
        settings["out"] = Path(settings["out"])
    if isinstance(models, str | os.PathLike):
        raise InputError(f"models={os.fspath(models)!r} is one model; give a list of at least two.")
    request = Request(
        models=tuple(os.fspath(model) for model in models),
        task=None if task is None else os.fspath(task),
        **settings,
    )
    console = Console(io.StringIO() if progress is None else progress, quiet=progress is None)
    prepared = prepare(request)
    return select(Session(prepared, request.out or prepared.default_directory, console, isolate=isolate))


def select(session: Session) -> Selection:
    """Fine-tune, fit, rank.

    Parameters
    ----------
    session : Session
        New; closed afterwards.

    Returns
    -------
    Selection
        Candidates that failed are in its `failures` and not ranked.

    Raises
    ------
    SelectionError
        If fewer than two candidates could be measured, or the journal could not be written.
    """
    prepared, console = session.prepared, session.console
    for notice in [*session.journal.notices, *version_notes(session.journal.lines), *prepared.notes]:
        console.line(f"note: {notice}")
    console.line(
        f"{len(prepared.candidates)} candidates, task {prepared.task.name}: subsets of "
        f"{', '.join(map(str, prepared.sizes))} samples, choosing for {prepared.target}; "
        f"results in {session.directory}"
    )
    if session.isolate:
        console.detail(f"each candidate is trained in a process of its own; their logs: {session.directory / LOGS}")
    elif console.verbose:
        # Otherwise this process would take memory of a device that its processes need.
        console.detail(f"everything is computed in this process; JAX devices: {', '.join(map(str, jax.devices()))}")
    try:
        with console.follow(session.state):
            _measure_all(session)
    finally:
        session.close()
    return _selection(session)


def _measure_all(session: Session) -> None:
    prepared = session.prepared
    session.update_ledger()
    if prepared.races:
        race(session)
    else:
        descend(session)
        # With a budget, scores get what is left when everything is trained that it pays for.
        for candidate in prepared.candidates:
            measure_scores(session, candidate)
    if prepared.request.tangents:
        measure_tangents(session, prepared.request.tangents)
    if prepared.request.verify:
        for candidate in prepared.candidates:
            session.verify(candidate)
    session.release_runner()
    session.rank(last=True)
    # Compiled programs are of use to a continued selection only.
    shutil.rmtree(session.directory / COMPILED, ignore_errors=True)


def _selection(session: Session) -> Selection:
    """Score what was measured and put the result together."""
    prepared, request = session.prepared, session.prepared.request
    ranked = _ranked(session)
    names = [c.name for c in ranked]
    runs = [run for run in session.runs.values() if run.candidate in names]
    measured = session.curves(ranked, session.measured_sizes(names))
    curves = measured.visible(prepared.sizes[-1])
    flops = np.zeros(measured.losses.shape)
    for run in runs:
        flops[names.index(run.candidate), int(np.searchsorted(measured.sizes, run.size))] = run.flops
    full_flops, truth, how = _full_cost(session, ranked, runs, measured, flops)
    scores, refused = _scores(session, ranked, curves)
    finished = {r.key for r in session.journal.lines if r.test_loss is not None and not r.part_of}
    spent = [r for r in charged_records(session.journal.lines) if r.part_of not in EXTRA_MEASUREMENTS]
    score_flops = {
        name: sum(r.flops for r in session.journal.lines if r.part_of == name)
        for name in method(request.method).pretrained_scores
    }
    return Selection(
        source=prepared.task.name,
        curves=curves,
        target=prepared.target,
        scores=scores,
        refused=refused,
        flops=flops[:, : len(curves.sizes)],
        full_flops=full_flops,
        failed_flops=sum(r.flops for r in spent if r.candidate in session.failures or r.key not in finished),
        cost_note=_cost_note(session, ranked, runs, how, score_flops),
        truth=truth,
        failures=session.failures,
        unverified=session.unverified,
        loss_unit=request.loss_unit,
        score_flops=score_flops,
        facts={
            "directory": str(session.directory),
            "seconds": sum(r.seconds for r in session.runs.values()),
            "seed": request.seed,
            "versions": versions(),
            "task": prepared.task.fingerprint,
            "notes": list(prepared.notes),
            **({TANGENTS: with_residuals(session.tangents, runs)} if session.tangents else {}),
            **{name: found for name, found in session.pretrained_scores.items() if found},
            "specification": prepared.specification,
            **tune_facts(prepared, next(iter(scores.values())).best, runs, session.directory),
        },
    )


def _ranked(session: Session) -> list[Candidate]:
    """Return the candidates that are measured far enough to be ranked; the others have failed.

    Raises
    ------
    SelectionError
        If they are fewer than two.
    """
    prepared, request = session.prepared, session.prepared.request
    needed = method(request.method).sizes_to_rank(request.gamma)
    for candidate in prepared.candidates:
        own = [size for name, size in session.runs if name == candidate.name]
        sizes = sum(size in prepared.sizes for size in own)
        if request.budget is not None and (sizes < needed or not own) and candidate.name not in session.failures:
            reason = f"the budget was spent after {sizes} of the {needed} sizes it needs"
            session.failures[candidate.name] = reason
    ranked = [c for c in prepared.candidates if c.name not in session.failures]
    if len(ranked) < 2:
        reasons = "; ".join(f"{n}: {r}" for n, r in session.failures.items())
        raise SelectionError(
            f"{len(ranked)} candidate(s) could be fine-tuned, choosing needs two ({reasons}). Finished runs are in "
            f"{session.directory}; mend the cause and give the same command again."
        )
    return ranked


def _full_cost(
    session: Session, ranked: Sequence[Candidate], runs: Sequence[Run], measured: Curves, flops: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Return the FLOPs (M,) of fine-tuning on the target, the losses (M,) there if measured, and how it was counted."""
    prepared, request = session.prepared, session.prepared.request
    by_name = {c.name: c for c in ranked}
    epochs = [
        run.tokens / prepared.tokens[by_name[run.candidate].tokenizer].train.token_counts[: run.size].sum()
        for run in runs
        if run.size == prepared.sizes[-1]
    ]
    most = request.plan.max_epochs * (request.search.trials(request.plan) - 1)
    passes = float(np.mean(epochs)) if epochs else float(most)
    tokens = np.array([prepared.tokens[c.tokenizer].mean for c in ranked]) * prepared.target * passes
    full = tokens * np.array([c.flops_per_token for c in ranked])
    truth = measured.at(prepared.target)
    if request.verify and np.isfinite(truth).any():
        at_target = flops[:, measured.sizes == prepared.target].sum(1)
        return np.where(np.isfinite(truth), at_target, full), truth, "as measured"
    how = ", as for the largest subset" if epochs else ", the most allowed"
    return full, None, f"estimated at {passes:.1f} passes{how}"


def _scores(session: Session, ranked: Sequence[Candidate], curves: Curves) -> tuple[dict[str, Scores], dict[str, str]]:
    """Score the candidates by the method, or by all; see `score_all`."""
    prepared, request = session.prepared, session.prepared.request
    names = {c.name for c in ranked}
    scores, refused = score_all(
        curves,
        prepared.target,
        request.method,
        gamma=request.gamma,
        tau=request.tau,
        without={
            score: {name: reason for name, reason in of.items() if name in names}
            for score, of in session.scores_unavailable.items()
        },
    )
    if LOG_ME in scores and len({c.tokenizer.removesuffix("-separate") for c in ranked}) > 1:
        remark = "its classes are its own tokens, and the candidates have different tokenizers"
        scores[LOG_ME] = replace(scores[LOG_ME], remarks=(remark,) * len(ranked))
    return scores, refused


def _cost_note(
    session: Session, ranked: Sequence[Candidate], runs: Sequence[Run], how: str, score_flops: dict[str, float]
) -> str:
    """Say how costs were counted."""
    frozen = " (4 N for frozen weights)" if any(c.lora for c in ranked) else ""
    note = f"6 N per token trained on{frozen}, all epochs and trials; the whole {how}{by_xla(runs)}"
    tangents = sum(found["flops"] for found in session.tangents.values())
    if tangents:
        note += f"; kernels and Hessian traces took {tangents:.3g} more"
    more = {n: flops for n, flops in score_flops.items() if flops and n != session.prepared.request.method}
    if more:
        note += f"; {' and '.join(more)} took {sum(more.values()):.3g} more"
    return note
