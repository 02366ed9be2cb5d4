"""Runs of one candidate, in this process or in one of their own: a crash there ends that run and nothing else."""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from lensjax.finetune import Trial
from lensjax.finetune.search import Point
from lensjax.jobs.resources import keep_compiled
from lensjax.jobs.runner import Callbacks, CandidateRunner, OutOfTimeError, Result, RunFailedError, RunnerConfig, reason

HEARTBEAT_SECONDS = 5.0  # seconds between two signs of waiting
GRACE = 5.0  # seconds a process gets to end by itself


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


class CandidateProcess:
    """One candidate in a process of its own, which stays for its next run unless it died.

    Parameters
    ----------
    assignment : RunnerConfig
    """

    def __init__(self, assignment: RunnerConfig) -> None:
        self.assignment = assignment
        self._process: Any = None
        self._connection: Any = None

    def _start(self) -> None:
        context = _context()
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_main, args=(theirs, self.assignment), daemon=True)
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

    def run(self, size: int, known: Mapping[Point, Trial], hooks: Callbacks, deadline: float | None = None) -> Result:
        """Run as `CandidateRunner.run`; at the deadline the process is killed.

        Raises
        ------
        RunFailedError
            If it gave no loss, or its process died.
        """
        made: list[Trial] = []
        result: Result = self._ask(("run", size, dict(known)), hooks, made, deadline)
        return result

    def look(
        self, samples: int, deadline: float | None = None, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Look as `CandidateRunner.look`; at the deadline the process is killed.

        Raises
        ------
        RunFailedError
            If it gave nothing, or its process died.
        """
        return self._measure(("look", samples), deadline, heartbeat)

    def gauge(
        self, what: str, samples: int, deadline: float | None = None, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Measure as `CandidateRunner.gauge`; at the deadline the process is killed.

        Raises
        ------
        RunFailedError
            If it gave nothing, or its process died.
        """
        return self._measure(("gauge", what, samples), deadline, heartbeat)

    def _measure(
        self, question: tuple[Any, ...], deadline: float | None, heartbeat: Callable[[], None]
    ) -> dict[str, Any]:
        """Ask what takes no training: there is nothing to tell of meanwhile but a sign of life."""
        hooks = Callbacks(lambda _: None, lambda _: None, heartbeat)
        found: dict[str, Any] = self._ask(question, hooks, [], deadline)
        return found

    def _ask(self, question: tuple[Any, ...], hooks: Callbacks, made: list[Trial], deadline: float | None) -> Any:
        try:
            if self._process is not None and not self._process.is_alive():
                self.close()
            if self._process is None:
                self._start()
            self._talk(functools.partial(self._connection.send, question), made)
            while True:
                left = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._talk(functools.partial(self._connection.poll, min(left, HEARTBEAT_SECONDS)), made):
                    if left <= HEARTBEAT_SECONDS:
                        raise OutOfTimeError("the time is spent", tuple(made))
                    hooks.heartbeat()
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


def worker_main(connection: multiprocessing.connection.Connection, assignment: RunnerConfig) -> None:
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
    bench = CandidateRunner(assignment)
    hooks = Callbacks(
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
