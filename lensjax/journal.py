"""The journal of a selection: every finished fine-tuning run is a line on disk before the next one starts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lensjax._files import PARTIAL, lock_directory, sync_directory, write_atomically
from lensjax.errors import InputError, SelectionError

SPECIFICATION = "specification.json"
JOURNAL = "runs.jsonl"
KEY = re.compile("[0-9a-f]{16}")  # of `key_of` and of fingerprints


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: a candidate fine-tuned on `size` samples (0: only evaluated).

    Attributes
    ----------
    key : str
        Identifies what defines the run: candidate, task, size, seed, plan.
    candidate : str
    size : int
        Training samples.
    test_loss : float or None
        Mean token cross-entropy on the test set, nats; None if the run failed: such a run is made again.
    steps : int
        Optimiser steps up to the weights kept by early stopping (t of eq. 9).
    tokens : int
        Tokens seen in training, all epochs.
    flops : float
        6 N per token trained on.
    seconds : float
        Wall time.
    reason : str
        Why training ended, or why the run failed.
    facts : mapping
        Everything else worth keeping (validation losses, hyper-parameters, peak memory, versions).
    samples : int
        Samples trained on, all epochs.
    part_of : str
        If this is no run by itself: the key of the run that it is a trial of (one learning rate and batch size), or
        one of `lensjax.jobs.defaults.EXTRA_MEASUREMENTS`.
    """

    key: str
    candidate: str
    size: int
    test_loss: float | None
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: int = 0
    part_of: str = ""


def key_of(definition: Mapping[str, Any]) -> str:
    """Return a short stable name for what defines a run; `definition` must be JSON-serialisable."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """An append-only record of runs in a directory.

    Parameters
    ----------
    directory : Path
        Created if it does not exist. If it holds the journal of the same specification, its runs are kept.
    specification : mapping
        What is being selected, JSON-serialisable: two selections share a directory only if it is equal.
    read_only : bool
        Only look: nothing is made, locked or mended, whoever writes there; a line that is being written is left out.

    Raises
    ------
    InputError
        If the directory is a file, holds something else or the journal of another selection; the message says what
        differs.
    """

    def __init__(self, directory: Path, specification: Mapping[str, Any], *, read_only: bool = False) -> None:
        self.directory, self.read_only = directory, read_only
        self.notices: list[str] = []
        self._runs: dict[str, Run] = {}
        self._lines: list[Run] = []
        self._release: Callable[[], object] = lambda: None
        wanted = json.loads(json.dumps(specification))
        begun = self._check(wanted)
        if not begun:
            if read_only:
                self._check_place()
            else:
                self._make(wanted)
        if not read_only:
            self._release = lock_directory(directory, self, "lensjax.select", by=SPECIFICATION)
        self._read()

    def _check(self, wanted: Mapping[str, Any]) -> bool:
        """Refuse a directory of anything else; return whether it is one of this selection, not one to be made."""
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"--out {self.directory}: is a file; name a directory.")
        path = self.directory / SPECIFICATION
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise InputError(f"--out {self.directory}: {SPECIFICATION} is damaged; name a new directory.")
            if found != wanted:
                differs = [k for k in sorted({*wanted, *found}) if wanted.get(k) != found.get(k)]
                raise InputError(
                    f"--out {self.directory}: holds another run ({', '.join(differs)} differ). Name a new directory, "
                    "or repeat the options of that run to continue it. "
                    f"It has {'; '.join(_differences(found, wanted))}."
                )
            return True
        if self.directory.exists() and any(p.suffix != PARTIAL for p in self.directory.iterdir()):
            raise InputError(f"--out {self.directory}: is not empty and holds no lensjax run. Name a new directory.")
        return False

    def _check_place(self) -> None:
        """Refuse a directory that could not be made or written to."""
        present = next(place for place in (self.directory, *self.directory.absolute().parents) if place.exists())
        if not (present.is_dir() and os.access(present, os.W_OK)):
            what = "cannot be written" if present.is_dir() else "is a file"
            raise InputError(f"--out {self.directory}: {present} {what}. Name another directory.")

    def _make(self, wanted: Mapping[str, Any]) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.directory / SPECIFICATION, json.dumps(wanted, indent=2) + "\n")
        except OSError as error:
            raise InputError(
                f"--out {self.directory}: cannot be written ({error.strerror}). Name another directory."
            ) from error

    def close(self) -> None:
        """Let other processes use the directory."""
        self._release()

    def _read(self) -> None:
        path = self.directory / JOURNAL
        if not path.exists():
            return
        raw = path.read_bytes()
        whole, _, torn = raw.rpartition(b"\n")
        if torn and not self.read_only:
            # A kill in the middle of a write leaves a line without its end: that run is repeated.
            self.notices.append(f"{path}: the last line was cut off and is dropped; its run is repeated")
            with path.open("r+b") as file:
                file.truncate(len(raw) - len(torn))
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                run = Run(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise InputError(
                    f"{self.directory / JOURNAL}, line {number}: not a run record. Remove that line, or name a new "
                    "directory."
                ) from None
            self._runs[run.key] = run
            self._lines.append(run)

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, key: str) -> Run | None:
        """Return the finished run of that key, or None."""
        return self._runs.get(key)

    @property
    def lines(self) -> tuple[Run, ...]:
        """Everything recorded, failures and trials included, in the order in which it was done."""
        return tuple(self._lines)

    def trials_of(self, key: str) -> tuple[Run, ...]:
        """Return the trials recorded for the run of that key; each once, the latest."""
        return tuple(run for run in self._runs.values() if run.part_of == key)

    def append(self, run: Run) -> None:
        """Put a run on disk; when this returns, it survives a crash.

        Raises
        ------
        SelectionError
            If it cannot be written (a full disk, say); the journal is then as it was.
        ValueError
            If it is only looked at.
        """
        if self.read_only:
            raise ValueError(f"{self.directory}: the journal was opened to be looked at only")
        line = json.dumps(dataclasses.asdict(run)) + "\n"
        path = self.directory / JOURNAL
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())
            sync_directory(self.directory)
        except OSError as error:
            # Half a line would be glued to the next one.
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise SelectionError(
                f"{path}: cannot be written ({error.strerror}). Make room and give the same command again."
            ) from error
        self._runs[run.key] = run
        self._lines.append(run)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], before: str = "") -> list[str]:
    """Say what another specification has instead of what is wanted."""
    said = []
    for name in sorted({*found, *wanted}):
        there, here, label = found.get(name), wanted.get(name), f"{before}{name}"
        if isinstance(there, dict) and isinstance(here, dict):
            said += _differences(there, here, f"{name.removesuffix('s')} ")
        elif there == here:
            continue
        elif name not in found:
            said.append(f"no {label}")
        elif name not in wanted:
            said.append(f"{label} too")
        elif isinstance(there, str) and KEY.fullmatch(there):
            said.append(f"another {label}")
        else:
            said.append(f"{label} {json.dumps(there)}, not {json.dumps(here)}")
    return said
