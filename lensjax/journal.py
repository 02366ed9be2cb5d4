"""The journal of a selection: each finished fine-tuning run is a line on disk before the next run starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lensjax._files import PARTIAL, append_line, lock_directory, parse_json, write_atomically
from lensjax.errors import InputError, SelectionError

SPECIFICATION = "specification.json"
JOURNAL = "runs.jsonl"
KEY = re.compile("[0-9a-f]{16}")  # of `key_of` and of fingerprints

ENCODING = "encoding"
"""In a specification: the version of how samples become tokens, on which every loss depends; absent in the first."""

TEXTS = ("key", "candidate", "reason", "part_of")
COUNTS = ("size", "steps", "tokens", "samples")
AMOUNTS = ("flops", "seconds")
NUMERIC_FACTS = ("parameters", "learning_rate", "batch_size", "steps_run", "step_flops", "evaluation_flops")
"""Facts that others calculate with, if they are there."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: a candidate fine-tuned on `size` samples (0: only evaluated).

    Attributes
    ----------
    key : str
        Digest of what defines the run: candidate, task, size, seed, plan.
    candidate : str
    size : int
        Training samples.
    test_loss : float or None
        Mean token cross-entropy on the test set, nats; None if the run failed. A failed run is repeated.
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
        Everything else (validation losses, hyper-parameters, peak memory, versions).
    samples : int
        Samples trained on, all epochs.
    part_of : str
        For a trial (one learning rate and batch size of a search) the key of its run; for other measurements one of
        `lensjax.jobs.defaults.EXTRA_MEASUREMENTS`.
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
    """Return a digest of what defines a run, 16 hexadecimal digits; `definition` must be JSON-serialisable."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a journal's file.

    Attributes
    ----------
    number : int
        From 1.
    run : Run or None
        None if the line is no record of a run.
    problem : str
        Why it is none.
    complete : bool
        Whether the line has its end; only the last one may have none, after a kill in the middle of a write.
    """

    number: int
    run: Run | None
    problem: str = ""
    complete: bool = True


def read_lines(path: Path) -> Iterator[Line]:
    """Read a journal's file line by line, in linear time; empty lines are left out.

    Parameters
    ----------
    path : Path

    Yields
    ------
    Line
        Also those that are no records of runs, with the reason: what to do about them is up to the caller.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            complete = content.endswith(b"\n")
            if not content.strip():
                continue
            try:
                yield Line(number, run_of(parse_json(content)), complete=complete)
            except ValueError as error:
                yield Line(number, None, str(error), complete)


def run_of(record: Any) -> Run:
    """Return the run that a record describes, each field checked by its type and range.

    Parameters
    ----------
    record : object
        As from JSON.

    Raises
    ------
    ValueError
        If it is no record of a run; the message says why.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}, not an object")
    fields = {field.name: field for field in dataclasses.fields(Run)}
    unknown = sorted(set(record) - set(fields))
    missing = [name for name in ("key", "candidate", "size", "test_loss") if name not in record]
    if unknown or missing:
        raise ValueError(f"it has no {missing[0]}" if missing else f"{reprlib.repr(unknown[0])} is no field of it")
    checked = dict(record)
    for names, check in ((TEXTS, _text), (COUNTS, _count), (AMOUNTS, _amount)):
        checked |= {name: check(name, record[name]) for name in names if name in record}
    if record["test_loss"] is not None:
        checked["test_loss"] = _amount("test_loss", record["test_loss"])
    facts = record.get("facts", {})
    if not isinstance(facts, dict):
        raise ValueError(f"facts is a {type(facts).__name__}, not an object")
    for name in NUMERIC_FACTS:
        if facts.get(name) is not None:
            _number(name, facts[name])
    return Run(**checked)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not text")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not a number")
    return float(value)


