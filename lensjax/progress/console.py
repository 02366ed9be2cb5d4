"""Progress while runs are going: a live view on a terminal, one line per finished run elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from lensjax._display import duration, printable_lines
from lensjax.progress.state import SelectionState

if TYPE_CHECKING:
    import rich.console

    from lensjax.progress.terminal import LiveView

LINE_INTERVAL = 20.0  # seconds between two lines of progress where there is no terminal


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
        Draws on the terminal. Default: one for the stream, if it is a terminal whose cursor can be moved.

    Attributes
    ----------
    live : bool
        Whether the state of a selection is drawn while it is followed.
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
        self._view: LiveView | None = None
        if screen is None and not quiet and stream.isatty():
            # rich takes a tenth of a second to import, and only a terminal needs it.
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
    def follow(self, state: SelectionState) -> Iterator[None]:
        """Show a selection's state until the block ends; the last drawing stays. Without a terminal, do nothing."""
        if not self.live or self._screen is None:
            yield
            return
        from lensjax.progress.terminal import LiveView

        view = LiveView(state, self._screen, self.stream, lambda: self.elapsed)
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
        """Redraw the state that is followed; unless `now`, only if the last drawing is not recent."""
        if self._view is not None:
            self._view.refresh(now=now)

    def next(self, text: str) -> None:
        """Announce the next run: by a line, or, where a state is followed, by redrawing that."""
        self.refresh(now=True)
        if self._view is None or self.verbose:
            self.line(text)

    def status(self, text: str) -> None:
        """Report the progress of the current run.

        Where nothing is drawn this is a line, but only after `LINE_INTERVAL` seconds without one.
        """
        if self._view is not None:
            self.refresh()
        elif self.elapsed - self._last_line >= LINE_INTERVAL:
            self.line(text)

    def line(self, text: str) -> None:
        """Write a line that stays. Of a text with several lines, all but the first are indented."""
        if self.quiet:
            return
        self._last_line = self.elapsed
        text = f"[{duration(self.elapsed)}] {printable_lines(text)}"
        if self._view is not None:
            self._view.line(text)
            return
        self.stream.write(text + "\n")
        self.stream.flush()

    def detail(self, text: str) -> None:
        """Write a line if the console is verbose."""
        if self.verbose:
            self.line(text)
