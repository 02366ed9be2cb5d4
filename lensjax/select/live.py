"""Selection by really fine-tuning the candidates: Algorithm 1 on live models."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lensjax.curves import Curves
from lensjax.errors import InputError, SelectionError
from lensjax.finetune import Progress, Trial
from lensjax.finetune.search import Point
from lensjax.report.html import versions
from lensjax.report.progress import Console, duration
from lensjax.report.selection import Selection
from lensjax.runs import TANGENTS, Journal, Run, curves_of, key_of
from lensjax.select.budget import paid
from lensjax.select.candidates import Candidate
from lensjax.select.clock import Clock, Stopwatch
from lensjax.select.from_losses import score_all
from lensjax.select.look import kernel_residual, look_flops
from lensjax.select.prepare import Prepared, sizes_needed
from lensjax.select.records import by_xla, common_facts, read_trial, run_key, run_record, trial_record
from lensjax.select.workers import Assignment, Bench, Hooks, OutOfTimeError, RunFailedError, Trials, Worker
from lensjax.selectors import RACE, propose, should_stop

COMPILED, LOGS, STOPWATCH = "compiled", "logs", "stopwatch.json"


def default_directory(prepared: Prepared) -> Path:
    """Return where results go without --out: one directory per task and specification, so that reruns continue."""
    return Path("runs") / f"{prepared.task.name}-{key_of(prepared.specification)[:8]}"


def assign(prepared: Prepared, candidate: Candidate) -> Assignment:
    """Return what the runs of a candidate need."""
    request = prepared.request
    return Assignment(
        name=candidate.name,
        path=candidate.path,
        vocabulary=candidate.config.vocab_size,
        plan=replace(request.plan, lora=candidate.lora),
        search=request.search,
        tokens=prepared.tokens[candidate.tokenizer],
        seed=request.seed,
    )


class LiveSelection:
    """Runs a prepared request: the journal is read first, and no finished run is repeated.

    Parameters
    ----------
    prepared : Prepared
    directory : Path
        Run directory.
    console : Console
        For progress.
    isolate : bool
        Whether each candidate is trained in a process of its own: whatever happens there, the others go on.

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
        self.found: dict[tuple[str, int], Run] = {}
        self.clock = Clock(prepared)
        self.ledger = prepared.ledger()
        self.bench: Bench | Worker | None = None
        self.stopwatch = Stopwatch(directory / STOPWATCH, sum(r.seconds for r in paid(self.journal.lines)))
        for notice in [*self.journal.notices, *prepared.notes]:
            console.line(f"note: {notice}")

    def execute(self) -> Selection:
        """Fine-tune, fit, rank.

        Returns
        -------
        Selection
            Candidates that failed are in its `failures` and not ranked.

        Raises
        ------
        SelectionError
            If fewer than two candidates could be measured, or the journal could not be written.
        """
        prepared, console = self.prepared, self.console
        console.line(
            f"{len(prepared.candidates)} candidates, task {prepared.task.name}: subsets of "
            f"{', '.join(map(str, prepared.sizes))} samples, choosing for {prepared.target}; "
            f"results in {self.directory}"
        )
        try:
            self._settle()
            if prepared.races:
                self._race()
            else:
                self._descend_all()
            if prepared.request.tangents:
                self._look_all(prepared.request.tangents)
            if prepared.request.verify:
                for candidate in prepared.candidates:
                    self._verify(candidate)
            self._leave()
            # What was compiled is of use to a continued selection only.
            shutil.rmtree(self.directory / COMPILED, ignore_errors=True)
        finally:
            # The lock goes last: whoever comes next finds everything in its place.
            try:
                self.stopwatch.pause()
                self._leave()
            finally:
                self.journal.close()
        return self._selection()

    def _settle(self) -> None:
        self.stopwatch.keep()
        self.ledger.settle(self.journal.lines, self.stopwatch.seconds)

    def _label(self, candidate: Candidate) -> str:
        number = self.prepared.candidates.index(candidate) + 1
        return f"candidate {number}/{len(self.prepared.candidates)} {candidate.name}"

    def _failed(self, candidate: Candidate, error: Exception) -> None:
        """Take a candidate out of the ranking and say why."""
        self.failures[candidate.name] = str(error)
        self.console.line(f"{candidate.name} FAILED and is not ranked: {error}")

    def _verify(self, candidate: Candidate) -> None:
        """Fine-tune a candidate on all samples, unless that was done or it failed."""
        done = (candidate.name, self.prepared.target) in self.found
        if done or candidate.name in self.failures or candidate.name in self.unverified:
            return
        self.stopwatch.pause()
        try:
            self._measure(candidate, self.prepared.target, "to verify the choice", paid=False)
        except RunFailedError as error:
            self.unverified[candidate.name] = str(error)
            self.console.line(f"{candidate.name} could NOT BE VERIFIED: {error}")
        self.stopwatch.go()

    def _look_all(self, samples: int) -> None:
        """Look at each candidate's kernel and curvature, as far as the budget goes; failures are only noted."""
        for candidate in self.prepared.candidates:
            if candidate.name in self.failures:
                continue
            label = f"{self._label(candidate)}: kernel and Hessian trace on {samples} samples"
            key = key_of({"look": run_key(self.prepared, candidate, samples)})
            known = self.journal.get(key)
            if known is not None:
                self.looks[candidate.name] = known.facts[TANGENTS]
                continue
            tokens = self.prepared.tokens[candidate.tokenizer].train.first(samples)
            cost = look_flops(candidate.parameters, int(tokens.token_counts.sum()), samples)
            budget = self.ledger.budget
            if budget is not None and (self.ledger.left <= 0 or (budget.kind == "flops" and cost > self.ledger.left)):
                self.console.line(f"{label}: not measured, it would exceed the budget")
                continue
            self.console.status(label)
            begun = time.monotonic()
            try:
                found = self._bench(candidate).look(samples, self._deadline(), self.stopwatch.keep)
            except RunFailedError as error:
                self.console.line(f"{label}: could not be measured: {error}")
                continue
            seconds = time.monotonic() - begun
            self.journal.append(
                Run(
                    *(key, candidate.name, samples, None),
                    flops=found["flops"],
                    seconds=seconds,
                    reason="kernel and Hessian trace",
                    facts={**common_facts(self.prepared, candidate), TANGENTS: found},
                    part_of=TANGENTS,
                )
            )
            self._settle()
            self.looks[candidate.name] = found
            self.console.line(
                f"{label}: largest eigenvalue {found['kernel_spectrum'][0]:.3g}, trace {found['trace']:.3g} "
                f"+- {found['trace_error']:.2g} ({duration(seconds)})"
            )

    def _tangents(self, runs: list[Run]) -> dict[str, Any]:
        """Return what was found of each candidate, with F(Theta, t) of eq. 9 at the time each of its runs stopped."""
        found = {}
        for name, seen in self.looks.items():
            residuals = {
                str(run.size): kernel_residual(seen, run.facts["learning_rate"], run.steps)
                for run in runs
                if run.candidate == name and run.size
            }
            found[name] = {**seen, "kernel_residual": residuals}
        return found

    def _race(self) -> None:
        """Let the candidates race: those that cannot win are not trained on the larger subsets."""
        prepared = self.prepared
        smallest, largest = prepared.sizes[0], prepared.sizes[-1]
        common, _ = RACE.sizes(prepared.target, smallest, largest)
        for candidate in prepared.candidates:
            for size in prepared.sizes[::-1]:
                if self._known(candidate, size) is not None:
                    self._measure(candidate, size, "")
        while True:
            left = [c for c in prepared.candidates if c.name not in self.failures]
            if len(left) < 2:
                return
            # Priced by what a run may cost at most, and asked again after each: the answer follows from the journal.
            curves = self._curves(left, prepared.sizes)
            prices = np.array([self.ledger.prices[c.name] for c in left])
            if self._lacking(left, common):
                # Estimates of time decide about nothing that everyone needs.
                prices = prices * (self.ledger.budget is None or self.ledger.budget.kind != "seconds")
            curves = replace(curves, parameters=np.maximum(prices, 1e-300))
            measured = float((prices[:, None] * curves.sizes * np.isfinite(curves.losses)).sum())
            try:
                stage = propose(
                    curves, prepared.target, self.ledger.left + measured, smallest=smallest, largest=largest
                )
            except InputError:
                # After failures, what is left may not pay for what everyone needs.
                self.console.line("what is left of the budget does not pay for the subsets that every candidate needs")
                return
            if not stage:
                return
            proposed = stage[0]
            candidate = next(c for c in left if c.name == proposed.name)
            if self._refused(candidate, proposed.size, needed=proposed.size in common):
                return
            try:
                self._measure(candidate, proposed.size, proposed.reason)
            except OutOfTimeError as error:
                self.console.line(f"{candidate.name}: {error}")
                return
            except RunFailedError as error:
                self._failed(candidate, error)

    def _lacking(self, candidates: list[Candidate], sizes: tuple[int, ...]) -> bool:
        return any((c.name, size) not in self.found for c in candidates for size in sizes)

    def _refused(self, candidate: Candidate, size: int, *, needed: bool) -> bool:
        """Say whether the budget forbids a run that is not in the journal yet."""
        known = self._known(candidate, size) is not None
        refusal = "" if known else self.ledger.refuses(candidate.name, size, needed=needed)
        if refusal:
            self.console.line(f"{candidate.name} is not trained: {refusal}")
        return bool(refusal)

    def _affordable(self) -> tuple[int, ...]:
        """Return the sizes that the budget pays for, if every candidate is trained on all of them; descending.

        Prices in FLOPs and samples do not change, and a resumed selection must come to the same answer: all runs count,
        against all of the budget. Prices in seconds do: those still to be made count, against what is left.
        """
        prepared, total = self.prepared, 0.0
        found: list[int] = []
        timed = self.ledger.budget is not None and self.ledger.budget.kind == "seconds"
        needed = sizes_needed(prepared.request.method, prepared.request.gamma)
        for size in prepared.sizes:
            left = [c for c in prepared.candidates if not (timed and self._known(c, size) is not None)]
            total += sum(self.ledger.price(c.name, size) for c in left)
            free = timed and (not left or len(found) < needed)
            if (
                not free
                and self.ledger.budget is not None
                and total > (self.ledger.left if timed else self.ledger.amount)
            ):
                self.console.line(f"subsets of {size} samples and more may cost more than --budget and are left out")
                break
            found.append(size)
        return tuple(found[::-1])

    def _descend_all(self) -> None:
        """Train every candidate on what the method needs, one after the other."""
        budget = self.ledger.budget
        if budget is not None and budget.kind == "seconds":
            # The speed is not known yet: the smallest subset, needed in any case, shows it.
            for candidate in self.prepared.candidates:
                self._descend(candidate, self.prepared.sizes[:1])
            self._settle()
        sizes = self._affordable()
        needed = sizes_needed(self.prepared.request.method, self.prepared.request.gamma)
        if len(sizes) < needed:
            raise SelectionError(
                f"the budget pays for {len(sizes)} size(s), --method {self.prepared.request.method} needs {needed}. "
                f"{''.join(f'{n} failed: {r}. ' for n, r in self.failures.items())}Finished runs are in "
                f"{self.directory}; raise --budget and give the same command again."
            )
        for candidate in self.prepared.candidates:
            if candidate.name not in self.failures:
                self._descend(candidate, sizes)
            for size in self.prepared.sizes:
                self.clock.skip(candidate.name, size)
            if self.prepared.request.verify and budget is None:
                # Now, while it is loaded and compiled.
                self._verify(candidate)
            self.clock.skip(candidate.name, self.prepared.target)

    def _descend(self, candidate: Candidate, sizes: tuple[int, ...]) -> None:
        """Measure what the method needs: zero-shot, then from the largest affordable subset downwards.

        Algorithm 1 and AtS stop where the line ends; the laws need all sizes, SubTuning the largest, the others none.
        Its failure must not lose the other candidates.
        """
        request = self.prepared.request
        sizes = {"zero_shot": (), "model_size": (), "subtuning": sizes[:1]}.get(request.method, sizes)
        stops = request.method in ("lens", "ats")
        needed = sizes_needed(request.method, request.gamma)
        why = "the largest affordable, then downwards until the line ends" if stops else "the method needs all"
        try:
            self._measure(candidate, 0, "the model as it is")
            losses: list[float] = []
            for size in sizes:
                if self._refused(candidate, size, needed=size in self.prepared.sizes[:needed]):
                    break
                losses.append(self._measure(candidate, size, why))
                if not stops:
                    continue
                measured = np.array(sizes[: len(losses)])
                decision = should_stop(measured, np.array(losses), gamma=request.gamma, tau=request.tau)
                if decision.stop:
                    self.console.line(f"{candidate.name}: stops here, {decision.reason}")
                    break
        except OutOfTimeError as error:
            self.console.line(f"{candidate.name}: {error}")
            for size in (0, *sizes):
                if self._known(candidate, size) is not None:
                    self._measure(candidate, size, "")
        except RunFailedError as error:
            self._failed(candidate, error)

    def _curves(self, candidates: list[Candidate], sizes: tuple[int, ...]) -> Curves:
        """Return what the race has measured, with a column for each size, also for those of no run yet."""
        found = {(r.candidate, r.size): r.test_loss for r in self.found.values() if r.test_loss is not None}
        losses = [[found.get((c.name, s), np.nan) * self._unit(c) for s in sizes] for c in candidates]
        return Curves(
            names=tuple(c.name for c in candidates),
            sizes=np.array(sizes, np.float64),
            losses=np.array(losses, np.float64),
            parameters=np.array([c.parameters for c in candidates], np.float64),
            source=self.prepared.task.name,
        )

    def _known(self, candidate: Candidate, size: int) -> Run | None:
        """Return a finished run from the journal."""
        run = self.journal.get(run_key(self.prepared, candidate, size))
        return None if run is None or run.test_loss is None else run

    def _measure(self, candidate: Candidate, size: int, why: str, *, paid: bool = True) -> float:
        """Return the test loss of one run: from the journal, or made now and put there."""
        key, label = run_key(self.prepared, candidate, size), self._label(candidate)
        doing = f"{size} samples" if size else "zero-shot"
        run = self._known(candidate, size)
        if run is not None and run.test_loss is not None:
            self.clock.skip(candidate.name, size)
            self.console.line(f"{label}: {doing}: test loss {run.test_loss:.4f} (from the journal)")
            self.found[candidate.name, size] = replace(run, candidate=candidate.name)
            return run.test_loss
        self.console.line(f"{label}: next {doing}: {why}")
        self.console.status(f"{label}: {doing}, loading and compiling; {self.clock}")
        begun, seen = time.monotonic(), Progress(0, 1, 0, float("nan"))
        request = self.prepared.request
        searches = request.search.trials(request.plan) > 2

        def progress(at: Progress) -> None:
            nonlocal seen
            seen = at
            self.stopwatch.keep()
            self.clock.progress(candidate.name, size, at.done)
            self.console.status(
                f"{label}: {doing}, step {at.step} of at most {at.total_steps}, validation loss "
                f"{at.validation_loss:.4f}; {self.clock}"
            )

        def trials(found: Trials) -> None:
            nonlocal seen
            seen = Progress(0, 1, 0, float("nan"))
            # The record of a run is that of its only trial.
            if searches:
                for trial in found:
                    self.journal.append(trial_record(key, candidate, size, trial))

        known: dict[Point, Trial] = {}
        for line in self.journal.trials_of(key):
            trial = read_trial(line.facts["trial"])
            known[trial.learning_rate, trial.batch_size] = trial
        bench = self._bench(candidate)
        try:
            hooks = Hooks(progress, trials, self.stopwatch.keep)
            result = bench.run(size, known, hooks, self._deadline() if paid else None)
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
            self._settle()
            raise
        run = run_record(self.prepared, candidate, size, result, why, time.monotonic() - begun)
        self.journal.append(run)
        self._settle()
        self.clock.finished(candidate.name, size, result.outcome.seconds)
        kept = f", best weights at step {run.steps} of {result.outcome.steps_run}" if size else ""
        if len(result.outcome.trials) > 1:
            chosen = result.outcome
            kept += f", learning rate {chosen.learning_rate:g}, batch size {chosen.batch_size}"
            kept += f" of {len(chosen.trials)} trials"
        assert run.test_loss is not None
        self.console.line(
            f"{label}: {doing}: test loss {run.test_loss:.4f}{kept} ({duration(run.seconds)}); {self.clock}"
        )
        self.found[candidate.name, size] = run
        return run.test_loss

    def _deadline(self) -> float | None:
        """Return when the budget of time is spent, on `time.monotonic`'s clock."""
        budget = self.ledger.budget
        if budget is None or budget.kind != "seconds":
            return None
        return self.stopwatch.deadline(budget.amount)

    def _bench(self, candidate: Candidate) -> Bench | Worker:
        """Return where the candidate is trained; what was there of another candidate is freed."""
        if self.bench is not None and self.bench.assignment.name == candidate.name:
            return self.bench
        self._leave()
        assignment = assign(self.prepared, candidate)
        if not self.isolate:
            self.bench = Bench(assignment)
            return self.bench
        log = self.directory / LOGS / (re.sub(r"[^\w.+-]", "_", candidate.name) + ".log")
        self.bench = Worker(replace(assignment, compiled=(self.directory / COMPILED).absolute(), log=log.absolute()))
        return self.bench

    def _leave(self) -> None:
        if self.bench is not None:
            self.bench.close()
        self.bench = None

    def _unit(self, candidate: Candidate) -> float:
        """Return what turns a candidate's losses per token into those that are compared."""
        if self.prepared.request.loss_unit == "token":
            return 1.0
        return self.prepared.tokens[candidate.tokenizer].test.tokens_per_byte

    def _selection(self) -> Selection:
        prepared, request = self.prepared, self.prepared.request
        needed = 1 if request.method == "averaged" else sizes_needed(request.method, request.gamma)
        for candidate in prepared.candidates:
            sizes = sum(1 for name, size in self.found if name == candidate.name and size in prepared.sizes)
            nothing = not any(name == candidate.name for name, _ in self.found)
            if request.budget is not None and (sizes < needed or nothing) and candidate.name not in self.failures:
                self.failures[candidate.name] = f"the budget was spent after {sizes} of the {needed} sizes it needs"
        ranked = [c for c in prepared.candidates if c.name not in self.failures]
        if len(ranked) < 2:
            reasons = "; ".join(f"{n}: {r}" for n, r in self.failures.items())
            raise SelectionError(
                f"{len(ranked)} candidate(s) could be fine-tuned, choosing needs two ({reasons}). Finished runs are in "
                f"{self.directory}; mend the cause and give the same command again."
            )
        names = [c.name for c in ranked]
        runs = [r for r in self.found.values() if r.candidate in names]
        measured = curves_of(runs, names, {c.name: c.parameters for c in ranked}, prepared.task.name)
        units = np.array([self._unit(c) for c in ranked])
        measured = replace(measured, losses=measured.losses * units[:, None])
        curves = measured.visible(prepared.sizes[-1])
        flops = np.zeros(measured.losses.shape)
        epochs = []
        for run in runs:
            flops[names.index(run.candidate), int(np.searchsorted(measured.sizes, run.size))] = run.flops
            if run.size == prepared.sizes[-1]:
                tokens = prepared.tokens[ranked[names.index(run.candidate)].tokenizer]
                epochs.append(run.tokens / tokens.train.token_counts[: run.size].sum())
        most = request.plan.max_epochs * (request.search.trials(request.plan) - 1)
        passes = float(np.mean(epochs)) if epochs else float(most)
        full_tokens = np.array([prepared.tokens[c.tokenizer].mean for c in ranked]) * prepared.target * passes
        full_flops = full_tokens * np.array([c.flops_per_token for c in ranked])
        truth = None
        how = f"estimated at {passes:.1f} passes" + (", as for the largest subset" if epochs else ", the most allowed")
        if request.verify and np.isfinite(measured.at(prepared.target)).any():
            truth = measured.at(prepared.target)
            full_flops = np.where(np.isfinite(truth), flops[:, measured.sizes == prepared.target].sum(1), full_flops)
            how = "as measured"
        finished = {r.key for r in self.journal.lines if r.test_loss is not None and not r.part_of}
        spent = [r for r in paid(self.journal.lines) if r.part_of != TANGENTS]
        looking = sum(seen["flops"] for seen in self.looks.values())
        frozen = " (4 N for frozen weights)" if any(c.lora for c in ranked) else ""
        scores, refused = score_all(curves, prepared.target, request.method, gamma=request.gamma, tau=request.tau)
        return Selection(
            source=prepared.task.name,
            curves=curves,
            target=prepared.target,
            scores=scores,
            refused=refused,
            flops=flops[:, : len(curves.sizes)],
            full_flops=full_flops,
            lost_flops=sum(r.flops for r in spent if r.candidate in self.failures or r.key not in finished),
            cost_note=f"6 N per token trained on{frozen}, all epochs and trials; the whole {how}{by_xla(runs)}"
            + (f"; kernels and Hessian traces took {looking:.3g} more" if looking else ""),
            truth=truth,
            failures=self.failures,
            unverified=self.unverified,
            loss_unit=request.loss_unit,
            facts={
                "directory": str(self.directory),
                "seconds": sum(r.seconds for r in self.found.values()),
                "seed": request.seed,
                "versions": versions(),
                "task": prepared.task.fingerprint,
                "notes": list(prepared.notes),
                **({TANGENTS: self._tangents(runs)} if self.looks else {}),
                "specification": prepared.specification,
            },
        )
