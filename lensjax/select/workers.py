"""Runs of one candidate, in this process or in one of their own: a crash there ends that run and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import jax

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import DivergedError, FineTuner, Outcome, Plan, Progress, Search, Trial, tune
from lensjax.finetune.search import Point
from lensjax.runs import NLP_METRICS
from lensjax.select.look import look
from lensjax.select.prepare import Tokens
from lensjax.select.process import keep_compiled, peak, reset_peak
from lensjax.select.untuned import evidence, spectra

TICK = 5.0  # seconds between two signs of waiting
GRACE = 5.0  # seconds a process gets to end by itself

Trials = tuple[Trial, ...]
Tick = Callable[[], None]


def _nothing() -> None:
    """Hear a tick and do nothing."""


@dataclasses.dataclass(frozen=True)
class Assignment:
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
class Hooks:
    """What the caller wants to hear of during a run."""

    progress: Callable[[Progress], None]
    trials: Callable[[Trials], None]
    tick: Tick = _nothing


class Bench:
    """One candidate in this process, loaded and compiled when its first run is really needed."""

    def __init__(self, assignment: Assignment) -> None:
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

    def run(self, size: int, known: Mapping[Point, Trial], hooks: Hooks, deadline: float | None = None) -> Result:
        """Fine-tune on `size` samples, or evaluate if that is 0.

        Parameters
        ----------
        size : int
        known : mapping
            Trials of this run that were made before.
        hooks : Hooks
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
        self, samples: int, deadline: float | None = None, tick: Callable[[], None] = lambda: None
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
        self, what: str, samples: int, deadline: float | None = None, tick: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Measure what a score needs that knows nothing of fine-tuning, of the weights without adapters.

        A deadline keeps it from starting; what has started is not ended.

        Parameters
        ----------
        what : str
            One of `lensjax.runs.GAUGES`.
        samples : int
            Training samples to measure on, if any.
        deadline, tick
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
        # Compiled functions of one candidate are of no use to the next.
        jax.clear_caches()

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


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let SIGINT wait for the end of a block, and keep it from processes that start there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # it would unblock the signal
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    # The mask is what a new process inherits; here, other threads may still receive the signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _context() -> Any:
    """Return how processes are started: forked from a server that has everything imported and nothing computed."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Worker:
    """One candidate in a process of its own, which stays for its next run unless it died.

    Parameters
    ----------
    assignment : Assignment
    """

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self._process: Any = None
        self._connection: Any = None

    def _start(self) -> None:
        context = _context()
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.assignment), daemon=True)
        try:
            # An interrupt waits until the process exists, and its server, which lives on, never sees one.
            with _interrupts_held():
                process.start()
                self._process, self._connection = process, ours
        except (OSError, EOFError) as error:
            ours.close()
            raise RunFailedError(f"its process could not be started: {reason(error)}") from error
        finally:
            theirs.close()

    def run(self, size: int, known: Mapping[Point, Trial], hooks: Hooks, deadline: float | None = None) -> Result:
        """Run as `Bench.run`; at the deadline the process is killed.

        Raises
        ------
        RunFailedError
            If it gave no loss, or its process died.
        """
        made: list[Trial] = []
        result: Result = self._ask(("run", size, dict(known)), hooks, made, deadline)
        return result

    def look(
        self, samples: int, deadline: float | None = None, tick: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Look as `Bench.look`; at the deadline the process is killed.

        Raises
        ------
        RunFailedError
            If it gave nothing, or its process died.
        """
        return self._measure(("look", samples), deadline, tick)

    def gauge(
        self, what: str, samples: int, deadline: float | None = None, tick: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Measure as `Bench.gauge`; at the deadline the process is killed.

        Raises
        ------
        RunFailedError
            If it gave nothing, or its process died.
        """
        return self._measure(("gauge", what, samples), deadline, tick)

    def _measure(self, question: tuple[Any, ...], deadline: float | None, tick: Callable[[], None]) -> dict[str, Any]:
        """Ask what takes no training: there is nothing to tell of meanwhile but a sign of life."""
        hooks = Hooks(lambda _: None, lambda _: None, tick)
        found: dict[str, Any] = self._ask(question, hooks, [], deadline)
        return found

    def _ask(self, question: tuple[Any, ...], hooks: Hooks, made: list[Trial], deadline: float | None) -> Any:
        try:
            if self._process is not None and not self._process.is_alive():
                self.close()
            if self._process is None:
                self._start()
            self._talk(functools.partial(self._connection.send, question), made)
            while True:
                left = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._talk(functools.partial(self._connection.poll, min(left, TICK)), made):
                    if left <= TICK:
                        raise OutOfTimeError("the time is spent", tuple(made))
                    hooks.tick()
                    continue
                kind, *content = self._talk(self._connection.recv, made)
                if kind == "progress":
                    hooks.progress(content[0])
                elif kind == "trials":
                    made.extend(content[0])
                    hooks.trials(content[0])
                elif kind == "failed":
                    raise RunFailedError(*content)
                else:
                    return content[0]
        except BaseException:
            # After a failure nothing is known of the process's memory: the next run gets a fresh one.
            self.close()
            raise

    def _talk(self, act: Callable[[], Any], made: list[Trial]) -> Any:
        """Say or hear something; what fails here is the process's end, and nothing of the caller's."""
        try:
            return act()
        except (EOFError, OSError) as error:
            self._process.join(GRACE)
            raise RunFailedError(_death(self._process.exitcode, self.assignment.log), tuple(made)) from error

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = None


def _death(status: int | None, log: Path | None) -> str:
    where = f" (its output is in {log})" if log is not None else ""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        memory = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
        return f"its process was killed by {name}{memory}{where}"
    return f"its process ended with status {status}{where}"


def serve(connection: multiprocessing.connection.Connection, assignment: Assignment) -> None:
    """Make the runs that are asked for over a connection; the body of a worker's process."""
    # An interrupt is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if assignment.log is not None:
        assignment.log.parent.mkdir(parents=True, exist_ok=True)
        with assignment.log.open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.enable()
    parent = multiprocessing.process.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    if assignment.compiled is not None:
        keep_compiled(assignment.compiled)
    bench = Bench(assignment)
    hooks = Hooks(
        progress=lambda at: connection.send(("progress", at)), trials=lambda found: connection.send(("trials", found))
    )
    while True:
        try:
            question, *about = connection.recv()
        except EOFError:
            return
        try:
            result: Any = None
            result = getattr(bench, question)(*about, *([hooks] if question == "run" else []))
        except RunFailedError as error:
            connection.send(("failed", str(error), error.trials, error.details))
        else:
            connection.send(("done", result))


def _die_with(sentinel: int) -> None:
    """Wait for another process's end and end this one, whatever it is doing."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
