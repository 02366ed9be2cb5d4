import shutil
from pathlib import Path

import pytest

from lensjax.finetune import FineTuner
from lensjax.jobs import runner
from lensjax.select import driver
from lensjax.select.cli import main as command_main


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


@pytest.fixture
def mistake(capsys, monkeypatch, tmp_path, tiny_models, tiny_task):
    """Make a mistake as a user would: options after those of a good selection -> the message.

    The present directory holds the models `one` and `two` and 140 samples in `task.jsonl`. The message must be all that
    is printed; no run may begin, and no file may be made or changed.
    """
    monkeypatch.chdir(tmp_path)
    for name, source in zip(("one", "two"), tiny_models, strict=True):
        shutil.copytree(source, name)
    shutil.copy(tiny_task, "task.jsonl")
    monkeypatch.setattr(driver, "select", lambda _: pytest.fail("a run began"))
    sizes = ("--smallest", 10, "--visible", 40, "--validation", 20, "--test", 20, "--max-length", 24)

    def files():
        return {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}

    def mistake(*options, task="task.jsonl", models=("one", "two"), good=True, lines=1):
        if good:
            options = ("--models", *models, "--task", task, *sizes, "--out", "out", *options)
        before = files()
        status = command_main([str(option) for option in options])
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "")
        assert files() == before
        assert not Path("out").exists()
        assert not Path("runs").exists()
        assert captured.err.startswith("lensjax.select: ")
        assert captured.err.endswith("\n")
        assert captured.err.count("\n") == lines
        return captured.err.removeprefix("lensjax.select: ").rstrip("\n")

    return mistake


@pytest.fixture
def settings(tiny_models, tiny_task):
    rest = {"smallest": 10, "visible": 40, "validation": 20, "test": 20, "max_length": 24}
    return {"models": tuple(map(str, tiny_models)), "task": str(tiny_task), **rest}


@pytest.fixture
def trained(monkeypatch, scripted_run):
    asked = []
    monkeypatch.setattr(runner.CandidateRunner, "run", scripted_run(lambda _, size: 3.0 / (1 + size) ** 0.1, asked))
    return asked
