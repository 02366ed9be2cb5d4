"""What a selection may spend, and what its runs may cost at most: no run starts that could exceed the budget."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from lensjax._messages import did_you_mean
from lensjax.errors import InputError
from lensjax.jobs.job import EXTRA_MEASUREMENTS
from lensjax.journal import Run
from lensjax.selectors.methods import PRETRAINED_SCORES

Kind = Literal["share", "flops", "seconds", "samples"]

UNITS: dict[str, tuple[Kind, float]] = {
    "share": ("share", 1.0),
    "%": ("share", 0.01),
    "flops": ("flops", 1.0),
    "samples": ("samples", 1.0),
    "s": ("seconds", 1.0),
    "min": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
    "d": ("seconds", 86400.0),
}
SYNONYMS = {"flop": "flops", "sample": "samples", "sec": "s", "second": "s", "minute": "min", "hour": "h", "day": "d"}
SYNONYMS |= {"seconds": "s", "minutes": "min", "hours": "h", "days": "d", "percent": "%"}
LEAST_FLOPS = 1e4  # a bare number below is no amount of FLOPs that anyone means
CAUTION = 1.25  # times as long as usual is what a run is given
HELP = "0.05 or 5% (of fine-tuning all on all samples), 2e16 (FLOPs), 3h, 90min, or 20000samples"


@dataclasses.dataclass(frozen=True)
class Budget:
    """An amount of something that a selection may spend.

    Attributes
    ----------
    kind : {"share", "flops", "seconds", "samples"}
        A share of fine-tuning all candidates on all samples, both counted as weights x samples in one pass; or all
        that is really spent: floating-point operations (6 for each trained weight and token, all epochs and trials),
        wall time, or samples trained on (all epochs and trials).
    amount : float
    """

    kind: Kind
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read what a user wrote.

        Raises
        ------
        InputError
            If it is no number, has an unknown unit, or is not positive.
        """
        # A comma is for thousands only: a decimal one is not guessed at.
        number = r"(?:[0-9_]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
        matched = re.fullmatch(rf"\s*({number})\s*([A-Za-z%]*)\s*", text)
        try:
            value = float(matched[1].replace(",", "").replace("_", "")) if matched else float("nan")
        except ValueError:
            value = float("nan")
        written = matched[2].lower() if matched else ""
        unit = SYNONYMS.get(written, written) or ("share" if value < 1 else "flops")
        kind, factor = UNITS.get(unit, ("share", float("nan")))
        wrong = ""
        if matched is None or math.isnan(value):
            wrong = " The decimal sign is a point." if re.search(r"\d,\d", text) else ""
        elif math.isnan(factor):
            wrong = f" {matched[2]!r} is no unit.{did_you_mean(written, (*UNITS, *SYNONYMS))}"
        elif kind == "share" and value * factor >= 1:
            wrong = " A share is below 100 %."
        elif not written and 1 <= value < LEAST_FLOPS:
            wrong = f" {value:g} FLOPs buy nothing: name the unit."
        if wrong or not value > 0 or value == float("inf") or math.isnan(factor):
            raise InputError(f"{text} is no amount that can be spent; give it as {HELP}.{wrong}")
        return cls(kind, value * factor)

    def __str__(self) -> str:
        """Return what `parse` reads as this budget."""
        unit = {"share": "", "flops": "flops", "seconds": "s", "samples": "samples"}[self.kind]
        return f"{self.amount!r}".removesuffix(".0") + unit


def paid(lines: Sequence[Run]) -> list[Run]:
    """Return the records whose costs add up to what was spent, each cost once.

    A finished run's record holds its trials; those of a run that failed stand beside its record; those of a run that
    was killed are left out, for it is made again.
    """
    finished = {run.key for run in lines if not run.part_of and run.test_loss is not None}
    failed = {run.key for run in lines if not run.part_of} - finished
    return [run for run in lines if run.part_of in {"", *EXTRA_MEASUREMENTS, *failed}]


