"""Selection by really fine-tuning the candidates: Algorithm 1 on live models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from lensjax.environment import versions
from lensjax.errors import SelectionError
from lensjax.journal import EXTRA_MEASUREMENTS, LOG_ME, TANGENTS, curves_of, key_of
from lensjax.progress.console import Console
from lensjax.select.budget import paid
from lensjax.select.extra_measurements import gauge, pretrained_scores_of
from lensjax.select.from_losses import score_all
from lensjax.select.looks import measure_tangents, with_residuals
from lensjax.select.race import race
from lensjax.select.records import by_xla
from lensjax.select.request import Prepared, sizes_needed
from lensjax.select.session import COMPILED, LOGS, Session
from lensjax.select.strategies import descend_all
from lensjax.select.tune_command import tune_facts
from lensjax.selection import Selection


def default_directory(prepared: Prepared) -> Path:
    """Return where results go without --out: one directory per task and specification, so that reruns continue."""
    return Path("runs") / f"{prepared.task.name}-{key_of(prepared.specification)[:8]}"


class LiveSelection(Session):
    """Runs a prepared request.

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
        super().__init__(prepared, directory, console, isolate=isolate)
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
        if self.isolate:
            console.detail(f"each candidate is trained in a process of its own; their logs: {self.directory / LOGS}")
        elif console.verbose:
            # Not in the other case: what this process takes of a device, its processes lack.
            console.detail(f"everything is computed in this process; JAX devices: {', '.join(map(str, jax.devices()))}")
        try:
            with console.follow(self.board):
                self._measure_all()
        finally:
            # The lock goes last: whoever comes next finds everything in its place.
            try:
                self.stopwatch.pause()
                self.leave()
            finally:
                self.journal.close()
        return self._selection()

    def _measure_all(self) -> None:
        prepared = self.prepared
        self.settle()
        if prepared.races:
            race(self)
        else:
            descend_all(self)
            # With a budget, what is left when all is trained that it pays for.
            for candidate in prepared.candidates:
                gauge(self, candidate)
        if prepared.request.tangents:
            measure_tangents(self, prepared.request.tangents)
        if prepared.request.verify:
            for candidate in prepared.candidates:
                self.verify(candidate)
        self.leave()
        self.rank(last=True)
        # What was compiled is of use to a continued selection only.
        shutil.rmtree(self.directory / COMPILED, ignore_errors=True)

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
        units = np.array([self.unit(c) for c in ranked])
        measured = replace(measured, losses=measured.losses * units[:, None], facts=self.facts(names))
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
        spent = [r for r in paid(self.journal.lines) if r.part_of not in EXTRA_MEASUREMENTS]
        looking = sum(seen["flops"] for seen in self.looks.values())
        gauges = pretrained_scores_of(request.method)
        gauging = {what: sum(r.flops for r in self.journal.lines if r.part_of == what) for what in gauges}
        more = {what: flops for what, flops in gauging.items() if flops and what != request.method}
        frozen = " (4 N for frozen weights)" if any(c.lora for c in ranked) else ""
        scores, refused = score_all(
            curves,
            prepared.target,
            request.method,
            gamma=request.gamma,
            tau=request.tau,
            without={what: {n: r for n, r in of.items() if n in names} for what, of in self.scores_unavailable.items()},
        )
        if LOG_ME in scores and len({c.tokenizer.removesuffix("-separate") for c in ranked}) > 1:
            remark = "its classes are its own tokens, and the candidates have different tokenizers"
            scores[LOG_ME] = replace(scores[LOG_ME], remarks=(remark,) * len(ranked))
        return Selection(
            source=prepared.task.name,
            curves=curves,
            target=prepared.target,
            scores=scores,
            refused=refused,
            flops=flops[:, : len(curves.sizes)],
            full_flops=full_flops,
            failed_flops=sum(r.flops for r in spent if r.candidate in self.failures or r.key not in finished),
            cost_note=f"6 N per token trained on{frozen}, all epochs and trials; the whole {how}{by_xla(runs)}"
            + (f"; kernels and Hessian traces took {looking:.3g} more" if looking else "")
            + (f"; {' and '.join(more)} took {sum(more.values()):.3g} more" if more else ""),
            truth=truth,
            failures=self.failures,
            unverified=self.unverified,
            loss_unit=request.loss_unit,
            score_flops=gauging,
            facts={
                "directory": str(self.directory),
                "seconds": sum(r.seconds for r in self.found.values()),
                "seed": request.seed,
                "versions": versions(),
                "task": prepared.task.fingerprint,
                "notes": list(prepared.notes),
                **({TANGENTS: with_residuals(self.looks, runs)} if self.looks else {}),
                **{what: found for what, found in self.pretrained_scores.items() if found},
                "specification": prepared.specification,
                **tune_facts(prepared, next(iter(scores.values())).best, runs, self.directory),
            },
        )
