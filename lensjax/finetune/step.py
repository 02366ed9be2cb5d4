"""The compiled functions of one model: a training step, an evaluation, and both for several learning rates at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lensjax.finetune.config import Plan
from lensjax.finetune.cost import xla_flops
from lensjax.finetune.sharding import place
from lensjax.models import LanguageModel
from lensjax.models.lora import add_lora, parameter_counts, with_dropout
from lensjax.tasks import Batch, Encoded, batches

Params = Any
"""A pytree of weights."""

State = dict[str, Any]
"""Where a training is: `params`, `state` of the optimiser, `loss` (the sum over its steps, nats), and `finite`, whether
all of these losses were."""

LossSums = Callable[..., tuple[jax.Array, jax.Array]]
"""(params, frozen, batch, dropout key or None) -> sum of the losses (N,), nats, and number of tokens (N,)."""

Gradient = Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, Params]]
"""(params, frozen, batch, dropout key) -> mean loss of the batch, nats, and its gradient."""

UNCHUNKED = 2**62  # rows of logits at once, for counting operations


def compute_dtype(precision: str) -> Any:
    """Return the dtype that a `Plan.precision` means on this backend."""
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def cast(tree: Params, dtype: Any) -> Params:
    """Return a tree of weights in the dtype they are computed with; float32 leaves all as they are."""
    if dtype == jnp.float32:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


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


def loss_function(graph: Any, dtype: Any, *, dropout: bool) -> LossSums:
    """Return the function that sums the losses of each sample of a batch.

    Parameters
    ----------
    graph : nnx.GraphDef
        Of a model split into its `nnx.Param`s and the rest.
    dtype : dtype
        Of the computation; the weights are cast to it.
    dropout : bool
        Whether the model's own dropout is on where there is a key; that of adapters always is.
    """

    # The frozen weights are an argument: closed over, they would be constants, copied into each program.
    def loss_sums(params: Params, frozen: Params, batch: Batch, key: Any = None) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, cast(params, dtype), frozen)
        if key is None or not dropout:
            return with_dropout(model, key).loss_sums(batch)
        return model.loss_sums(batch, dropout_key=key)

    return loss_sums


def gradient_function(loss_sums: LossSums, micro_batch: int | None) -> Gradient:
    """Return the function that computes the mean loss of a batch and its gradient, in micro-batches if there are any.

    Parameters
    ----------
    loss_sums : callable
        From `loss_function`.
    micro_batch : int or None
        Samples whose activations exist at once; None: the whole batch.
    """

    def gradient(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Params]:
        rows = batch["labels"].shape[0]
        micro = rows if micro_batch is None else min(micro_batch, rows)

        def total(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            sums, counts = loss_sums(params, frozen, batch, key)
            return sums.sum(), counts.sum()

        gradient_of = jax.value_and_grad(total, has_aux=True)
        if micro == rows:
            (loss, count), found = gradient_of(params, batch, key)
        else:
            # Neighbouring rows go to different micro-batches, so that each device has its share of every one.
            pieces = {n: jnp.moveaxis(x.reshape(micro, rows // micro, -1), 1, 0) for n, x in batch.items()}

            def add(carry: Any, piece: Any) -> tuple[Any, None]:
                (loss, count), found = gradient_of(params, piece[0], jax.random.fold_in(key, piece[1]))
                return jax.tree.map(jnp.add, carry, ((loss, count), found)), None

            zero = ((jnp.zeros(()), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, params))
            ((loss, count), found), _ = jax.lax.scan(add, zero, (pieces, jnp.arange(rows // micro)))
        count = jnp.maximum(count, 1)
        return loss / count, jax.tree.map(lambda g: g / count, found)

    return gradient


def update_function(gradient: Gradient, optimiser: optax.GradientTransformation, plan: Plan) -> Callable[..., State]:
    """Return the function that takes one training step.

    Parameters
    ----------
    gradient : callable
        From `gradient_function`.
    optimiser : optax.GradientTransformation
        Without the learning rate.
    plan : Plan
        Its `schedule` and `warmup` count.

    Returns
    -------
    callable
        (state, peak learning rate, frozen, batch, dropout key, number of the step, steps at most) -> state; see
        `State`.
    """

    def update(
        state: State,
        rate: jax.Array,
        frozen: Params,
        batch: Batch,
        dropout_key: jax.Array,
        step: jax.Array | int,
        total: jax.Array | int,
    ) -> State:
        params = state["params"]
        loss, found = gradient(params, frozen, batch, jax.random.fold_in(dropout_key, step))
        change, moments = optimiser.update(found, state["state"], params)
        scale = -rate * rate_factor(plan.schedule, plan.warmup, jnp.asarray(step), jnp.asarray(total))
        return {
            "params": optax.apply_updates(params, jax.tree.map(lambda u: scale * u, change)),
            "state": moments,
            "loss": state["loss"] + loss,
            "finite": state["finite"] & jnp.isfinite(loss),
        }

    return update


class CompiledSteps:
    """The compiled functions of one model, each compiled once per batch shape, with what they share.

    Nothing refers back to the object, so that weights and compiled programs are freed with the last reference to it.

    Parameters
    ----------
    model, plan, buckets, pad_id, batch_sizes, devices
        As in `FineTuner`.

    Attributes
    ----------
    parameters, trainable : int
        Weights, adapters among them, and those that training changes.
    placement : Placement
        Where weights and samples live.
    dtype : dtype
        Of the computation; trained weights are kept in float32.
    graph : nnx.GraphDef
        Of the model.
    initial, frozen : pytrees of arrays
        The weights to train, as they were, and all others, as they are computed with.
    optimiser : optax.GradientTransformation
        AdamW without the learning rate.
    start : callable, params -> State
        Copies the weights.
    step : callable
        See `update_function`; the state that is passed in is given up.
    evaluate : callable, (params, frozen, batch) -> sum of the losses, nats, and number of tokens
    copy : callable, tree -> tree
    start_trials : callable, (params, number) -> State
        As `start`, with a leading axis over trials in each array.
    step_trials : callable
        As `step`, for one learning rate each; frozen weights and batch are shared.
    evaluate_trials : callable
        As `evaluate`, for one set of weights each.
    keep_better : callable, (best, params, better (L,)) -> tree
        The weights `params` of the trials that are `better`, `best` of the others; `best` is given up.
    select_trials : callable, (tree, rows) -> tree
        The arrays of some trials.

    Raises
    ------
    InputError
        As `FineTuner`.
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
        self.buckets, self.pad_id = tuple(buckets), pad_id
        self.parameters, self.trainable = parameter_counts(model)
        self.placement = place(
            plan.sharding,
            plan.computed_at_once(batch_sizes or (plan.batch_size,)),
            trainable=self.trainable,
            frozen=self.parameters - self.trainable,
            devices=devices,
        )
        self.dtype = compute_dtype(plan.precision)
        self.graph, *states = nnx.split(model, nnx.Param, ...)
        self.initial, self.frozen = map(self.placement.put_weights, (states[0], cast(states[1], self.dtype)))
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(plan.clip), optax.scale_by_adam(), optax.add_decayed_weights(plan.weight_decay)
        )
        self._compile(plan)
        counting = model
        if isinstance(model, LanguageModel):
            counting = nnx.clone(model)
            counting.head_chunk = UNCHUNKED
        # A loop's body is counted once: what is counted has neither micro-batches nor a chunked head.
        self._counted_evaluation = loss_function(nnx.graphdef(counting), self.dtype, dropout=plan.dropout)
        self._counted_step = update_function(gradient_function(self._counted_evaluation, None), self.optimiser, plan)
        self._costs: dict[tuple[str, tuple[int, ...]], float] = {}

    def _compile(self, plan: Plan) -> None:
        optimiser = self.optimiser
        loss_sums = loss_function(self.graph, self.dtype, dropout=plan.dropout)
        update = update_function(gradient_function(loss_sums, plan.micro_batch), optimiser, plan)

        def start(params: Params) -> State:
            # Weights and optimiser state are replaced by the step, so these are copies, never aliases.
            copy = jax.tree.map(jnp.copy, params)
            return {
                "params": copy,
                "state": optimiser.init(copy),
                "loss": jnp.zeros(()),
                "finite": jnp.array(True),
            }

        def evaluate(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            sums, counts = loss_sums(params, frozen, batch)
            return sums.sum(), counts.sum()

        def keep(best: Params, params: Params, better: jax.Array) -> Params:
            return jax.tree.map(lambda b, p: jnp.where(better.reshape(-1, *[1] * (p.ndim - 1)), p, b), best, params)

        shardings: dict[str, Any] = {}
        if self.placement.mesh is not None:
            # Left to itself, the compiler need not keep what is as large as the weights sharded as they are.
            split, whole = self.placement.weights, self.placement.whole
            state = jax.eval_shape(start, self.initial)
            shardings = {
                "out_shardings": {
                    "params": split(state["params"]),
                    "state": optax.tree.map_params(
                        optimiser, split, state["state"], transform_non_params=lambda x: whole(x)
                    ),
                    "loss": whole(state["loss"]),
                    "finite": whole(state["finite"]),
                }
            }
        self.start = jax.jit(start, **shardings)
        self.step = jax.jit(update, donate_argnums=0, **shardings)
        self.evaluate = jax.jit(evaluate)
        self.copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        # Several rates at once: the frozen weights and the batch are shared.
        self.start_trials = jax.jit(
            lambda params, number: jax.vmap(lambda _: start(params))(jnp.arange(number)), static_argnums=1
        )
        shared = (None,) * 5
        self.step_trials = jax.jit(jax.vmap(update, in_axes=(0, 0, *shared)), donate_argnums=0)
        self.evaluate_trials = jax.jit(jax.vmap(evaluate, in_axes=(0, None, None)))
        self.keep_better = jax.jit(keep, donate_argnums=0)
        self.select_trials = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree))

    def cost_of_step(self, batch: Batch) -> float:
        """Floating-point operations of a training step on such a batch, by XLA's cost analysis.

        Of the arithmetic alone: what the chunked head and micro-batches compute twice or in loops is counted once.
        """
        key = ("step", batch["labels"].shape)
        if key not in self._costs:
            state = jax.eval_shape(self.start, self.initial)
            arguments = (state, jnp.float32(0), self.frozen, batch, jax.random.key(0), jnp.int32(0), jnp.int32(1))
            self._costs[key] = xla_flops(self._counted_step, *arguments)
        return self._costs[key]

    def cost_of_evaluation(self, batch: Batch) -> float:
        """Floating-point operations of evaluating such a batch, as `cost_of_step`."""
        key = ("evaluation", batch["labels"].shape)
        if key not in self._costs:
            self._costs[key] = xla_flops(self._counted_evaluation, self.initial, self.frozen, batch)
        return self._costs[key]

    def batches(self, encoded: Encoded, batch_size: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
        """Yield a data set's padded batches, in random order if there is a generator; see `lensjax.tasks.batches`."""
        return batches(encoded, batch_size=batch_size, buckets=self.buckets, pad_id=self.pad_id, rng=rng)

    def losses(self, params: Params, encoded: Encoded, batch_size: int, *, stacked: bool = False) -> np.ndarray:
        """Return the mean token cross-entropy of a data set, nats, finite or not.

        Parameters
        ----------
        params : pytree of arrays
        encoded : Encoded
        batch_size : int
        stacked : bool
            Whether the arrays have a leading axis over L trials.

        Returns
        -------
        float64 array (L,), or (1,)
        """
        function = self.evaluate_trials if stacked else self.evaluate
        pending = [
            function(params, self.frozen, self.placement.put_batch(batch))
            for batch in self.batches(encoded, batch_size)
        ]
        sums = np.array([np.asarray(s, np.float64) for s, _ in pending])
        counts = np.array([np.asarray(c, np.float64) for _, c in pending])
        return np.atleast_1d(sums.sum(0) / counts.sum(0))
