"""TODO"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import DivergedError, FineTuner, Outcome, Plan, Progress, Search, Trial, tune
from lensjax.finetune.search import Point
from lensjax.jobs.pretrained_scores import evidence, spectra
from lensjax.jobs.resources import peak, reset_peak
from lensjax.jobs.tangent_measurements import look
from lensjax.jobs.tokens import Tokens
from lensjax.journal import NLP_METRICS

Trials = tuple[Trial, ...]
Heartbeat = Callable[[], None]


def no_heartbeat() -> None:
    """Hear a heartbeat and do nothing."""


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """All that runs of a candidate need; it can be sent to another process.

    Attributes
    ----------
    name : str
    path : Path
    vocabulary : int
        Tokens the model knows.
    plan : Plan
    search : Search
    tokens : Tokens
    seed : int
    compiled : Path or None
        Where compiled programs are kept for the candidate's next process.
    log : Path or None
        Where a process's own output goes.
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


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave, and on what.

    Attributes
    ----------
    outcome : Outcome
    facts : mapping
        Devices, precision, sharding, peak memory in bytes.
    """

    outcome: Outcome
    facts: Mapping[str, Any]


class RunFailedError(RuntimeError):
    """A run that gave no loss.

    Attributes
    ----------
    trials : tuple of Trial
        That were made before.
    """

    def __init__(self, message: str, trials: Trials = (), details: str = "") -> None:
        super().__init__(message)
        self.trials, self._details = trials, details

    @property
    def details(self) -> str:
        """The traceback of what went wrong, also in another process; empty if there is none."""
        cause = self.__cause__
        return self._details or ("" if cause is None else "".join(traceback.format_exception(cause)).rstrip())


class OutOfTimeError(RunFailedError):
    """A run that was stopped because the budget of time was spent."""


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """What the caller wants to hear of during a run."""

    progress: Callable[[Progress], None]
    trials: Callable[[Trials], None]
    heartbeat: Heartbeat = no_heartbeat


class CandidateRunner:
    """One candidate in this process, loaded and compiled when its first run is really needed."""

    def __init__(self, assignment: RunnerConfig) -> None:
        self.assignment = assignment
        self._tuner: FineTuner | None = None
        self._untuned: models.LanguageModel | None = None

    @property
    def pad_id(self) -> int:
        """Token for padding."""
        # Padding is masked, but an id outside of the vocabulary would still give NaN.
        own = self.assignment
        return own.tokens.pad_id if own.tokens.pad_id < own.vocabulary else 0

    @property
    def tuner(self) -> FineTuner:
        """The compiled fine-tuner."""
        if self._tuner is None:
            own, self._untuned = self.assignment, None
            model = models.load_model(own.path)
            sizes = [size for size, _ in own.search.grid(own.plan)]
            plan = dataclasses.replace(own.plan, batch_size=max(sizes))
            self._tuner = FineTuner(model, plan, own.tokens.buckets, self.pad_id, batch_sizes=sizes)
        return self._tuner

    def run(self, size: int, known: Mapping[Point, Trial], hooks: Callbacks, deadline: float | None = None) -> Result:
        """Fine-tune on `size` samples, or evaluate if that is 0.

        Parameters
        ----------
        size : int
        known : mapping
            Trials of this run that were made before.
        hooks : Callbacks
        deadline : float, optional
            Of `time.monotonic`: past it, the run is given up at its next look.

        Raises
        ------
        RunFailedError
            If it gave no loss.
        """
        reset = reset_peak()
        tokens, own = self.assignment.tokens, self.assignment
        made: list[Trial] = []

        def progress(at: Progress) -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTimeError("the time is spent", tuple(made))
            hooks.progress(at)

        def trials(found: Trials) -> None:
            made.extend(found)
            hooks.trials(found)

        try:
            if size == 0:
                outcome = self.tuner.zero_shot(tokens.test)
            else:
                outcome = tune(
                    self.tuner,
                    tokens.train.first(size),
                    tokens.validation,
                    tokens.test,
                    search=own.search,
                    seed=own.seed,
                    known=known,
                    on_trials=trials,
                    on_progress=progress,
                    count_flops=True,
                )
        except RunFailedError:
            raise
        except Exception as error:
            before = error.trials if isinstance(error, DivergedError) else tuple(made)
            raise RunFailedError(reason(error), before) from error
        return Result(outcome, {**self._facts(), **peak(reset)})

    def look(
        self, samples: int, deadline: float | None = None, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Measure the candidate's kernel and curvature on the first training samples; see `look.look`.

        A deadline keeps it from starting; what has started is not ended.

        Raises
        ------
        RunFailedError
            If it could not be.
        """
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTimeError("the time is spent")
        reset = reset_peak()
        own = self.assignment
        try:
            model = models.load_model(own.path)
            if own.plan.lora is not None:
                model = models.add_lora(model, key=jax.random.key(0), **dataclasses.asdict(own.plan.lora))
            found = look(model, own.tokens.train.first(samples), self.pad_id, self.tuner.parameters)
        except Exception as error:
            raise RunFailedError(reason(error)) from error
        return {**found, **peak(reset)}

    def gauge(
        self, what: str, samples: int, deadline: float | None = None, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Measure what a score needs that knows nothing of fine-tuning, of the weights without adapters.

        A deadline keeps it from starting; what has started is not ended.

        Parameters
        ----------
        what : str
            One of `lensjax.journal.PRETRAINED_SCORES`.
        samples : int
            Training samples to measure on, if any.
        deadline, heartbeat
            As in `look`.

        Returns
        -------
        dict
            Of `untuned.spectra` or `untuned.evidence`; or ``problem``: why weights or samples do not allow it, which
            another try would not change.

        Raises
        ------
        RunFailedError
            If it could not be done.
        """
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTimeError("the time is spent")
        reset = reset_peak()
        own = self.assignment
        try:
            if self._untuned is None:
                # What fine-tuning holds would take memory from it.
                self._tuner = None
                self._untuned = models.load_model(own.path)
        except Exception as error:
            raise RunFailedError(reason(error)) from error
        try:
            if what == NLP_METRICS:
                found = spectra(self._untuned)
            else:
                found = evidence(self._untuned, own.tokens.train.first(samples), own.tokens.buckets, self.pad_id)
        except InputError as error:
            found = {"problem": str(error)}
        except Exception as error:
            raise RunFailedError(reason(error)) from error
        return {**found, **peak(reset)}

    def close(self) -> None:
        """Free what the candidate held."""
        self._tuner = self._untuned = None

    def _facts(self) -> dict[str, Any]:
        placement = self.tuner.placement
        return {
            "device": jax.devices()[0].device_kind,
            "devices": placement.devices,
            "sharding": placement.name,
            "precision": self.tuner.dtype.name,
        }


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
