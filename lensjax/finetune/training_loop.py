"""One training of several learning rates side by side: when to look, what to keep, when to end each."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.finetune.cost import tuning_flops
from lensjax.finetune.results import DivergedError, Progress, Trial, Weights
from lensjax.tasks import Batch, Encoded

if TYPE_CHECKING:
    from lensjax.finetune.tuner import FineTuner

Params = Any  # a pytree of weights
CHECK_EVERY = 64  # steps between two looks at how training goes, at most
CHECK_SECONDS = 1.0  # about so long between two looks
RISE = 1.1  # a training loss so many times the untouched model's is divergence, if nothing better was ever reached


@dataclasses.dataclass
class TrialState:
    """Where one learning rate is."""

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
    """One training of several learning rates side by side, with the compiled functions of a `FineTuner`."""

    def __init__(self, tuner: FineTuner, rates: tuple[float, ...], batch_size: int) -> None:
        self.tuner, self.rates, self.batch_size = tuner, rates, batch_size
        self.single = len(rates) == 1
        self.shapes: collections.Counter[tuple[int, ...]] = collections.Counter()
        self.examples: dict[tuple[int, ...], Batch] = {}

    def run(
        self,
        train: Encoded,
        validation: Encoded,
        test: Encoded,
        seed: int,
        hopeless: Callable[[float, float, Sequence[float]], bool] | None,
        count_flops: bool,
        report: Callable[[Progress], None] | None,
        on_weights: Callable[[Weights], None] | None,
    ) -> tuple[Trial, ...]:
        """Train all lanes to their ends; arguments and result as in `FineTuner.trials`."""
        tuner, plan = self.tuner, self.tuner.plan
        untouched = float(tuner._losses(tuner.initial, validation, self.batch_size, None)[0])
        lanes = [TrialState(rate, untouched, history=[(0, untouched)]) for rate in self.rates]
        if not math.isfinite(untouched):
            raise DivergedError(f"the untouched model's validation loss is {untouched}")
        self.rows = list(range(len(lanes)))  # which lane each row of the stacked weights is
        state = tuner._start(tuner.initial) if self.single else tuner._start_lanes(tuner.initial, len(lanes))
        best = tuner.initial if self.single else tuner._copy(state["params"])
        rng = np.random.default_rng([seed, len(train)])
        dropout_key = jax.random.key(seed)
        per_epoch = sum(1 for _ in tuner._batches(train, self.batch_size))
        total = per_epoch * plan.max_epochs
        per_epoch_tokens = int(train.token_counts.sum())
        steps = since_evaluation = 0
        sums_before = np.zeros(len(lanes))
        look_every, since_look, looked = 1, 0, time.perf_counter()
        for epoch in range(1, plan.max_epochs + 1):
            for batch in tuner._batches(train, self.batch_size, rng):
                state = self._step(state, lanes, batch, dropout_key, steps, total)
                steps += 1
                since_evaluation += 1
                since_look += 1
                if since_look >= look_every or steps % per_epoch == 0:
                    # Reading the flag waits for the device: not after every step, but about once a second.
                    finite = np.atleast_1d(state["finite"])
                    now = time.perf_counter()
                    look_every = max(1, min(CHECK_EVERY, int(since_look * CHECK_SECONDS / max(now - looked, 1e-6))))
                    since_look, looked = 0, now
                    for row, number in enumerate(self.rows):
                        if not finite[row] and not lanes[number].status:
                            self._end(
                                lanes[number], "diverged", f"the training loss is not finite in epoch {epoch}", steps
                            )
                    if all(lane.status for lane in lanes):
                        break
                    if report:
                        report(self._progress(lanes, steps, total, epoch, per_epoch_tokens / per_epoch))
            if all(lane.status for lane in lanes):
                break
            if since_evaluation < plan.min_steps_between and epoch < plan.max_epochs:
                continue
            values = tuner._losses(state["params"], validation, self.batch_size, None if self.single else len(lanes))
            sums = np.atleast_1d(np.asarray(state["loss"], np.float64))
            training = (sums - sums_before) / since_evaluation
            sums_before, since_evaluation = sums, 0
            better = np.zeros(len(self.rows), bool)
            for row, number in enumerate(self.rows):
                numbers = float(values[row]), float(training[row]), steps, untouched
                better[row] = self._judge(lanes[number], *numbers, last=epoch == plan.max_epochs)
            best = self._keep(best, state["params"], better)
            self._tell(on_weights, lanes, best, [lanes[self.rows[row]] for row in np.flatnonzero(better)])
            ended = self._stop(lanes, steps, epoch, hopeless)
            if ended:
                self._test(lanes, ended, best, test)
                self._tell(on_weights, lanes, best, [lane for lane in ended if lane.status == "finished"])
            if report:
                report(self._progress(lanes, steps, total, epoch, per_epoch_tokens / per_epoch))
            if all(lane.status for lane in lanes):
                break
            state, best, sums_before = self._compact(lanes, state, best, sums_before)
        costs = self._costs(validation, test) if count_flops else None
        return tuple(self._trial(lane, lane is lanes[0], per_epoch, train, costs) for lane in lanes)

    def _step(
        self, state: Any, lanes: list[TrialState], batch: Batch, dropout_key: jax.Array, steps: int, total: int
    ) -> Any:
        tuner = self.tuner
        shape = batch["labels"].shape
        self.shapes[shape] += 1
        self.examples.setdefault(shape, batch)
        own = tuner.placement.put_batch(batch)
        if self.single:
            return tuner._step(state, jnp.float32(lanes[0].rate), tuner.frozen, own, dropout_key, steps, total)
        rates = jnp.array([lanes[number].rate for number in self.rows], jnp.float32)
        return tuner._step_lanes(state, rates, tuner.frozen, own, dropout_key, steps, total)

    def _judge(
        self, lane: TrialState, value: float, training: float, steps: int, untouched: float, *, last: bool
    ) -> bool:
        """Take note of an evaluation; return whether it is the lane's best."""
        if lane.status:
            return False
        if not math.isfinite(value):
            self._end(lane, "diverged", f"the validation loss is {value} at step {steps}", steps)
            return False
        lane.history.append((steps, value))
        if value < lane.best:
            lane.best, lane.best_step, lane.since_best = value, steps, 0
            return True
        lane.since_best += 1
        ends = last or lane.since_best >= self.tuner.plan.patience
        if ends and lane.best_step == 0 and min(training, value) > RISE * untouched:
            self._end(
                lane,
                "diverged",
                f"the loss rises: {training:.3g} in training, {value:.3g} in validation, {untouched:.3g} untouched",
                steps,
            )
        return False

    def _stop(
        self,
        lanes: list[TrialState],
        steps: int,
        epoch: int,
        hopeless: Callable[[float, float, Sequence[float]], bool] | None,
    ) -> list[TrialState]:
        """End the lanes that are done; return those that finished now."""
        plan = self.tuner.plan
        at_start = [(lane, lane.best) for lane in lanes if lane.status != "diverged"]
        ended = []
        for lane in lanes:
            if lane.status:
                continue
            others = [best for other, best in at_start if other is not lane]
            if lane.since_best >= plan.patience:
                reason = f"validation loss has not improved for {plan.patience} evaluations"
            elif epoch == plan.max_epochs:
                reason = f"{plan.max_epochs} epochs done"
            elif hopeless is not None and hopeless(epoch, lane.best, others):
                self._end(lane, "hopeless", f"worse than the other trials after {epoch} epochs", steps)
                continue
            else:
                continue
            self._end(lane, "finished", reason, steps)
            ended.append(lane)
        return ended

    def _end(self, lane: TrialState, status: str, reason: str, steps: int) -> None:
        rate = f" (rate {lane.rate:g}, batch size {self.batch_size})" if status == "diverged" else ""
        lane.status, lane.reason, lane.steps_run = status, reason + rate, steps

    def _keep(self, best: Params, params: Params, better: np.ndarray) -> Params:
        if not better.any():
            return best
        return self.tuner._copy(params) if self.single else self.tuner._keep_lanes(best, params, jnp.array(better))

    def _tell(
        self, listener: Callable[[Weights], None] | None, lanes: list[TrialState], best: Params, told: list[TrialState]
    ) -> None:
        """Tell of the best weights of some lanes so far."""
        if listener is None:
            return
        for row, number in enumerate(self.rows):
            lane = lanes[number]
            if any(lane is t for t in told):
                params = best if self.single else jax.tree.map(lambda x, row=row: x[row], best)
                finished = lane.status == "finished"
                listener(Weights(lane.rate, self.batch_size, lane.best_step, lane.best, params, finished))

    def _test(self, lanes: list[TrialState], ended: list[TrialState], best: Params, test: Encoded) -> None:
        values = self.tuner._losses(best, test, self.batch_size, None if self.single else len(self.rows))
        for row, number in enumerate(self.rows):
            lane = lanes[number]
            if any(lane is e for e in ended):
                lane.test_loss = float(values[row])
                if not math.isfinite(lane.test_loss):
                    self._end(lane, "diverged", f"the test loss is {lane.test_loss}", lane.steps_run)

    def _compact(self, lanes: list[TrialState], state: Any, best: Params, sums: np.ndarray) -> tuple[Any, Params, Any]:
        """Drop lanes that have ended, so that they cost no more; each width is compiled."""
        going = [row for row, number in enumerate(self.rows) if not lanes[number].status]
        if self.single or len(going) == len(self.rows):
            return state, best, sums
        rows = jnp.array(going)
        self.rows = [self.rows[row] for row in going]
        return self.tuner._take_lanes(state, rows), self.tuner._take_lanes(best, rows), sums[going]

    def _progress(
        self, lanes: list[TrialState], steps: int, total: int, epoch: int, tokens_per_step: float
    ) -> Progress:
        best = min(lane.best for lane in lanes)
        trained = sum(lane.steps_run if lane.status else steps for lane in lanes) * tokens_per_step
        return Progress(steps, total, epoch, best, steps / total, int(trained))

    def _costs(self, validation: Encoded, test: Encoded) -> tuple[float, float, float]:
        """Return XLA's counts: of an average step, of one pass over validation, and over the test set."""
        tuner = self.tuner
        step = sum(tuner.cost_of_step(self.examples[shape]) * count for shape, count in self.shapes.items())
        validating, testing = (
            sum(tuner.cost_of_evaluation(batch) for batch in tuner._batches(part, self.batch_size))
            for part in (validation, test)
        )
        return step / max(sum(self.shapes.values()), 1), validating, testing

    def _trial(
        self, lane: TrialState, first: bool, per_epoch: int, train: Encoded, costs: tuple[float, float, float] | None
    ) -> Trial:
        tuner = self.tuner
        # The untouched model is evaluated once for all lanes.
        evaluations = len(lane.history) - (not first)
        # A lane that diverged inside an epoch has trained on a part of it.
        epochs = lane.steps_run / per_epoch
        tokens = round(epochs * int(train.token_counts.sum()))
        finished = lane.status == "finished"
        return Trial(
            learning_rate=lane.rate,
            batch_size=self.batch_size,
            status=lane.status,
            test_loss=lane.test_loss if finished else None,
            validation_loss=lane.best if finished else None,
            steps=lane.best_step,
            steps_run=lane.steps_run,
            steps_per_epoch=per_epoch,
            samples=round(epochs * len(train)),
            tokens=tokens,
            flops=tuning_flops(tuner.parameters, tuner.trainable, tokens),
            step_flops=None if costs is None else costs[0] * lane.steps_run,
            evaluation_flops=None if costs is None else costs[1] * evaluations + costs[2] * finished,
            validation_history=tuple(lane.history),
            reason=lane.reason,
        )
