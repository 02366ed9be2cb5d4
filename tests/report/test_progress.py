import io

import pytest

from lensjax.report.progress import Console, duration


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


def test_on_a_terminal_a_status_replaces_the_last_one_completely():
    stream = Terminal()
    console = Console(stream)
    console.status("a long status line")
    console.status("short")
    console.line("done")
    shown = ""
    for part in stream.getvalue().split("\n")[0].split("\r"):
        shown = part + shown[len(part) :]  # what a terminal shows after carriage returns
    assert shown.rstrip().endswith("] done")
    assert "long" not in shown
    assert "short" not in shown


def test_a_status_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    Console(stream).status("x" * 200)
    assert len(stream.getvalue().strip("\r")) == 39


def test_quiet_writes_nothing():
    stream = Terminal()
    console = Console(stream, quiet=True)
    console.status("working")
    console.line("done")
    assert stream.getvalue() == ""
