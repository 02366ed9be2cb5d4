"""Progress while runs are going: a live view on a terminal, one line per finished run elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

import numpy as np

from lensjax.selectors import Scores

if TYPE_CHECKING:
    import rich.console

    from lensjax.report.view import View

EVERY = 20.0  # seconds between two lines of progress where there is no terminal


def duration(seconds: float) -> str:
    """Format a time span as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plain(text: str) -> str:
    """Return a text without what a terminal would obey: control and format characters become question marks."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


@dataclasses.dataclass
class Running:
    """What is being measured now.

    Attributes
    ----------
    name : str
        Candidate.
    size : int or None
        Training samples, a column of the board; None if no loss is being measured.
    doing : str
        In words.
    done : float
        Share that is done at least.
    """

    name: str
    size: int | None
    doing: str
    done: float = 0.0


@dataclasses.dataclass(frozen=True)
class Place:
    """A candidate's place in a ranking.

    Attributes
    ----------
    rank : int
        From 1.
    predicted : float
        Loss at the target; NaN if the method predicts none.
    probability : float
        Of being the best; NaN if the method does not say.
    """

    rank: int
    predicted: float
    probability: float


@dataclasses.dataclass
class Board:
    """All there is to see of a selection under way; whoever selects writes here, a `Console` shows it.

    Attributes
    ----------
    title : str
    unit : str
        Of the losses.
    names : tuple of str
        Candidates.
    sizes : tuple of int
        Sizes that may be measured, ascending; 0 is zero-shot.
    target : int
    losses : dict of (candidate, size) to float
        Measured so far.
    places : dict of candidate to Place
        The ranking so far, of those it can say something about.
    failures : dict of candidate to reason
    running : Running or None
    spent : str
        What was spent, and what is left.
    time_left : str
    """

    title: str
    unit: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    target: int
    losses: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    places: dict[str, Place] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    running: Running | None = None
    spent: str = ""
    time_left: str = ""

    def rank(self, scores: Scores | None) -> None:
        """Take over a ranking; None: there is none."""
        self.places = {}
        if scores is None:
            return
        chances = scores.best_probability
        for rank, row in enumerate(scores.order, start=1):
            if np.isfinite(scores.score[row]):
                chance = float("nan") if chances is None else float(chances[row])
                self.places[scores.names[row]] = Place(rank, float(scores.predicted_loss[row]), chance)


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
            from lensjax.report.view import screen_for

            self._screen = screen_for(stream)
        self.live = self._screen is not None and not quiet
        self.start = clock()
        self._last_line = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the console was made."""
        return self._clock() - self.start

    @contextlib.contextmanager
    def follow(self, board: Board) -> Iterator[None]:
        """Show a board until the block ends; its last state stays. Where nothing can be drawn, do nothing."""
        if not self.live or self._screen is None:
            yield
            return
        from lensjax.report.view import View

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
