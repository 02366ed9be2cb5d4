"""One training of several learning rates side by side: when to check how they do, what to keep, when to end each."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.finetune.config import Plan
from lensjax.finetune.cost import tuning_flops
from lensjax.finetune.results import DIVERGED, FINISHED, PRUNED, DivergedError, Progress, Trial, Weights
from lensjax.finetune.step import CompiledSteps, Params, State
from lensjax.tasks import Batch, Encoded

ShouldPrune = Callable[[float, float, Sequence[float]], bool]
"""Told the epochs done, the best validation loss of a trial so far, and those of the trials beside it."""

CHECK_EVERY = 64  # steps between two checks of how training goes, at most
CHECK_SECONDS = 1.0  # about so long between two checks
RISE = 1.1  # a training loss so many times the untouched model's is divergence, if nothing better was ever reached


@dataclasses.dataclass
class TrialState:
    """Where the training with one learning rate is; `status` is empty while it goes on."""

    rate: float
    best: float
    best_step: int = 0
    since_best: int = 0
    status: str = ""
    reason: str = ""
    test_loss: float | None = None
    steps_run: int = 0
    history: list[tuple[int, float]] = dataclasses.field(default_factory=list)


class TrainingLoop:
    """One training of several learning rates side by side.

    Parameters
    ----------
    compiled : CompiledSteps
    plan : Plan
        Says when to evaluate and when to stop; the rest of it is in `compiled`.
    rates : tuple of float
    batch_size : int
    """

    def __init__(self, compiled: CompiledSteps, plan: Plan, rates: tuple[float, ...], batch_size: int) -> None:
        self.compiled, self.plan, self.rates, self.batch_size = compiled, plan, rates, batch_size
        self.single = len(rates) == 1
        self.shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
        self.examples: dict[tuple[int, ...], Batch] = {}

    def run(
        self,
        train: Encoded,
        validation: Encoded,
        test: Encoded,
        seed: int,
        should_prune: ShouldPrune | None,
        count_flops: bool,
        report: Callable[[Progress], None] | None,
        on_weights: Callable[[Weights], None] | None,
    ) -> tuple[Trial, ...]:
        """Train with all rates to their ends; arguments and result as in `FineTuner.trials`."""
        compiled, plan = self.compiled, self.plan
        untouched = float(compiled.losses(compiled.initial, validation, self.batch_size)[0])
        trials = [TrialState(rate, untouched, history=[(0, untouched)]) for rate in self.rates]
        if not math.isfinite(untouched):
            raise DivergedError(f"the untouched model's validation loss is {untouched}")
        self.rows = list(range(len(trials)))  # which trial each row of the stacked weights belongs to
        initial = compiled.initial
        state = compiled.start(initial) if self.single else compiled.start_trials(initial, len(trials))
        best = initial if self.single else compiled.copy(state["params"])
        rng = np.random.default_rng([seed, len(train)])
        dropout_key = jax.random.key(seed)
        per_epoch = sum(1 for _ in compiled.batches(train, self.batch_size))
        total = per_epoch * plan.max_epochs
        per_epoch_tokens = int(train.token_counts.sum())
        steps = since_evaluation = 0
        sums_before = np.zeros(len(trials))
        check_every, since_check, checked = 1, 0, time.perf_counter()
        for epoch in range(1, plan.max_epochs + 1):
            for batch in compiled.batches(train, self.batch_size, rng):
                state = self._step(state, trials, batch, dropout_key, steps, total)
                steps += 1
                since_evaluation += 1
                since_check += 1
                if since_check >= check_every or steps % per_epoch == 0:
                    # Reading the flag waits for the device: not after every step, but about once a second.
                    finite = np.atleast_1d(state["finite"])
                    now = time.perf_counter()
                    check_every = max(1, min(CHECK_EVERY, int(since_check * CHECK_SECONDS / max(now - checked, 1e-6))))
                    since_check, checked = 0, now
                    for row, number in enumerate(self.rows):
                        if not finite[row] and not trials[number].status:
                            self._end(
                                trials[number], DIVERGED, f"the training loss is not finite in epoch {epoch}", steps
                            )
                    if all(trial.status for trial in trials):
                        break
                    if report:
                        report(self._progress(trials, steps, total, epoch, per_epoch_tokens / per_epoch))
            if all(trial.status for trial in trials):
                break
            if since_evaluation < plan.min_steps_between and epoch < plan.max_epochs:
                continue
            values = compiled.losses(state["params"], validation, self.batch_size, stacked=not self.single)
            sums = np.atleast_1d(np.asarray(state["loss"], np.float64))
            training = (sums - sums_before) / since_evaluation
            sums_before, since_evaluation = sums, 0
            better = np.zeros(len(self.rows), bool)
            for row, number in enumerate(self.rows):
                numbers = float(values[row]), float(training[row]), steps, untouched
                better[row] = self._record_evaluation(trials[number], *numbers, last=epoch == plan.max_epochs)
            best = self._keep(best, state["params"], better)
            self._report_weights(on_weights, trials, best, [trials[self.rows[row]] for row in np.flatnonzero(better)])
            finished = self._stop(trials, steps, epoch, should_prune)
            if finished:
                self._test(trials, finished, best, test)
                # Those whose test loss is not finite have diverged.
                self._report_weights(on_weights, trials, best, [t for t in finished if t.status == FINISHED])
            if report:
                report(self._progress(trials, steps, total, epoch, per_epoch_tokens / per_epoch))
            if all(trial.status for trial in trials):
                break
            state, best, sums_before = self._drop_ended(trials, state, best, sums_before)
        costs = self._costs(validation, test) if count_flops else None
        return tuple(self._trial(trial, trial is trials[0], per_epoch, train, costs) for trial in trials)

    def _step(
        self, state: State, trials: list[TrialState], batch: Batch, dropout_key: jax.Array, steps: int, total: int
    ) -> State:
        compiled = self.compiled
        shape = batch["labels"].shape
        self.shapes[shape] += 1
        self.examples.setdefault(shape, batch)
        own = compiled.placement.put_batch(batch)
        found: State
        if self.single:
            rate = jnp.float32(trials[0].rate)
            found = compiled.step(state, rate, compiled.frozen, own, dropout_key, steps, total)
        else:
            rates = jnp.array([trials[number].rate for number in self.rows], jnp.float32)
            found = compiled.step_trials(state, rates, compiled.frozen, own, dropout_key, steps, total)
        return found

    def _record_evaluation(
        self, trial: TrialState, value: float, training: float, steps: int, untouched: float, *, last: bool
    ) -> bool:
        """Record an evaluation of a trial, which may end it as diverged; return whether it is its best so far."""
        if trial.status:
            return False
        if not math.isfinite(value):
            self._end(trial, DIVERGED, f"the validation loss is {value} at step {steps}", steps)
            return False
        trial.history.append((steps, value))
        if value < trial.best:
            trial.best, trial.best_step, trial.since_best = value, steps, 0
            return True
        trial.since_best += 1
        ends = last or trial.since_best >= self.plan.patience
        if ends and trial.best_step == 0 and min(training, value) > RISE * untouched:
            self._end(
                trial,
                DIVERGED,
                f"the loss rises: {training:.3g} in training, {value:.3g} in validation, {untouched:.3g} untouched",
                steps,
            )
        return False

    def _stop(
        self, trials: list[TrialState], steps: int, epoch: int, should_prune: ShouldPrune | None
    ) -> list[TrialState]:
        """End the trials that are done, and prune; return those that finished now."""
        plan = self.plan
        at_start = [(trial, trial.best) for trial in trials if trial.status != DIVERGED]
        finished = []
        for trial in trials:
            if trial.status:
                continue
            others = [best for other, best in at_start if other is not trial]
            if trial.since_best >= plan.patience:
                reason = f"validation loss has not improved for {plan.patience} evaluations"
            elif epoch == plan.max_epochs:
                reason = f"{plan.max_epochs} epochs done"
            elif should_prune is not None and should_prune(epoch, trial.best, others):
                self._end(trial, PRUNED, f"worse than the other trials after {epoch} epochs", steps)
                continue
            else:
                continue
            self._end(trial, FINISHED, reason, steps)
            finished.append(trial)
        return finished

    def _end(self, trial: TrialState, status: str, reason: str, steps: int) -> None:
        rate = f" (rate {trial.rate:g}, batch size {self.batch_size})" if status == DIVERGED else ""
        trial.status, trial.reason, trial.steps_run = status, reason + rate, steps

    def _keep(self, best: Params, params: Params, better: np.ndarray) -> Params:
        if not better.any():
            return best
        compiled = self.compiled
        return compiled.copy(params) if self.single else compiled.keep_better(best, params, jnp.array(better))

    def _report_weights(
        self,
        listener: Callable[[Weights], None] | None,
        trials: list[TrialState],
        best: Params,
        reported: list[TrialState],
    ) -> None:
        """Pass the best weights so far of some trials to the listener, if there is one."""
        if listener is None:
            return
        for row, number in enumerate(self.rows):
            trial = trials[number]
            if any(trial is t for t in reported):
                params = best if self.single else jax.tree.map(lambda x, row=row: x[row], best)
                finished = trial.status == FINISHED
                listener(Weights(trial.rate, self.batch_size, trial.best_step, trial.best, params, finished))

    def _test(self, trials: list[TrialState], finished: list[TrialState], best: Params, test: Encoded) -> None:
        values = self.compiled.losses(best, test, self.batch_size, stacked=not self.single)
        for row, number in enumerate(self.rows):
            trial = trials[number]
            if any(trial is e for e in finished):
                trial.test_loss = float(values[row])
                if not math.isfinite(trial.test_loss):
                    self._end(trial, DIVERGED, f"the test loss is {trial.test_loss}", trial.steps_run)

    def _drop_ended(
        self, trials: list[TrialState], state: State, best: Params, sums: np.ndarray
    ) -> tuple[State, Params, np.ndarray]:
        """Drop trials that have ended, so that they cost no more; each number of trials is compiled."""
        going = [row for row, number in enumerate(self.rows) if not trials[number].status]
        if self.single or len(going) == len(self.rows):
            return state, best, sums
        rows = jnp.array(going)
        self.rows = [self.rows[row] for row in going]
        return self.compiled.select_trials(state, rows), self.compiled.select_trials(best, rows), sums[going]

    def _progress(
        self, trials: list[TrialState], steps: int, total: int, epoch: int, tokens_per_step: float
    ) -> Progress:
        best = min(trial.best for trial in trials)
        trained = sum(trial.steps_run if trial.status else steps for trial in trials) * tokens_per_step
        return Progress(steps, total, epoch, best, steps / total, int(trained))

    def _costs(self, validation: Encoded, test: Encoded) -> tuple[float, float, float]:
        """Return XLA's counts: of an average step, of one pass over validation, and over the test set."""
        compiled = self.compiled
        step = sum(compiled.cost_of_step(self.examples[shape]) * count for shape, count in self.shapes.items())
        validating, testing = (
            sum(compiled.cost_of_evaluation(batch) for batch in compiled.batches(part, self.batch_size))
            for part in (validation, test)
        )
        return step / max(sum(self.shapes.values()), 1), validating, testing

    def _trial(
        self, trial: TrialState, first: bool, per_epoch: int, train: Encoded, costs: tuple[float, float, float] | None
    ) -> Trial:
        compiled = self.compiled
        # The untouched model is evaluated once for all trials.
        evaluations = len(trial.history) - (not first)
        # A trial that diverged inside an epoch has trained on a part of it.
        epochs = trial.steps_run / per_epoch
        tokens = round(epochs * int(train.token_counts.sum()))
        finished = trial.status == FINISHED
        return Trial(
            learning_rate=trial.rate,
            batch_size=self.batch_size,
            status=trial.status,
            test_loss=trial.test_loss if finished else None,
            validation_loss=trial.best if finished else None,
            steps=trial.best_step,
            steps_run=trial.steps_run,
            steps_per_epoch=per_epoch,
            samples=round(epochs * len(train)),
            tokens=tokens,
            flops=tuning_flops(compiled.parameters, compiled.trainable, tokens),
            step_flops=None if costs is None else costs[0] * trial.steps_run,
            evaluation_flops=None if costs is None else costs[1] * evaluations + costs[2] * finished,
            validation_history=tuple(trial.history),
            reason=trial.reason,
        )
