import dataclasses
import fcntl
import json
import os
import subprocess
import sys

import pytest

from lensjax._files import lock_directory, write_atomically
from lensjax.errors import InputError, SelectionError
from lensjax.journal import JOURNAL, Journal, Run, key_of, read_lines, run_of
from support import journal_worker, starting_at_once

SPECIFICATION = {"task": "t", "sizes": [1, 2]}


def run(key="k", **facts):
    return Run(key=key, candidate="a", size=200, test_loss=1.5, steps=3, flops=1e9, facts=facts)


def test_a_finished_run_is_on_disk_when_append_returns(tmp_path):
    journal = Journal(tmp_path / "r", SPECIFICATION)
    journal.append(run("one", history=[[0, 2.0]]))
    journal.append(run("two"))
    journal.close()
    again = Journal(tmp_path / "r", SPECIFICATION)
    assert len(again) == 2
    assert again.get("one") == run("one", history=[[0, 2.0]])
    assert again.get("three") is None


def test_a_torn_last_line_is_dropped_with_a_notice(tmp_path):
    journal = Journal(tmp_path, SPECIFICATION)
    journal.append(run("one"))
    journal.close()
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        again = Journal(tmp_path, SPECIFICATION)
        assert len(again) == 1
        assert "the last line was cut off and is dropped" in again.notices[0]
        again.append(run("two"))
        again.close()
        assert len(Journal(tmp_path, SPECIFICATION)) == 2


