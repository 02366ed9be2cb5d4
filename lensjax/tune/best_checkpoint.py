"""The best weights so far on disk: replaced at once, with a record beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lensjax._files import PARTIAL, lock_directory, read_json, sync_directory, write_atomically
from lensjax.errors import InputError
from lensjax.finetune import Trial, Weights

RECORD = "tune.json"
WORK_DIRECTORY = ".unfinished"  # inside of the directory, which may be a file system of its own
LEFT_BY_CRASH = (WORK_DIRECTORY, RECORD + PARTIAL)
RUNNING, FINISHED = "running", "finished"


@dataclasses.dataclass(frozen=True)
class Saved:
    """Weights on disk.

    Attributes
    ----------
    learning_rate, batch_size : float, int
        Of the trial that gave them.
    step : int
        After which it had them; 0: the untouched ones.
    validation_loss : float
        Nats per token.
    sha256 : str
        Of the file that holds them: a record whose digest is another's was written before the weights beside it.
    """

    learning_rate: float
    batch_size: int
    step: int
    validation_loss: float
    sha256: str

    def __str__(self) -> str:
        at = f"step {self.step}" if self.step else "the untouched model"
        return f"{at}, validation loss {self.validation_loss:.4f}"


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the record of a directory that this command wrote; None if it holds none that can be read."""
    try:
        found = read_json(directory / RECORD)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_directory(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory whose content would be lost, or that cannot be made.

    Raises
    ------
    InputError
        If it is a file or below one, may not be written, holds something of another kind, or a fine-tuned model and
        `overwrite` is false.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--out {directory}: is a file; name a directory.")
    above = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"--out {directory}: nothing can be made in {above}; name another.")
    if not directory.exists() or all(entry.name in LEFT_BY_CRASH for entry in directory.iterdir()):
        return
    record = read_record(directory)
    if record is None:
        raise InputError(f"--out {directory}: is not empty and holds no model of lensjax.tune. Name a new directory.")
    if overwrite:
        return
    what = "a fine-tuned model already"
    if record.get("status") != FINISHED:
        what = "the best weights so far of a fine-tuning that did not finish" if record.get("saved") else "a beginning"
    raise InputError(f"--out {directory}: holds {what}. Name a new directory, or replace it with --overwrite.")


class BestCheckpoint:
    """Keeps the best weights so far in a directory; in the end it holds those of the chosen trial.

    Whatever happens, the directory holds a whole model or, before the first are there, none. What an earlier run left
    stays until then.

    Parameters
    ----------
    directory : Path
        Made if it is not there.
    save : callable (params, directory, whole)
        Writes weights into a directory that it makes; if `whole`, also what belongs to them and never changes.
    weights : str
        Name of the file that holds the weights; it is moved into place after all others.
    record : mapping
        JSON-serialisable: what is known before training.
    overwrite : bool
        Whether an earlier model may be replaced.

    Raises
    ------
    InputError
        See `check_directory`; another process writes there, or it cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        save: Callable[[Any, Path, bool], None],
        weights: str,
        record: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        self.directory, self.work, self.save, self.weights = directory, directory / WORK_DIRECTORY, save, weights
        self.record = dict(record)
        self.saved: Saved | None = None
        self._chosen: Saved | None = None  # of the best trial that has finished
        self._files: list[str] = []
        check_directory(directory, overwrite=overwrite)
        try:
            self._release = lock_directory(directory, self, "lensjax.tune")
            # Another process may have finished there since the first check.
            self._check_again(overwrite=overwrite)
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
        except OSError as error:
            raise InputError(f"--out {directory}: cannot be written ({error.strerror}); name another.") from error

    def _check_again(self, *, overwrite: bool) -> None:
        try:
            check_directory(self.directory, overwrite=overwrite)
        except InputError:
            self._release()
            raise

    def update(self, found: Weights) -> bool:
        """Save weights if they are the best so far, see `lensjax.finetune.tune`; return whether they are on disk now.

        The best weights of any trial are in the directory while training goes on. Those of the best finished trial are
        kept beside them until another one finishes with better ones, for only a finished trial is chosen in the end.

        Raises
        ------
        OSError
            If they cannot be written; what was there before still is.
        """
        best = self.saved is None or found.validation_loss < self.saved.validation_loss
        if not found.finished:
            if best:
                self._replace(found)
            return best
        if self._chosen is not None and found.validation_loss >= self._chosen.validation_loss:
            return False
        same = self.saved is not None and _trial(self.saved) == _trial(found)
        if best:
            self._replace(found)
        self._chosen = self.saved if best or same else self._write(found, self._previous_best)
        if best or same:
            self._previous_best.unlink(missing_ok=True)
        return best or same

    def select(self, trial: Trial) -> None:
        """Put the weights of the chosen trial, which has finished, into the directory."""
        if self.saved is None or self.saved.validation_loss != trial.validation_loss:
            os.replace(self._previous_best, self.directory / self.weights)
            self.saved = self._chosen

    @property
    def _previous_best(self) -> Path:
        """Where the weights of the best finished trial are while better ones of another are in the directory."""
        return self.work / f"finished-{self.weights}"

    def _replace(self, found: Weights) -> None:
        if self.saved is not None and self.saved == self._chosen:
            self._previous_best.unlink(missing_ok=True)
            try:
                os.link(self.directory / self.weights, self._previous_best)
            except OSError:  # some file systems have no links
                shutil.copyfile(self.directory / self.weights, self._previous_best)
        self.saved = self._write(found, self.directory / self.weights)
        self.write_record(RUNNING)

    def _write(self, found: Weights, target: Path) -> Saved:
        part = self.work / "model"
        shutil.rmtree(part, ignore_errors=True)
        self.save(found.params, part, not self._files)
        digest = _digest(part / self.weights)
        if not self._files:
            self._write_static_files(part)
        os.replace(part / self.weights, target)
        sync_directory(target.parent)
        return Saved(*_trial(found), digest)

    def _write_static_files(self, part: Path) -> None:
        """Move the files beside the weights into place, after those of an earlier model are removed."""
        earlier = (read_record(self.directory) or {}).get("files")
        # The record may be anybody's: only what lies in the directory itself is removed, no "" and no "..".
        entries = {entry.name for entry in self.directory.iterdir()} - {WORK_DIRECTORY, RECORD}
        stale = [n for n in earlier if isinstance(n, str) and n in entries] if isinstance(earlier, list) else []
        files = sorted(entry.name for entry in part.iterdir())
        # Named before they are there: whoever comes after a crash knows what may be removed.
        self._files = sorted({*files, *stale})
        self.write_record(RUNNING)
        for name in sorted(stale, key=lambda name: name != self.weights):
            entry = self.directory / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        for name in files:
            if name != self.weights:
                if (part / name).is_file():
                    _digest(part / name)
                os.replace(part / name, self.directory / name)
        self._files = files

    def write_record(self, status: str, **more: Any) -> None:
        """Write the record: what was known before training, what is saved, and what is known more now."""
        self.record |= more
        saved = None if self.saved is None else dataclasses.asdict(self.saved)
        content = {**self.record, "status": status, "saved": saved, "files": self._files}
        # JSON knows no NaN, which counts of operations are where a backend has none.
        content = json.loads(json.dumps(content), parse_constant=lambda _: None)
        write_atomically(self.directory / RECORD, json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        """Remove temporary files and unlock the directory."""
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()  # if nothing came of it
        self._release()


def _trial(of: Saved | Weights) -> tuple[float, int, int, float]:
    return of.learning_rate, of.batch_size, of.step, of.validation_loss


def _digest(file: Path) -> str:
    """Flush a file to the disk and return its digest."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()
