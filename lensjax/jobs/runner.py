"""Jobs of one candidate in this process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import DivergedError, FineTuner, Progress, Trial, tune
from lensjax.jobs import pretrained_scores, tangent_measurements
from lensjax.jobs.job import (
    Callbacks,
    FineTuning,
    Measurement,
    OutOfTimeError,
    PretrainedScore,
    Result,
    RunFailedError,
    RunnerConfig,
    Trials,
    first_line,
)
from lensjax.jobs.resources import peak, reset_peak
from lensjax.selectors.methods import NLP_METRICS


class CandidateRunner:
    """Runs one candidate's jobs in this process; the model is loaded and compiled when the first one needs it.

    Only one copy of the weights is held at a time: that of the fine-tuner, or that of the model as it was pre-trained.

    Parameters
    ----------
    config : RunnerConfig
    """

    def __init__(self, config: RunnerConfig) -> None:
        self.config = config
        self._tuner: FineTuner | None = None
        self._pretrained: models.LanguageModel | None = None

    @property
    def tuner(self) -> FineTuner:
        """The compiled fine-tuner."""
        if self._tuner is None:
            self._pretrained = None
            config = self.config
            sizes = [size for size, _ in config.search.grid(config.plan)]
            plan = dataclasses.replace(config.plan, batch_size=max(sizes))
            model = models.load_model(config.path)
            self._tuner = FineTuner(model, plan, config.tokens.buckets, config.pad_id, batch_sizes=sizes)
        return self._tuner

    @property
    def pretrained(self) -> models.LanguageModel:
        """The model before fine-tuning and without adapters."""
        if self._pretrained is None:
            self._tuner = None
            self._pretrained = models.load_model(self.config.path)
        return self._pretrained

    def run(self, job: FineTuning, callbacks: Callbacks, deadline: float | None = None) -> Result:
        """Fine-tune or evaluate; see `lensjax.jobs.job.Runner`. The deadline is checked at each progress report.

        Raises
        ------
        RunFailedError
            If it gave no loss.
        """
        reset = reset_peak()
        config, tokens = self.config, self.config.tokens
        ended: list[Trial] = []

        def progress(at: Progress) -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTimeError("the time is spent", tuple(ended))
            callbacks.progress(at)

        def trials(found: Trials) -> None:
            ended.extend(found)
            callbacks.trials(found)

        try:
            if job.size == 0:
                outcome = self.tuner.zero_shot(tokens.test)
            else:
                outcome = tune(
                    self.tuner,
                    tokens.train.first(job.size),
                    tokens.validation,
                    tokens.test,
                    search=config.search,
                    seed=config.seed,
                    known=job.known,
                    on_trials=trials,
                    on_progress=progress,
                    count_flops=True,
                )
        except RunFailedError:
            raise
        except Exception as error:
            before = error.trials if isinstance(error, DivergedError) else tuple(ended)
            raise RunFailedError(first_line(error), before) from error
        return Result(outcome, {**self._facts(), **peak(reset)})

    def measure(self, job: Measurement, callbacks: Callbacks, deadline: float | None = None) -> dict[str, Any]:
        """Measure something that takes no training; see `lensjax.jobs.job.Runner`.

        A deadline that has passed keeps it from starting; what has started is not ended.

        Raises
        ------
        RunFailedError
            If it failed.
        """
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTimeError("the time is spent")
        reset = reset_peak()
        try:
            found = self._score(job) if isinstance(job, PretrainedScore) else self._tangents(job.samples)
        except Exception as error:
            raise RunFailedError(first_line(error)) from error
        return {**found, **peak(reset)}

    def _tangents(self, samples: int) -> dict[str, Any]:
        config = self.config
        model = self.pretrained
        if config.plan.lora is not None:
            model = models.add_lora(model, key=jax.random.key(0), **dataclasses.asdict(config.plan.lora))
        return tangent_measurements.measure(model, config.tokens.train.first(samples), config.pad_id)

    def _score(self, job: PretrainedScore) -> Mapping[str, Any]:
        config, model = self.config, self.pretrained
        try:
            if job.name == NLP_METRICS:
                return pretrained_scores.spectra(model)
            samples = config.tokens.train.first(job.samples)
            return pretrained_scores.evidence(model, samples, config.tokens.buckets, config.pad_id)
        except InputError as error:
            return {"problem": str(error)}

    def close(self) -> None:
        """Free the weights and, with the fine-tuner, its compiled programs."""
        self._tuner = self._pretrained = None

    def _facts(self) -> dict[str, Any]:
        placement = self.tuner.placement
        return {
            "device": jax.devices()[0].device_kind,
            "devices": placement.devices,
            "sharding": placement.name,
            "precision": self.tuner.dtype.name,
        }
