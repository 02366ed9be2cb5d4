"""The live view, as a terminal shows it."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading

import numpy as np
import pytest
import rich.console
from rich.cells import cell_len

from lensjax.progress.console import Console
from lensjax.progress.state import ActiveRun, RankedCandidate, SelectionState
from lensjax.progress.terminal import REDRAW_INTERVAL, LiveView, crop, screen_for, shorten
from lensjax.selectors import Scores
from support.hostile import HOSTILE

SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Screen:
    """A terminal: rows of characters, a cursor, and the few sequences that rich uses; any other is an error."""

    def __init__(self, columns, lines):
        self.columns, self.height = columns, lines
        self.rows, self.row, self.column, self.cursor_shown = [[]], 0, 0, True
        self.sequences = set()

    def feed(self, text):
        while text:
            found = SEQUENCE.match(text)
            if found:
                self.obey(*found.groups())
                text = text[found.end() :]
                continue
            self.put(text[0])
            text = text[1:]
        return self

    def obey(self, numbers, kind):
        self.sequences.add((numbers, kind))
        if kind == "A":
            self.row -= int(numbers or 1)
            # What has left the screen at its top cannot be reached any more.
            assert self.row >= max(0, len(self.rows) - self.height)
        elif (kind, numbers) == ("K", "2"):
            self.rows[self.row] = []
        elif kind in "hl":
            assert numbers == "?25"
            self.cursor_shown = kind == "h"
        else:
            assert kind == "m"

    def put(self, character):
        if character == "\n":
            self.row, self.column = self.row + 1, 0
            if self.row == len(self.rows):
                self.rows.append([])
        elif character == "\r":
            self.column = 0
        else:
            assert character.isprintable(), repr(character)
            width = cell_len(character)
            if self.column + width > self.columns:
                self.put("\n")
            row = self.rows[self.row]
            row += [" "] * (self.column + width - len(row))
            row[self.column : self.column + width] = [character, *[""] * (width - 1)]
            self.column += width

    @property
    def text(self):
        return "\n".join("".join(row).rstrip() for row in self.rows)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def everything(terminal, stream):
    """Return what was written to a terminal and not read yet: up to a bell that is rung now."""
    stream.write("\a")
    stream.flush()
    found = b""
    while not found.endswith(b"\a"):
        found += os.read(terminal, 1 << 16)
    return found[:-1].decode()


pytestmark = pytest.mark.usefixtures("common_terminal")


@pytest.fixture
def follow():
    """Make a terminal: (columns, lines, encoding, options of Console) -> (console, its stream, its clock as a list)."""

    def follow(columns=100, lines=30, encoding="utf-8", **options):
        stream, now = Terminal(), [0.0]
        stream.encoding = encoding
        screen = rich.console.Console(
            file=stream, force_terminal=True, width=columns, height=lines, markup=False, emoji=False, highlight=False
        )
        return Console(stream, clock=lambda: now[0], screen=screen, **options), stream, now

    return follow


SIZES = (0, 200, 400, 800, 1600)


def state(names=("alpha", "beta", "gamma", "delta"), measured=2):
    """A selection under way: some candidates are measured and ranked, the next one is running."""
    found = SelectionState("wikitext: choosing for 12,800 samples", "nats per token", tuple(names), SIZES, 12800)
    for number, name in enumerate(names[:measured]):
        found.losses |= {(name, size): 3.0 - 0.1 * number - size / 10000 for size in SIZES}
        found.ranking[name] = RankedCandidate(number + 1, 1.5 + 0.01 * number, 0.5 / (number + 1))
    if measured < len(names):
        found.losses[names[measured], 1600] = 2.2222
        found.running = ActiveRun(names[measured], 800, "step 13 of at most 60, validation loss 2.8123", 0.21)
    found.time_left, found.spent = "at most about 12:40 left", "budget 3 h: 62 % spent, 38 % left"
    return found


def shown(stream, columns=100, lines=30):
    return Screen(columns, lines).feed(stream.getvalue()).text


def draw(found, follow, columns, lines, **options):
    """Return what stands on the terminal in the middle of a run, and the stream."""
    console, stream, _ = follow(columns, lines, **options)
    with console.follow(found):
        return shown(stream, columns, lines), stream


def test_everything_there_is_to_see_is_on_the_screen(follow):
    found = state()
    found.failures["delta"] = "MemoryError: no room"
    text, stream = draw(found, follow, 100, 30)
    lines = text.split("\n")
    assert lines[0] == "wikitext: choosing for 12,800 samples; losses in nats per token"
    assert lines[1].split() == ["#", "candidate", "0", "200", "400", "800", "1,600", "predicted", "P(best)"]
    assert lines[2].split() == ["1", "alpha", "3.0000", "2.9800", "2.9600", "2.9200", "2.8400", "1.5000", "50", "%"]
    assert lines[3].split() == ["2", "beta", "2.9000", "2.8800", "2.8600", "2.8200", "2.7400", "1.5100", "25", "%"]
    assert lines[4].split() == ["▸", "gamma", "21", "%", "2.2222"]
    # Under its size.
    assert lines[4].index("21 %") + 4 == lines[1].index("800") + 3
    assert lines[5] == "delta failed: MemoryError: no room"
    assert "\x1b[31mdelta failed" in stream.getvalue()
    assert lines[6] == "now: gamma, 800 samples: step 13 of at most 60, validation loss 2.8123"
    assert lines[7] == "0:00 so far; at most about 12:40 left; budget 3 h: 62 % spent, 38 % left"
    assert len(lines) == 8


def test_a_run_that_has_not_begun_and_zero_shot_and_a_measurement_of_tangents_are_named(follow):
    found = state()
    found.running = ActiveRun("gamma", 0, "loading and compiling; the model as it is")
    text, _ = draw(found, follow, 100, 30)
    assert "now: gamma, zero-shot: loading and compiling; the model as it is" in text
    assert re.search(r"▸ +gamma +… +2\.2222\n", text)
    found.running = ActiveRun("beta", None, "kernel and Hessian trace on 8 samples")
    text, _ = draw(found, follow, 100, 30)
    assert "now: beta: kernel and Hessian trace on 8 samples" in text
    # Nobody knows how long that takes: the time left is that of the losses.
    assert "left" in found.time_left
    assert found.time_left not in text


@pytest.mark.parametrize(("columns", "lines"), [(100, 24), (60, 20), (40, 24), (40, 12)])
def test_thirty_candidates_fit_and_those_that_matter_are_shown(follow, columns, lines):
    names = [f"organisation/model-{number:02}" for number in range(30)]
    found = state(names, measured=20)
    found.failures = dict.fromkeys(names[-5:], "MemoryError: " + "no room " * 30)
    text, _ = draw(found, follow, columns, lines)
    rows = text.split("\n")
    assert len(rows) < lines
    assert max(map(cell_len, rows)) <= columns
    table = [row for row in rows if re.match(r"[▸ ] .*(model|o…|or…|org…)", row) and "failed" not in row]
    # Leaders in their order, the one that runs last.
    assert [re.search(r"-\d\d", row)[0] for row in table] == [*(f"-{n:02}" for n in range(len(table) - 1)), "-20"]
    assert table[-1].startswith("▸")
    assert "21 %" in table[-1]
    hidden = 25 - len(table)
    assert f"{hidden} more candidates: {20 - (len(table) - 1)} measured, 4 not yet"[:38] in text
    assert "failed" in text
    shown_failures = sum("failed:" in row for row in rows)
    more = re.search(r"(\d+)( more)? failed$", text, re.MULTILINE)
    assert shown_failures + (int(more[1]) if more else 0) == 5


def test_what_has_no_room_is_said(follow):
    text, _ = draw(state(), follow, 40, 24)
    # What is measured now, then the largest.
    assert text.split("\n")[1].split() == ["candidate", "800", "1,600", "expect", "best?"]
    assert "without 0, 200, 400 samples" in text
    text, _ = draw(state(), follow, 100, 24)
    assert "without" not in text


@pytest.mark.parametrize("columns", [1, 2, 5, 12, 20, 30])
@pytest.mark.parametrize("lines", [1, 2, 4, 7])
def test_however_small_a_terminal_is_nothing_breaks(follow, columns, lines):
    names = [f"organisation/model-{number:02}" for number in range(30)]
    console, stream, now = follow(columns, lines)
    found = state(names, measured=20)
    found.failures = {names[29]: "no room"}
    with console.follow(found):
        for _ in range(3):
            now[0] += 1
            console.refresh()
    assert Screen(columns, lines).feed(stream.getvalue()).cursor_shown


def test_methods_without_predictions_or_probabilities_have_no_columns_for_them(follow):
    found = state()
    found.ranking = {
        "beta": RankedCandidate(1, float("nan"), float("nan")),
        "alpha": RankedCandidate(2, float("nan"), float("nan")),
    }
    lines = draw(found, follow, 100, 30)[0].split("\n")
    assert lines[1].split() == ["#", "candidate", "0", "200", "400", "800", "1,600"]
    assert [line.split()[1] for line in lines[2:4]] == ["beta", "alpha"]


def test_names_that_mean_harm_are_only_shown(follow):
    names = (*HOSTILE, "[bold red]markup[/bold red]", ":smile: \x07\x9b31m", "模型" * 30, "new\nline\ttab")
    found = state(names, measured=5)
    found.failures = {names[-2]: "Error: \x1b[2J[red]boom[/red]\n\x1b]0;title\x07 more"}
    for columns in (200, 60, 40):
        # The screen refuses any character that is not printable and any sequence that rich does not need.
        text, _ = draw(found, follow, columns, 30)
        assert max(map(cell_len, text.split("\n"))) <= columns
    console, stream, _ = follow(200, 30)
    with console.follow(found):
        for name in names:
            console.line(f"{name}: done")
    text = shown(stream, 200)
    assert "[bold red]markup[/bold red]" in text
    assert ":smile: ??31m" in text
    assert "?[2J[red]boom[/red]" in text


def test_on_a_terminal_without_unicode_only_ascii_is_drawn(follow):
    found = state(["x" * 80, "beta", "gamma"])
    text, stream = draw(found, follow, 60, 20, encoding="ascii")
    assert stream.getvalue().isascii()
    assert re.search(r"^> +gamma .* 21 %", text, re.MULTILINE)


def test_without_colours_nothing_is_coloured(monkeypatch):
    for value, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        stream = Terminal()
        console = Console(stream)
        found = state()
        found.failures["delta"] = "no room"
        with console.follow(found):
            pass
        assert bool(re.search(r"\x1b\[[0-9;]*3\d[0-9;]*m", stream.getvalue())) == coloured
        assert "delta failed: no room" in shown(stream, 80, 25)


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TTY_INTERACTIVE", "0")])
def test_where_the_cursor_cannot_be_moved_there_are_only_lines(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    stream = Terminal()
    assert screen_for(stream) is None
    console = Console(stream)
    with console.follow(state()):
        console.line("a line")
    assert not console.live
    assert stream.getvalue() == "[0:00] a line\n"


def test_elsewhere_than_on_a_terminal_following_changes_nothing(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = Console(stream)
    with console.follow(state()):
        console.next("what begins")
        console.refresh(now=True)
        console.line("a line")
    assert stream.getvalue() == "[0:00] what begins\n[0:00] a line\n"


def test_lines_stay_above_the_view_which_follows_the_selection(follow):
    console, stream, now = follow()
    found = state()
    with console.follow(found):
        console.line("alpha: a long line " + "and so on " * 20)
        found.running.activity = "step 14"
        now[0] = 61.0
        console.line("beta: test loss 1.0")
        console.status("not a line")
    lines = shown(stream).split("\n")
    above = lines.index("wikitext: choosing for 12,800 samples; losses in nats per token")
    assert (
        " ".join(lines[:above]).split()
        == ("[0:00] alpha: a long line " + "and so on " * 20 + "[1:01] beta: test loss 1.0").split()
    )
    assert lines[above + 6 :] == [
        "now: gamma, 800 samples: step 14",
        "1:01 so far; at most about 12:40 left; budget 3 h: 62 % spent, 38 % left",
        "",
    ]
    assert shown(stream).count("now: ") == 1


def test_it_is_drawn_at_most_four_times_a_second_but_at_once_when_it_must(follow):
    console, stream, now = follow()
    found = state()
    with console.follow(found):
        drawn = []
        for _ in range(100):
            now[0] += REDRAW_INTERVAL / 10
            before = len(stream.getvalue())
            console.status("step")
            drawn.append(len(stream.getvalue()) > before)
        assert 9 <= sum(drawn) <= 10
        before = len(stream.getvalue())
        console.refresh()
        assert len(stream.getvalue()) == before
        found.running = ActiveRun("alpha", 400, "loading")
        console.next("alpha: next 400 samples")
        assert "now: alpha, 400 samples: loading" in shown(stream)
        assert "alpha: next" not in shown(stream)
    console, stream, _ = follow(verbose=True)
    with console.follow(found):
        console.next("alpha: next 400 samples")
    assert shown(stream).startswith("[0:00] alpha: next 400 samples\n")


def test_an_interrupt_gives_the_cursor_back_and_says_where_it_stopped(follow):
    console, stream, _ = follow()

    def interrupted():
        with console.follow(state()):
            assert not Screen(100, 30).feed(stream.getvalue()).cursor_shown
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    screen = Screen(100, 30).feed(stream.getvalue())
    assert screen.cursor_shown
    assert screen.column == 0
    assert "stopped at: gamma, 800 samples: step 13" in screen.text
    console.line("afterwards")
    assert shown(stream).endswith("38 % left\n[0:00] afterwards\n")


def test_an_interrupt_while_drawing_gives_the_cursor_back(follow, monkeypatch):
    console, stream, _ = follow()
    whole, drawn = LiveView._table, []

    def interrupted(view, *arguments, **options):
        drawn.append(1)
        if len(drawn) == 1:
            raise KeyboardInterrupt
        return whole(view, *arguments, **options)

    monkeypatch.setattr(LiveView, "_table", interrupted)
    with pytest.raises(KeyboardInterrupt), console.follow(state()):
        pytest.fail("the first drawing was not interrupted")
    assert Screen(100, 30).feed(stream.getvalue()).cursor_shown
    assert len(drawn) == 2


def test_no_thread_draws_and_what_others_print_goes_above(monkeypatch):
    out, stream = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(stream)
    threads = threading.active_count()
    with console.follow(state()):
        assert threading.active_count() == threads
        print("a warning", file=sys.stderr)
        # Results that go to a file are none of the terminal's business.
        print("a result")
    assert sys.stderr is stream
    assert shown(stream, 80, 25).startswith("a warning\nwikitext: ")
    assert out.getvalue() == "a result\n"


def test_a_terminal_that_is_resized_gets_what_fits():
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8", closefd=True) as stream:
        now = [0.0]

        def resize(columns, lines):
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

        def last_drawn():
            """Return the rows of the last drawing, styles left out."""
            text = SEQUENCE.sub("", everything(ours, stream)).replace("\r", "")
            return text[text.rindex("wikitext") :].split("\n")

        resize(120, 40)
        console = Console(stream, clock=lambda: now[0])
        with console.follow(state([f"organisation/a-model-{n}" for n in range(20)], measured=10)):
            assert len(last_drawn()) == 24
            for columns, lines in ((50, 12), (40, 30), (200, 50)):
                resize(columns, lines)
                now[0] += 1
                console.status("")
                rows = last_drawn()
                assert len(rows) < lines
                assert max(map(cell_len, rows)) <= columns
            assert len(rows) == 24
    os.close(ours)


def test_a_ranking_is_taken_over():
    found = state()
    scores = Scores(
        method="averaged",
        names=("alpha", "beta", "gamma"),
        score=np.array([2.0, 1.0, np.nan]),
        predicted_loss=np.array([2.1, 1.1, np.nan]),
        status=("", "", ""),
        used=np.ones((3, 5), bool),
        best_probability=np.array([0.2, 0.8, 0.0]),
    )
    found.update_ranking(scores)
    assert found.ranking == {"beta": RankedCandidate(1, 1.1, 0.8), "alpha": RankedCandidate(2, 2.1, 0.2)}
    found.update_ranking(None)
    assert found.ranking == {}


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [("short", 5, "short"), ("organisation/model-1B", 12, "org…model-1B"), ("abc", 1, "…"), ("abc", 0, "")],
)
def test_a_name_that_is_too_long_keeps_its_end(text, width, short):
    assert shorten(text, width) == short


def test_what_is_cut_never_fills_more_columns():
    for width in range(20):
        for text in ("模型" * 9, "a" * 1000, "é\u0301" * 30, "\x1b" * 50):
            for cut in (shorten, crop):
                assert cell_len(cut(text, width)) <= width
                assert cell_len(cut(text, width, "...")) <= width
    assert crop("a sentence", 6) == "a sen…"
