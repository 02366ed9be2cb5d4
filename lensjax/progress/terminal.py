"""The live view of a selection on a terminal: candidates, their losses, the current run, the ranking so far.

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

from lensjax._display import duration, number, percent, printable
from lensjax.progress.state import SelectionState

REDRAW_INTERVAL = 0.25  # seconds between two drawings
WIDE = 60  # columns from which there is room for ranks and full titles
LOSS_WIDTH = 6  # columns of a loss
MIN_NAME_WIDTH = 10  # columns of a name; names may take up to a quarter of the terminal before losses get any
MAX_LENGTH = 200  # characters of a name or a reason that are ever shown


def screen_for(stream: TextIO) -> rich.console.Console | None:
    """Return a console that draws on a terminal; None if its cursor cannot be moved (TERM=dumb) or should not be."""
    screen = rich.console.Console(
        file=stream, force_terminal=True, force_jupyter=False, markup=False, emoji=False, highlight=False
    )
    return screen if screen.is_interactive and not screen.is_dumb_terminal else None


def shorten(text: str, width: int, dots: str = "…") -> str:
    """Shorten a text to a number of columns by leaving out its middle."""
    text = printable(text if len(text) <= 2 * MAX_LENGTH else text[:MAX_LENGTH] + text[-MAX_LENGTH:])
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
    """Shorten a text to a number of columns by leaving out its end."""
    text = printable(text[: 2 * MAX_LENGTH])
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > width - len(dots):
        text = text[:-1]
    return text + dots[: max(width, 0)]


class LiveView:
    """Draws the state of a selection into a region at the bottom of a terminal; lines go above it.

    Parameters
    ----------
    state : SelectionState
    screen : rich.console.Console
    stream : text stream
        The terminal, asked for its size before each drawing.
    elapsed : callable
        Seconds so far.

    Attributes
    ----------
    interrupted : bool
        Whether the current run was interrupted.
    """

    def __init__(
        self, state: SelectionState, screen: rich.console.Console, stream: TextIO, elapsed: Callable[[], float]
    ) -> None:
        self.state, self.screen, self.stream, self.elapsed = state, screen, stream, elapsed
        self.interrupted = False
        self._drawn = -math.inf
        self._live = rich.live.Live(
            self,
            console=screen,
            auto_refresh=False,
            transient=False,
            # Other output to the terminal goes above the region too; results that go to a file are left alone.
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
        """Draw again; unless `now`, only if the last drawing is not recent."""
        if now or self.elapsed() - self._drawn >= REDRAW_INTERVAL:
            self._drawn = self.elapsed()
            self._measure()
            self._live.refresh()

    def line(self, text: str) -> None:
        """Write a text above the region."""
        self._drawn = self.elapsed()
        self._measure()
        self.screen.print(Text(text, overflow="fold"))

    def _measure(self) -> None:
        """Ask the terminal for its size, which may have changed; it need not be the terminal of this process."""
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
        state = self.state

        def cut(text: str, style: str = "") -> Text:
            return Text(crop(text, width, dots), style=style, no_wrap=True, end="")

        def folded(text: str, style: str = "", most: int = 2) -> list[Text]:
            lines = [line.plain for line in Text(printable(text)).wrap(console, width)]
            rest = " ".join(lines[most - 1 :])
            return [cut(line.rstrip(), style) for line in (*lines[: most - 1], rest)[:most] if line]

        above = [cut(f"{state.title}; losses in {state.unit}", "bold")]
        below = [cut(text, "red") for text in self._failures(width, dots, max(1, (height - 8) // 3))]
        below += [line for text, style in self._status() for line in folded(text, style)]
        columns, left_out = self._columns(width)
        room = max(1, height - len(above) - len(below) - 1)
        rows, hidden = self._rows(room)
        notes = [part for part in (hidden, left_out) if part]
        if notes:
            rows, hidden = self._rows(max(1, room - 1))
            notes = [part for part in (hidden, left_out) if part]
            below.insert(0, cut("; ".join(notes), "dim"))
        yield from self._lines(above)
        yield self._table(rows, columns, width, dots, ascii_only=options.ascii_only)
        yield from self._lines(below, last="")

    @staticmethod
    def _lines(lines: Sequence[Text], last: str = "\n") -> list[Text]:
        """Set the ends of lines: line breaks, except that the last line of the region has none."""
        for at, line in enumerate(lines):
            line.end = last if at == len(lines) - 1 else "\n"
        return list(lines)

    def _failures(self, width: int, dots: str, most: int) -> list[str]:
        """Return a line for each candidate that failed, `most` lines at most."""
        failures = self.state.failures.items()
        lines = [f"{shorten(name, width // 2, dots)} failed: {why}" for name, why in failures]
        if len(lines) > most:
            lines = [*lines[: most - 1], f"{len(lines) - most + 1} more failed" if most > 1 else f"{len(lines)} failed"]
        return lines

    def _status(self) -> list[tuple[str, str]]:
        """Return the current run, and the time and budget spent so far, with styles."""
        state, parts = self.state, []
        if state.running is not None:
            what = "stopped at" if self.interrupted else "now"
            size = {None: "", 0: ", zero-shot"}.get(state.running.size, f", {state.running.size or 0:,} samples")
            parts.append((f"{what}: {shorten(state.running.name, MAX_LENGTH)}{size}: {state.running.activity}", "cyan"))
        spent = [f"{duration(self.elapsed())} so far"]
        # The time left is that of the losses to be measured.
        if state.running is not None and state.running.size is not None:
            spent.append(state.time_left)
        parts.append(("; ".join(filter(None, [*spent, state.spent])), ""))
        return parts

    def _rows(self, room: int) -> tuple[list[str], str]:
        """Return the candidates to show, the best first and the running one always, and a note on the others."""
        state, measured = self.state, self._measured()
        named = [n for n in state.names if n not in state.failures]
        last = len(state.names) + 1
        named.sort(key=lambda n: (state.ranking[n].rank if n in state.ranking else last, n not in measured))
        shown = named[:room]
        running = state.running.name if state.running is not None else ""
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
        return {name for name, _ in self.state.losses}

    def _columns(self, width: int) -> tuple[list[int], str]:
        """Return the sizes for whose losses there is room, and a note on the others."""
        state = self.state
        left = width - self._fixed(width) - max(MIN_NAME_WIDTH, min(self._longest(), width // 4))
        running = state.running.size if state.running is not None else None
        measured = {size for _, size in state.losses}
        # The size that is running comes first, then those that were measured, the largest first.
        by_priority = sorted(state.sizes, key=lambda s: (s != running, s not in measured, -s))
        shown: list[int] = []
        for size in by_priority:
            left -= 1 + self._width(size)
            if left < 0:
                break
            shown.append(size)
        hidden = [s for s in state.sizes if s not in shown]
        note = f"without {', '.join(f'{s:,}' for s in hidden)} samples" if hidden else ""
        return sorted(shown), note

    def _longest(self) -> int:
        """Return the width of the longest name."""
        return max((cell_len(printable(name[: 2 * MAX_LENGTH])) for name in self.state.names), default=0)

    @staticmethod
    def _width(size: int) -> int:
        return max(LOSS_WIDTH, len(f"{size:,}"))

    def _fixed(self, width: int) -> int:
        """Return the width of everything beside names and losses."""
        wide = width >= WIDE
        return 2 + (1 + self._digits() if wide else 0) + sum(1 + len(title) for title, _ in self._predictions(wide))

    def _digits(self) -> int:
        """Return the width of a rank."""
        return max(2, len(str(len(self.state.names))))

    def _predictions(self, wide: bool) -> list[tuple[str, bool]]:
        """Return the columns of the ranking for which its method has numbers: titles, and whether they are losses."""
        entries = self.state.ranking.values()
        columns = []
        if not entries or any(math.isfinite(p.predicted) for p in entries):
            columns.append(("predicted" if wide else "expect", True))
        if not entries or any(math.isfinite(p.probability) for p in entries):
            columns.append(("P(best)" if wide else "best?", False))
        return columns

    def _table(self, rows: list[str], columns: list[int], width: int, dots: str, *, ascii_only: bool) -> Table:
        state, wide = self.state, width >= WIDE
        free = width - self._fixed(width) - sum(1 + self._width(s) for s in columns)
        name_width = max(1, min(free, max(MIN_NAME_WIDTH, self._longest())))
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
        predictions = self._predictions(wide)
        table.add_column("", width=1)
        if wide:
            table.add_column("#", width=self._digits(), justify="right", no_wrap=True)
        table.add_column("candidate"[:name_width], width=name_width, no_wrap=True)
        for size in columns:
            table.add_column(f"{size:,}", width=self._width(size), justify="right", no_wrap=True)
        for title, _ in predictions:
            table.add_column(title, width=len(title), justify="right", no_wrap=True)
        marker, measured = ">" if ascii_only else "▸", self._measured()
        for name in rows:
            running = state.running if state.running is not None and state.running.name == name else None
            place = state.ranking.get(name)
            waiting = name not in measured and running is None
            style = "bold green" if place is not None and place.rank == 1 else "dim" if waiting else ""
            cells = [Text(marker if running is not None else "", style="cyan")]
            if wide:
                cells.append(Text("" if place is None else str(place.rank)))
            cells.append(Text(shorten(name, name_width, dots)))
            for size in columns:
                loss = state.losses.get((name, size))
                if loss is not None:
                    cells.append(Text(number(loss, 4)))
                elif running is not None and running.size == size:
                    done = f"{percent(min(running.fraction, 1.0), 0)} %" if running.fraction > 0 else dots
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
