"""Mistakes in where results go and in what is continued; what ends with another status than 2."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from lensjax.errors import SelectionError
from lensjax.select import cli, driver

SIZES = ("--smallest", 10, "--visible", 40, "--validation", 20, "--test", 20, "--max-length", 24)
GOOD = ("--models", "one", "two", "--task", "task.jsonl", *SIZES)
ANOTHER = "Name a new directory, or repeat the options of that run to continue it."


@pytest.fixture
def begun(mistake, monkeypatch, capsys):
    """Interrupt a selection in `old` before its first run; return what makes mistakes after it."""
    own = driver.select

    def execute(session):
        session.journal.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "select", execute)
    assert cli.main([str(option) for option in (*GOOD, "--out", "old")]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "\nlensjax.select: interrupted. Runs that had finished are kept; the same command continues.\n"
    )
    monkeypatch.setattr(driver, "select", own)
    return mistake


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("task.jsonl", "is a file; name a directory."),
        ("task.jsonl/x", "cannot be written (Not a directory). Name another directory."),
        ("one", "is not empty and holds no lensjax run. Name a new directory."),
        (".", "is not empty and holds no lensjax run. Name a new directory."),
        ("/proc/none", "cannot be written (No such file or directory). Name another directory."),
    ],
)
def test_run_directories(mistake, out, message):
    assert mistake("--out", out) == f"--out {out}: {message}"


@pytest.mark.parametrize(
    ("options", "differ", "differences"),
    [
        (("--seed", 3), "seed, task", "seed 0, not 3; another task"),
        (("--max-epochs", 3, "--tau", 2), "plan, tau", "plan max_epochs 10, not 3; tau 5.0, not 2.0"),
        (
            ("--smallest", 5, "--target", 90),
            "sizes, target",
            "sizes [10, 20, 40], not [5, 10, 20, 40]; target 100, not 90",
        ),
        (("--models", "one", "one+lora"), "candidates", "no candidate one+lora; candidate two too"),
        (("--input-field", "target", "--target-field", "input"), "task", "another task"),
    ],
)
def test_another_selection_in_the_run_directory(begun, options, differ, differences):
    assert begun("--out", "old", *options) == (
        f"--out old: holds another run ({differ} differ). {ANOTHER} It has {differences}."
    )


def test_a_candidate_that_has_changed(begun):
    config = Path("two/config.json")
    config.write_text(config.read_text() + "\n")
    assert begun("--out", "old") == (
        f"--out old: holds another run (candidates differ). {ANOTHER} It has another candidate two."
    )


def test_a_run_directory_of_a_version_with_other_tokens(begun):
    path = Path("old/specification.json")
    specification = json.loads(path.read_text())
    assert specification.pop("encoding") == 2
    path.write_text(json.dumps(specification))
    assert begun("--out", "old") == (
        "--out old: was made by a version of lensjax that turned samples into tokens in another way, so its losses do "
        "not go with new ones. Name a new directory; --losses old reads what is there, and the version that began it "
        "can continue it."
    )


def test_damaged_run_directories(begun):
    Path("old/specification.json").write_text("{")
    assert begun("--out", "old") == "--out old: specification.json is damaged; name a new directory."


def test_a_run_directory_in_use(begun):
    handle = os.open("old", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert begun("--out", "old") == (
        "--out old: another lensjax.select is running there. Wait for it or name a new directory."
    )
    os.close(handle)


def test_nothing_to_resume(begun, tmp_path):
    remedy = "name its run directory, or give again the command that started it."
    for place in ("nowhere", "one", "task.jsonl"):
        assert begun("--resume", place, good=False) == (
            f"--resume {tmp_path / place}: holds no command.json of a selection; {remedy}"
        )
    command = Path("old/command.json")
    stored = json.loads(command.read_text())
    command.write_text(json.dumps(stored | {"directory": "/gone/away"}))
    assert begun("--resume", "old", good=False) == (
        f"--resume {tmp_path / 'old'}: was started in /gone/away, which is no directory now; make it again."
    )
    for damaged in ("{", "[" * 100000, '{"arguments": ' + "9" * 5000 + "}", "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        command.write_text(damaged, "latin-1")
        assert begun("--resume", "old", good=False) == (
            f"--resume {tmp_path / 'old'}: holds no command.json of a selection; {remedy}"
        )


@pytest.mark.parametrize(("flag", "value"), [("--out", "new"), ("--losses", "published:flan")])
def test_resuming_in_another_place(begun, tmp_path, flag, value):
    assert begun("--resume", "old", flag, value, good=False) == (
        f"{flag} {value}: --resume {tmp_path / 'old'} continues the selection there; remove {flag} or --resume."
    )


def test_resuming_something_else(begun, tmp_path):
    assert begun("--resume", "old", "--seed", 3, good=False) == (
        f"--out {tmp_path / 'old'}: holds another run (seed, task differ). {ANOTHER} It has seed 0, not 3; "
        "another task."
    )
    Path("task.jsonl").rename("tasks.jsonl")
    assert begun("--resume", "old", good=False) == (
        "task.jsonl: no such file. --task takes a file (.jsonl, .jsonl.gz, .csv, .csv.gz, .parquet, .txt, .txt.gz), "
        "the id of a data set (owner/name), or one of flan, wikitext, gigaword, wmt19. Did you mean tasks.jsonl?"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json", "nowhere/x.json"), "--json nowhere/x.json: there is no directory nowhere; make it first."),
        (("--json", "one"), "--json one: is a directory; name a file."),
        (("--html", "one"), "--html one: is a directory; name a file."),
        (("--html", "no/report.html"), "--html no/report.html: there is no directory no; make it first."),
        (("--figures", "task.jsonl"), "--figures task.jsonl: is a file; name a directory."),
        (("--figures", "task.jsonl/x"), "--figures task.jsonl/x: task.jsonl is a file; name a directory."),
        (("--json", "x", "--html", "x"), "--json and --html are both x; name two files."),
        (
            ("--figure-format", "png"),
            "--figure-format: no figures are asked for; add --figures DIR, or remove --figure-format.",
        ),
    ],
)
def test_files_that_cannot_be_written(mistake, options, message):
    assert mistake(*options) == message


def test_a_disk_that_is_full(mistake, monkeypatch, capsys):
    def execute(session):
        session.journal.close()
        raise SelectionError("out/runs.jsonl: cannot be written (No space left on device). Make room.")

    monkeypatch.setattr(driver, "select", execute)
    assert cli.main([str(option) for option in (*GOOD, "--out", "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "lensjax.select: out/runs.jsonl: cannot be written (No space left on device). Make room.\n"