def _amount(name: str, value: Any) -> float:
    number = _number(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not a finite number from 0")
    return number


def _count(name: str, value: Any) -> int:
    number = _amount(name, value)
    if not number.is_integer() or number >= 2**63:
        raise ValueError(f"{name} is {reprlib.repr(value)}, not a count")
    return int(value)


class Journal:
    """An append-only record of runs in a directory.

    Parameters
    ----------
    directory : Path
        Made if it does not exist. If it holds the journal of the same specification, that is continued.
    specification : mapping
        What defines the selection, JSON-serialisable; only selections of equal specifications share a directory.
    read_only : bool
        Nothing is made, locked or repaired, whoever writes there; a line that is being written is left out.

    Attributes
    ----------
    notices : list of str
        Lines that were left out, for the user.

    Raises
    ------
    InputError
        If the directory is a file, holds other files or the journal of another selection (the message says what
        differs), cannot be written, or is in use by another process.
    """

    def __init__(self, directory: Path, specification: Mapping[str, Any], *, read_only: bool = False) -> None:
        self.directory, self.read_only = directory, read_only
        self.notices: list[str] = []
        self._runs: dict[str, Run] = {}
        self._lines: list[Run] = []
        self._release: Callable[[], object] = lambda: None
        wanted = json.loads(json.dumps(specification))
        # Before locking too: waiting for another selection to end would be of no use.
        exists = self._check_specification(wanted)
        if read_only:
            if not exists:
                self._check_empty()
                self._check_place()
        else:
            self._lock(wanted)
        try:
            self._read()
        except BaseException:
            self._release()
            raise

    def _lock(self, wanted: Mapping[str, Any]) -> None:
        """Make the directory, lock it, check it and write the specification; no other process can come between."""
        try:
            self._release = lock_directory(self.directory, self, "lensjax.select")
            if not self._check_specification(wanted):
                self._check_empty()
                write_atomically(self.directory / SPECIFICATION, json.dumps(wanted, indent=2) + "\n")
        except OSError as error:
            self._release()
            raise InputError(
                f"--out {self.directory}: cannot be written ({error.strerror}). Name another directory."
            ) from error
        except BaseException:
            self._release()
            raise

    def _check_specification(self, wanted: Mapping[str, Any]) -> bool:
        """Refuse a directory of another selection; return whether it is one of this selection."""
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"--out {self.directory}: is a file; name a directory.")
        path = self.directory / SPECIFICATION
        try:
            found = parse_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"--out {self.directory}: {SPECIFICATION} is damaged; name a new directory.")
        if found.get(ENCODING) != wanted.get(ENCODING):
            raise InputError(
                f"--out {self.directory}: was made by a version of lensjax that turned samples into tokens in another "
                f"way, so its losses do not go with new ones. Name a new directory; --losses {self.directory} reads "
                "what is there, and the version that began it can continue it."
            )
        if found != wanted:
            differs = [k for k in sorted({*wanted, *found}) if wanted.get(k) != found.get(k)]
            raise InputError(
                f"--out {self.directory}: holds another run ({', '.join(differs)} differ). Name a new directory, "
                "or repeat the options of that run to continue it. "
                f"It has {'; '.join(_differences(found, wanted))}."
            )
        return True

    def _check_empty(self) -> None:
        """Refuse a directory that holds other files."""
        if self.directory.exists() and any(p.suffix != PARTIAL for p in self.directory.iterdir()):
            raise InputError(f"--out {self.directory}: is not empty and holds no lensjax run. Name a new directory.")

    def _check_place(self) -> None:
        """Refuse a directory that could not be made or written to."""
        present = next(place for place in (self.directory, *self.directory.absolute().parents) if place.exists())
        if not (present.is_dir() and os.access(present, os.W_OK)):
            what = "cannot be written" if present.is_dir() else "is a file"
            raise InputError(f"--out {self.directory}: {present} {what}. Name another directory.")

    def close(self) -> None:
        """Let other processes use the directory."""
        self._release()

    def _read(self) -> None:
        path = self.directory / JOURNAL
        if not path.exists():
            return
        for line in read_lines(path):
            if not line.complete:
                self._drop_incomplete(path)
            elif line.run is None:
                self.notices.append(
                    f"{path}, line {line.number}: not a run record ({line.problem}). It is left out; if it was a run, "
                    "that is repeated"
                )
            else:
                self._keep(line.run)

    def _drop_incomplete(self, path: Path) -> None:
        """Remove the last line, whose end a kill in the middle of a write has cut off: that run is repeated."""
        if self.read_only:
            return
        self.notices.append(f"{path}: the last line was cut off and is dropped; its run is repeated")
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)

    def _keep(self, run: Run) -> None:
        self._runs[run.key] = run
        self._lines.append(run)

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, key: str) -> Run | None:
        """Return the finished run of that key, or None."""
        return self._runs.get(key)

    @property
    def lines(self) -> tuple[Run, ...]:
        """All records, failures and trials included, in the order in which they were written."""
        return tuple(self._lines)

    def trials_of(self, key: str) -> tuple[Run, ...]:
        """Return the trials recorded for the run of that key; of equal trials the last."""
        return tuple(run for run in self._runs.values() if run.part_of == key)

    def append(self, run: Run) -> None:
        """Write a run to disk; when this returns, it survives a crash.

        Raises
        ------
        SelectionError
            If it cannot be written (a full disk, say); the journal is then as it was.
        ValueError
            If it was opened with `read_only`.
        """
        if self.read_only:
            raise ValueError(f"{self.directory}: the journal was opened to be looked at only")
        path = self.directory / JOURNAL
        try:
            append_line(path, json.dumps(dataclasses.asdict(run)).encode())
        except OSError as error:
            raise SelectionError(
                f"{path}: cannot be written ({error.strerror}). Make room and give the same command again."
            ) from error
        self._keep(run)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], before: str = "") -> list[str]:
    """Return in words, for each difference, what another specification has instead of what is wanted."""
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
