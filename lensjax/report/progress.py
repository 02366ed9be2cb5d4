"""Progress while runs are going: one changing line on a terminal, one line per finished run elsewhere."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

EVERY = 20.0  # seconds between two lines of progress where there is no terminal


def duration(seconds: float) -> str:
    """Format a time span as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console:
    """Writes progress to a stream.

    Parameters
    ----------
    stream : text stream
    quiet : bool
        Write nothing.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self.stream, self.quiet = stream, quiet
        self.live = stream.isatty() and not quiet
        self.start = time.perf_counter()
        self._last_length = 0
        self._last_line = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the console was made."""
        return time.perf_counter() - self.start

    def status(self, text: str) -> None:
        """Show what is happening now; the next status replaces it.

        Where lines cannot be replaced, a status becomes a line only after `EVERY` seconds without one.
        """
        if not self.live:
            if self.elapsed - self._last_line >= EVERY:
                self.line(text)
            return
        width = shutil.get_terminal_size().columns - 1
        text = f"[{duration(self.elapsed)}] {text}"[:width]
        self.stream.write("\r" + text.ljust(self._last_length))
        self.stream.flush()
        self._last_length = len(text)

    def line(self, text: str) -> None:
        """Write a line that stays."""
        if self.quiet:
            return
        self._last_line = self.elapsed
        if self.live and self._last_length:
            self.stream.write("\r" + " " * self._last_length + "\r")
            self._last_length = 0
        self.stream.write(f"[{duration(self.elapsed)}] {text}\n")
        self.stream.flush()
