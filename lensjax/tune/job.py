"""Fine-tuning one model on the full data: checked as a whole, done, kept."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lensjax import environment, models
from lensjax._display import duration, printable
from lensjax._files import NO_ROOM, disk_error
from lensjax.environment import versions
from lensjax.errors import InputError
from lensjax.finetune import DivergedError, FineTuner, Outcome, Progress, Trial, Weights, tune
from lensjax.jobs.candidates import Candidate, find_candidate
from lensjax.jobs.defaults import ADAPTED
from lensjax.jobs.job import first_line
from lensjax.jobs.request import JobRequest, task_of
from lensjax.jobs.runner import CandidateRunner
from lensjax.jobs.tokens import Tokens, tokens_of
from lensjax.models.checkpoints.adapters import WEIGHTS as ADAPTER_WEIGHTS
from lensjax.models.checkpoints.gguf import is_gguf
from lensjax.progress.console import Console
from lensjax.progress.state import ActiveRun, RankedCandidate, SelectionState
from lensjax.tasks import Task
from lensjax.tune.best_checkpoint import FINISHED, BestCheckpoint, check_directory
from lensjax.tune.comparison import SelectionComparison, read_comparison

MODEL_WEIGHTS = "model.safetensors"
ONE_FILE = 2**62  # bytes: weights in shards could not be replaced at once
INTERRUPTED, FAILED = "interrupted", "failed"


class TuningError(RuntimeError):
    """A fine-tuning that gave no model, for a reason that showed only while it ran; the message says what is kept."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A fine-tuning that was checked as a whole.

    Attributes
    ----------
    request : JobRequest
        With one model.
    out : Path
        Directory the model is kept in.
    overwrite : bool
        Whether an earlier model there may be replaced.
    task : Task
    candidate : Candidate
    tokens : Tokens
        Of the `samples` training samples, and those set aside.
    samples, max_length : int
    notes : tuple of str
    comparison : SelectionComparison or None
        With what the selection expected.
    arguments : tuple of str
        Of the command, for the record.
    """

    request: JobRequest
    out: Path
    overwrite: bool
    task: Task
    candidate: Candidate
    tokens: Tokens
    samples: int
    max_length: int
    notes: tuple[str, ...] = ()
    comparison: SelectionComparison | None = None
    arguments: tuple[str, ...] = ()


def prepare_job(
    request: JobRequest,
    out: Path,
    *,
    samples: int | None = None,
    selection: Path | None = None,
    overwrite: bool = False,
    arguments: Sequence[str] = (),
) -> Job:
    """Check a fine-tuning as a whole before any long work.

    Parameters
    ----------
    request : JobRequest
        With one model; what it says of subsets, methods and budgets does not matter.
    out : Path
        Directory for the model.
    samples : int, optional
        Train on the first so many training samples, in the order of a selection's subsets; default: all.
    selection : Path, optional
        Run directory of the selection that chose the model, to compare with what it expects.
    overwrite : bool
        Whether an earlier model in `out` may be replaced.
    arguments : sequence of str
        For the record.

    Raises
    ------
    InputError
        See `load_task`, `lensjax.models.check_checkpoint`, `check_directory` and `read_comparison`; more samples than
        there are; a tokenizer that does not fit the model.
    """
    environment.require_exact_backend()
    check_directory(out, overwrite=overwrite)
    request.plan.check()
    request.search.check(request.plan)
    (asked,) = request.models
    _check_apart(asked, out)
    task = task_of(request)
    size = len(task.train) if samples is None else samples
    if size > len(task.train):
        raise InputError(f"--samples {size}: the task has {len(task.train)} training samples; lower it.")
    candidate = find_candidate(asked, request.lora)
    limit = candidate.config.max_length
    max_length = request.max_length if limit is None else min(request.max_length, limit)
    comparison = None
    if selection is not None:
        comparison = read_comparison(
            selection,
            candidate,
            task=task.fingerprint,
            plan=dataclasses.asdict(request.plan),
            max_length=max_length,
            samples=size,
        )
    tokens = tokens_of(task, candidate, size, size, max_length)
    notes = list(task.notes)
    cut = sum(part.truncated for part in tokens.parts)
    if cut:
        notes.append(f"{cut} samples were cut at {max_length} tokens")
    tokens.check_vocabulary("--model", candidate)
    return Job(
        *(request, out, overwrite, task, candidate, tokens, size, max_length),
        notes=tuple(notes),
        comparison=comparison,
        arguments=tuple(arguments),
    )


def _check_apart(asked: str, out: Path) -> None:
    """Refuse to write a model over the one that is fine-tuned."""
    source = Path(asked.removesuffix(ADAPTED)).expanduser()
    if source.is_dir() and source.resolve() == out.resolve():
        raise InputError(f"--out {out}: is the model that is fine-tuned; name another directory.")


class Tuning:
    """Fine-tunes the chosen model and keeps its best weights.

    Parameters
    ----------
    job : Job
    console : Console
        For progress.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self.job, self.console = job, console
        request, candidate = job.request, job.candidate
        self.runner = CandidateRunner(request.runner_config(candidate, job.tokens))
        self.running = ActiveRun(candidate.name, job.samples, "loading and compiling")
        self.state = SelectionState(
            title=f"Fine-tuning on {job.samples} samples of {job.task.name}",
            unit="nats per token",
            names=(candidate.name,),
            sizes=(job.samples,),
            target=job.samples,
            running=self.running,
        )
        if job.comparison is not None and job.comparison.loss is not None and not job.comparison.per_byte:
            self.state.ranking = {candidate.name: RankedCandidate(1, job.comparison.loss, float("nan"))}
        self.checkpoint: BestCheckpoint | None = None
        self.disk_failed = False
        self.first: tuple[float, float] | None = None  # time and fraction done at the first progress report
        self.trials: list[Trial] = []

    @property
    def tuner(self) -> FineTuner:
        """The compiled fine-tuner, as in a selection."""
        return self.runner.tuner

    @property
    def kept(self) -> str:
        """What is on disk, in a sentence."""
        saved = None if self.checkpoint is None else self.checkpoint.saved
        if saved is None and self.disk_failed:
            return "No weights were saved."
        if saved is None:
            return "No weights were saved: the validation loss had not improved yet."
        return f"{self.job.out} holds the best weights so far ({saved})."

    def execute(self) -> Outcome:
        """Fine-tune, keep the best weights, write the record.

        Returns
        -------
        Outcome
            Its test loss is that of the weights in the job's directory.

        Raises
        ------
        InputError
            See `BestCheckpoint`; devices that do not suit the batches.
        TuningError
            If training diverged at every rate, memory ran out, or the weights could not be written.
        """
        job, console = self.job, self.console
        size = f"{job.samples} samples of {job.task.name}"
        console.line(f"{job.candidate.name} on {size}; the best weights go to {job.out}")
        for note in job.notes:
            console.line(f"note: {note}")
        name = MODEL_WEIGHTS if job.candidate.lora is None else ADAPTER_WEIGHTS
        console.detail(f"JAX devices: {', '.join(map(str, jax.devices()))}")
        self.checkpoint = BestCheckpoint(job.out, self._save, name, self._known(), overwrite=job.overwrite)
        status = FAILED
        try:
            with console.follow(self.state):
                outcome = tune(
                    self.tuner,
                    *job.tokens.parts,
                    search=job.request.search,
                    seed=job.request.seed,
                    on_trials=self._on_trials,
                    on_progress=self._on_progress,
                    on_weights=self._on_weights,
                    count_flops=True,
                )
                self.state.losses[job.candidate.name, job.samples] = outcome.test_loss
                self.state.running = None
            chosen = next(t for t in outcome.trials if t.validation_loss == outcome.validation_loss)
            self.checkpoint.select(chosen)
            status = FINISHED
            self.checkpoint.write_record(status, **self._found(outcome))
        except InputError:
            raise
        except DivergedError as error:
            raise TuningError(f"{error}. {self.kept}") from error
        except KeyboardInterrupt:
            status = INTERRUPTED
            raise
        except Exception as error:
            # Of many types: memory that ran out, a disk that is full.
            failure = disk_error(error)
            if failure is not None:
                self.disk_failed = True
                where = failure.filename or job.out
                advice = ". Make room and give the same command again" if failure.errno in NO_ROOM else ""
                raise TuningError(f"{where}: {failure.strerror}{advice}. {self.kept}") from error
            raise TuningError(f"{first_line(error)}. {self.kept}") from error
        finally:
            if status != FINISHED and self.checkpoint.saved is not None:
                # Where the disk is full, the record of what is saved is there already.
                with contextlib.suppress(OSError):
                    self.checkpoint.write_record(status, trials=[dataclasses.asdict(t) for t in self.trials])
            self.checkpoint.close()
        return outcome

    def _save(self, params: Any, directory: Path, whole: bool) -> None:
        path, model = self.job.candidate.path, self.tuner.model(params)
        tokenizer = models.load_tokenizer(path) if whole else None
        if self.job.candidate.lora is None:
            models.save_pretrained(model, directory, tokenizer, max_shard_size=ONE_FILE)
            generation = path / "generation_config.json"
            if whole and generation.is_file():
                shutil.copyfile(generation, directory / generation.name)
        else:
            models.save_lora(model, directory, base=self.base)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)

    @property
    def base(self) -> str:
        """The model as it was named; a place on this machine with its whole path, for adapters may be moved."""
        (asked,) = self.job.request.models
        plain = asked.removesuffix(ADAPTED)
        path = Path(plain).expanduser()
        return str(path.resolve()) if path.is_dir() or is_gguf(plain) else plain

    def _known(self) -> dict[str, Any]:
        """Return the record as far as it is known before training."""
        job, request = self.job, self.job.request
        comparison = None if job.comparison is None else dataclasses.asdict(job.comparison)
        if comparison is not None:
            comparison["doubts"] = comparison.pop("caveats")  # as the file has called them from the beginning
        return {
            "model": self.base,
            # Of a hub id: a snapshot, which names the commit.
            "path": str(job.candidate.path),
            "fingerprint": job.candidate.fingerprint,
            "parameters": job.candidate.parameters,
            "trainable": job.candidate.trainable,
            "lora": None if job.candidate.lora is None else dataclasses.asdict(job.candidate.lora),
            "task": job.task.name,
            "task_fingerprint": job.task.fingerprint,
            "samples": job.samples,
            "validation": len(job.task.validation),
            "test": len(job.task.test),
            "seed": request.seed,
            "max_length": job.max_length,
            "plan": dataclasses.asdict(request.plan),
            "search": request.search.as_record(),
            "notes": list(job.notes),
            "expectation": comparison,
            "arguments": list(job.arguments),
            "directory": os.getcwd(),
            "versions": versions(),
        }

    def _found(self, outcome: Outcome) -> dict[str, Any]:
        """Return what only the end shows."""
        found = dataclasses.asdict(outcome)
        found["samples_trained_on"], found["tokens_trained_on"] = found.pop("samples"), found.pop("tokens")
        found |= {"step_flops": outcome.step_flops, "evaluation_flops": outcome.evaluation_flops}
        found["test_loss_per_byte"] = self.per_byte(outcome)
        placement = self.tuner.placement
        found |= {"devices": placement.devices, "sharding": placement.name, "precision": self.tuner.dtype.name}
        return found

    def per_byte(self, outcome: Outcome) -> float | None:
        """Return the test loss per byte of target text, nats."""
        factor = self.job.tokens.test.tokens_per_byte
        return outcome.test_loss * factor if np.isfinite(factor) else None

    def _on_trials(self, found: tuple[Trial, ...]) -> None:
        self.trials += found
        for trial in found:
            if trial.status != FINISHED or self.job.request.search.trials(self.job.request.plan) > 2:
                end = "" if trial.validation_loss is None else f", validation loss {trial.validation_loss:.4f}"
                self.console.line(
                    f"{_point(trial)}: {trial.status} after {trial.steps_run} steps{end} ({trial.reason})"
                )

    def _on_progress(self, at: Progress) -> None:
        # Loading and compiling are no measure of what follows.
        self.first = self.first or (time.monotonic(), at.done)
        seconds, done = time.monotonic() - self.first[0], at.done - self.first[1]
        left = f"at most about {duration(seconds * (1 - at.done) / done)} left" if done > 0 else "time left not known"
        self.running.activity = (
            f"step {at.step} of at most {at.total_steps}, epoch {at.epoch}, validation loss {at.validation_loss:.4f}"
        )
        self.running.fraction, self.state.time_left = at.done, left
        self.console.status(f"{self.running.activity}; {left}")

    def _on_weights(self, found: Weights) -> None:
        assert self.checkpoint is not None
        if self.checkpoint.update(found) and not found.finished:
            self.console.line(f"{_point(found)}: step {found.step}, validation loss {found.validation_loss:.4f}: saved")

    def render(self, outcome: Outcome) -> str:
        """Return the result as text."""
        job = self.job
        untouched = outcome.validation_history[0][1]
        lines = [
            f"Fine-tuned {job.candidate.name} on {job.samples} samples: test loss {outcome.test_loss:.4f}, validation "
            f"loss {outcome.validation_loss:.4f} (before: {untouched:.4f}) nats per token.",
            f"Best weights at step {outcome.steps} of {outcome.steps_run}, {_point(outcome)}; {outcome.reason}.",
        ]
        if outcome.steps == 0:
            lines[1] = (
                f"No step lowered the validation loss: what is saved is the model as it was. Try another learning rate "
                f"than {outcome.learning_rate:g}, or more data."
            )
        if job.comparison is not None:
            loss = self.per_byte(outcome) if job.comparison.per_byte else outcome.test_loss
            if loss is None:
                lines.append("The selection expected a loss per byte, but the bytes of the test samples are not known.")
            else:
                unit = f"{loss:.4f} nats per byte. " if job.comparison.per_byte else ""
                lines.append(unit + job.comparison.compare(loss))
        if job.candidate.lora is None:
            lines.append(f"The model is in {job.out}: lensjax.from_pretrained({str(job.out)!r}), or transformers.")
        else:
            lines.append(
                f"The adapters are in {job.out}, in peft's format: lensjax.models.load_lora(model, {str(job.out)!r}) "
                f"puts them on {self.base}."
            )
        return "\n".join(map(printable, lines))


def _point(of: Trial | Weights | Outcome) -> str:
    return f"learning rate {of.learning_rate:g}, batch size {of.batch_size}"
