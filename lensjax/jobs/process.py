"""Jobs of one candidate in a process of its own: a crash there ends that job and nothing else."""

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
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from lensjax.finetune import Trial
from lensjax.jobs.job import (
    Callbacks,
    FineTuning,
    Measurement,
    OutOfTimeError,
    Result,
    RunFailedError,
    RunnerConfig,
    first_line,
)
from lensjax.jobs.resources import keep_compiled
from lensjax.jobs.runner import CandidateRunner

HEARTBEAT_SECONDS = 5.0  # between two heartbeats while waiting for the process
GRACE_SECONDS = 5.0  # for a process to end by itself
PROCESS_NAME = "lensjax candidate"


@contextlib.contextmanager
def _deferred_interrupts() -> Iterator[None]:
    """Delay SIGINT until the end of the block, and block it in processes that start there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # it would unblock the signal
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    # A new process inherits the mask; in this one, other threads may still receive the signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


def _context() -> Any:
    """Return the start method: processes are forked from a server that has imported everything and computed nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class CandidateProcess:
    """Runs one candidate's jobs in a process of its own, which stays for the next job unless it died.

    Parameters
    ----------
    config : RunnerConfig
    """

    def __init__(self, config: RunnerConfig) -> None:
        self.config = config
        self._process: Any = None
        self._connection: Any = None

    def _start(self) -> None:
        context = _context()
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_main, args=(theirs, self.config), daemon=True, name=PROCESS_NAME)
        try:
            # An interrupt waits until the process exists, and its server, which lives on, never sees one.
            with _deferred_interrupts():
                process.start()
                self._process, self._connection = process, ours
        except (OSError, EOFError) as error:
            ours.close()
            raise RunFailedError(f"its process could not be started: {first_line(error)}") from error
        finally:
            theirs.close()

    def run(self, job: FineTuning, callbacks: Callbacks, deadline: float | None = None) -> Result:
        """Fine-tune or evaluate; see `lensjax.jobs.job.Runner`. At the deadline the process is killed.

        Raises
        ------
        RunFailedError
            If it gave no loss, or its process died.
        """
        # A mapping of any kind is sent as a dictionary.
        result: Result = self._request(dataclasses.replace(job, known=dict(job.known)), callbacks, deadline)
        return result

    def measure(self, job: Measurement, callbacks: Callbacks, deadline: float | None = None) -> dict[str, Any]:
        """Measure something that takes no training; see `lensjax.jobs.job.Runner`. At the deadline it is killed.

        Raises
        ------
        RunFailedError
            If it failed, or its process died.
        """
        found: dict[str, Any] = self._request(job, callbacks, deadline)
        return found

    def _request(self, job: FineTuning | Measurement, callbacks: Callbacks, deadline: float | None) -> Any:
        """Send a job and wait for its result, passing on what the process reports meanwhile."""
        ended: list[Trial] = []
        try:
            if self._process is not None and not self._process.is_alive():
                self.close()
            if self._process is None:
                self._start()
            self._communicate(functools.partial(self._connection.send, job), ended)
            while True:
                left = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
                wait = min(left, HEARTBEAT_SECONDS)
                if not self._communicate(functools.partial(self._connection.poll, wait), ended):
                    if left <= HEARTBEAT_SECONDS:
                        raise OutOfTimeError("the time is spent", tuple(ended))
                    callbacks.heartbeat()
                    continue
                kind, *content = self._communicate(self._connection.recv, ended)
                if kind == "progress":
                    callbacks.progress(content[0])
                elif kind == "trials":
                    ended.extend(content[0])
                    callbacks.trials(content[0])
                elif kind == "failed":
                    raise RunFailedError(*content)
                else:
                    return content[0]
        except BaseException:
            # After a failure nothing is known of the process's memory: the next job gets a new one.
            self.close()
            raise

    def _communicate(self, act: Callable[[], Any], ended: list[Trial]) -> Any:
        """Use the connection; if that fails, the process has ended."""
        try:
            return act()
        except (EOFError, OSError) as error:
            self._process.join(GRACE_SECONDS)
            raise RunFailedError(_cause_of_death(self._process.exitcode, self.config.log), tuple(ended)) from error

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = None


def _cause_of_death(status: int | None, log: Path | None) -> str:
    where = f" (its output is in {log})" if log is not None else ""
    if status is not None and status < 0:
        memory = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
        return f"its process was killed by {signal_name(-status)}{memory}{where}"
    return f"its process ended with status {status}{where}"


def signal_name(number: int) -> str:
    """Return a signal's name; real-time signals have only numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def worker_main(connection: multiprocessing.connection.Connection, config: RunnerConfig) -> None:
    """Run the jobs that arrive on a connection until it is closed."""
    # An interrupt is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if config.log is not None:
        config.log.parent.mkdir(parents=True, exist_ok=True)
        with config.log.open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.enable()
    parent = multiprocessing.process.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()
    if config.compiled is not None:
        keep_compiled(config.compiled)
    runner = CandidateRunner(config)
    callbacks = Callbacks(
        progress=lambda at: connection.send(("progress", at)), trials=lambda found: connection.send(("trials", found))
    )
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            result: Any = None  # frees the last one
            result = runner.run(job, callbacks) if isinstance(job, FineTuning) else runner.measure(job, callbacks)
        except RunFailedError as error:
            connection.send(("failed", str(error), error.trials, error.details))
        else:
            connection.send(("done", result))


def _exit_with(sentinel: int) -> None:
    """Wait for another process's end and then end this one, whatever it is doing."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
