"""Search over learning rates and batch sizes: each trial is counted, hopeless ones end early."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lensjax.finetune.config import Search
from lensjax.finetune.results import DivergedError, Outcome, Progress, Trial, Weights
from lensjax.finetune.tuner import FineTuner
from lensjax.tasks import Encoded

Point = tuple[float, int]  # learning rate, batch size


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
        Trials of this very run that were made before; they are not made again.
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
    made: list[Trial] = []
    grid = search.grid(tuner.plan)
    trials_in_all = search.trials(tuner.plan) - 1

    def attempt(rates: Sequence[float], batch_size: int, others: Sequence[Trial], so_far: int) -> None:
        def hopeless(epochs: float, best: float, beside: Sequence[float]) -> bool:
            rivals = [*beside, *(t.best_after(epochs) for t in others if t.status != "diverged")]
            evaluations = epochs / max(1, -(-tuner.plan.min_steps_between // per_epoch))
            return evaluations >= search.prune_after and len(rivals) > 0 and best > statistics.median(rivals)

        def report(progress: Progress) -> None:
            if on_progress is not None:
                done = (so_far + progress.done * len(rates)) / max(trials_in_all, so_far + len(rates))
                on_progress(replace(progress, done=done))

        per_epoch = sum(1 for _ in tuner._batches(train, batch_size))
        found = tuner.trials(
            train,
            validation,
            test,
            rates=rates,
            seed=seed,
            batch_size=batch_size,
            hopeless=hopeless,
            count_flops=count_flops,
            report=report,
            on_weights=on_weights,
        )
        if on_trials is not None:
            on_trials(found)
        made.extend(found)

    for batch_size, rates in grid:
        lanes = search.lanes or tuner.parallel_trials(len(rates))
        for group in (rates[i : i + lanes] for i in range(0, len(rates), lanes)):
            before = [known[rate, batch_size] for rate in group if (rate, batch_size) in known]
            if len(before) == len(group):
                made.extend(before)
            else:
                # The lanes of a group stand and fall together: what they are worth is judged against each other.
                attempt(group, batch_size, tuple(made), len(made))
    if not any(t.status == "finished" for t in made):
        batch_size, rates = grid[-1]
        point = (min(rates) * search.retry, batch_size)
        if point in known:
            made.append(known[point])
        else:
            attempt(point[:1], batch_size, tuple(made), len(made))
    finished = [t for t in made if t.status == "finished"]
    if not finished:
        raise DivergedError("; ".join(t.reason for t in made), tuple(made))

    def validation_loss(trial: Trial) -> float:
        assert trial.validation_loss is not None
        return trial.validation_loss

    return tuner.outcome(tuple(made), min(finished, key=validation_loss), time.perf_counter() - start)
