"""How long a selection has taken, in all its sessions, and will still take."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path

from lensjax._display import duration
from lensjax._files import read_json, write_atomically
from lensjax.select.request import Prepared


class Clock:
    """Estimates the time left from the speed of the runs so far.

    Work is counted in weights x samples, all sizes of all candidates; Algorithm 1 may need less.
    """

    def __init__(self, prepared: Prepared) -> None:
        sizes = [*prepared.sizes, *([prepared.target] if prepared.request.verify else [])]
        self.left = {(c.name, s): float(c.parameters) * s for c in prepared.candidates for s in sizes}
        self.done = self.seconds = self.running = 0.0

    def progress(self, name: str, size: int, share: float) -> None:
        """Record how far the current run is."""
        self.running = self.left.get((name, size), 0.0) * share

    def finished(self, name: str, size: int, seconds: float) -> None:
        """Record how long a run took; zero-shot evaluations say nothing about training."""
        work = self.left.pop((name, size), 0.0)
        self.running = 0.0
        if work:
            self.done += work
            self.seconds += seconds

    def skip(self, name: str, size: int) -> None:
        """Record that a run is not needed."""
        self.left.pop((name, size), None)

    def __str__(self) -> str:
        if not self.done:
            return "time left not known yet"
        left = max(sum(self.left.values()) - self.running, 0.0)
        return f"at most about {duration(left * self.seconds / self.done)} left"


def elapsed(path: Path, otherwise: float) -> float:
    """Return the seconds that a stopwatch's file says were taken; `otherwise` where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        seconds = float(read_json(path)["seconds"])
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return otherwise


class Stopwatch:
    """Counts the seconds of a selection over all its sessions, in a file, so that none are spent twice.

    Parameters
    ----------
    path : Path
        Written every `EVERY` seconds, and at each stop, if it can be.
    otherwise : float
        Seconds taken so far, if the file does not say.
    """

    EVERY = 5.0

    def __init__(self, path: Path, otherwise: float) -> None:
        self.path, self.earlier = path, elapsed(path, otherwise)
        self.started: float | None = time.monotonic()
        self.written = self.started

    @property
    def seconds(self) -> float:
        """Of all sessions, pauses left out."""
        return self.earlier + (0.0 if self.started is None else time.monotonic() - self.started)

    def deadline(self, seconds: float) -> float:
        """Return when so many seconds are over, on `time.monotonic`'s clock."""
        return time.monotonic() + seconds - self.seconds

    def save(self) -> None:
        """Save the time, unless that was done a moment ago."""
        if time.monotonic() - self.written >= self.EVERY:
            self._write()

    def pause(self) -> None:
        """Stop; the time until `resume` does not count."""
        self.earlier, self.started = self.seconds, None
        self._write()

    def resume(self) -> None:
        """Count again."""
        self.started = time.monotonic()

    def _write(self) -> None:
        self.written = time.monotonic()
        # A full disk must not cost what was computed.
        with contextlib.suppress(OSError):
            write_atomically(self.path, json.dumps({"seconds": self.seconds}) + "\n")