class Ledger:
    """Accounts for what is spent of a budget.

    It follows from the journal alone, so that a resumed selection goes on as an undisturbed one does.

    Parameters
    ----------
    budget : Budget or None
        None: without limit.
    weights : mapping of str to float
        Parameters of each candidate.
    flops_per_sample, passes : mapping, float
        What one pass over one sample costs each candidate, and how many passes all trials of a run make at most.
    target : float
        Samples of the full data; runs of so many are for verification and not counted.
    """

    def __init__(
        self,
        budget: Budget | None,
        *,
        weights: Mapping[str, float],
        flops_per_sample: Mapping[str, float],
        passes: float,
        target: float,
    ) -> None:
        self.budget, self.passes, self.target = budget, passes, target
        self.flops_per_sample = flops_per_sample
        self.amount, self.spent = float("inf"), 0.0
        self.spent_on_scores = 0.0  # part of `spent`
        self.prices: dict[str, float] = dict.fromkeys(weights, 0.0)
        if budget is None:
            return
        self.amount = budget.amount
        self._whole = sum(weights.values()) * target
        if budget.kind == "share":
            self.amount = budget.amount * self._whole
            self.prices = {name: float(value) for name, value in weights.items()}
        elif budget.kind != "seconds":  # what a second buys is not known before the first run
            own = flops_per_sample if budget.kind == "flops" else dict.fromkeys(weights, 1.0)
            self.prices = {name: passes * float(value) for name, value in own.items()}

    def describe(self, amount: float) -> str:
        """Return an amount of the budget's kind in words."""
        kind = "flops" if self.budget is None else self.budget.kind
        if kind == "share":
            return f"{amount / self._whole:.3g} of fine-tuning all on all samples"
        if kind == "seconds":
            return f"{amount / 3600:.3g} h" if amount >= 3600 else f"{amount:.3g} s"
        return f"{amount:,.0f} samples" if kind == "samples" else f"{amount:.3g} FLOPs"

    @property
    def timed(self) -> bool:
        """Whether the budget is one of time."""
        return self.budget is not None and self.budget.kind == "seconds"

    @property
    def left(self) -> float:
        """What may still be spent."""
        return self.amount - self.spent

    def pays(self, flops: float) -> bool:
        """Return whether a measurement that costs so many FLOPs may start."""
        if self.budget is None:
            return True
        return self.left > 0 and not (self.budget.kind == "flops" and flops > self.left)

    def affordable(
        self, sizes: Sequence[int], prices: Callable[[int], Sequence[float]], needed: int
    ) -> tuple[int, ...]:
        """Return the sizes that the budget pays for if every candidate is trained on all of them.

        Prices in FLOPs and samples do not change, and a resumed selection must come to the same answer: all runs count,
        against all of the budget. Prices in seconds do change: those still to be made count, against what is left.

        Parameters
        ----------
        sizes : sequence of int
            Subset sizes, ascending.
        prices : callable (size) -> sequence of float
            Of the runs at that size that count.
        needed : int
            Sizes that the method cannot do without: within a time budget, whose prices are estimates, they are kept.
        """
        total, found = 0.0, list[int]()
        for size in sizes:
            own = prices(size)
            total += sum(own)
            kept = self.timed and (not own or len(found) < needed)
            if self.budget is not None and not kept and total > (self.left if self.timed else self.amount):
                break
            found.append(size)
        return tuple(found)

    def price(self, name: str, size: int) -> float:
        """Return what a run may cost at most; for seconds an estimate from the runs so far, 0 before the first."""
        return self.prices[name] * size

    def refuses(self, name: str, size: int, *, needed: bool = False) -> str:
        """Return why a run must not start; empty if it may.

        What is `needed` in any case may start while there is time left, for its price in time is an estimate only.
        """
        if self.budget is None or (needed and self.timed and self.left > 0):
            return ""
        # Scores take what runs leave. When a selection is continued with a larger budget, they are there already.
        price, left = self.price(name, size), max(self.left + self.spent_on_scores, 0.0)
        if price <= left and left > 0:
            return ""
        return (
            f"{size} samples may cost up to {self.describe(price)}; of the budget of {self.describe(self.amount)}, "
            f"{self.describe(left)} are left"
        )

    def update(self, lines: Sequence[Run], elapsed: float = 0.0) -> None:
        """Work out what is spent.

        Parameters
        ----------
        lines : sequence of Run
            Everything in the journal; `paid` says what of it counts.
        elapsed : float
            Seconds that the choice has taken in all sessions.
        """
        if self.budget is None:
            return
        counted = [r for r in paid(lines) if 0 < r.size < self.target or r.part_of in PRETRAINED_SCORES]
        if self.budget.kind == "seconds":
            self.spent = elapsed
            # The best seen, for small runs mostly load and compile; a run that takes longer is ended in time.
            speeds = [
                r.seconds / (self.flops_per_sample[r.candidate] * r.size)
                for r in counted
                if not r.part_of and r.test_loss is not None and r.candidate in self.flops_per_sample
            ]
            if speeds:
                self.prices = {n: CAUTION * own * min(speeds) for n, own in self.flops_per_sample.items()}
        elif self.budget.kind == "share":
            self.spent = sum(self.prices.get(r.candidate, 0.0) * r.size for r in counted if not r.part_of)
        elif self.budget.kind == "samples":
            self.spent = float(sum(r.samples for r in counted))
        else:
            self.spent = float(sum(r.flops for r in counted))
            self.spent_on_scores = float(sum(r.flops for r in counted if r.part_of in PRETRAINED_SCORES))
