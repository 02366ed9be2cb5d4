"""Progress while runs are going: a live view on a terminal, one line per finished run elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from lensjax._display import duration, plain
from lensjax.progress.board import SelectionState

if TYPE_CHECKING:
    import rich.console

    from lensjax.progress.terminal import View

EVERY = 20.0  # seconds between two lines of progress where there is no terminal


class Console:
    """Writes progress to a stream.

    Parameters
    ----------
    stream : text stream
    quiet : bool
        Write nothing.
    verbose : bool
        Write details too.
    clock : callable
        Seconds since any moment.
    screen : rich.console.Console, optional
        What draws on the terminal. Default: one for the stream, if it is a terminal whose cursor can be moved.

    Attributes
    ----------
    live : bool
        Whether a board that is followed is drawn.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        verbose: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        screen: rich.console.Console | None = None,
    ) -> None:
        self.stream, self.quiet, self.verbose = stream, quiet, verbose and not quiet
        self._clock, self._screen = clock, screen
        self._view: View | None = None
        if screen is None and not quiet and stream.isatty():
            from lensjax.progress.terminal import screen_for

            self._screen = screen_for(stream)
        self.live = self._screen is not None and not quiet
        self.start = clock()
        self._last_line = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the console was made."""
        return self._clock() - self.start

    @contextlib.contextmanager
    def follow(self, board: SelectionState) -> Iterator[None]:
        """Show a board until the block ends; its last state stays. Where nothing can be drawn, do nothing."""
        if not self.live or self._screen is None:
            yield
            return
        from lensjax.progress.terminal import View

        view = View(board, self._screen, self.stream, lambda: self.elapsed)
        try:
            self._view = view
            view.start()
            yield
        except BaseException:
            view.interrupted = True
            raise
        finally:
            self._view = None
            view.stop()

    def refresh(self, *, now: bool = False) -> None:
        """Draw the board anew; unless it must be `now`, not if that was done just before."""
        if self._view is not None:
            self._view.refresh(now=now)

    def next(self, text: str) -> None:
        """Announce what begins: by a line, or by the board that is followed, where the caller has noted it."""
        self.refresh(now=True)
        if self._view is None or self.verbose:
            self.line(text)

    def status(self, text: str) -> None:
        """Say what is happening now.

        Where no board is shown, this becomes a line, but only after `EVERY` seconds without one.
        """
        if self._view is not None:
            self.refresh()
        elif self.elapsed - self._last_line >= EVERY:
            self.line(text)

    def line(self, text: str) -> None:
        """Write a line that stays; a text of several lines becomes so many."""
        if self.quiet:
            return
        self._last_line = self.elapsed
        text = f"[{duration(self.elapsed)}] " + "\n".join(map(plain, text.splitlines()))
        if self._view is not None:
            self._view.line(text)
            return
        self.stream.write(text + "\n")
        self.stream.flush()

    def detail(self, text: str) -> None:
        """Write a line that only a verbose console has."""
        if self.verbose:
            self.line(text)
