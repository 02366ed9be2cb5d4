import io

import pytest

from lensjax._display import duration
from lensjax.progress.console import LINE_INTERVAL, Console
from lensjax.progress.state import ActiveRun, SelectionState


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3661, "1:01:01")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_elsewhere_than_on_a_terminal_only_whole_lines_are_written():
    stream = io.StringIO()
    console = Console(stream)
    console.status("working")
    console.line("done")
    assert stream.getvalue().endswith("] done\n")
    assert "working" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_where_there_is_no_view_a_status_becomes_a_line_once_in_a_while():
    now = [0.0]
    for stream in (io.StringIO(), Terminal()):
        now[0] = 0.0
        console = Console(stream, clock=lambda: now[0])
        console.line("begins")
        for _ in range(10):
            now[0] += LINE_INTERVAL / 4
            console.status(f"at {now[0]:g}")
        assert stream.getvalue() == "[0:00] begins\n[0:20] at 20\n[0:40] at 40\n"


def test_nothing_in_a_line_is_obeyed():
    stream = io.StringIO()
    Console(stream).line("a\x1b[2Jb\x07\x9b \u202e \ud800 é 模\nsecond line\r\n\tthird")
    assert stream.getvalue() == "[0:00] a?[2Jb?? ? ? é 模\n  second line\n  ?third\n"


def test_only_a_verbose_console_writes_details():
    for verbose, quiet, written in ((False, False, ""), (True, False, "[0:00] a detail\n"), (True, True, "")):
        stream = io.StringIO()
        console = Console(stream, verbose=verbose, quiet=quiet)
        console.detail("a detail")
        assert stream.getvalue() == written
        assert console.verbose == (verbose and not quiet)


def test_quiet_writes_nothing():
    stream = Terminal()
    console = Console(stream, quiet=True)
    state = SelectionState("title", "nats", ("a", "b"), (10, 20), 100, running=ActiveRun("a", 10, "loading"))
    with console.follow(state):
        console.status("working")
        console.next("next")
        console.line("done")
        console.refresh(now=True)
    assert not console.live
    assert stream.getvalue() == ""
