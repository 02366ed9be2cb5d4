"""What a fine-tuning run is told, and what it gives back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lensjax.errors import InputError
from lensjax.models import Lora

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16")
SHARDINGS = ("auto", "none", "data", "full")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to fine-tune.

    Attributes
    ----------
    learning_rate : float
        Peak rate; it rises linearly over the first `warmup` steps and then follows `schedule`.
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
    schedule : {"constant", "linear", "cosine"}
        After the warm-up: the peak rate throughout, or falling to 0 at the last step of `max_epochs`.
    dropout : bool
        Whether the model's own dropout, as its configuration has it, is on in training. Adapters have theirs in `lora`.
    micro_batch : int, optional
        Samples whose activations exist at once: gradients are added up over the micro-batches of a step. It divides
        `batch_size`, or all that is left of it is one step. None: the whole batch.
    precision : {"auto", "float32", "bfloat16"}
        Of activations and gradients of activations; weights, optimiser, norms and losses stay in float32. "auto":
        bfloat16 on GPUs and TPUs, float32 on CPUs, where it is the faster one.
    sharding : {"auto", "none", "data", "full"}
        Over several devices: the samples of a batch ("data"), the weights and optimiser state besides ("full"), or one
        device only ("none"). "auto": "full" if weights, gradients and optimiser state of a copy would fill more than
        half of a device's memory, else "data", over as many devices as divide the batch.
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
    schedule: str = "constant"
    dropout: bool = False
    micro_batch: int | None = None
    precision: str = "auto"
    sharding: str = "auto"

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises
        ------
        InputError
            If a number is out of its range, a name unknown, or `micro_batch` does not divide `batch_size`.
        """
        _positive("learning rate", self.learning_rate)
        _positive("clip", self.clip)
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise InputError(f"weight_decay is {self.weight_decay:g}; it must be 0 or more, and finite.")
        for name, least in (("batch_size", 1), ("max_epochs", 1), ("patience", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("sharding", SHARDINGS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}.")
        check_micro_batch(self.batch_size, self.micro_batch)


def check_micro_batch(batch_size: int, micro_batch: int | None) -> None:
    """Refuse a micro-batch that batches cannot be cut into.

    Raises
    ------
    InputError
    """
    if micro_batch is None:
        return
    if micro_batch < 1 or (batch_size > micro_batch and batch_size % micro_batch):
        raise InputError(
            f"micro-batch {micro_batch} does not divide the batch size {batch_size}; choose one of its divisors."
        )


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"the {name} is {value:g}; it must be positive and finite.")


@dataclasses.dataclass(frozen=True)
class Search:
    """Hyper-parameters to try for each run; the trial with the lowest validation loss is the run.

    Attributes
    ----------
    learning_rates : tuple of float
        (LensLLM: 3e-5, 1e-4, 3e-4, 1e-3.) Empty: the plan's.
    batch_sizes : tuple of int
        (LensLLM: 64, 128, 256.) Empty: the plan's.
    lanes : int, optional
        Learning rates trained at once, by `jax.vmap`. None: on GPUs and TPUs as many as fit into half of the memory;
        on CPUs one, for there several at once took 1.1 to 1.3 times as long for each as one after the other.
    hopeless_after : int
        Evaluations after which a trial ends if its best validation loss so far is above the median of the best that
        the other trials, if they did not diverge, had after as many epochs (after the median stopping rule of Golovin
        et al. 2017, Google Vizier, which compares with running averages).
    retry : float
        If no trial gives a finite, falling loss, one more is made at the lowest rate times this.
    """

    learning_rates: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    lanes: int | None = None
    hopeless_after: int = 2
    retry: float = 0.25

    def grid(self, plan: Plan) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Return (batch size, learning rates) for each batch size, ascending."""
        rates = tuple(sorted(self.learning_rates)) or (plan.learning_rate,)
        return tuple((size, rates) for size in (tuple(sorted(self.batch_sizes)) or (plan.batch_size,)))

    def trials(self, plan: Plan) -> int:
        """Return how many trials a run makes at most, the retry included."""
        return sum(len(rates) for _, rates in self.grid(plan)) + 1

    def check(self, plan: Plan) -> None:
        """Refuse what cannot be meant.

        Raises
        ------
        InputError
            If a value is not positive or named twice, or a batch size does not suit the plan's micro-batch.
        """
        for name, values in (("learning rate", self.learning_rates), ("batch size", self.batch_sizes)):
            for value in values:
                _positive(name, value)
            if len(set(values)) < len(values):
                raise InputError(f"{name}s {', '.join(f'{v:g}' for v in values)}: one is named twice; name each once.")
        _positive("retry", self.retry)
        if self.hopeless_after < 1 or (self.lanes is not None and self.lanes < 1):
            raise InputError(f"hopeless_after {self.hopeless_after} and lanes {self.lanes} must be at least 1.")
        for size, _ in self.grid(plan):
            check_micro_batch(size, plan.micro_batch)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training with one learning rate and one batch size.

    Attributes
    ----------
    learning_rate, batch_size : float, int
    status : {"finished", "hopeless", "diverged"}
        Only finished trials can be chosen.
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
    """Where a run is: passed to the caller after each evaluation and every few steps.

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
        Trained on so far by the present trial, all its lanes.
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
