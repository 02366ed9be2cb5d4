"""The result of a dry run, as data and as text for the terminal."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lensjax._display import printable, samples, text_table

SCHEMA = 1
TEXT_WIDTH = 96  # characters
NAME_WIDTH = 30  # characters of a candidate's name in a table

AS_IT_IS, CHOICE, LATER, VERIFICATION, KERNEL, SPECTRA, FEATURES = (
    "the models as they are",
    "to choose",
    "to choose, if it may still win",
    "to verify the choice",
    "kernel and Hessian trace",
    "NLPmetrics of the weights",
    "LogME of the features",
)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run that a selection would make.

    Attributes
    ----------
    candidate : str
    size : int
        Training samples; 0: the model is only evaluated.
    purpose : str
        `AS_IT_IS`, `CHOICE`, `LATER`, `VERIFICATION`, `KERNEL`, `SPECTRA` or `FEATURES`.
    sure : bool
        Whether it is made whatever the other runs' losses are, if nothing fails.
    done : bool
        Whether it is in the run directory's journal already, so that it costs nothing.
    trials : int
        How many pairs of learning rate and batch size are tried.
    tokens : int
        Tokens of one pass, prompts and targets, padding left out.
    flops, seconds : float
        Upper bounds, for all passes and trials. Floating-point operations of training: 6 for each trained weight and
        token, 4 for each frozen one. Seconds: evaluations, padding, loading and compiling included.
    """

    candidate: str
    size: int
    purpose: str
    sure: bool
    done: bool
    trials: int
    tokens: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """The memory that fine-tuning one candidate needs.

    Attributes
    ----------
    name : str
    parameters, trainable : int
        Number of weights, and of those that fine-tuning changes.
    weights, optimiser, working, process : int
        Bytes of memory: copies of the weights; AdamW's moments; gradients, activations and logits; the process itself,
        where it shares the devices' memory, as on CPUs. With several devices, of each.
    available : int or None
        Bytes that are free; None if not known.
    download : int
        Bytes to be downloaded from the hub.
    problem, remedy : str
        Why it does not fit, and what to do about it; empty if it fits.
    """

    name: str
    parameters: int
    trainable: int
    weights: int
    optimiser: int
    working: int
    process: int
    available: int | None
    download: int = 0
    problem: str = ""
    remedy: str = ""

    @property
    def memory(self) -> int:
        """Bytes of memory in total."""
        return self.weights + self.optimiser + self.working + self.process

    @property
    def fits(self) -> bool:
        """Whether it can be fine-tuned here."""
        return not self.problem


