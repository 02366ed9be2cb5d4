"""What a selection would do and take, before it does: as data and as text for the terminal."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lensjax._display import printable, samples

SCHEMA = 1
WIDTH = 96  # of the text, in characters
NAME = 30  # characters of a name in a table

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
        Whether it is made in any case, if nothing fails.
    done : bool
        Whether it is in the run directory's journal: then it costs nothing more.
    trials : int
        Learning rates and batch sizes tried.
    tokens : int
        Trained on in one pass, prompt and target, without padding.
    flops, seconds : float
        At most: all passes and trials. Floating-point operations of training, 6 for each trained weight and token and 4
        for each frozen one; seconds with evaluations, padding, loading and compiling.
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
    """What one candidate needs.

    Attributes
    ----------
    name : str
    parameters, trainable : int
        Weights, and those that fine-tuning changes.
    weights, optimiser, working, process : int
        Bytes of memory: copies of the weights; AdamW's moments; gradients, activations and logits; the process itself,
        where devices and processes share their memory, as on CPUs. Of each device, where there are several.
    available : int or None
        Bytes there are; None if not known.
    download : int
        Bytes to be fetched from the hub.
    problem, remedy : str
        Why it does not fit, and what to do about it; empty if it does.
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
        """Bytes of memory, all together."""
        return self.weights + self.optimiser + self.working + self.process

    @property
    def fits(self) -> bool:
        """Whether it can be fine-tuned here."""
        return not self.problem


@dataclasses.dataclass(frozen=True)
class DiskNeed:
    """A directory that will take up disk.

    Attributes
    ----------
    what : str
    path : str
    needed, free : int
        Bytes.
    """

    what: str
    path: str
    needed: int
    free: int


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a selection by fine-tuning would run, and what that takes.

    Attributes
    ----------
    task : str
    directory : str or None
        Run directory; None if it depends on data that are not here.
    method : str
    target, train, validation, test : int
        Samples the choice is made for; that are there for training; that are set aside.
    sizes : tuple of int
        Subsets, ascending.
    max_length, passes : int
        Tokens of a sample, and passes over a subset, at most.
    needs : tuple of MemoryNeed
        One for each candidate.
    runs : tuple of PlannedRun
    flops, seconds : (float, float)
        Of what is still to do: of the runs that are sure, and of all at most, as far as the budget goes; both with all
        passes that are allowed.
    budget : str
        What the choice may cost; empty without a budget.
    places : tuple of DiskNeed
    basis : mapping of str to str
        How "FLOPs", "time" and "memory" were found.
    notes, problems : tuple of str
        What is good to know, and what besides the candidates stands in the way.
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
        """Whether everything can be done as it was asked for."""
        return not self.problems and all(need.fits for need in self.needs)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values; bytes, seconds and floating-point operations."""
        own = dataclasses.asdict(self)
        needs = [{**dataclasses.asdict(n), "memory": n.memory, "fits": n.fits} for n in self.needs]
        totals = {
            name: dict(zip(("sure", "at_most"), pair, strict=True))
            for name, pair in (("flops", self.flops), ("seconds", self.seconds))
        }
        return {"schema": SCHEMA, "fits": self.fits, **own, "basis": dict(self.basis), "needs": needs, **totals}

    def render(self) -> str:
        """Return it as text, the answer first."""
        parts = [self._answer(), self._plan(), "", self._candidates()]
        for need in self.needs:
            if need.problem:
                parts += ["", _wrapped(f"{need.name} does NOT FIT: {need.problem}"), _wrapped(need.remedy, "  ")]
        for problem in self.problems:
            parts += ["", _wrapped(f"PROBLEM: {problem}")]
        parts += ["", "What would be run:", self._runs()]
        if self.places:
            parts += ["", "Disk:", self._places()]
        parts += ["", *(_wrapped(f"{name}: {text}.", hang="  ") for name, text in self.basis.items())]
        parts += [_wrapped(f"Note: {note}.", hang="  ") for note in self.notes]
        return "\n".join(parts)

    def _answer(self) -> str:
        bad = [need.name for need in self.needs if not need.fits]
        count = len(self.needs)
        if not bad and any(need.available is None for need in self.needs):
            text = f"How much memory this machine has is not known: see below what the {count} candidates need. "
        elif not bad:
            text = f"All {count} candidates fit on this machine. "
        else:
            text = f"{len(bad)} of {count} candidates {'does' if len(bad) == 1 else 'do'} NOT FIT on this machine. "
        open_ = [run for run in self.runs if not run.done]
        if not open_:
            return _wrapped(text + "Every run is done already: the same command without --dry-run gives the result.")
        sure, most = self.seconds
        text += f"Everything takes at most about {span(most)} and {self.flops[1]:.1e} floating-point operations"
        if most > 1.01 * sure:
            text += f", {span(sure)} and {self.flops[0]:.1e} of that in any case"
        return _wrapped(text + ". This is a forecast: nothing was fine-tuned, and no weights were fetched.")

    def _plan(self) -> str:
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

    def _candidates(self) -> str:
        header = ["candidate", "weights", "trained", "memory", "of", "fits", "FLOPs", "time", "download"]
        rows = []
        for need in self.needs:
            own = [r for r in self.runs if r.candidate == need.name and not r.done]
            rows.append(
                [
                    shortened(need.name),
                    count(need.parameters),
                    "all" if need.trainable == need.parameters else count(need.trainable),
                    amount(need.memory),
                    "unknown" if need.available is None else amount(need.available),
                    "yes" if need.fits else "NO",
                    f"{sum(r.flops for r in own):.1e}" if own else "done",
                    span(sum(r.seconds for r in own)) if own else "done",
                    amount(need.download) if need.download else "-",
                ]
            )
        return table(header, rows)

    def _runs(self) -> str:
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
                    span(sum(r.seconds for r in left)) if left else "-",
                ]
            )
        return table(header, rows, left=1)

    def _places(self) -> str:
        rows = [[p.what, amount(p.needed), amount(p.free)] for p in self.places]
        lines = table(["what", "needed", "free"], rows).splitlines()
        paths = ["where", *(printable(p.path) for p in self.places)]
        fits = max(map(len, paths)) + len(lines[0]) + 2 <= WIDTH
        gap = "  " if fits else "\n    "
        return "\n".join(f"{line}{gap}{path}" for line, path in zip(lines, paths, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Lay out cells in columns that end on the right; the one numbered `left`, and the first, begin on the left."""
    header, rows = list(map(printable, header)), [list(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == left or (i == 0 and left != 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join(lines)


def amount(size: int) -> str:
    """Format a number of bytes."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            value = size / 2**power
            return (
                f"{value:.0f} {unit}"
                if value >= 100
                else f"{value:.2g} {unit}"
                if value < 10
                else f"{value:.0f} {unit}"
            )
    return f"{size} B"


def count(number: int) -> str:
    """Format a number of weights."""
    for unit, power in (("B", 9), ("M", 6), ("K", 3)):
        # From where three digits would round up to it.
        if number >= 0.9995 * 10**power:
            return f"{max(number / 10**power, 1):.3g}{unit}"
    return str(number)


def span(seconds: float) -> str:
    """Format a time that is known roughly only."""
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
    """Return a name that is short enough for a table: its beginning and its end."""
    return name if len(name) <= NAME else f"{name[: NAME - 17]}...{name[-14:]}"


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _wrapped(text: str, indent: str = "", hang: str | None = None) -> str:
    return textwrap.fill(
        " ".join(map(printable, text.splitlines())),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent if hang is None else hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
