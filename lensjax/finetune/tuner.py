"""Fine-tuning one model again and again: AdamW, early stopping on validation loss, best weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from lensjax.finetune.config import Plan
from lensjax.finetune.results import DIVERGED, DivergedError, Outcome, Progress, Trial, Weights
from lensjax.finetune.step import CompiledSteps, Params
from lensjax.finetune.training_loop import ShouldPrune, TrainingLoop
from lensjax.tasks import Batch, Encoded


class FineTuner:
    """Fine-tunes one model again and again from the same weights; compiled once per batch shape.

    Parameters
    ----------
    model : flax.nnx.Module
        With ``loss_sums(batch) -> (loss_sum (N,), token_count (N,))``, as the ports of `lensjax.models`. Its
        `nnx.Param`s are trained; all else, such as the weights under adapters, is passed in and never differentiated.
    plan : Plan
        With `lora`, the model gets these adapters, from the same random numbers in each run.
    buckets : sequence of int
        Padded lengths.
    pad_id : int
        Token used for padding.
    batch_sizes : sequence of int, optional
        All that will be used, if not only the plan's.
    devices : sequence of jax.Device, optional
        Default: all of this process.

    Attributes
    ----------
    compiled : CompiledSteps
        What is compiled of the model.
    parameters, trainable, placement, dtype, initial, frozen
        As in `CompiledSteps`. `initial` and `frozen` share their arrays with the model that was given, unless devices
        or precision make others of them.

    Raises
    ------
    InputError
        If the plan makes no sense, its adapters do not fit the model, or the devices its batches.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        buckets: Iterable[int],
        pad_id: int,
        *,
        batch_sizes: Sequence[int] = (),
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self.plan = plan
        self.compiled = CompiledSteps(model, plan, buckets, pad_id, batch_sizes=batch_sizes, devices=devices)
        self.buckets, self.pad_id = self.compiled.buckets, pad_id
        self.parameters, self.trainable = self.compiled.parameters, self.compiled.trainable
        self.placement, self.dtype = self.compiled.placement, self.compiled.dtype
        self.initial, self.frozen = self.compiled.initial, self.compiled.frozen

    def cost_of_step(self, batch: Batch) -> float:
        """Floating-point operations of a training step on such a batch; see `CompiledSteps.cost_of_step`."""
        return self.compiled.cost_of_step(batch)

    def cost_of_evaluation(self, batch: Batch) -> float:
        """Floating-point operations of evaluating such a batch; see `CompiledSteps.cost_of_step`."""
        return self.compiled.cost_of_evaluation(batch)

    def loss(self, params: Params, encoded: Encoded) -> float:
        """Mean token cross-entropy of a data set, nats.

        Raises
        ------
        DivergedError
            If it is not finite.
        """
        value = float(self.compiled.losses(params, encoded, self.plan.batch_size)[0])
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value}")
        return value

    def model(self, params: Params) -> Any:
        """Return the model with these weights, whose arrays it shares, and the frozen ones as computed with."""
        return nnx.merge(self.compiled.graph, params, self.frozen)

    def zero_shot(self, test: Encoded) -> Outcome:
        """Evaluate the model as it is."""
        start = time.perf_counter()
        value = self.loss(self.initial, test)
        return Outcome(
            test_loss=value,
            validation_loss=float("nan"),
            steps=0,
            steps_run=0,
            samples=0,
            tokens=0,
            flops=0.0,
            seconds=time.perf_counter() - start,
            validation_history=(),
            reason="not fine-tuned",
            trainable=self.trainable,
            learning_rate=self.plan.learning_rate,
            batch_size=self.plan.batch_size,
        )

    def run(
        self,
        train: Encoded,
        validation: Encoded,
        test: Encoded,
        *,
        seed: int,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Outcome:
        """Fine-tune from the initial weights on one subset, at the plan's rate and batch size.

        Training ends when the validation loss has not improved for `patience` evaluations or after `max_epochs`; the
        test loss is that of the weights with the best validation loss, which may be the initial ones.

        Parameters
        ----------
        train, validation, test : Encoded
        seed : int
            Seeds the order of the batches and dropout.
        on_progress : callable, optional
            Called with a `Progress` after every few steps.

        Raises
        ------
        DivergedError
            If the training or validation loss is not finite, or both only rose.
        """
        start = time.perf_counter()
        (trial,) = self.trials(train, validation, test, rates=(self.plan.learning_rate,), seed=seed, report=on_progress)
        if trial.status == DIVERGED:
            raise DivergedError(trial.reason, (trial,))
        return self.outcome((trial,), trial, time.perf_counter() - start)

    def outcome(self, trials: tuple[Trial, ...], chosen: Trial, seconds: float) -> Outcome:
        """Return what a finished trial, chosen among those that were made, gave and cost."""
        assert chosen.test_loss is not None
        assert chosen.validation_loss is not None
        return Outcome(
            test_loss=chosen.test_loss,
            validation_loss=chosen.validation_loss,
            steps=chosen.steps,
            steps_run=chosen.steps_run,
            samples=sum(t.samples for t in trials),
            tokens=sum(t.tokens for t in trials),
            flops=sum(t.flops for t in trials),
            seconds=seconds,
            validation_history=chosen.validation_history,
            reason=chosen.reason,
            trainable=self.trainable,
            learning_rate=chosen.learning_rate,
            batch_size=chosen.batch_size,
            trials=trials,
            chosen_tokens=chosen.tokens,
        )

    def trials(
        self,
        train: Encoded,
        validation: Encoded,
        test: Encoded,
        *,
        rates: Sequence[float],
        seed: int,
        batch_size: int | None = None,
        should_prune: ShouldPrune | None = None,
        count_flops: bool = False,
        report: Callable[[Progress], None] | None = None,
        on_weights: Callable[[Weights], None] | None = None,
    ) -> tuple[Trial, ...]:
        """Fine-tune from the initial weights at one or several learning rates at once.

        Parameters
        ----------
        train, validation, test : Encoded
        rates : sequence of float
            Each is a trial of its own, with the same batches and dropout as alone.
        seed : int
        batch_size : int, optional
            Instead of the plan's.
        should_prune : callable, optional
            Given (epochs done, best validation loss of a trial, those of the trials beside it), tells whether to end
            the trial.
        count_flops : bool
            Whether XLA's cost analysis is asked too, which takes a second or so for each batch shape, once.
        report : callable, optional
            Called with a `Progress` after every few steps.
        on_weights : callable, optional
            Called with `Weights` whenever a trial has better ones, and with its best at its end.

        Returns
        -------
        tuple of Trial
            In the order of `rates`; one that diverged says so in its status.
        """
        loop = TrainingLoop(self.compiled, self.plan, tuple(rates), batch_size or self.plan.batch_size)
        return loop.run(train, validation, test, seed, should_prune, count_flops, report, on_weights)
