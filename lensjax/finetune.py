"""One fine-tuning run, jit-compiled: AdamW, early stopping on validation loss, best weights kept."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lensjax.metrics import training_flops
from lensjax.models.lora import Lora, add_lora, parameter_counts, with_dropout
from lensjax.tasks import Batch, Encoded, batches

Params = Any  # a pytree of weights
LOOK_EVERY = 16  # steps between two looks at how training goes
FROZEN_FLOPS = 4  # per frozen weight and token: its own gradient, 2 of the 6 of a trained one, is left out


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to fine-tune.

    Attributes
    ----------
    learning_rate : float
        Peak rate; it rises linearly over the first `warmup` steps and is constant after.
    batch_size : int
        Samples per step.
    weight_decay : float
        Of AdamW, on all weights (LensLLM, section 4.1: 0.01).
    max_epochs : int
        Passes over the subset at most.
    patience : int
        Evaluations without a better validation loss after which training stops.
    min_steps_between : int
        At least so many steps between evaluations, so that tiny subsets are not evaluated after every few samples.
    warmup : int
        Steps.
    clip : float
        Largest global norm of a gradient.
    lora : lensjax.models.lora.Lora, optional
        Train low-rank adapters with these settings, and nothing else; weight decay is then on them alone.
    """

    learning_rate: float = 3e-4
    batch_size: int = 32
    weight_decay: float = 0.01
    max_epochs: int = 10
    patience: int = 2
    min_steps_between: int = 10
    warmup: int = 10
    clip: float = 1.0
    lora: Lora | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fine-tuning run gave.

    Attributes
    ----------
    test_loss, validation_loss : float
        Mean token cross-entropy at the kept weights, nats.
    steps : int
        Optimiser steps to the kept weights, the early-stopping time t of eq. 9.
    steps_run : int
        Optimiser steps taken in all.
    tokens : int
        Tokens (prompt and target, no padding) trained on in all.
    flops : float
        6 per trained weight and token; 4 per frozen weight, for no gradient of it is formed (2 forward, 2 to pass the
        gradient of its outputs on to its inputs).
    seconds : float
        Wall time.
    validation_history : tuple of (step, loss)
    reason : str
        Why it ended.
    trainable : int
        Weights that training changes: all, or those of the adapters.
    """

    test_loss: float
    validation_loss: float
    steps: int
    steps_run: int
    tokens: int
    flops: float
    seconds: float
    validation_history: tuple[tuple[int, float], ...]
    reason: str
    trainable: int = 0


class DivergedError(RuntimeError):
    """Training produced a loss that is not a number."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is: passed to the caller after each evaluation and every few steps."""

    step: int
    total_steps: int
    epoch: int
    validation_loss: float


def mean_loss(loss_sums: Callable[[Params, Batch], tuple[jax.Array, jax.Array]], params: Params, batch: Batch) -> Any:
    """Mean cross-entropy over all counted tokens of a batch, nats; scalar, 0 for a batch without any."""
    sums, counts = loss_sums(params, batch)
    return sums.sum() / jnp.maximum(counts.sum(), 1)


