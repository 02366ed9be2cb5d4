"""How to fine-tune: the plan of a run, and the hyper-parameters to search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lensjax.errors import InputError
from lensjax.finetune.choices import PRECISIONS, SCHEDULES, SHARDINGS
from lensjax.models import Lora

FIRST_NAMES = {"parallel_trials": "lanes", "prune_after": "hopeless_after"}
"""Fields of `Search` that had another name when the first journals were written."""


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
        Steps of warm-up, which begins at 1 / `warmup` of the peak rate, not at 0: see `step.rate_factor`.
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

    def computed_at_once(self, batch_sizes: Sequence[int]) -> list[int]:
        """Return how many samples are computed at once with batches of these sizes, each number once, ascending."""
        return sorted({min(size, self.micro_batch or size) for size in batch_sizes})

    def check(self) -> None:
        """Refuse settings that make no sense.

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
    parallel_trials : int, optional
        Learning rates trained at once, by `jax.vmap`. None: on GPUs and TPUs as many as fit into half of the memory;
        on CPUs one, because there several at once took 1.1 to 1.3 times as long for each as one after the other.
    prune_after : int
        Evaluations after which a trial is pruned if its best validation loss so far is above the median of the best
        that the other trials, if they did not diverge, had after as many epochs (after the median stopping rule of
        Golovin et al. 2017, Google Vizier, which compares with running averages).
    retry : float
        If no trial gives a finite, falling loss, one more is made at the lowest rate times this.
    """

    learning_rates: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    parallel_trials: int | None = None
    prune_after: int = 2
    retry: float = 0.25

    def grid(self, plan: Plan) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Return (batch size, learning rates) for each batch size, ascending."""
        rates = tuple(sorted(self.learning_rates)) or (plan.learning_rate,)
        return tuple((size, rates) for size in (tuple(sorted(self.batch_sizes)) or (plan.batch_size,)))

    def trials(self, plan: Plan) -> int:
        """Return how many trials a run makes at most, the retry included."""
        return sum(len(rates) for _, rates in self.grid(plan)) + 1

    def as_record(self) -> dict[str, Any]:
        """Return the settings as they are written to disk: what `dataclasses.asdict` gives, under its first names.

        A journal's runs are found again by a digest of this record: other names would give other digests, and runs
        that were journaled before would be made again.
        """
        record = dataclasses.asdict(self)
        return {FIRST_NAMES.get(name, name): value for name, value in record.items()}

    def check(self, plan: Plan) -> None:
        """Refuse settings that make no sense.

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
        if self.prune_after < 1 or (self.parallel_trials is not None and self.parallel_trials < 1):
            raise InputError(
                f"prune_after {self.prune_after} and parallel_trials {self.parallel_trials} must be at least 1."
            )
        for size, _ in self.grid(plan):
            check_micro_batch(size, plan.micro_batch)
