"""What a fine-tuning run gives back: its trials, its outcome, and what is reported while it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

FINISHED, PRUNED, DIVERGED = "finished", "pruned", "diverged"
"""How a trial ends; only finished ones can be chosen."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training with one learning rate and one batch size.

    Attributes
    ----------
    learning_rate, batch_size : float, int
    status : {"finished", "pruned", "diverged"}
        Only finished trials can be chosen; pruned ones were ended early because others did better.
    test_loss, validation_loss : float or None
        Mean token cross-entropy at the weights with the best validation loss, nats; None if not finished.
    steps, steps_run : int
        To the kept weights (t of eq. 9), and in all.
    steps_per_epoch : int
    samples, tokens : int
        Trained on in all, epochs counted; tokens of prompt and target without padding.
    flops : float
        See `Outcome`.
    step_flops, evaluation_flops : float or None
        Of the training steps and the evaluations, by XLA's cost analysis, padding included; None if not asked for.
    validation_history : tuple of (step, loss)
    reason : str
        Why it ended.
    """

    learning_rate: float
    batch_size: int
    status: str
    test_loss: float | None
    validation_loss: float | None
    steps: int
    steps_run: int
    steps_per_epoch: int
    samples: int
    tokens: int
    flops: float
    step_flops: float | None
    evaluation_flops: float | None
    validation_history: tuple[tuple[int, float], ...]
    reason: str

    def best_after(self, epochs: float) -> float:
        """Return the best validation loss up to that many epochs, nats."""
        return min(loss for step, loss in self.validation_history if step <= epochs * self.steps_per_epoch)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fine-tuning run gave: the chosen trial's losses and what all trials together cost.

    Attributes
    ----------
    test_loss, validation_loss : float
        Mean token cross-entropy at the kept weights, nats.
    steps : int
        Optimiser steps to the kept weights, the early-stopping time t of eq. 9.
    steps_run : int
        Optimiser steps taken in all by the chosen trial.
    samples, tokens : int
        Trained on by all trials, epochs counted; tokens of prompt and target without padding.
    flops : float
        6 per trained weight and token; 4 per frozen weight, for no gradient of it is formed (2 forward, 2 to pass the
        gradient of its outputs on to its inputs). All trials.
    seconds : float
        Wall time.
    validation_history : tuple of (step, loss)
    reason : str
        Why the chosen trial ended.
    trainable : int
        Weights that training changes: all, or those of the adapters.
    learning_rate, batch_size : float, int
        Of the chosen trial.
    trials : tuple of Trial
        All that were made.
    chosen_tokens : int
        Tokens the chosen trial trained on.
    """

    test_loss: float
    validation_loss: float
    steps: int
    steps_run: int
    samples: int
    tokens: int
    flops: float
    seconds: float
    validation_history: tuple[tuple[int, float], ...]
    reason: str
    trainable: int
    learning_rate: float
    batch_size: int
    trials: tuple[Trial, ...] = ()
    chosen_tokens: int = 0

    @property
    def step_flops(self) -> float | None:
        """Of all training steps by XLA's cost analysis, padding included; None if it was not asked for."""
        return _total([t.step_flops for t in self.trials])

    @property
    def evaluation_flops(self) -> float | None:
        """Of all evaluations by XLA's cost analysis, padding included; None if it was not asked for."""
        return _total([t.evaluation_flops for t in self.trials])


def _total(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


class DivergedError(RuntimeError):
    """Training gave no finite or no falling loss, at any rate tried.

    Attributes
    ----------
    trials : tuple of Trial
        What was tried, for its cost.
    """

    def __init__(self, message: str, trials: tuple[Trial, ...] = ()) -> None:
        super().__init__(message)
        self.trials = trials


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: passed to the caller after each evaluation and every few steps.

    Attributes
    ----------
    step, total_steps : int
        Of the present trial, and at most.
    epoch : int
    validation_loss : float
        The best so far, nats.
    done : float
        Share of the whole run, all trials, that is done at least.
    tokens : int
        Trained on so far by the present trial and those beside it.
    """

    step: int
    total_steps: int
    epoch: int
    validation_loss: float
    done: float = 0.0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Weights:
    """The best weights of a trial so far: passed to the caller whenever there are better ones, and at its end.

    Attributes
    ----------
    learning_rate, batch_size : float, int
        Of the trial.
    step : int
        After which the trial had them; 0: the untouched ones.
    validation_loss : float
        Nats.
    params : pytree of arrays
        As in `FineTuner.initial`, see `FineTuner.model`; to be used before the call returns.
    finished : bool
        Whether the trial has finished, and these are its weights; one that diverges never does.
    """

    learning_rate: float
    batch_size: int
    step: int
    validation_loss: float
    params: Any
    finished: bool
