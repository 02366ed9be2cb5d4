"""Jobs of one candidate, what they give, and the interface of whatever runs them.

A job is described by plain data that can be sent to another process or machine. Today a candidate's jobs run in this
process (`lensjax.jobs.runner`) or in one of its own (`lensjax.jobs.process`).
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lensjax.finetune import Outcome, Plan, Progress, Search, Trial
from lensjax.finetune.search import Point
from lensjax.jobs.tokens import Tokens

Trials = tuple[Trial, ...]


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """Everything that the jobs of one candidate need; it can be pickled.

    Attributes
    ----------
    name : str
    path : Path
        Checkpoint directory or GGUF file.
    vocabulary : int
        Number of tokens the model knows.
    plan : Plan
    search : Search
    tokens : Tokens
    seed : int
    compiled : Path or None
        Directory for compiled programs, so that the candidate's next process need not compile them again.
    log : Path or None
        File for the process's own output.
    """

    name: str
    path: Path
    vocabulary: int
    plan: Plan
    search: Search
    tokens: Tokens
    seed: int
    compiled: Path | None = None
    log: Path | None = None

    @property
    def pad_id(self) -> int:
        """Token used for padding."""
        # Padding is masked, but an id outside of the vocabulary would still give NaN.
        return self.tokens.pad_id if self.tokens.pad_id < self.vocabulary else 0


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Fine-tune on the first `size` training samples; with size 0 only evaluate the model.

    Attributes
    ----------
    size : int
    known : mapping of (learning rate, batch size) to Trial
        Trials of this run that were made before; they are not repeated.
    """

    size: int
    known: Mapping[Point, Trial] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TangentMeasurement:
    """Measure the neural tangent kernel and the Hessian trace on the first training samples.

    Attributes
    ----------
    samples : int
    """

    samples: int


@dataclasses.dataclass(frozen=True)
class PretrainedScore:
    """Measure a score that needs no fine-tuning, of the weights without adapters.

    Attributes
    ----------
    name : str
        One of `lensjax.selectors.methods.PRETRAINED_SCORES`.
    samples : int
        Training samples to measure it on; 0 where the weights alone decide.
    """

    name: str
    samples: int


Measurement = TangentMeasurement | PretrainedScore


@dataclasses.dataclass(frozen=True)
class Result:
    """What a fine-tuning run gave.

    Attributes
    ----------
    outcome : Outcome
    facts : mapping
        Devices, precision, sharding, peak memory in bytes.
    """

    outcome: Outcome
    facts: Mapping[str, Any]


class RunFailedError(RuntimeError):
    """A job that gave no result.

    Attributes
    ----------
    trials : tuple of Trial
        Trials that had ended before.
    """

    def __init__(self, message: str, trials: Trials = (), details: str = "") -> None:
        super().__init__(message)
        self.trials, self._details = trials, details

    @property
    def details(self) -> str:
        """The traceback of the error, also of one in another process; empty if there is none."""
        cause = self.__cause__
        return self._details or ("" if cause is None else "".join(traceback.format_exception(cause)).rstrip())


class OutOfTimeError(RunFailedError):
    """A job that was stopped because the time budget was spent."""


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _ignore(*_: Any) -> None:
    """Do nothing."""


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """Functions that are called during a job.

    Attributes
    ----------
    progress : callable (Progress) -> None
        After every few training steps.
    trials : callable (tuple of Trial) -> None
        With the trials that have just ended.
    heartbeat : callable () -> None
        Every few seconds while waiting for another process.
    """

    progress: Callable[[Progress], None] = _ignore
    trials: Callable[[Trials], None] = _ignore
    heartbeat: Callable[[], None] = _ignore


class Runner(Protocol):
    """Runs the jobs of one candidate, one after the other."""

    config: RunnerConfig

    def run(self, job: FineTuning, callbacks: Callbacks, deadline: float | None = None) -> Result:
        """Fine-tune or evaluate.

        Parameters
        ----------
        job : FineTuning
        callbacks : Callbacks
        deadline : float, optional
            On `time.monotonic`'s clock; a run that is still going then is given up.

        Raises
        ------
        RunFailedError
            If it gave no loss.
        """
        ...

    def measure(self, job: Measurement, callbacks: Callbacks, deadline: float | None = None) -> dict[str, Any]:
        """Measure something that takes no training; parameters as in `run`.

        Returns
        -------
        dict
            See `lensjax.jobs.tangent_measurements.measure` and `lensjax.jobs.pretrained_scores`; or ``problem``: why
            the weights or samples do not allow a score, which another try would not change.

        Raises
        ------
        RunFailedError
            If it failed.
        """
        ...

    def close(self) -> None:
        """Free what the candidate holds."""
        ...
