"""Selection by really fine-tuning the candidates: Algorithm 1 on live models."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np

from lensjax import models
from lensjax.curves import Curves
from lensjax.errors import SelectionError
from lensjax.finetune import FineTuner, Outcome, Progress
from lensjax.report.progress import Console, duration
from lensjax.report.selection import Selection
from lensjax.runs import Journal, Run, curves_of, key_of
from lensjax.select.candidates import Candidate
from lensjax.select.from_losses import score_all
from lensjax.select.prepare import Prepared
from lensjax.selectors import full_cost, propose, should_stop


def default_directory(prepared: Prepared) -> Path:
    """Return where results go without --out: one directory per task and specification, so that reruns continue."""
    return Path("runs") / f"{prepared.task.name}-{key_of(prepared.specification)[:8]}"


class Clock:
    """Estimates the time left from the speed of the runs so far.

    Work is counted in weights x samples, all sizes of all candidates; Algorithm 1 may need less.
    """

    def __init__(self, prepared: Prepared) -> None:
        sizes = [*prepared.sizes, *([prepared.target] if prepared.request.verify else [])]
        self.left = {(c.name, s): float(c.parameters) * s for c in prepared.candidates for s in sizes}
        self.done = self.seconds = self.running = 0.0

    def progress(self, name: str, size: int, share: float) -> None:
        """Note how far the present run is at least."""
        self.running = self.left.get((name, size), 0.0) * share

    def finished(self, name: str, size: int, seconds: float) -> None:
        """Note that a run took so long; zero-shot evaluations are no measure of training."""
        work = self.left.pop((name, size), 0.0)
        self.running = 0.0
        if work:
            self.done += work
            self.seconds += seconds

    def skip(self, name: str, size: int) -> None:
        """Note that a run is not needed."""
        self.left.pop((name, size), None)

    def __str__(self) -> str:
        if not self.done:
            return "time left not known yet"
        left = max(sum(self.left.values()) - self.running, 0.0)
        return f"at most about {duration(left * self.seconds / self.done)} left"


class LiveSelection:
    """Runs a prepared request: the journal is read first, and no finished run is repeated.

    Parameters
    ----------
    prepared : Prepared
    directory : Path
        Run directory.
    console : Console
        For progress.

    Raises
    ------
    InputError
        If the directory cannot be used, see `Journal`.
    """

    def __init__(self, prepared: Prepared, directory: Path, console: Console) -> None:
        self.prepared, self.console, self.directory = prepared, console, directory
        self.journal = Journal(directory, prepared.specification)
        self.failures: dict[str, str] = {}
        self.unverified: dict[str, str] = {}
        self.runs: list[Run] = []
        self.clock = Clock(prepared)
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
            if prepared.request.budget is not None:
                self._race(prepared.request.budget)
            for number, candidate in enumerate(prepared.candidates, start=1):
                self._candidate(candidate, f"candidate {number}/{len(prepared.candidates)} {candidate.name}")
                # Compiled functions of one candidate are of no use to the next.
                jax.clear_caches()
        finally:
            self.journal.close()
        return self._selection()

    def _candidate(self, candidate: Candidate, label: str) -> None:
        """Measure one candidate; its failure must not lose the others."""
        bench = Bench(candidate, self.prepared)
        raced = self.prepared.request.budget is not None
        verify = self.prepared.request.verify and candidate.name not in self.failures
        try:
            if not raced:
                self._descend(bench, label)
        except SelectionError:
            raise
        except Exception as error:
            self._failed(candidate, error)
            verify = False
        for size in self.prepared.sizes:
            self.clock.skip(candidate.name, size)
        if verify:
            try:
                self._measure(bench, self.prepared.target, label)
            except SelectionError:
                raise
            except Exception as error:
                self.unverified[candidate.name] = _reason(error)
                self.console.line(f"{candidate.name} could NOT BE VERIFIED: {_reason(error)}")
        self.clock.skip(candidate.name, self.prepared.target)

    def _failed(self, candidate: Candidate, error: Exception) -> None:
        """Take a candidate out of the ranking and say why."""
        self.failures[candidate.name] = _reason(error)
        self.console.line(f"{candidate.name} FAILED and is not ranked: {_reason(error)}")

    def _race(self, budget: float) -> None:
        """Let the candidates race: those that cannot win are not trained on the larger subsets."""
        prepared, bench = self.prepared, None
        smallest, largest = prepared.sizes[0], prepared.sizes[-1]
        while True:
            left = [c for c in prepared.candidates if c.name not in self.failures]
            if len(left) < 2:
                return
            curves = self._curves(left, prepared.sizes)
            allowed = budget * full_cost(curves, prepared.target)
            stage = propose(curves, prepared.target, allowed, smallest=smallest, largest=largest)
            if not stage:
                return
            for run in stage:
                candidate = next(c for c in left if c.name == run.name)
                if candidate.name in self.failures:
                    continue
                if bench is None or bench.candidate is not candidate:
                    # Compiled functions of one candidate are of no use to the next.
                    jax.clear_caches()
                    bench = Bench(candidate, prepared)
                self.console.status(f"{run.name}: {run.size} samples, because {run.reason}")
                try:
                    self._measure(bench, run.size, f"{run.name} ({run.reason})")
                except SelectionError:
                    raise
                except Exception as error:
                    self._failed(candidate, error)

    def _curves(self, candidates: list[Candidate], sizes: tuple[int, ...]) -> Curves:
        """Return what the race has measured, with a column for each size, also for those of no run yet."""
        found = {(r.candidate, r.size): r.test_loss for r in self.runs if r.test_loss is not None}
        losses = [[found.get((c.name, s), np.nan) * self._unit(c) for s in sizes] for c in candidates]
        return Curves(
            names=tuple(c.name for c in candidates),
            sizes=np.array(sizes, np.float64),
            losses=np.array(losses, np.float64),
            parameters=np.array([c.parameters for c in candidates], np.float64),
            source=self.prepared.task.name,
        )

    def _descend(self, bench: Bench, label: str) -> None:
        """Measure what the method needs: zero-shot, then from the largest subset downwards.

        Algorithm 1 and AtS stop where the line ends; the laws need all sizes, SubTuning the largest, the others none.
        """
        request = self.prepared.request
        self._measure(bench, 0, label)
        sizes = self.prepared.sizes[::-1]
        sizes = {"zero_shot": (), "model_size": (), "subtuning": sizes[:1]}.get(request.method, sizes)
        losses: list[float] = []
        for size in sizes:
            losses.append(self._measure(bench, size, label))
            if request.method not in ("lens", "ats"):
                continue
            measured = np.array(sizes[: len(losses)])
            decision = should_stop(measured, np.array(losses), gamma=request.gamma, tau=request.tau)
            if decision.stop:
                self.console.line(f"{bench.candidate.name}: stops here, {decision.reason}")
                break

    def _measure(self, bench: Bench, size: int, label: str) -> float:
        """Return the test loss of one run: from the journal, or made now and put there."""
        candidate = bench.candidate
        key = key_of({**self.prepared.definition, "candidate": candidate.fingerprint, "size": size})
        doing = f"{size} samples" if size else "zero-shot"
        run = self.journal.get(key)
        if run is not None and run.test_loss is not None:
            self.clock.skip(candidate.name, size)
            self.console.line(f"{label}: {doing}: test loss {run.test_loss:.4f} (from the journal)")
            self.runs.append(replace(run, candidate=candidate.name))
            return run.test_loss
        self.console.status(f"{label}: {doing}, loading and compiling; {self.clock}")

        def on_progress(at: Progress) -> None:
            self.clock.progress(candidate.name, size, at.step / at.total_steps)
            self.console.status(
                f"{label}: {doing}, step {at.step} of at most {at.total_steps}, validation loss "
                f"{at.validation_loss:.4f}; {self.clock}"
            )

        try:
            outcome = bench.run(size, on_progress)
        except Exception as error:
            self.journal.append(
                Run(key, candidate.name, size, None, reason=_reason(error), facts=self._facts(candidate))
            )
            raise
        run = self._record(key, candidate, size, outcome)
        self.journal.append(run)
        self.clock.finished(candidate.name, size, outcome.seconds)
        kept = f", best weights at step {run.steps} of {outcome.steps_run}" if size else ""
        self.console.line(
            f"{label}: {doing}: test loss {outcome.test_loss:.4f}{kept} ({duration(run.seconds)}); {self.clock}"
        )
        self.runs.append(run)
        return outcome.test_loss

    def _unit(self, candidate: Candidate) -> float:
        """Return what turns a candidate's losses per token into those that are compared."""
        if self.prepared.request.loss_unit == "token":
            return 1.0
        return self.prepared.tokens[candidate.tokenizer].test.tokens_per_byte

    def _facts(self, candidate: Candidate) -> dict[str, object]:
        return {
            "parameters": candidate.parameters,
            "lora": None if candidate.lora is None else asdict(candidate.lora),
            "fingerprint": candidate.fingerprint,
            "definition": self.prepared.definition,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
        }

    def _record(self, key: str, candidate: Candidate, size: int, outcome: Outcome) -> Run:
        own = asdict(outcome)
        shared = {name: own.pop(name) for name in ("test_loss", "steps", "tokens", "flops", "seconds", "reason")}
        own["validation_loss"] = own["validation_loss"] if size else None  # JSON knows no NaN
        own["test_loss_per_byte"] = outcome.test_loss * self.prepared.tokens[candidate.tokenizer].test.tokens_per_byte
        return Run(key, candidate.name, size, **shared, facts={**self._facts(candidate), **own})

    def _selection(self) -> Selection:
        prepared, request = self.prepared, self.prepared.request
        ranked = [c for c in prepared.candidates if c.name not in self.failures]
        if len(ranked) < 2:
            reasons = "; ".join(f"{n}: {r}" for n, r in self.failures.items())
            raise SelectionError(
                f"{len(ranked)} candidate(s) could be fine-tuned, choosing needs two ({reasons}). Finished runs are in "
                f"{self.directory}; mend the cause and give the same command again."
            )
        names = [c.name for c in ranked]
        runs = [r for r in self.runs if r.candidate in names]
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
        passes = float(np.mean(epochs)) if epochs else float(request.plan.max_epochs)
        full_tokens = np.array([prepared.tokens[c.tokenizer].mean for c in ranked]) * prepared.target * passes
        full_flops = full_tokens * np.array([c.flops_per_token for c in ranked])
        truth = None
        how = f"estimated at {passes:.1f} epochs" + (", as for the largest subset" if epochs else ", the most allowed")
        if request.verify and np.isfinite(measured.at(prepared.target)).any():
            truth = measured.at(prepared.target)
            full_flops = np.where(np.isfinite(truth), flops[:, measured.sizes == prepared.target].sum(1), full_flops)
            how = "as measured"
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
            lost_flops=sum(r.flops for r in self.runs if r.candidate in self.failures),
            cost_note=f"6 N per token trained on{frozen}, all epochs; the whole {how}",
            truth=truth,
            failures=self.failures,
            unverified=self.unverified,
            loss_unit=request.loss_unit,
            facts={
                "directory": str(self.directory),
                "seconds": sum(r.seconds for r in self.runs),
                "task": prepared.task.fingerprint,
                "notes": list(prepared.notes),
                "specification": prepared.specification,
            },
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Bench:
    """One candidate, loaded and compiled when its first run is really needed."""

    def __init__(self, candidate: Candidate, prepared: Prepared) -> None:
        self.candidate, self.prepared = candidate, prepared
        self.tokens = prepared.tokens[candidate.tokenizer]
        self._tuner: FineTuner | None = None

    @property
    def tuner(self) -> FineTuner:
        """The compiled fine-tuner."""
        if self._tuner is None:
            model = models.load_model(self.candidate.path)
            # Padding is masked, but an id outside of the vocabulary would still give NaN.
            pad = self.tokens.pad_id if self.tokens.pad_id < self.candidate.config.vocab_size else 0
            self._tuner = FineTuner(
                model, replace(self.prepared.request.plan, lora=self.candidate.lora), self.tokens.buckets, pad
            )
        return self._tuner

    def run(self, size: int, on_progress: Callable[[Progress], None]) -> Outcome:
        """Fine-tune on `size` samples, or evaluate if that is 0."""
        tokens = self.tokens
        if size == 0:
            return self.tuner.zero_shot(tokens.test)
        seed = self.prepared.request.seed
        return self.tuner.run(
            tokens.train.first(size), tokens.validation, tokens.test, seed=seed, on_progress=on_progress
        )
