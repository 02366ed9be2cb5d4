import io

import pytest

from lensjax.finetune import FineTuner
from lensjax.select.cli import main as command_main
from lensjax.select.cli import run


@pytest.fixture
def command():
    """Run the command in this process: arguments -> (exit status, text on standard output)."""

    def command(*arguments):
        out = io.StringIO()
        status = run([str(a) for a in arguments], out, io.StringIO())
        return status, out.getvalue()

    return command


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run the command and return its one-line message, checking that it exits with status 2 and trains nothing."""
    monkeypatch.setattr(FineTuner, "__init__", lambda *_: pytest.fail("training began"))

    def refused(*arguments):
        assert command_main([str(a) for a in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("lensjax.select: ")
        assert captured.err.endswith("\n")
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("lensjax.select: ").strip()

    return refused