def tuning_flops(parameters: int, trainable: int, tokens: int) -> float:
    """Floating-point operations of training some of the weights on so many tokens, as `Outcome` counts them."""
    return float(training_flops(trainable, tokens)) + FROZEN_FLOPS * (parameters - trainable) * tokens


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

    Raises
    ------
    InputError
        If the plan's adapters do not fit the model.
    """

    def __init__(self, model: Any, plan: Plan, buckets: Iterable[int], pad_id: int) -> None:
        if plan.lora is not None:
            model = add_lora(model, key=jax.random.key(0), **dataclasses.asdict(plan.lora))
        graph, *states = nnx.split(model, nnx.Param, ...)
        params, self.frozen = states
        self.plan, self.buckets, self.pad_id = plan, tuple(buckets), pad_id
        self.initial = params
        self.parameters, self.trainable = parameter_counts(model)
        schedule = optax.linear_schedule(plan.learning_rate / max(plan.warmup, 1), plan.learning_rate, plan.warmup)
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(plan.clip), optax.adamw(schedule, weight_decay=plan.weight_decay)
        )

        # The frozen weights are an argument: closed over, they would be constants, copied into each program.
        def loss_sums(params: Params, frozen: Params, batch: Batch, key: Any = None) -> tuple[jax.Array, jax.Array]:
            return with_dropout(nnx.merge(graph, params, frozen), key).loss_sums(batch)

        def step(
            params: Params,
            state: Any,
            finite: jax.Array,
            frozen: Params,
            batch: Batch,
            dropout_key: jax.Array,
            number: int | jax.Array,
        ) -> tuple[Params, Any, jax.Array]:
            key = jax.random.fold_in(dropout_key, number)

            def loss(params: Params) -> jax.Array:
                return mean_loss(lambda params, batch: loss_sums(params, frozen, batch, key), params, batch)

            value, gradient = jax.value_and_grad(loss)(params)
            update, state = self.optimiser.update(gradient, state, params)
            return optax.apply_updates(params, update), state, finite & jnp.isfinite(value)

        def evaluate(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            sums, counts = loss_sums(params, frozen, batch)
            return sums.sum(), counts.sum()

        # Weights and optimiser state are replaced by the step, so their buffers are reused.
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._evaluate = jax.jit(evaluate)
        # A donated buffer is gone: copies are made by a compiled function, never aliases.
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        self._init = jax.jit(self.optimiser.init)

    def loss(self, params: Params, encoded: Encoded) -> float:
        """Mean token cross-entropy of a data set, nats.

        Raises
        ------
        DivergedError
            If it is not finite.
        """
        pending = [
            self._evaluate(params, self.frozen, batch)
            for batch in batches(encoded, batch_size=self.plan.batch_size, buckets=self.buckets, pad_id=self.pad_id)
        ]
        sums, counts = (math.fsum(float(p[i]) for p in pending) for i in (0, 1))
        value = sums / counts
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value}")
        return value

    def zero_shot(self, test: Encoded) -> Outcome:
        """Evaluate the model as it is."""
        start = time.perf_counter()
        value = self.loss(self.initial, test)
        seconds = time.perf_counter() - start
        return Outcome(value, float("nan"), 0, 0, 0, 0.0, seconds, (), "not fine-tuned", self.trainable)

    def run(
        self,
        train: Encoded,
        validation: Encoded,
        test: Encoded,
        *,
        seed: int,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Outcome:
        """Fine-tune from the initial weights on one subset.

        Training ends when the validation loss has not improved for `patience` evaluations or after `max_epochs`; the
        test loss is that of the weights with the best validation loss, which may be the initial ones.

        Parameters
        ----------
        train, validation, test : Encoded
        seed : int
            Of the order of the batches and of the adapters' dropout.
        on_progress : callable, optional
            Called with a `Progress` after every few steps.

        Raises
        ------
        DivergedError
            If the training or validation loss is not finite.
        """
        start = time.perf_counter()
        plan = self.plan
        rng = np.random.default_rng([seed, len(train)])
        params = self._copy(self.initial)
        state, finite = self._init(params), jnp.array(True)
        best, best_loss, best_step = self.initial, self.loss(self.initial, validation), 0
        history = [(0, best_loss)]
        since_best = steps = since_evaluation = 0
        dropout_key = jax.random.key(seed)
        reason = f"{plan.max_epochs} epochs done"
        tokens = 0
        shuffled: dict[str, Any] = {
            "batch_size": plan.batch_size,
            "buckets": self.buckets,
            "pad_id": self.pad_id,
            "rng": rng,
        }
        per_epoch = sum(1 for _ in batches(train, **shuffled))
        for epoch in range(1, plan.max_epochs + 1):
            for batch in batches(train, **shuffled):
                params, state, finite = self._step(params, state, finite, self.frozen, batch, dropout_key, steps)
                steps += 1
                since_evaluation += 1
                if steps % LOOK_EVERY == 0 or steps % per_epoch == 0:
                    # Reading the flag waits for the device: not after every step.
                    if not bool(finite):
                        raise DivergedError(
                            f"the training loss is not finite in epoch {epoch} (rate {plan.learning_rate:g})"
                        )
                    if on_progress:
                        on_progress(Progress(steps, per_epoch * plan.max_epochs, epoch, best_loss))
            tokens += int(train.token_counts.sum())
            if since_evaluation < plan.min_steps_between and epoch < plan.max_epochs:
                continue
            since_evaluation = 0
            value = self.loss(params, validation)
            history.append((steps, value))
            if value < best_loss:
                best, best_loss, best_step, since_best = self._copy(params), value, steps, 0
            else:
                since_best += 1
            if on_progress:
                on_progress(Progress(steps, per_epoch * plan.max_epochs, epoch, best_loss))
            if since_best >= plan.patience:
                reason = f"validation loss has not improved for {plan.patience} evaluations"
                break
        return Outcome(
            test_loss=self.loss(best, test),
            validation_loss=best_loss,
            steps=best_step,
            steps_run=steps,
            tokens=tokens,
            flops=tuning_flops(self.parameters, self.trainable, tokens),
            seconds=time.perf_counter() - start,
            validation_history=tuple(history),
            reason=reason,
            trainable=self.trainable,
        )