WRONG = {
    "test_loss": ("3.0", True, -1.0, float("nan"), float("inf"), [], {}),
    "flops": ("abc", None, float("nan"), -1, False),
    "seconds": ("1", None),
    "size": ("20", None, 0.5, -200, float("nan"), float("inf"), 1e300, 2**63, 10**300, True, [1]),
    "steps": ("x", None, 1.5),
    "tokens": (None, [], 2**64),
    "samples": (None, "3"),
    "candidate": (5, None, ["a"]),
    "key": ({}, 1, None),
    "part_of": (None, {}, 0),
    "reason": (None, 1),
    "facts": ([], None, "x", {"learning_rate": "0.1"}, {"parameters": [1]}, {"batch_size": True}),
    "unknown": (0,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_record_of_wrong_types_is_no_record(name, value):
    record = dataclasses.asdict(run("one"))
    assert run_of(record) == run("one")
    with pytest.raises(ValueError, match=next(iter(value)) if name == "facts" and isinstance(value, dict) else name):
        run_of({**record, name: value})


def test_a_line_that_cannot_be_read_is_left_out_with_a_notice_and_stays_in_the_file(tmp_path):
    journal = Journal(tmp_path, SPECIFICATION)
    journal.append(run("one"))
    journal.append(run("two"))
    journal.close()
    path = tmp_path / JOURNAL
    good = path.read_bytes().splitlines()
    bad = [
        b"rubbish",
        b"[1]",
        b"{}",
        b"\xff",
        b"[" * 100000,
        b'{"key": ' + b"9" * 5000 + b"}",
        good[0] + good[1],
        good[1].replace(b'"size": 200', b'"size": NaN'),
    ]
    path.write_bytes(b"\n".join([good[0], *bad, b"", good[1]]) + b"\n")
    before = path.read_bytes()
    again = Journal(tmp_path, SPECIFICATION)
    assert [r.key for r in again.lines] == ["one", "two"]
    assert len(again.notices) == len(bad)
    for number, notice in enumerate(again.notices, start=2):
        assert f"{path}, line {number}: not a run record (" in notice
        assert len(notice) < 400
    again.append(run("three"))
    assert path.read_bytes().startswith(before)
    assert [r.key for r in again.lines] == ["one", "two", "three"]
    assert [line.number for line in read_lines(path) if line.run is not None] == [1, 11, 12]


def test_lines_are_read_once_each(tmp_path):
    path = tmp_path / JOURNAL
    record = json.dumps(dataclasses.asdict(run("one"))).encode()
    path.write_bytes((record + b"\n") * 20000 + record[:20])
    lines = list(read_lines(path))
    assert len(lines) == 20001
    assert all(line.run == run("one") and line.complete for line in lines[:-1])
    assert (lines[-1].run, lines[-1].complete) == (None, False)


def test_a_directory_of_another_selection_is_refused_and_left_alone(tmp_path):
    Journal(tmp_path, SPECIFICATION).append(run())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"holds another run \(sizes differ\)\. Name a new directory"):
        Journal(tmp_path, {**SPECIFICATION, "sizes": [1, 2, 4]})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no lensjax run"):
        Journal(tmp_path, SPECIFICATION)
    with pytest.raises(InputError, match="is a file; name a directory"):
        Journal(tmp_path / "thesis.tex", SPECIFICATION)
    with pytest.raises(InputError, match="cannot be written"):
        Journal(tmp_path / "thesis.tex" / "below", SPECIFICATION)


def test_a_damaged_specification_is_refused(tmp_path):
    Journal(tmp_path, SPECIFICATION)
    for content in ("{", "[1]", "[" * 100000):
        (tmp_path / "specification.json").write_text(content)
        with pytest.raises(InputError, match=r"specification\.json is damaged"):
            Journal(tmp_path, SPECIFICATION)


def test_two_processes_cannot_use_one_directory_at_once(tmp_path):
    journal = Journal(tmp_path, SPECIFICATION)
    with pytest.raises(InputError, match=r"another lensjax\.select is running there"):
        Journal(tmp_path, SPECIFICATION)
    journal.close()
    assert len(Journal(tmp_path, SPECIFICATION)) == 0


def test_of_processes_that_start_at_once_one_owns_a_new_directory(tmp_path):
    done = subprocess.run(
        [sys.executable, starting_at_once.__file__, tmp_path, "60"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for first, second in json.loads(done.stdout):
        refusal = second if first == "owns it" else first
        assert sorted([first, second]) == sorted(["owns it", refusal])
        assert "another lensjax.select is running there. Wait for it or name a new directory." in refusal


def test_a_directory_removed_between_opening_and_locking_is_not_owned(tmp_path, monkeypatch):
    directory, whole, calls = tmp_path / "r", fcntl.flock, []

    def removed_meanwhile(handle, how):
        whole(handle, how)
        calls.append(handle)
        if len(calls) == 1:
            directory.rmdir()

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    journal = Journal(directory, SPECIFICATION)
    assert len(calls) == 2
    assert (directory / "specification.json").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="another lensjax"):
        Journal(directory, SPECIFICATION)
    journal.close()


def test_a_selection_of_something_else_is_said_before_waiting_for_it(tmp_path):
    journal = Journal(tmp_path, SPECIFICATION)
    with pytest.raises(InputError, match="holds another run"):
        Journal(tmp_path, {"task": "u"})
    journal.close()


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    handles = len(os.listdir("/proc/self/fd"))
    for what in (lambda: Journal(tmp_path / "r", SPECIFICATION), lambda: lock_directory(tmp_path, run(), "x")):
        with pytest.raises(InputError, match=r"cannot be locked \(Operation not supported\)\. Name a directory on"):
            what()
    assert len(os.listdir("/proc/self/fd")) == handles


def test_who_only_looks_changes_nothing_and_waits_for_nobody(tmp_path):
    writing = Journal(tmp_path / "r", SPECIFICATION)
    writing.append(run("one"))
    path = tmp_path / "r" / JOURNAL
    path.write_bytes(path.read_bytes() + b'{"key": "t')
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    looked = Journal(tmp_path / "r", SPECIFICATION, read_only=True)
    assert (len(looked), looked.get("one"), looked.notices) == (1, run("one"), [])
    with pytest.raises(ValueError, match="to be looked at only"):
        looked.append(run("two"))
    looked.close()
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    with pytest.raises(InputError, match="another lensjax"):
        Journal(tmp_path / "r", SPECIFICATION)  # still locked by the one that writes
    with pytest.raises(InputError, match="holds another run"):
        Journal(tmp_path / "r", {"task": "u"}, read_only=True)


def test_who_only_looks_makes_nothing_and_refuses_what_could_not_be_made(tmp_path, monkeypatch):
    assert len(Journal(tmp_path / "new" / "r", SPECIFICATION, read_only=True)) == 0
    (tmp_path / "empty").mkdir()
    assert len(Journal(tmp_path / "empty", SPECIFICATION, read_only=True)) == 0
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{tmp_path}/file is a file. Name another directory"):
        Journal(tmp_path / "file" / "r", SPECIFICATION, read_only=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written. Name another directory"):
        Journal(tmp_path / "r", SPECIFICATION, read_only=True)


def test_a_record_that_cannot_be_written_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    journal = Journal(tmp_path, SPECIFICATION)
    journal.append(run("one"))
    before = (tmp_path / JOURNAL).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SelectionError, match="No space left on device"):
            journal.append(run("two"))
    assert (tmp_path / JOURNAL).read_bytes() == before
    assert journal.get("two") is None
    journal.append(run("three"))
    journal.close()
    assert len(Journal(tmp_path, SPECIFICATION)) == 2


@pytest.mark.parametrize("mode", ["first short, then full", "few bytes at once", "interrupted"])
def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch, mode):
    journal = Journal(tmp_path, SPECIFICATION)
    journal.append(run("one"))
    before = (tmp_path / JOURNAL).read_bytes()
    whole, calls = os.write, []

    def short(handle, content):
        calls.append(len(content))
        if len(calls) > 1 and mode == "first short, then full":
            raise OSError(28, "No space left on device")
        if len(calls) > 1 and mode == "interrupted":
            raise KeyboardInterrupt
        return whole(handle, content[:7])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        if mode == "few bytes at once":
            journal.append(run("two"))
        else:
            expected = KeyboardInterrupt if mode == "interrupted" else SelectionError
            with pytest.raises(expected):
                journal.append(run("two"))
            assert (tmp_path / JOURNAL).read_bytes() == before
    journal.append(run("three"))
    journal.close()
    again = Journal(tmp_path, SPECIFICATION)
    assert again.notices == []
    written = ["two"] if mode == "few bytes at once" else []
    assert [r.key for r in again.lines] == ["one", *written, "three"]


def test_half_a_line_that_could_not_be_removed_is_not_glued_to_the_next(tmp_path, monkeypatch):
    journal = Journal(tmp_path, SPECIFICATION)
    journal.append(run("one"))
    whole, calls = os.write, []

    def short(handle, content):
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return whole(handle, content[:7])

    def fails(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        patch.setattr(os, "ftruncate", fails)
        with pytest.raises(SelectionError, match="No space left on device"):
            journal.append(run("two"))
    journal.append(run("three"))
    journal.close()
    again = Journal(tmp_path, SPECIFICATION)
    assert [r.key for r in again.lines] == ["one", "three"]
    assert "line 2: not a run record" in again.notices[0]


FIRST_JOURNAL = (
    '{"key": "1f", "candidate": "a", "size": 200, "test_loss": 1.5, "steps": 3, "tokens": 640, "flops": 1000000000.0, '
    '"seconds": 2.5, "reason": "", "facts": {"learning_rate": 0.001, "step_flops": NaN, "history": [[0, 2.0]]}}\n'
    '{"key": "2f", "candidate": "b", "size": 0, "test_loss": null, "reason": "out of memory", "facts": {}}\n'
)


def test_a_directory_written_by_the_first_versions_is_read_and_continued(tmp_path):
    # As commit a3e207b and those before wrote them.
    (tmp_path / "specification.json").write_text(json.dumps(SPECIFICATION, indent=2) + "\n")
    (tmp_path / JOURNAL).write_text(FIRST_JOURNAL)
    journal = Journal(tmp_path, SPECIFICATION)
    assert journal.notices == []
    assert [(r.key, r.test_loss, r.part_of) for r in journal.lines] == [("1f", 1.5, ""), ("2f", None, "")]
    journal.append(run("3f"))
    assert (tmp_path / JOURNAL).read_text().startswith(FIRST_JOURNAL)


def test_a_kill_before_the_first_rename_does_not_spoil_the_directory(tmp_path):
    (tmp_path / "specification.json.part").write_text("{")
    assert len(Journal(tmp_path, SPECIFICATION)) == 0


def test_a_device_is_written_to_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    write_atomically(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "real").read_text() == "text"


def test_keys_depend_on_content_not_on_order():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_writing_atomically_leaves_no_partial_file(tmp_path):
    write_atomically(tmp_path / "f.json", json.dumps([1]))
    write_atomically(tmp_path / "f.json", json.dumps([2]))
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    assert json.loads((tmp_path / "f.json").read_text()) == [2]


def test_killed_at_any_moment_nothing_finished_is_lost_or_repeated(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    killed.mkdir()
    done = subprocess.run(
        [sys.executable, journal_worker.__file__, killed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 60
    assert found["torn"] > 0
    assert found["repeated"] == 0
    # A selection that was never disturbed ends with the same runs in the same order.
    journal_worker.work(undisturbed, lambda what, key: None)
    lines = (undisturbed / JOURNAL).read_text().splitlines()
    assert found["runs"] == [json.loads(line) for line in lines]
    assert len(lines) == 24
