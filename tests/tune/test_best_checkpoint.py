"""The best weights on disk, without any training: what is told is a number, and so is what is saved."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from lensjax._files import lock_directory
from lensjax.errors import InputError
from lensjax.finetune import Trial, Weights
from lensjax.tune import best_checkpoint
from lensjax.tune.best_checkpoint import RECORD, WORK_DIRECTORY, BestCheckpoint

FILE = "weights.bin"


class Crash(BaseException):
    """The process ends here."""


def save(params, directory, whole):
    directory.mkdir(parents=True)
    (directory / FILE).write_text(f"weights {params}")
    if whole:
        (directory / "config.json").write_text("config")


def best_weights(loss, rate=0.1, *, step=1, finished=False):
    return Weights(rate, 8, step, loss, f"{rate} {step}", finished)


def trial(loss, rate=0.1, *, step=1):
    numbers = dict.fromkeys(("steps_run", "steps_per_epoch", "samples", "tokens"), 1)
    rest = {"flops": 1.0, "step_flops": None, "evaluation_flops": None, "validation_history": (), "reason": ""}
    return Trial(rate, 8, "finished", loss, loss, step, **numbers, **rest)


def content(directory):
    return (directory / FILE).read_text()


def record(directory):
    return json.loads((directory / RECORD).read_text())


@pytest.fixture
def open_checkpoint(tmp_path):
    """Return what opens a checkpoint in the same directory; all are closed in the end."""
    opened = []

    def open_checkpoint(*, saving=save, **options):
        opened.append(BestCheckpoint(tmp_path / "out", saving, FILE, {"model": "m"}, **options))
        return opened[-1]

    yield open_checkpoint
    for one in opened:
        one.close()


def test_every_improvement_is_on_disk_with_its_record(open_checkpoint):
    kept = open_checkpoint()
    assert kept.update(best_weights(3.0, step=1))
    assert not kept.update(best_weights(4.0, step=2))
    assert content(kept.directory) == "weights 0.1 1"
    assert kept.update(best_weights(2.0, step=3))
    found = record(kept.directory)
    assert content(kept.directory) == "weights 0.1 3"
    assert (kept.directory / "config.json").read_text() == "config"
    digest = hashlib.sha256(b"weights 0.1 3").hexdigest()
    assert found["saved"] == {
        "learning_rate": 0.1,
        "batch_size": 8,
        "step": 3,
        "validation_loss": 2.0,
        "sha256": digest,
    }
    assert (found["status"], found["model"], found["files"]) == ("running", "m", ["config.json", FILE])


def test_in_the_end_the_chosen_trial_is_there_whatever_others_had(open_checkpoint):
    """A later trial was better for a while and then diverged: only finished trials are chosen."""
    kept = open_checkpoint()
    for weights in (
        best_weights(3.0),
        best_weights(3.0, finished=True),
        best_weights(2.5, 0.2),
        best_weights(2.0, 0.2, step=2),
    ):
        kept.update(weights)
    assert content(kept.directory) == "weights 0.2 2"
    kept.select(trial(3.0))
    assert content(kept.directory) == "weights 0.1 1"
    kept.write_record("finished")
    assert record(kept.directory)["saved"]["validation_loss"] == 3.0


def test_a_trial_that_finishes_behind_one_under_way_is_kept_too(open_checkpoint):
    """Trials side by side: the better one diverges after the other has finished, whose weights never were on disk."""
    kept = open_checkpoint()
    kept.update(best_weights(2.0, 0.2))
    kept.update(best_weights(3.0, 0.1))
    kept.update(best_weights(3.0, 0.1, finished=True))
    assert content(kept.directory) == "weights 0.2 1"
    kept.select(trial(3.0, 0.1))
    assert content(kept.directory) == "weights 0.1 1"


def test_the_lower_rate_tried_after_divergence_is_kept_though_its_loss_is_higher(open_checkpoint):
    kept = open_checkpoint()
    kept.update(best_weights(2.0, 0.2))  # it diverged later
    assert not kept.update(best_weights(3.0, 0.05))
    kept.update(best_weights(3.0, 0.05, finished=True))
    kept.select(trial(3.0, 0.05))
    assert content(kept.directory) == "weights 0.05 1"


def test_a_better_trial_that_finishes_replaces_the_one_before(open_checkpoint):
    kept = open_checkpoint()
    for weights in (
        best_weights(3.0),
        best_weights(3.0, finished=True),
        best_weights(2.0, 0.2),
        best_weights(2.0, 0.2, finished=True),
    ):
        kept.update(weights)
    kept.update(best_weights(2.5, 0.3, finished=True))
    kept.select(trial(2.0, 0.2))
    assert content(kept.directory) == "weights 0.2 1"
    assert not list((kept.directory / WORK_DIRECTORY).glob("finished*"))


def test_where_there_are_no_links_weights_are_copied_aside(open_checkpoint, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    kept = open_checkpoint()
    for weights in (best_weights(3.0), best_weights(3.0, finished=True), best_weights(2.0, 0.2)):
        kept.update(weights)
    kept.select(trial(3.0))
    assert content(kept.directory) == "weights 0.1 1"


def test_untouched_weights_are_saved_when_nothing_was_better(open_checkpoint):
    kept = open_checkpoint()
    kept.update(best_weights(7.0, step=0, finished=True))
    kept.select(trial(7.0, step=0))
    assert content(kept.directory) == "weights 0.1 0"
    assert "untouched" in str(kept.saved)


CRASHES = 40


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_at_any_moment_leaves_a_whole_model_or_none(tmp_path, monkeypatch, overwrite):
    """At every change of the file system in turn the process ends; what is found then is whole and the best so far."""
    seen = set()
    for last in range(CRASHES):
        directory = tmp_path / str(last)
        if overwrite:
            earlier = BestCheckpoint(directory, save, FILE, {"model": "earlier"})
            earlier.update(best_weights(9.0, 0.9, finished=True))
            (directory / "config.json").write_text("earlier config")
            earlier.write_record("finished")
            earlier.close()
        left = last

        def counted(original):
            def call(*arguments, **options):
                nonlocal left
                if left <= 0:
                    left = -1  # it was here
                    raise Crash
                left -= 1
                return original(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for place, name in ((os, "replace"), (os, "link"), (Path, "unlink"), (Path, "replace")):
                patch.setattr(place, name, counted(getattr(place, name)))
            done, crashed = [], False
            kept = BestCheckpoint(directory, save, FILE, {"model": "m"}, overwrite=overwrite)
            try:
                for weights in (
                    best_weights(3.0),
                    best_weights(3.0, finished=True),
                    best_weights(2.0, 0.2),
                    best_weights(1.0, 0.2, step=2),
                ):
                    kept.update(weights)
                    done.append(f"weights {weights.params}")
            except Crash:
                crashed = True
            kept._release()  # as the system does when a process ends
        whole = (directory / FILE).exists()
        assert crashed == (left < 0) == (len(done) < 4)  # nothing catches it on its way
        seen.add((whole, len(done)))
        assert whole or not done
        if whole:
            config = (directory / "config.json").read_text()
            if config == "earlier config":
                assert content(directory) == "weights 0.9 1"
            else:
                # What the last finished call had saved, or what the one under way was about to.
                saved = ["weights 0.1 1", "weights 0.1 1", "weights 0.2 1", "weights 0.2 2"]
                assert content(directory) in saved[max(len(done) - 1, 0) : len(done) + 1]
                found = record(directory)["saved"]
                right = found is not None and found["sha256"] == hashlib.sha256(content(directory).encode()).hexdigest()
                assert right or len(done) < 4
        # Whoever comes next can go on from there.
        again = BestCheckpoint(directory, save, FILE, {"model": "m"}, overwrite=True)
        again.update(best_weights(0.5, 0.3, finished=True))
        again.write_record("finished")
        again.close()
        assert content(directory) == "weights 0.3 1"
        assert sorted(e.name for e in directory.iterdir()) == sorted(["config.json", RECORD, FILE])
    assert (True, 4) in seen  # the last of them were not crashes
    assert {count for _, count in seen} == {0, 1, 2, 3, 4}


def test_what_fails_while_it_is_written_leaves_what_was_there(open_checkpoint):
    def failing(params, directory, whole):
        save(params, directory, whole)
        if params.endswith("2"):
            (directory / FILE).write_text("half")
            raise OSError(28, "No space left on device")

    kept = open_checkpoint(saving=failing)
    kept.update(best_weights(3.0))
    with pytest.raises(OSError, match="No space"):
        kept.update(best_weights(2.0, step=2))
    assert content(kept.directory) == "weights 0.1 1"
    assert kept.saved.validation_loss == 3.0


def test_what_is_there_is_not_overwritten_unless_asked_for(open_checkpoint):
    kept = open_checkpoint()
    kept.update(best_weights(3.0))
    kept.close()
    with pytest.raises(InputError, match=r"fine-tuning that did not finish.*--overwrite"):
        open_checkpoint()
    kept.write_record("finished")
    with pytest.raises(InputError, match=r"holds a fine-tuned model already.*--overwrite"):
        open_checkpoint()
    again = open_checkpoint(overwrite=True)
    assert content(again.directory) == "weights 0.1 1"  # until there is something better to keep
    again.update(best_weights(9.0, 0.9))
    assert content(again.directory) == "weights 0.9 1"


def test_what_belongs_to_an_earlier_model_goes_and_nothing_else(open_checkpoint):
    def other(params, directory, whole):
        save(params, directory, False)
        (directory / "adapter.json").write_text("adapter")
        (directory / "templates").mkdir()

    kept = open_checkpoint(saving=other)
    kept.update(best_weights(3.0))
    kept.close()
    (kept.directory / "mine.txt").write_text("mine")
    again = open_checkpoint(overwrite=True)
    again.update(best_weights(2.0))
    again.close()
    assert sorted(e.name for e in kept.directory.iterdir()) == sorted(["config.json", "mine.txt", RECORD, FILE])


def test_a_record_that_names_what_is_not_in_the_directory_costs_nothing(open_checkpoint, tmp_path):
    """It may have come with somebody's model; a link among its files is removed, not what it leads to."""
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("")
    (tmp_path / "out" / "templates").symlink_to(tmp_path / "mine")
    files = ["", ".", "..", "../thesis.tex", str(tmp_path), WORK_DIRECTORY, RECORD, "templates", 3]
    (tmp_path / "out" / RECORD).write_text(json.dumps({"files": files}))
    open_checkpoint(overwrite=True).update(best_weights(2.0))
    assert sorted(e.name for e in tmp_path.iterdir()) == ["mine", "out", "thesis.tex"]
    left = ["config.json", "notes", RECORD, FILE, WORK_DIRECTORY]
    assert sorted(e.name for e in (tmp_path / "out").iterdir()) == sorted(left)


