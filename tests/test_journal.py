import fcntl
import json
import os
import subprocess
import sys

import pytest

from lensjax._files import lock_directory, write_atomically
from lensjax.errors import InputError, SelectionError
from lensjax.journal import JOURNAL, Journal, Run, key_of
from support import journal_worker

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


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    Journal(tmp_path, SPECIFICATION).append(run("one"))
    path = tmp_path / JOURNAL
    path.write_bytes(b"rubbish\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"runs\.jsonl, line 1: not a run record"):
        Journal(tmp_path, SPECIFICATION)


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
