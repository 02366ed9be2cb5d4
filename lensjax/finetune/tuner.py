"""Fine-tuning, jit-compiled: AdamW, early stopping on validation loss, best weights kept, several rates at once."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lensjax.finetune.config import Plan
from lensjax.finetune.cost import xla_flops
from lensjax.finetune.results import DivergedError, Outcome, Progress, Trial, Weights
from lensjax.finetune.sharding import place
from lensjax.finetune.training_loop import TrainingLoop
from lensjax.models import LanguageModel
from lensjax.models.lora import add_lora, parameter_counts, with_dropout
from lensjax.tasks import Batch, Encoded, batches

Params = Any  # a pytree of weights
UNCHUNKED = 2**62  # rows of logits at once, for counting


def rate_factor(schedule: str, warmup: int, step: jax.Array, total: jax.Array) -> jax.Array:
    """Return the learning rate of a step as a share of the peak.

    The rise is from 1 / `warmup` in the first step to 1 in step `warmup` + 1, not from 0 as in transformers' Trainer,
    whose first step changes nothing. Runs on a few hundred samples have few steps, and with early stopping each is
    paid for: none is spent on a rate of 0. In no step are the two more than 1 / `warmup` apart.

    Parameters
    ----------
    schedule : {"constant", "linear", "cosine"}
    warmup : int
        Steps in which it rises linearly from 1 / warmup.
    step, total : int arrays
        This step, from 0, and how many there are at most.
    """
    first = max(warmup, 1)
    rising = (1 + (first - 1) * jnp.minimum(step / first, 1)) / first
    done = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
    falling = {"constant": jnp.ones_like(done), "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}
    return rising * falling[schedule]


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

    Raises
    ------
    InputError
        If the plan cannot be meant, its adapters do not fit the model, or the devices its batches.
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
        plan.check()
        if plan.lora is not None:
            model = add_lora(model, key=jax.random.key(0), **dataclasses.asdict(plan.lora))
        self.plan, self.buckets, self.pad_id = plan, tuple(buckets), pad_id
        self.parameters, self.trainable = parameter_counts(model)
        at_once = sorted({min(size, plan.micro_batch or size) for size in batch_sizes or (plan.batch_size,)})
        self.placement = place(
            plan.sharding,
            at_once,
            trainable=self.trainable,
            frozen=self.parameters - self.trainable,
            devices=devices,
        )
        self.dtype = _dtype(plan.precision)
        graph, *states = nnx.split(model, nnx.Param, ...)
        self.initial, self.frozen = map(self.placement.put_weights, (states[0], self._cast(states[1])))
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(plan.clip), optax.scale_by_adam(), optax.add_decayed_weights(plan.weight_decay)
        )
        self._graph = graph
        self._loss_sums = self._make_loss_sums(graph)
        counting = model
        if isinstance(model, LanguageModel):
            counting = nnx.clone(model)
            counting.head_chunk = UNCHUNKED
        self._unchunked_sums = self._make_loss_sums(nnx.graphdef(counting))
        self._costs: dict[tuple[str, tuple[int, ...]], float] = {}
        self._compile()

    def _make_loss_sums(self, graph: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
        # The frozen weights are an argument: closed over, they would be constants, copied into each program.
        def loss_sums(params: Params, frozen: Params, batch: Batch, key: Any = None) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, self._cast(params), frozen)
            if key is None or not self.plan.dropout:
                return with_dropout(model, key).loss_sums(batch)
            return model.loss_sums(batch, dropout_key=key)

        return loss_sums

    def _cast(self, tree: Params) -> Params:
        """Return the weights as they are computed with."""
        if self.dtype == jnp.float32:
            return tree
        return jax.tree.map(lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def _gradient(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, *, whole: bool = False
    ) -> tuple[jax.Array, Params]:
        """Return the mean loss of a batch and its gradient, computed in micro-batches unless `whole`."""
        rows = batch["labels"].shape[0]
        micro = rows if whole or self.plan.micro_batch is None else min(self.plan.micro_batch, rows)
        loss_sums = self._unchunked_sums if whole else self._loss_sums

        def total(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            sums, counts = loss_sums(params, frozen, batch, key)
            return sums.sum(), counts.sum()

        gradient_of = jax.value_and_grad(total, has_aux=True)
        if micro == rows:
            (loss, count), gradient = gradient_of(params, batch, key)
        else:
            # Neighbouring rows go to different micro-batches, so that each device has its share of every one.
            pieces = {n: jnp.moveaxis(x.reshape(micro, rows // micro, -1), 1, 0) for n, x in batch.items()}

            def add(carry: Any, piece: Any) -> tuple[Any, None]:
                (loss, count), gradient = gradient_of(params, piece[0], jax.random.fold_in(key, piece[1]))
                return jax.tree.map(jnp.add, carry, ((loss, count), gradient)), None

            zero = ((jnp.zeros(()), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, params))
            ((loss, count), gradient), _ = jax.lax.scan(add, zero, (pieces, jnp.arange(rows // micro)))
        count = jnp.maximum(count, 1)
        return loss / count, jax.tree.map(lambda g: g / count, gradient)

    def _update(
        self,
        lane: dict[str, Any],
        rate: jax.Array,
        frozen: Params,
        batch: Batch,
        dropout_key: jax.Array,
        step: jax.Array | int,
        total: jax.Array | int,
        *,
        whole: bool = False,
    ) -> dict[str, Any]:
        """Take one step: `lane` holds weights, optimiser state, sum of training losses, and whether all were finite."""
        params = lane["params"]
        key = jax.random.fold_in(dropout_key, step)
        loss, gradient = self._gradient(params, frozen, batch, key, whole=whole)
        update, state = self.optimiser.update(gradient, lane["state"], params)
        plan = self.plan
        scale = -rate * rate_factor(plan.schedule, plan.warmup, jnp.asarray(step), jnp.asarray(total))
        params = optax.apply_updates(params, jax.tree.map(lambda u: scale * u, update))
        return {
            "params": params,
            "state": state,
            "loss": lane["loss"] + loss,
            "finite": lane["finite"] & jnp.isfinite(loss),
        }

    def _compile(self) -> None:
        def start(params: Params) -> dict[str, Any]:
            # Weights and optimiser state are replaced by the step, so these are copies, never aliases.
            copy = jax.tree.map(jnp.copy, params)
            return {
                "params": copy,
                "state": self.optimiser.init(copy),
                "loss": jnp.zeros(()),
                "finite": jnp.array(True),
            }

        def evaluate(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            sums, counts = self._loss_sums(params, frozen, batch)
            return sums.sum(), counts.sum()

        def keep(best: Params, params: Params, better: jax.Array) -> Params:
            return jax.tree.map(lambda b, p: jnp.where(better.reshape(-1, *[1] * (p.ndim - 1)), p, b), best, params)

        shardings: dict[str, Any] = {}
        if self.placement.mesh is not None:
            # Left to itself, the compiler need not keep what is as large as the weights sharded as they are.
            split, whole = self.placement.weights, self.placement.whole
            lane = jax.eval_shape(start, self.initial)
            shardings = {
                "out_shardings": {
                    "params": split(lane["params"]),
                    "state": optax.tree.map_params(
                        self.optimiser, split, lane["state"], transform_non_params=lambda x: whole(x)
                    ),
                    "loss": whole(lane["loss"]),
                    "finite": whole(lane["finite"]),
                }
            }
        self._start = jax.jit(start, **shardings)
        self._step = jax.jit(self._update, donate_argnums=0, **shardings)
        self._evaluate = jax.jit(evaluate)
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        # Several rates at once: the frozen weights and the batch are shared.
        self._start_lanes = jax.jit(
            lambda params, lanes: jax.vmap(lambda _: start(params))(jnp.arange(lanes)), static_argnums=1
        )
        shared = (None,) * 5
        self._step_lanes = jax.jit(jax.vmap(self._update, in_axes=(0, 0, *shared)), donate_argnums=0)
        self._evaluate_lanes = jax.jit(jax.vmap(evaluate, in_axes=(0, None, None)))
        self._keep_lanes = jax.jit(keep, donate_argnums=0)
        self._take_lanes = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree))

    def parallel_trials(self, wanted: int) -> int:
        """Return how many learning rates to train at once; see `Search.lanes`."""
        if self.placement.mesh is not None or jax.default_backend() == "cpu":
            return 1
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0) / 2
        shared, each = 4 * self.parameters, 20 * self.trainable  # 20: with the best weights beside the present ones
        return int(max(1, min(wanted, (memory - shared) // each)))

    def cost_of_step(self, batch: Batch) -> float:
        """Floating-point operations of a training step on such a batch, by XLA's cost analysis.

        Of the arithmetic alone: what the chunked head and micro-batches compute twice or in loops is counted once.
        """
        key = ("step", batch["labels"].shape)
        if key in self._costs:
            return self._costs[key]
        lane = jax.eval_shape(self._start, self.initial)
        arguments = (lane, jnp.float32(0), self.frozen, batch, jax.random.key(0), jnp.int32(0), jnp.int32(1))
        self._costs[key] = xla_flops(lambda *given: self._update(*given, whole=True), *arguments)
        return self._costs[key]

    def cost_of_evaluation(self, batch: Batch) -> float:
        """Floating-point operations of evaluating such a batch, as `cost_of_step`."""
        key = ("evaluation", batch["labels"].shape)
        if key not in self._costs:
            self._costs[key] = xla_flops(self._unchunked_sums, self.initial, self.frozen, batch)
        return self._costs[key]

    def _batches(self, encoded: Encoded, batch_size: int, rng: np.random.Generator | None = None) -> Iterable[Batch]:
        return batches(encoded, batch_size=batch_size, buckets=self.buckets, pad_id=self.pad_id, rng=rng)

    def _losses(self, params: Params, encoded: Encoded, batch_size: int, lanes: int | None) -> np.ndarray:
        """Return the mean loss of a data set, nats, finite or not: for each lane, or (1,) without lanes."""
        function = self._evaluate if lanes is None else self._evaluate_lanes
        pending = [
            function(params, self.frozen, self.placement.put_batch(batch))
            for batch in self._batches(encoded, batch_size)
        ]
        sums = np.array([np.asarray(s, np.float64) for s, _ in pending])
        counts = np.array([np.asarray(c, np.float64) for _, c in pending])
        return np.atleast_1d(sums.sum(0) / counts.sum(0))

    def loss(self, params: Params, encoded: Encoded) -> float:
        """Mean token cross-entropy of a data set, nats.

        Raises
        ------
        DivergedError
            If it is not finite.
        """
        value = float(self._losses(params, encoded, self.plan.batch_size, None)[0])
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value}")
        return value

    def model(self, params: Params) -> Any:
        """Return the model, with its adapters if it has some, that has these weights; frozen ones as computed with."""
        return nnx.merge(self._graph, params, self.frozen)

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
            Of the order of the batches and of dropout.
        on_progress : callable, optional
            Called with a `Progress` after every few steps.

        Raises
        ------
        DivergedError
            If the training or validation loss is not finite, or both only rose.
        """
        start = time.perf_counter()
        (trial,) = self.trials(train, validation, test, rates=(self.plan.learning_rate,), seed=seed, report=on_progress)
        if trial.status == "diverged":
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
        hopeless: Callable[[float, float, Sequence[float]], bool] | None = None,
        count_flops: bool = False,
        report: Callable[[Progress], None] | None = None,
        on_weights: Callable[[Weights], None] | None = None,
    ) -> tuple[Trial, ...]:
        """Fine-tune from the initial weights at one or several learning rates at once.

        Parameters
        ----------
        train, validation, test : Encoded
        rates : sequence of float
            Each is trained in a lane of its own, with the same batches and dropout as alone.
        seed : int
        batch_size : int, optional
            Instead of the plan's.
        hopeless : callable, optional
            Told (epochs done, best validation loss of a lane, those of the other lanes), says whether to end the lane.
        count_flops : bool
            Whether XLA's cost analysis is asked too, which takes a second or so for each batch shape, once.
        report : callable, optional
            Called with a `Progress` after every few steps.
        on_weights : callable, optional
            Called with `Weights` whenever a lane has better ones, and with its best at its end.

        Returns
        -------
        tuple of Trial
            In the order of `rates`; one that diverged says so in its status.
        """
        lanes = TrainingLoop(self, tuple(rates), batch_size or self.plan.batch_size)
        return lanes.run(train, validation, test, seed, hopeless, count_flops, report, on_weights)


def _dtype(precision: str) -> Any:
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)