def test_directories_of_another_kind_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for name, message in (("file", "is a file"), ("full", "holds no model of lensjax.tune")):
        with pytest.raises(InputError, match=message):
            BestCheckpoint(tmp_path / name, save, FILE, {}, overwrite=True)
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_two_processes_do_not_share_a_directory(open_checkpoint):
    kept = open_checkpoint()
    with pytest.raises(InputError, match=r"another lensjax\.tune is running there"):
        open_checkpoint()
    kept.close()
    assert not kept.directory.exists()  # nothing came of it


def test_a_model_that_another_process_has_just_finished_is_not_overwritten(open_checkpoint, tmp_path, monkeypatch):
    whole, calls = best_checkpoint.check_directory, []

    def finished_meanwhile(directory, **options):
        whole(directory, **options)
        calls.append(directory)
        if len(calls) == 1:
            directory.mkdir()
            (directory / RECORD).write_text(json.dumps({"status": "finished", "saved": {"step": 1}}))

    monkeypatch.setattr(best_checkpoint, "check_directory", finished_meanwhile)
    with pytest.raises(InputError, match="holds a fine-tuned model already"):
        open_checkpoint()
    lock_directory(tmp_path / "out", calls.append, "lensjax.tune")()


def test_a_record_holds_no_number_that_json_has_not(open_checkpoint):
    kept = open_checkpoint()
    kept.update(best_weights(3.0))
    kept.write_record("finished", step_flops=float("nan"))
    assert record(kept.directory)["step_flops"] is None
    assert best_checkpoint.read_record(kept.directory)["status"] == "finished"