@dataclasses.dataclass(frozen=True)
class DiskNeed:
    """The disk space that a selection takes in one directory.

    Attributes
    ----------
    what : str
        What is stored there.
    path : str
        The directory.
    needed, free : int
        Bytes.
    """

    what: str
    path: str
    needed: int
    free: int


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a selection by fine-tuning would run, and how much time, memory and disk that takes.

    Attributes
    ----------
    task : str
    directory : str or None
        Run directory; None if its name depends on data that were not downloaded.
    method : str
    target, train, validation, test : int
        Number of samples: for which the choice is made, available for training, set aside for validation and test.
    sizes : tuple of int
        Subset sizes, ascending.
    max_length, passes : int
        Tokens of a sample, and passes over a subset, at most.
    needs : tuple of MemoryNeed
        One for each candidate.
    runs : tuple of PlannedRun
    flops, seconds : (float, float)
        Of the runs not done yet: of those that are sure, and of all, as far as the budget allows them. Both count all
        passes that are allowed.
    budget : str
        What the choice may cost; empty without a budget.
    places : tuple of DiskNeed
    basis : mapping of str to str
        A sentence each on how "FLOPs", "Time" and "Memory" were estimated.
    notes, problems : tuple of str
        Remarks; and problems that are not about a single candidate.
    """

    task: str
    directory: str | None
    method: str
    target: int
    train: int
    validation: int
    test: int
    sizes: tuple[int, ...]
    max_length: int
    passes: int
    needs: tuple[MemoryNeed, ...]
    runs: tuple[PlannedRun, ...]
    flops: tuple[float, float]
    seconds: tuple[float, float]
    budget: str = ""
    places: tuple[DiskNeed, ...] = ()
    basis: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all candidates fit, and there are no other problems."""
        return not self.problems and all(need.fits for need in self.needs)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values, in bytes, seconds and floating-point operations."""
        own = dataclasses.asdict(self)
        needs = [{**dataclasses.asdict(n), "memory": n.memory, "fits": n.fits} for n in self.needs]
        totals = {
            name: dict(zip(("sure", "at_most"), pair, strict=True))
            for name, pair in (("flops", self.flops), ("seconds", self.seconds))
        }
        return {"schema": SCHEMA, "fits": self.fits, **own, "basis": dict(self.basis), "needs": needs, **totals}

    def render(self) -> str:
        """Return the text for the terminal, the answer first."""
        parts = [self._answer(), self._settings(), "", self._candidates_table()]
        for need in self.needs:
            if need.problem:
                parts += ["", _wrapped(f"{need.name} does NOT FIT: {need.problem}"), _wrapped(need.remedy, "  ")]
        for problem in self.problems:
            parts += ["", _wrapped(f"PROBLEM: {problem}")]
        parts += ["", "What would be run:", self._runs_table()]
        if self.places:
            parts += ["", "Disk:", self._disk_table()]
        parts += ["", *(_wrapped(f"{name}: {text}.", hang="  ") for name, text in self.basis.items())]
        parts += [_wrapped(f"Note: {note}.", hang="  ") for note in self.notes]
        return "\n".join(parts)

    def _answer(self) -> str:
        too_large = [need.name for need in self.needs if not need.fits]
        count = len(self.needs)
        if not too_large and any(need.available is None for need in self.needs):
            text = f"How much memory this machine has is not known: see below what the {count} candidates need. "
        elif not too_large:
            text = f"All {count} candidates fit on this machine. "
        else:
            verb = "does" if len(too_large) == 1 else "do"
            text = f"{len(too_large)} of {count} candidates {verb} NOT FIT on this machine. "
        if all(run.done for run in self.runs):
            return _wrapped(text + "Every run is done already: the same command without --dry-run gives the result.")
        sure, at_most = self.seconds
        text += f"Everything takes at most about {rough_duration(at_most)}"
        text += f" and {self.flops[1]:.1e} floating-point operations"
        if at_most > 1.01 * sure:
            text += f", {rough_duration(sure)} and {self.flops[0]:.1e} of that in any case"
        return _wrapped(text + ". This is a forecast: nothing was fine-tuned, and no weights were fetched.")

    def _settings(self) -> str:
        text = (
            f"Task {self.task}: {samples(self.train)} samples to train on; {samples(self.validation)} that say when to "
            f"stop and {samples(self.test)} to test with are set aside. "
        )
        if any(run.purpose in (CHOICE, LATER) for run in self.runs):
            text += (
                f"Each candidate is fine-tuned on {_listed([samples(s) for s in self.sizes])} samples, at most "
                f"{self.passes} pass{'es' if self.passes > 1 else ''} each, and the losses tell which will be best on "
                f"{samples(self.target)}."
            )
        else:
            text += (
                f"No candidate is fine-tuned for the choice: method {self.method} tells without which will be best on "
                f"{samples(self.target)}."
            )
        if any(run.purpose == LATER or not run.sure for run in self.runs):
            text += " Which of the larger subsets are used depends on the losses of the others."
        if self.budget:
            text += f" The choice may cost {self.budget}."
        return _wrapped(text)

    def _candidates_table(self) -> str:
        header = ["candidate", "weights", "trained", "memory", "of", "fits", "FLOPs", "time", "download"]
        rows = []
        for need in self.needs:
            own = [r for r in self.runs if r.candidate == need.name and not r.done]
            rows.append(
                [
                    shortened(need.name),
                    format_weights(need.parameters),
                    "all" if need.trainable == need.parameters else format_weights(need.trainable),
                    format_bytes(need.memory),
                    "unknown" if need.available is None else format_bytes(need.available),
                    "yes" if need.fits else "NO",
                    f"{sum(r.flops for r in own):.1e}" if own else "done",
                    rough_duration(sum(r.seconds for r in own)) if own else "done",
                    format_bytes(need.download) if need.download else "-",
                ]
            )
        return text_table(header, rows, left=(0,))

    def _runs_table(self) -> str:
        header = ["samples", "what for", "runs", "done", "passes", "FLOPs at most", "time at most"]
        rows = []
        for purpose, size in dict.fromkeys((r.purpose, r.size) for r in self.runs):
            group = [r for r in self.runs if (r.purpose, r.size) == (purpose, size)]
            left = [r for r in group if not r.done]
            up_to = "" if all(r.sure for r in left) else "up to "
            trains = purpose in (CHOICE, LATER, VERIFICATION)
            trials = group[0].trials
            rows.append(
                [
                    samples(size),
                    purpose,
                    f"{up_to}{len(group)}",
                    str(len(group) - len(left)),
                    (f"{trials} x " if trials > 1 else "") + str(self.passes) if trains else "-",
                    f"{sum(r.flops for r in left):.1e}" if any(r.flops for r in left) else "-",
                    rough_duration(sum(r.seconds for r in left)) if left else "-",
                ]
            )
        return text_table(header, rows, left=(1,))

    def _disk_table(self) -> str:
        rows = [[p.what, format_bytes(p.needed), format_bytes(p.free)] for p in self.places]
        lines = text_table(["what", "needed", "free"], rows, left=(0,)).splitlines()
        paths = ["where", *(printable(p.path) for p in self.places)]
        fits = max(map(len, paths)) + len(lines[0]) + 2 <= TEXT_WIDTH
        gap = "  " if fits else "\n    "
        return "\n".join(f"{line}{gap}{path}" for line, path in zip(lines, paths, strict=True))


def format_bytes(size: int) -> str:
    """Write a number of bytes with a binary unit."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            value = size / 2**power
            return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{size} B"


def format_weights(number: int) -> str:
    """Write a number of weights with a decimal unit: 124M."""
    for unit, power in (("B", 9), ("M", 6), ("K", 3)):
        # Numbers that three digits would round up to the unit have it too.
        if number >= 0.9995 * 10**power:
            return f"{max(number / 10**power, 1):.3g}{unit}"
    return str(number)


def rough_duration(seconds: float) -> str:
    """Write a time that is known only roughly."""
    if seconds < 1:
        return "1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 600 else f"{minutes / 60:.0f} h"
    return f"{minutes / 1440:.1f} days"


def shortened(name: str) -> str:
    """Cut the middle out of a name that is too long for a table."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 17]}...{name[-14:]}"


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _wrapped(text: str, indent: str = "", hang: str | None = None) -> str:
    return textwrap.fill(
        " ".join(map(printable, text.splitlines())),
        TEXT_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent if hang is None else hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
