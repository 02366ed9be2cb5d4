"""Search over learning rates and batch sizes: each trial is counted, those that fall behind are pruned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax

from lensjax.finetune.config import Search
from lensjax.finetune.results import DIVERGED, FINISHED, DivergedError, Outcome, Progress, Trial, Weights
from lensjax.finetune.sharding import device_memory
from lensjax.finetune.tuner import FineTuner
from lensjax.tasks import Encoded

Point = tuple[float, int]  # learning rate, batch size


def parallel_trials(
    search: Search,
    rates: int,
    *,
    parameters: int,
    trainable: int,
    memory: float | None,
    platform: str,
    sharded: bool,
) -> int:
    """Decide how many of the learning rates of one batch size are trained at once.

    Parameters
    ----------
    search : Search
        Its `parallel_trials` decides if it is given.
    rates : int
        How many there are to try.
    parameters, trainable : int
        Weights of the model, adapters among them, and those that are trained.
    memory : float or None
        Bytes that programs may take on one device; None: not known.
    platform : {"cpu", "gpu", "tpu"}
    sharded : bool
        Whether several devices share a batch; then one at a time.

    Returns
    -------
    int
        From 1 to `rates`.
    """
    if search.parallel_trials is not None:
        return min(search.parallel_trials, rates)
    if sharded or platform == "cpu" or memory is None:
        return 1
    # In float32: the weights that all share; for each, the present and the best weights, two moments and a gradient.
    shared, each = 4 * parameters, 20 * trainable
    return int(max(1, min(rates, (memory / 2 - shared) // each)))


def tune(
    tuner: FineTuner,
    train: Encoded,
    validation: Encoded,
    test: Encoded,
    *,
    search: Search,
    seed: int,
    known: Mapping[Point, Trial] | None = None,
    on_trials: Callable[[tuple[Trial, ...]], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_weights: Callable[[Weights], None] | None = None,
    count_flops: bool = False,
) -> Outcome:
    """Fine-tune with each learning rate and batch size of a search, and keep the best by validation loss.

    Parameters
    ----------
    tuner : FineTuner
    train, validation, test : Encoded
    search : Search
    seed : int
    known : mapping of (learning rate, batch size) to Trial, optional
        Trials of this same run that were made before; they are not made again.
    on_trials : callable, optional
        Called with the trials that were just made.
    on_progress : callable, optional
        Called with a `Progress` after every few steps.
    on_weights : callable, optional
        Called with `Weights` whenever a trial has better ones than it had, and with its best at its end.
    count_flops : bool
        See `FineTuner.trials`.

    Returns
    -------
    Outcome
        Of the best trial, with the cost of all. Its `seconds` are those of this call.

    Raises
    ------
    DivergedError
        If no trial gave a finite and falling loss, not even the one at a lower rate that is then made.
    """
    start = time.perf_counter()
    known = dict(known or {})
    trials: list[Trial] = []
    grid = search.grid(tuner.plan)
    trials_in_all = search.trials(tuner.plan) - 1

    def attempt(rates: Sequence[float], batch_size: int, others: Sequence[Trial], so_far: int) -> None:
        def should_prune(epochs: float, best: float, beside: Sequence[float]) -> bool:
            rivals = [*beside, *(t.best_after(epochs) for t in others if t.status != DIVERGED)]
            evaluations = epochs / max(1, -(-tuner.plan.min_steps_between // per_epoch))
            return evaluations >= search.prune_after and len(rivals) > 0 and best > statistics.median(rivals)

        def report(progress: Progress) -> None:
            if on_progress is not None:
                done = (so_far + progress.done * len(rates)) / max(trials_in_all, so_far + len(rates))
                on_progress(replace(progress, done=done))

        per_epoch = sum(1 for _ in tuner.compiled.batches(train, batch_size))
        found = tuner.trials(
            train,
            validation,
            test,
            rates=rates,
            seed=seed,
            batch_size=batch_size,
            should_prune=should_prune,
            count_flops=count_flops,
            report=report,
            on_weights=on_weights,
        )
        if on_trials is not None:
            on_trials(found)
        trials.extend(found)

    for batch_size, rates in grid:
        at_once = parallel_trials(
            search,
            len(rates),
            parameters=tuner.parameters,
            trainable=tuner.trainable,
            memory=device_memory(jax.local_devices()[0]),
            platform=jax.default_backend(),
            sharded=tuner.placement.mesh is not None,
        )
        for group in (rates[i : i + at_once] for i in range(0, len(rates), at_once)):
            before = [known[rate, batch_size] for rate in group if (rate, batch_size) in known]
            if len(before) == len(group):
                trials.extend(before)
            else:
                # A group is trained again whole: whether its trials are pruned depends on each other.
                attempt(group, batch_size, tuple(trials), len(trials))
    if not any(t.status == FINISHED for t in trials):
        batch_size, rates = grid[-1]
        point = (min(rates) * search.retry, batch_size)
        if point in known:
            trials.append(known[point])
        else:
            attempt(point[:1], batch_size, tuple(trials), len(trials))
    finished = [t for t in trials if t.status == FINISHED]
    if not finished:
        raise DivergedError("; ".join(t.reason for t in trials), tuple(trials))

    def validation_loss(trial: Trial) -> float:
        assert trial.validation_loss is not None
        return trial.validation_loss

    return tuner.outcome(tuple(trials), min(finished, key=validation_loss), time.perf_counter() - start)
