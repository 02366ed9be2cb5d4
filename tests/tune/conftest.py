import io

import pytest

from lensjax.finetune import FineTuner
from lensjax.tune import cli


@pytest.fixture(scope="session")
def tune_command():
    """Run the command in this process: arguments -> (exit status, standard output, progress)."""

    def tune_command(*arguments):
        out, err = io.StringIO(), io.StringIO()
        status = cli.run([str(a) for a in arguments], out, err)
        return status, out.getvalue(), err.getvalue()

    return tune_command


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run the command and return its one-line message, checking that it exits with status 2 and trains nothing."""
    monkeypatch.setattr(FineTuner, "__init__", lambda *_: pytest.fail("training began"))

    def refused(*arguments):
        assert cli.main([str(a) for a in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("lensjax.tune: ")
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("lensjax.tune: ").strip()

    return refused
