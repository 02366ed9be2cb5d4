"""The state of one selection by fine-tuning: its journal, its budget, and what has been measured so far.

Every run is made once, and is in the journal before the next one starts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lensjax._display import duration
from lensjax.finetune import Progress
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.job import Callbacks, FineTuning, Result, RunFailedError, Runner, RunnerConfig, Trials
from lensjax.jobs.process import CandidateProcess
from lensjax.jobs.runner import CandidateRunner
from lensjax.journal import Journal, Run
from lensjax.losses.curves import FACT_COLUMNS, Curves
from lensjax.progress.console import Console
from lensjax.progress.state import ActiveRun, SelectionState
from lensjax.select.budget import charged_records
from lensjax.select.from_losses import score_all
from lensjax.select.interim_ranking import InterimRanking, rankable
from lensjax.select.records import (
    common_facts,
    describe_run,
    describe_trial,
    known_trials,
    run_key,
    run_record,
    trial_record,
)
from lensjax.select.request import Prepared
from lensjax.select.timing import Clock, Stopwatch
from lensjax.selectors import DEFAULT, Scores, method
from lensjax.selectors.methods import ALL, PRETRAINED_SCORES

COMPILED, LOGS, STOPWATCH = "compiled", "logs", "stopwatch.json"


def runner_config(prepared: Prepared, candidate: Candidate) -> RunnerConfig:
    """Return what the jobs of a candidate need."""
    return prepared.request.runner_config(candidate, prepared.tokens[candidate.tokenizer])


class Session:
    """Runs jobs of a prepared request and keeps their results; a run in the journal is not repeated.

    Parameters
    ----------
    prepared : Prepared
    directory : Path
        Run directory.
    console : Console
        For progress.
    isolate : bool
        Whether each candidate is trained in a process of its own: if that one crashes, the others go on.

    Attributes
    ----------
    runs : dict of (candidate, size) to Run
        Finished runs.
    failures : dict of candidate to reason
        Candidates that are not ranked.
    unverified : dict of candidate to reason
        Candidates whose run on all samples failed.
    tangents : dict of candidate to measurement
        See `lensjax.select.extra_measurements.measure_tangents`.
    pretrained_scores, scores_unavailable : dict of score to dict of candidate to measurement, or to reason
        For each of `lensjax.selectors.methods.PRETRAINED_SCORES`.
    state : SelectionState
        What the console shows.
    callbacks : Callbacks
        Keeps the time and the view up to date while a job runs.

    Raises
    ------
    InputError
        If the directory cannot be used, see `Journal`.
    """

    def __init__(self, prepared: Prepared, directory: Path, console: Console, *, isolate: bool = True) -> None:
        self.prepared, self.console, self.directory, self.isolate = prepared, console, directory, isolate
        self.journal = Journal(directory, prepared.specification)
        self.runs: dict[tuple[str, int], Run] = {}
        self.failures: dict[str, str] = {}
        self.unverified: dict[str, str] = {}
        self.tangents: dict[str, dict[str, Any]] = {}
        self.pretrained_scores: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in PRETRAINED_SCORES}
        self.scores_unavailable: dict[str, dict[str, str]] = {name: {} for name in PRETRAINED_SCORES}
        self.clock = Clock(prepared)
        self.ledger = prepared.ledger()
        self.stopwatch = Stopwatch(directory / STOPWATCH, sum(r.seconds for r in charged_records(self.journal.lines)))
        self.callbacks = Callbacks(heartbeat=self.heartbeat)
        self.state = self._initial_state()
        self._runner: Runner | None = None
        self._ranking = InterimRanking(console, self.state)

    def _initial_state(self) -> SelectionState:
        """Return what there is to show before the first run."""
        prepared = self.prepared
        zero_shot = () if prepared.races else (0,)
        target = (prepared.target,) if prepared.request.verify else ()
        return SelectionState(
            title=f"{prepared.task.name}: choosing for {prepared.target:,} samples",
            unit=f"nats per {prepared.request.loss_unit}",
            names=tuple(c.name for c in prepared.candidates),
            sizes=(*zero_shot, *prepared.sizes, *target),
            target=prepared.target,
            failures=self.failures,
        )

    def update_ledger(self) -> None:
        """Save the elapsed time and work out what is spent."""
        self.stopwatch.save()
        self.ledger.update(self.journal.lines, self.stopwatch.seconds)
        self.refresh()

    def refresh(self) -> None:
        """Bring the view up to date."""
        state, budget = self.state, self.ledger.budget
        state.time_left = str(self.clock)
        if budget is not None:
            used = self.stopwatch.seconds if self.ledger.timed else self.ledger.spent
            share = min(used / self.ledger.amount, 1.0)
            whole = self.ledger.describe(budget.amount)
            if budget.kind == "share":
                whole = f"{budget.amount:.3g} of tuning all"
            state.spent = f"budget {whole}: {100 * share:.0f} % spent, {100 * (1 - share):.0f} % left"
        self.console.refresh()

    def heartbeat(self) -> None:
        """Save the elapsed time and refresh the view while a job runs."""
        self.stopwatch.save()
        self.refresh()

    def rank(self, *, last: bool = False) -> None:
        """Show an interim ranking, if somebody watches; see `InterimRanking.update`."""
        news = (len(self.runs), len(self.failures), sum(map(len, self.pretrained_scores.values())))
        self._ranking.update(news, self._interim_scores, last=last)

    def _interim_scores(self) -> Scores | None:
        """Score the candidates that are measured as far as the method needs; None if they are fewer than two."""
        request, largest = self.prepared.request, self.prepared.sizes[-1]
        chosen = method(DEFAULT if request.method == ALL else request.method)
        ready = rankable(self.prepared, chosen, self.runs, self.pretrained_scores, self.failures)
        if len(ready) < 2:
            return None
        sizes = [size for size in self.measured_sizes([c.name for c in ready]) if size <= largest]
        curves = self.curves(ready, sizes)
        scores, _ = score_all(curves, self.prepared.target, chosen.name, gamma=request.gamma, tau=request.tau)
        return scores[chosen.name]

    def label(self, candidate: Candidate) -> str:
        """Return a candidate's number and name."""
        number = self.prepared.candidates.index(candidate) + 1
        return f"candidate {number}/{len(self.prepared.candidates)} {candidate.name}"

    def failed(self, candidate: Candidate, error: RunFailedError) -> None:
        """Take a candidate out of the ranking and say why."""
        self.failures[candidate.name] = str(error)
        self.console.line(f"{candidate.name} FAILED and is not ranked: {error}")

    def verify(self, candidate: Candidate) -> None:
        """Fine-tune a candidate on all samples, unless that was done or it failed."""
        done = (candidate.name, self.prepared.target) in self.runs
        if done or candidate.name in self.failures or candidate.name in self.unverified:
            return
        self.stopwatch.pause()
        try:
            self.loss(candidate, self.prepared.target, "to verify the choice", paid=False)
        except RunFailedError as error:
            self.unverified[candidate.name] = str(error)
            self.console.line(f"{candidate.name} could NOT BE VERIFIED: {error}")
        self.stopwatch.resume()

    def refused(self, candidate: Candidate, size: int, *, needed: bool) -> bool:
        """Return whether the budget forbids a run that is not in the journal yet, and say so."""
        known = self.known(candidate, size) is not None
        refusal = "" if known else self.ledger.refuses(candidate.name, size, needed=needed)
        if refusal:
            self.console.line(f"{candidate.name} is not trained: {refusal}")
        return bool(refusal)

    def curves(self, candidates: Sequence[Candidate], sizes: Sequence[int]) -> Curves:
        """Return what is measured, (candidates, sizes), in the loss unit that was asked for; NaN where no run is."""
        losses = np.full((len(candidates), len(sizes)), np.nan)
        for row, candidate in enumerate(candidates):
            for column, size in enumerate(sizes):
                run = self.runs.get((candidate.name, size))
                if run is not None and run.test_loss is not None:
                    losses[row, column] = run.test_loss * self.unit(candidate)
        names = tuple(c.name for c in candidates)
        return Curves(
            names=names,
            sizes=np.array(sizes, np.float64),
            losses=losses,
            parameters=np.array([c.parameters for c in candidates], np.float64),
            source=self.prepared.task.name,
            facts=self._facts(names),
        )

    def measured_sizes(self, names: Sequence[str]) -> list[int]:
        """Return the sizes at which any of these candidates is measured, ascending."""
        return sorted({size for name, size in self.runs if name in names})

    def _facts(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the facts of candidates that selectors know, see `lensjax.losses.curves.FACT_COLUMNS`."""
        merged = {n: {k: v for of in self.pretrained_scores.values() for k, v in of.get(n, {}).items()} for n in names}
        known = [fact for fact in FACT_COLUMNS if any(fact in own for own in merged.values())]
        return {fact: np.array([merged[n].get(fact, np.nan) for n in names]) for fact in known}

    def known(self, candidate: Candidate, size: int) -> Run | None:
        """Return a finished run from the journal."""
        run = self.journal.get(run_key(self.prepared, candidate, size))
        return None if run is None or run.test_loss is None else run

    def _record(self, candidate: Candidate, size: int, run: Run) -> float:
        """Keep a finished run; return its test loss, nats per token."""
        assert run.test_loss is not None
        self.runs[candidate.name, size] = run
        self.state.losses[candidate.name, size] = run.test_loss * self.unit(candidate)
        return run.test_loss

    def load(self, candidate: Candidate, size: int) -> float | None:
        """Take a finished run over from the journal; return its test loss, None if there is none.

        Of a candidate that another name was given to, the run counts under its present name.
        """
        run = self.known(candidate, size)
        if run is None:
            return None
        self.clock.skip(candidate.name, size)
        loss = self._record(candidate, size, replace(run, candidate=candidate.name))
        self.console.line(f"{self.label(candidate)}: {_what(size)}: test loss {loss:.4f} (from the journal)")
        return loss

    def loss(self, candidate: Candidate, size: int, why: str, *, paid: bool = True) -> float:
        """Return the test loss of a run, nats per token: from the journal, or made now and put there.

        Parameters
        ----------
        candidate : Candidate
        size : int
            Training samples; 0: the model is evaluated as it is.
        why : str
            Reason for the run, for progress and the journal.
        paid : bool
            Whether a time budget ends it.

        Raises
        ------
        RunFailedError
            If it gave none.
        """
        known = self.load(candidate, size)
        if known is not None:
            return known
        label = f"{self.label(candidate)}: {_what(size)}"
        self.rank()
        running = self.state.running = ActiveRun(candidate.name, size, f"loading and compiling; {why}")
        self.console.next(f"{self.label(candidate)}: next {_what(size)}: {why}")
        self.console.status(f"{label}, loading and compiling; {self.clock}")
        try:
            run = self._run(candidate, size, label, why, running, paid=paid)
        except RunFailedError as error:
            self.state.running = None
            self.console.detail(f"{label}: {error.details or error}")
            raise
        self.state.running = None
        loss = self._record(candidate, size, run)
        kept = f", best weights at step {run.steps} of {run.facts['steps_run']}" if size else ""
        if len(run.facts["trials"]) > 1:
            kept += f", learning rate {run.facts['learning_rate']:g}, batch size {run.facts['batch_size']}"
            kept += f" of {len(run.facts['trials'])} trials"
        self.console.line(f"{label}: test loss {loss:.4f}{kept} ({duration(run.seconds)}); {self.clock}")
        self.console.detail(f"{label}: {describe_run(run)}")
        return loss

    def _run(self, candidate: Candidate, size: int, label: str, why: str, running: ActiveRun, *, paid: bool) -> Run:
        """Make a run and put it into the journal, also if it fails."""
        key, request = run_key(self.prepared, candidate, size), self.prepared.request
        begun, none_yet = time.monotonic(), Progress(0, 1, 0, float("nan"))
        latest = none_yet
        # Otherwise the record of the run is that of its only trial.
        records_trials = request.search.trials(request.plan) > 2

        def progress(at: Progress) -> None:
            nonlocal latest
            before, latest = latest, at
            self.clock.progress(candidate.name, size, at.done)
            step = f"step {at.step} of at most {at.total_steps}, validation loss {at.validation_loss:.4f}"
            running.activity, running.fraction = step, at.done
            self.heartbeat()
            # A step is reported a second time when it has been evaluated.
            if at.step == before.step:
                self.console.detail(f"{label}, evaluated in epoch {at.epoch}: {step} at best")
            self.console.status(f"{label}, {step}; {self.clock}")

        def trials(ended: Trials) -> None:
            nonlocal latest
            latest = none_yet
            for trial in ended:
                if records_trials:
                    self.journal.append(trial_record(key, candidate, size, trial))
            for trial in ended:
                self.console.detail(f"{label}: {describe_trial(trial)}")

        known = known_trials(self.journal.trials_of(key))
        callbacks = replace(self.callbacks, progress=progress, trials=trials)
        runner = self.runner_for(candidate)
        try:
            result = runner.run(FineTuning(size, known), callbacks, self.deadline() if paid else None)
        except RunFailedError as error:
            seconds = time.monotonic() - begun
            self._record_failure(key, candidate, size, error, latest, seconds, trials_recorded=records_trials)
            raise
        return self._record_success(candidate, size, result, why, time.monotonic() - begun)

    def _record_success(self, candidate: Candidate, size: int, result: Result, why: str, seconds: float) -> Run:
        run = run_record(self.prepared, candidate, size, result, why, seconds)
        self.journal.append(run)
        self.update_ledger()
        self.clock.finished(candidate.name, size, result.outcome.seconds)
        return run

    def _record_failure(
        self,
        key: str,
        candidate: Candidate,
        size: int,
        error: RunFailedError,
        latest: Progress,
        seconds: float,
        *,
        trials_recorded: bool,
    ) -> None:
        """Put a failed run into the journal, with the cost that no record of a trial has."""
        unrecorded = () if trials_recorded else error.trials
        per_sample = self.prepared.tokens[candidate.tokenizer].most_per_sample((size,)) if size else 1.0
        failed = Run(
            key,
            candidate.name,
            size,
            None,
            tokens=sum(t.tokens for t in unrecorded) + latest.tokens,
            flops=sum(t.flops for t in unrecorded) + candidate.flops_per_token * latest.tokens,
            seconds=seconds,
            reason=str(error),
            facts=common_facts(self.prepared, candidate),
            samples=sum(t.samples for t in unrecorded) + round(latest.tokens / per_sample),
        )
        before = self.journal.get(key)
        # Trials that all failed are not made again, and a second record of them would cost nothing.
        if before is None or failed.flops or before.reason != failed.reason:
            self.journal.append(failed)
        self.update_ledger()

    def deadline(self) -> float | None:
        """Return when the time budget is spent, on `time.monotonic`'s clock."""
        budget = self.ledger.budget
        return self.stopwatch.deadline(budget.amount) if budget is not None and self.ledger.timed else None

    def runner_for(self, candidate: Candidate) -> Runner:
        """Return the runner of a candidate's jobs; that of another candidate is closed."""
        if self._runner is not None and self._runner.config.name == candidate.name:
            return self._runner
        self.release_runner()
        config = runner_config(self.prepared, candidate)
        if not self.isolate:
            self._runner = CandidateRunner(config)
            return self._runner
        log = self.directory / LOGS / (re.sub(r"[^\w.+-]", "_", candidate.name)[-200:] + ".log")
        compiled = self.directory / COMPILED
        self._runner = CandidateProcess(replace(config, compiled=compiled.absolute(), log=log.absolute()))
        return self._runner

    def release_runner(self) -> None:
        """Free what the last candidate held."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def close(self) -> None:
        """Stop the time, free the last candidate, and let other processes use the directory."""
        # The lock goes last: whoever comes next finds everything in its place.
        try:
            self.stopwatch.pause()
            self.release_runner()
        finally:
            self.journal.close()

    def unit(self, candidate: Candidate) -> float:
        """Return the factor that turns a candidate's losses per token into the unit that was asked for."""
        if self.prepared.request.loss_unit == "token":
            return 1.0
        return self.prepared.tokens[candidate.tokenizer].test.tokens_per_byte


def _what(size: int) -> str:
    return f"{size} samples" if size else "zero-shot"
