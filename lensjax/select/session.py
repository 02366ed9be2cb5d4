"""The measurements of a selection: each run is made once, in the journal before the next one starts, and shown."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lensjax._display import duration
from lensjax.finetune import Progress, Trial
from lensjax.finetune.search import Point
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.process import CandidateProcess
from lensjax.jobs.runner import Callbacks, CandidateRunner, RunFailedError, RunnerConfig, Trials, reason
from lensjax.journal import PRETRAINED_SCORES, Journal, Run
from lensjax.losses.curves import FACT_COLUMNS, Curves
from lensjax.progress.board import ActiveRun, SelectionState
from lensjax.progress.console import Console
from lensjax.select.budget import paid
from lensjax.select.details import of_run, of_scores, of_trial
from lensjax.select.from_losses import score_all
from lensjax.select.records import common_facts, read_trial, run_key, run_record, trial_record
from lensjax.select.request import Prepared, sizes_needed
from lensjax.select.timing import Clock, Stopwatch
from lensjax.selectors import DEFAULT, Scores

COMPILED, LOGS, STOPWATCH = "compiled", "logs", "stopwatch.json"
RANKING_SHARE = 0.03  # of the time so far: what the rankings for who looks on may have taken


def assign(prepared: Prepared, candidate: Candidate) -> RunnerConfig:
    """Return what the runs of a candidate need."""
    request = prepared.request
    return RunnerConfig(
        name=candidate.name,
        path=candidate.path,
        vocabulary=candidate.config.vocab_size,
        plan=replace(request.plan, lora=candidate.lora),
        search=request.search,
        tokens=prepared.tokens[candidate.tokenizer],
        seed=request.seed,
    )


class Session:
    """Makes the runs of a prepared request: the journal is read first, and no finished run is repeated.

    Parameters
    ----------
    prepared : Prepared
    directory : Path
        Run directory.
    console : Console
        For progress.
    isolate : bool
        Whether each candidate is trained in a process of its own: whatever happens there, the others go on.

    Attributes
    ----------
    found : dict of (candidate, size) to Run
    failures, unverified : dict of candidate to reason
        Those that are not ranked, and those of no run on all samples.
    looks : dict of candidate to what a look found
    pretrained_scores, scores_unavailable : dict of score to dict of candidate to what was found, or to reason
        For scores in `lensjax.journal.PRETRAINED_SCORES`.
    board : SelectionState
        What there is to see.

    Raises
    ------
    InputError
        If the directory cannot be used, see `Journal`.
    """

    def __init__(self, prepared: Prepared, directory: Path, console: Console, *, isolate: bool = True) -> None:
        self.prepared, self.console, self.directory, self.isolate = prepared, console, directory, isolate
        self.journal = Journal(directory, prepared.specification)
        self.failures: dict[str, str] = {}
        self.unverified: dict[str, str] = {}
        self.looks: dict[str, dict[str, Any]] = {}
        self.pretrained_scores: dict[str, dict[str, dict[str, Any]]] = {what: {} for what in PRETRAINED_SCORES}
        self.scores_unavailable: dict[str, dict[str, str]] = {what: {} for what in PRETRAINED_SCORES}
        self.found: dict[tuple[str, int], Run] = {}
        self.clock = Clock(prepared)
        self.ledger = prepared.ledger()
        self.bench: CandidateRunner | CandidateProcess | None = None
        self.stopwatch = Stopwatch(directory / STOPWATCH, sum(r.seconds for r in paid(self.journal.lines)))
        self.board = self._board()
        self._ranked: tuple[int, ...] = (0, 0, 0)  # runs, failures and other scores that the ranking so far knows
        self._ranking = 0.0  # seconds that rankings took

    def _board(self) -> SelectionState:
        """Return what there is to see before the first run."""
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

    def settle(self) -> None:
        """Keep the time, and work out what is spent."""
        self.stopwatch.keep()
        self.ledger.settle(self.journal.lines, self.stopwatch.seconds)
        self.show()

    def show(self) -> None:
        """Show how things stand."""
        board, budget = self.board, self.ledger.budget
        board.time_left = str(self.clock)
        if budget is not None:
            used = self.stopwatch.seconds if budget.kind == "seconds" else self.ledger.spent
            share = min(used / self.ledger.amount, 1.0)
            whole = f"{budget.amount:.3g} of tuning all" if budget.kind == "share" else self.ledger.say(budget.amount)
            board.spent = f"budget {whole}: {100 * share:.0f} % spent, {100 * (1 - share):.0f} % left"
        self.console.refresh()

    def heartbeat(self) -> None:
        """Take note of a sign of life."""
        self.stopwatch.keep()
        self.show()

    def rank(self, *, last: bool = False) -> None:
        """Rank what is measured so far, if somebody looks on, there is news, and it takes little of the time.

        Nothing here may stop the selection.

        Parameters
        ----------
        last : bool
            Whether there will be no other: then it may take its time.
        """
        console, news = (
            self.console,
            (len(self.found), len(self.failures), sum(map(len, self.pretrained_scores.values()))),
        )
        if news == self._ranked or not (console.live or console.verbose):
            return
        begun = console.elapsed
        if self._ranking > RANKING_SHARE * begun and not last:
            return
        self._ranked, scores = news, None
        try:
            scores = self._so_far()
        except Exception as error:
            console.detail(f"no ranking so far: {reason(error)}")
        self._ranking += console.elapsed - begun
        self.board.update_ranking(scores)
        if scores is not None and not console.live:
            console.detail(f"ranking so far: {of_scores(scores)}")

    def _so_far(self) -> Scores | None:
        """Return the verdict on the candidates that are measured as far as the method needs; None on less than two."""
        request, largest = self.prepared.request, self.prepared.sizes[-1]
        method = DEFAULT if request.method == "all" else request.method
        needed = 1 if method == "averaged" else sizes_needed(method, request.gamma)
        ready = []
        for candidate in self.prepared.candidates:
            sizes = [size for name, size in self.found if name == candidate.name and size <= largest]
            scored = method not in PRETRAINED_SCORES or candidate.name in self.pretrained_scores[method]
            if sizes and sum(s > 0 for s in sizes) >= needed and scored and candidate.name not in self.failures:
                ready.append(candidate)
        if len(ready) < 2:
            return None
        names = {c.name for c in ready}
        curves = self.curves(ready, sorted({s for name, s in self.found if name in names and s <= largest}))
        scores, _ = score_all(curves, self.prepared.target, method, gamma=request.gamma, tau=request.tau)
        return scores[method]

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
        done = (candidate.name, self.prepared.target) in self.found
        if done or candidate.name in self.failures or candidate.name in self.unverified:
            return
        self.stopwatch.pause()
        try:
            self.measure(candidate, self.prepared.target, "to verify the choice", paid=False)
        except RunFailedError as error:
            self.unverified[candidate.name] = str(error)
            self.console.line(f"{candidate.name} could NOT BE VERIFIED: {error}")
        self.stopwatch.go()

    def refused(self, candidate: Candidate, size: int, *, needed: bool) -> bool:
        """Say whether the budget forbids a run that is not in the journal yet."""
        known = self.known(candidate, size) is not None
        refusal = "" if known else self.ledger.refuses(candidate.name, size, needed=needed)
        if refusal:
            self.console.line(f"{candidate.name} is not trained: {refusal}")
        return bool(refusal)

    def curves(self, candidates: Sequence[Candidate], sizes: Sequence[int]) -> Curves:
        """Return what is measured, with a column for each size, also for those of no run yet."""
        found = {(r.candidate, r.size): r.test_loss for r in self.found.values() if r.test_loss is not None}
        losses = [[found.get((c.name, s), np.nan) * self.unit(c) for s in sizes] for c in candidates]
        return Curves(
            names=tuple(c.name for c in candidates),
            sizes=np.array(sizes, np.float64),
            losses=np.array(losses, np.float64),
            parameters=np.array([c.parameters for c in candidates], np.float64),
            source=self.prepared.task.name,
            facts=self.facts([c.name for c in candidates]),
        )

    def facts(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the facts of candidates that selectors know, see `lensjax.losses.curves.FACT_COLUMNS`."""
        merged = {n: {k: v for of in self.pretrained_scores.values() for k, v in of.get(n, {}).items()} for n in names}
        known = [fact for fact in FACT_COLUMNS if any(fact in own for own in merged.values())]
        return {fact: np.array([merged[n].get(fact, np.nan) for n in names]) for fact in known}

    def known(self, candidate: Candidate, size: int) -> Run | None:
        """Return a finished run from the journal."""
        run = self.journal.get(run_key(self.prepared, candidate, size))
        return None if run is None or run.test_loss is None else run

    def _take(self, candidate: Candidate, size: int, run: Run) -> float:
        """Keep a finished run; return its test loss."""
        assert run.test_loss is not None
        self.found[candidate.name, size] = run
        self.board.losses[candidate.name, size] = run.test_loss * self.unit(candidate)
        return run.test_loss

    def measure(self, candidate: Candidate, size: int, why: str, *, paid: bool = True) -> float:
        """Return the test loss of one run: from the journal, or made now and put there.

        Raises
        ------
        RunFailedError
            If it gave none.
        """
        label = self.label(candidate)
        doing = f"{size} samples" if size else "zero-shot"
        run = self.known(candidate, size)
        if run is not None and run.test_loss is not None:
            self.clock.skip(candidate.name, size)
            loss = self._take(candidate, size, replace(run, candidate=candidate.name))
            self.console.line(f"{label}: {doing}: test loss {loss:.4f} (from the journal)")
            return loss
        self.rank()
        running = self.board.running = ActiveRun(candidate.name, size, f"loading and compiling; {why}")
        self.console.next(f"{label}: next {doing}: {why}")
        self.console.status(f"{label}: {doing}, loading and compiling; {self.clock}")
        try:
            run = self._make(candidate, size, f"{label}: {doing}", why, running, paid=paid)
        except RunFailedError as error:
            self.board.running = None
            self.console.detail(f"{label}: {doing}: {error.details or error}")
            raise
        self.board.running = None
        loss = self._take(candidate, size, run)
        kept = f", best weights at step {run.steps} of {run.facts['steps_run']}" if size else ""
        if len(run.facts["trials"]) > 1:
            kept += f", learning rate {run.facts['learning_rate']:g}, batch size {run.facts['batch_size']}"
            kept += f" of {len(run.facts['trials'])} trials"
        self.console.line(f"{label}: {doing}: test loss {loss:.4f}{kept} ({duration(run.seconds)}); {self.clock}")
        self.console.detail(f"{label}: {doing}: {of_run(run)}")
        return loss

    def _make(self, candidate: Candidate, size: int, label: str, why: str, running: ActiveRun, *, paid: bool) -> Run:
        """Make a run and put it into the journal, also if it fails."""
        key, request = run_key(self.prepared, candidate, size), self.prepared.request
        begun, seen = time.monotonic(), Progress(0, 1, 0, float("nan"))
        searches = request.search.trials(request.plan) > 2

        def progress(at: Progress) -> None:
            nonlocal seen
            before, seen = seen, at
            self.clock.progress(candidate.name, size, at.done)
            step = f"step {at.step} of at most {at.total_steps}, validation loss {at.validation_loss:.4f}"
            running.activity, running.fraction = step, at.done
            self.heartbeat()
            # A step is told of a second time when it has been evaluated.
            if at.step == before.step:
                self.console.detail(f"{label}, evaluated in epoch {at.epoch}: {step} at best")
            self.console.status(f"{label}, {step}; {self.clock}")

        def trials(found: Trials) -> None:
            nonlocal seen
            seen = Progress(0, 1, 0, float("nan"))
            # The record of a run is that of its only trial.
            if searches:
                for trial in found:
                    self.journal.append(trial_record(key, candidate, size, trial))
            for trial in found:
                self.console.detail(f"{label}: {of_trial(trial)}")

        known: dict[Point, Trial] = {}
        for line in self.journal.trials_of(key):
            trial = read_trial(line.facts["trial"])
            known[trial.learning_rate, trial.batch_size] = trial
        bench = self.runner_for(candidate)
        try:
            hooks = Callbacks(progress, trials, self.heartbeat)
            result = bench.run(size, known, hooks, self.deadline() if paid else None)
        except RunFailedError as error:
            # What no record of a trial says: the cost of the one under way, and of all where they have no records.
            unsaid = () if searches else error.trials
            per_sample = self.prepared.tokens[candidate.tokenizer].most_per_sample((size,)) if size else 1.0
            failed = Run(
                key,
                candidate.name,
                size,
                None,
                tokens=sum(t.tokens for t in unsaid) + seen.tokens,
                flops=sum(t.flops for t in unsaid) + candidate.flops_per_token * seen.tokens,
                seconds=time.monotonic() - begun,
                reason=str(error),
                facts=common_facts(self.prepared, candidate),
                samples=sum(t.samples for t in unsaid) + round(seen.tokens / per_sample),
            )
            before = self.journal.get(key)
            # Trials that all failed are not made again, and to say so again would cost nothing.
            if before is None or failed.flops or before.reason != failed.reason:
                self.journal.append(failed)
            self.settle()
            raise
        run = run_record(self.prepared, candidate, size, result, why, time.monotonic() - begun)
        self.journal.append(run)
        self.settle()
        self.clock.finished(candidate.name, size, result.outcome.seconds)
        return run

    def deadline(self) -> float | None:
        """Return when the budget of time is spent, on `time.monotonic`'s clock."""
        budget = self.ledger.budget
        if budget is None or budget.kind != "seconds":
            return None
        return self.stopwatch.deadline(budget.amount)

    def runner_for(self, candidate: Candidate) -> CandidateRunner | CandidateProcess:
        """Return where the candidate is trained; what was there of another candidate is freed."""
        if self.bench is not None and self.bench.assignment.name == candidate.name:
            return self.bench
        self.leave()
        assignment = assign(self.prepared, candidate)
        if not self.isolate:
            self.bench = CandidateRunner(assignment)
            return self.bench
        log = self.directory / LOGS / (re.sub(r"[^\w.+-]", "_", candidate.name) + ".log")
        self.bench = CandidateProcess(
            replace(assignment, compiled=(self.directory / COMPILED).absolute(), log=log.absolute())
        )
        return self.bench

    def leave(self) -> None:
        """Free what the last candidate held."""
        if self.bench is not None:
            self.bench.close()
        self.bench = None

    def unit(self, candidate: Candidate) -> float:
        """Return what turns a candidate's losses per token into those that are compared."""
        if self.prepared.request.loss_unit == "token":
            return 1.0
        return self.prepared.tokens[candidate.tokenizer].test.tokens_per_byte
