"""The live view of a selection on a terminal: candidates, their losses, what runs, the ranking so far.

Drawn by rich, and only from calls of this process's main thread: there is no refresh thread that a fork could copy.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import rich.console
import rich.live
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from lensjax._display import duration, number, percent, plain
from lensjax.progress.board import SelectionState

EVERY = 0.25  # seconds between two drawings
ROOMY = 60  # columns from which ranks and words in full have room
LOSS = 6  # columns of a loss
SHORTEST = 10  # columns of a name at least; what there is of room, up to a quarter of all, goes to names first
MOST = 200  # characters looked at of a name or a reason


def screen_for(stream: TextIO) -> rich.console.Console | None:
    """Return what draws on a terminal; None if its cursor cannot be moved (TERM=dumb) or should not be."""
    screen = rich.console.Console(
        file=stream, force_terminal=True, force_jupyter=False, markup=False, emoji=False, highlight=False
    )
    return screen if screen.is_interactive and not screen.is_dumb_terminal else None


def shorten(text: str, width: int, dots: str = "…") -> str:
    """Return a text that fills no more columns: where it is too long, its middle is left out."""
    text = plain(text if len(text) <= 2 * MOST else text[:MOST] + text[-MOST:])
    if cell_len(text) <= width:
        return text
    if width <= len(dots):
        return dots[: max(width, 0)]
    head, tail = list(text[: len(text) // 2]), list(text[len(text) // 2 :])
    # The ends of names tell more than their beginnings: owner/family-SIZE+lora.
    while cell_len("".join(head)) > (width - len(dots)) // 3 and head:
        head.pop()
    while cell_len("".join(tail)) > width - len(dots) - cell_len("".join(head)):
        tail.pop(0)
    return "".join(head) + dots + "".join(tail)


def crop(text: str, width: int, dots: str = "…") -> str:
    """Return a text that fills no more columns: where it is too long, its end is left out."""
    text = plain(text[: 2 * MOST])
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > width - len(dots):
        text = text[:-1]
    return text + dots[: max(width, 0)]


class View:
    """Draws a board into a region at the bottom of a terminal; lines go above it.

    Parameters
    ----------
    board : SelectionState
    screen : rich.console.Console
    stream : text stream
        The terminal, asked for its size before each drawing.
    elapsed : callable
        Seconds so far.

    Attributes
    ----------
    interrupted : bool
        Whether what was running will not end.
    """

    def __init__(
        self, board: SelectionState, screen: rich.console.Console, stream: TextIO, elapsed: Callable[[], float]
    ) -> None:
        self.board, self.screen, self.stream, self.elapsed = board, screen, stream, elapsed
        self.interrupted = False
        self._drawn = -math.inf
        self._live = rich.live.Live(
            self,
            console=screen,
            auto_refresh=False,
            transient=False,
            # What others print goes above the region too; a file that gets the results does not.
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )

    def start(self) -> None:
        """Draw for the first time."""
        self._measure()
        self._live.start(refresh=True)
        self._drawn = self.elapsed()

    def stop(self) -> None:
        """Draw for the last time and give the cursor back."""
        self._measure()
        try:
            self._live.stop()
        finally:
            self.screen.show_cursor(True)

    def refresh(self, *, now: bool = False) -> None:
        """Draw anew; unless it must be `now`, not if that was done just before."""
        if now or self.elapsed() - self._drawn >= EVERY:
            self._drawn = self.elapsed()
            self._measure()
            self._live.refresh()

    def line(self, text: str) -> None:
        """Write something above."""
        self._drawn = self.elapsed()
        self._measure()
        self.screen.print(Text(text, overflow="fold"))

    def _measure(self) -> None:
        """Ask the terminal for its size: it may have changed, and need not be the process's own."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            columns, lines = os.get_terminal_size(self.stream.fileno())
            if columns and lines:
                self.screen.size = rich.console.ConsoleDimensions(columns, lines)

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        """Lay everything out for the size that the terminal has now."""
        width, height = options.max_width, options.size.height - 1
        dots = "..." if options.ascii_only else "…"
        board = self.board

        def cut(text: str, style: str = "") -> Text:
            return Text(crop(text, width, dots), style=style, no_wrap=True, end="")

        def folded(text: str, style: str = "", most: int = 2) -> list[Text]:
            lines = [line.plain for line in Text(plain(text)).wrap(console, width)]
            rest = " ".join(lines[most - 1 :])
            return [cut(line.rstrip(), style) for line in (*lines[: most - 1], rest)[:most] if line]

        above = [cut(f"{board.title}; losses in {board.unit}", "bold")]
        below = [cut(text, "red") for text in self._failures(width, dots, max(1, (height - 8) // 3))]
        below += [line for text, style in self._now() for line in folded(text, style)]
        columns, unseen = self._columns(width)
        room = max(1, height - len(above) - len(below) - 1)
        rows, hidden = self._rows(room)
        notes = [part for part in (hidden, unseen) if part]
        if notes:
            rows, hidden = self._rows(max(1, room - 1))
            notes = [part for part in (hidden, unseen) if part]
            below.insert(0, cut("; ".join(notes), "dim"))
        yield from self._lines(above)
        yield self._table(rows, columns, width, dots, ascii_only=options.ascii_only)
        yield from self._lines(below, last="")

    @staticmethod
    def _lines(lines: Sequence[Text], last: str = "\n") -> list[Text]:
        """Return lines that end where they should: the region's last one has no end."""
        for at, line in enumerate(lines):
            line.end = last if at == len(lines) - 1 else "\n"
        return list(lines)

    def _failures(self, width: int, dots: str, most: int) -> list[str]:
        """Return a line for each candidate that failed, as far as there is room."""
        failures = self.board.failures.items()
        found = [f"{shorten(name, width // 2, dots)} failed: {why}" for name, why in failures]
        if len(found) > most:
            found = [*found[: most - 1], f"{len(found) - most + 1} more failed" if most > 1 else f"{len(found)} failed"]
        return found

    def _now(self) -> list[tuple[str, str]]:
        """Return what runs, and what it has taken so far, with styles."""
        board, found = self.board, []
        if board.running is not None:
            what = "stopped at" if self.interrupted else "now"
            size = {None: "", 0: ", zero-shot"}.get(board.running.size, f", {board.running.size or 0:,} samples")
            found.append((f"{what}: {shorten(board.running.name, MOST)}{size}: {board.running.doing}", "cyan"))
        spent = [f"{duration(self.elapsed())} so far"]
        # The time left is that of the losses to be measured.
        if board.running is not None and board.running.size is not None:
            spent.append(board.time_left)
        found.append(("; ".join(filter(None, [*spent, board.spent])), ""))
        return found

    def _rows(self, room: int) -> tuple[list[str], str]:
        """Return the candidates to show, and what to say of the others: leaders first, what runs is always there."""
        board, measured = self.board, self._measured()
        named = [n for n in board.names if n not in board.failures]
        last = len(board.names) + 1
        named.sort(key=lambda n: (board.places[n].rank if n in board.places else last, n not in measured))
        shown = named[:room]
        running = board.running.name if board.running is not None else ""
        if running in named and running not in shown:
            shown[-1] = running
        hidden = [n for n in named if n not in shown]
        if not hidden:
            return shown, ""
        waiting = sum(n not in measured for n in hidden)
        parts = [f"{len(hidden) - waiting} measured"] if waiting < len(hidden) else []
        parts += [f"{waiting} not yet"] if waiting else []
        return shown, f"{len(hidden)} more candidates: {', '.join(parts)}"

    def _measured(self) -> set[str]:
        return {name for name, _ in self.board.losses}

    def _columns(self, width: int) -> tuple[list[int], str]:
        """Return the sizes whose losses have room, and what to say of the others."""
        board = self.board
        left = width - self._fixed(width) - max(SHORTEST, min(self._longest(), width // 4))
        running = board.running.size if board.running is not None else None
        measured = {size for _, size in board.losses}
        # What is being measured, then what has been, the largest first.
        wanted = sorted(board.sizes, key=lambda s: (s != running, s not in measured, -s))
        shown: list[int] = []
        for size in wanted:
            left -= 1 + self._width(size)
            if left < 0:
                break
            shown.append(size)
        hidden = [s for s in board.sizes if s not in shown]
        unseen = f"without {', '.join(f'{s:,}' for s in hidden)} samples" if hidden else ""
        return sorted(shown), unseen

    def _longest(self) -> int:
        """Return the columns that the longest name fills."""
        return max((cell_len(plain(name[: 2 * MOST])) for name in self.board.names), default=0)

    @staticmethod
    def _width(size: int) -> int:
        return max(LOSS, len(f"{size:,}"))

    def _fixed(self, width: int) -> int:
        """Return the columns that are taken by what stands beside names and losses."""
        roomy = width >= ROOMY
        return 2 + (1 + self._digits() if roomy else 0) + sum(1 + len(title) for title, _ in self._predictions(roomy))

    def _digits(self) -> int:
        """Return the columns of a rank."""
        return max(2, len(str(len(self.board.names))))

    def _predictions(self, roomy: bool) -> list[tuple[str, bool]]:
        """Return the titles of the columns of the ranking that its method fills, and whether they are losses."""
        places = self.board.places.values()
        found = []
        if not places or any(math.isfinite(p.predicted) for p in places):
            found.append(("predicted" if roomy else "expect", True))
        if not places or any(math.isfinite(p.probability) for p in places):
            found.append(("P(best)" if roomy else "best?", False))
        return found

    def _table(self, rows: list[str], columns: list[int], width: int, dots: str, *, ascii_only: bool) -> Table:
        board, roomy = self.board, width >= ROOMY
        free = width - self._fixed(width) - sum(1 + self._width(s) for s in columns)
        name_width = max(1, min(free, max(SHORTEST, self._longest())))
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
        predictions = self._predictions(roomy)
        table.add_column("", width=1)
        if roomy:
            table.add_column("#", width=self._digits(), justify="right", no_wrap=True)
        table.add_column("candidate"[:name_width], width=name_width, no_wrap=True)
        for size in columns:
            table.add_column(f"{size:,}", width=self._width(size), justify="right", no_wrap=True)
        for title, _ in predictions:
            table.add_column(title, width=len(title), justify="right", no_wrap=True)
        marker, measured = ">" if ascii_only else "▸", self._measured()
        for name in rows:
            running = board.running if board.running is not None and board.running.name == name else None
            place = board.places.get(name)
            waiting = name not in measured and running is None
            style = "bold green" if place is not None and place.rank == 1 else "dim" if waiting else ""
            cells = [Text(marker if running is not None else "", style="cyan")]
            if roomy:
                cells.append(Text("" if place is None else str(place.rank)))
            cells.append(Text(shorten(name, name_width, dots)))
            for size in columns:
                loss = board.losses.get((name, size))
                if loss is not None:
                    cells.append(Text(number(loss, 4)))
                elif running is not None and running.size == size:
                    done = f"{percent(min(running.done, 1.0), 0)} %" if running.done > 0 else dots
                    cells.append(Text(done, style="cyan"))
                else:
                    cells.append(Text(""))
            for _, is_loss in predictions:
                value = math.nan if place is None else place.predicted if is_loss else place.probability
                if math.isnan(value):
                    cells.append(Text(""))
                else:
                    cells.append(Text(number(value, 4) if is_loss else f"{percent(value, 0)} %"))
            table.add_row(*cells, style=style)
        return table


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()
