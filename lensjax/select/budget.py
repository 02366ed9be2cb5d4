"""The budget of a selection, and its ledger: no run starts that could exceed the budget."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from lensjax._messages import did_you_mean
from lensjax.errors import InputError
from lensjax.jobs.defaults import EXTRA_MEASUREMENTS
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
SMALLEST_BARE_FLOPS = 1e4  # a smaller number without a unit is refused: nobody means so few FLOPs
TIME_MARGIN = 1.25  # factor on a run's estimated time, when it is decided whether the budget pays for it
HELP = "0.05 or 5% (of fine-tuning all on all samples), 2e16 (FLOPs), 3h, 90min, or 20000samples"


@dataclasses.dataclass(frozen=True)
class Budget:
    """An amount of something that a selection may spend.

    Attributes
    ----------
    kind : {"share", "flops", "seconds", "samples"}
        A share of what fine-tuning all candidates on all samples costs, both counted as weights x samples of one pass;
        or what is really spent: floating-point operations (6 for each trained weight and token, all epochs and
        trials), wall time, or samples trained on (all epochs and trials).
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
        # Commas only separate thousands; whether one was meant as a decimal sign is not guessed.
        number = r"(?:[0-9_]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
        matched = re.fullmatch(rf"\s*({number})\s*([A-Za-z%]*)\s*", text)
        try:
            value = float(matched[1].replace(",", "").replace("_", "")) if matched else float("nan")
        except ValueError:
            value = float("nan")
        named_unit = matched[2].lower() if matched else ""
        unit = SYNONYMS.get(named_unit, named_unit) or ("share" if value < 1 else "flops")
        kind, factor = UNITS.get(unit, ("share", float("nan")))
        wrong = ""
        if matched is None or math.isnan(value):
            wrong = " The decimal sign is a point." if re.search(r"\d,\d", text) else ""
        elif math.isnan(factor):
            wrong = f" {matched[2]!r} is no unit.{did_you_mean(named_unit, (*UNITS, *SYNONYMS))}"
        elif kind == "share" and value * factor >= 1:
            wrong = " A share is below 100 %."
        elif not named_unit and 1 <= value < SMALLEST_BARE_FLOPS:
            wrong = f" {value:g} FLOPs buy nothing: name the unit."
        if wrong or not value > 0 or value == float("inf") or math.isnan(factor):
            raise InputError(f"{text} is no amount that can be spent; give it as {HELP}.{wrong}")
        return cls(kind, value * factor)

    def __str__(self) -> str:
        """Return the text that `parse` turns into this budget again."""
        unit = {"share": "", "flops": "flops", "seconds": "s", "samples": "samples"}[self.kind]
        return f"{self.amount!r}".removesuffix(".0") + unit


def charged_records(records: Sequence[Run]) -> list[Run]:
    """Return the records whose costs add up to what was spent, without counting a cost twice.

    The record of a finished run includes the costs of its trials. That of a failed run does not: its trials' own
    records count. Trials of a run that was killed do not count, for the run is repeated.
    """
    finished = {run.key for run in records if not run.part_of and run.test_loss is not None}
    failed = {run.key for run in records if not run.part_of} - finished
    return [run for run in records if run.part_of in {"", *EXTRA_MEASUREMENTS, *failed}]


def left_out(first: int) -> str:
    """Return the note on subsets of `first` samples and more, for which the budget may not suffice."""
    return f"subsets of {first} samples and more may cost more than --budget and are left out"


class Ledger:
    """Keeps account of a budget: how much of it is spent, and which runs may still start.

    It depends on the journal alone, so that a resumed selection decides as one that was not interrupted.

    Parameters
    ----------
    budget : Budget or None
        None: without limit.
    weights : mapping of str to float
        Parameters of each candidate.
    flops_per_sample, passes : mapping, float
        FLOPs of one pass over one sample by each candidate; passes that all trials of a run make at most.
    target : float
        Samples of the full data; runs on that many are for verification and not counted.
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
        elif budget.kind != "seconds":  # seconds have no price before the first run shows the speed
            own = flops_per_sample if budget.kind == "flops" else dict.fromkeys(weights, 1.0)
            self.prices = {name: passes * float(value) for name, value in own.items()}

    def describe(self, amount: float) -> str:
        """Write an amount with the budget's unit."""
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
        """Return whether a measurement that costs `flops` may start."""
        if self.budget is None:
            return True
        return self.left > 0 and not (self.budget.kind == "flops" and flops > self.left)

    def affordable(
        self, sizes: Sequence[int], prices: Callable[[int], Sequence[float]], needed: int
    ) -> tuple[int, ...]:
        """Return the sizes that the budget pays for if every candidate is trained on all of them.

        Prices in FLOPs and samples do not change, and a resumed selection must come to the same answer: the prices of
        all runs are compared with the whole budget. Prices in seconds do change: only those of the runs still to be
        made are compared with what is left.

        Parameters
        ----------
        sizes : sequence of int
            Subset sizes, ascending.
        prices : callable (size) -> sequence of float
            Prices of the runs at that size that count.
        needed : int
            How many sizes the method needs at least. A time budget keeps that many, for its prices are estimates.
        """
        total, affordable = 0.0, list[int]()
        for size in sizes:
            own = prices(size)
            total += sum(own)
            required = self.timed and (not own or len(affordable) < needed)
            if self.budget is not None and not required and total > (self.left if self.timed else self.amount):
                break
            affordable.append(size)
        return tuple(affordable)

    def price(self, name: str, size: int) -> float:
        """Return what a run costs at most; in seconds an estimate from the runs so far, 0 before the first."""
        return self.prices[name] * size

    def refuses(self, name: str, size: int, *, needed: bool = False) -> str:
        """Return why a run must not start; "" if it may.

        A run that is `needed` in any case may start as long as time is left, for its price in time is only an estimate.
        """
        if self.budget is None or (needed and self.timed and self.left > 0):
            return ""
        # Scores are computed from what the runs leave over. In a selection that is continued with a larger budget
        # they may have been paid before the runs; they must not keep a run from starting that would have come first.
        price, left = self.price(name, size), max(self.left + self.spent_on_scores, 0.0)
        if price <= left and left > 0:
            return ""
        return (
            f"{size} samples may cost up to {self.describe(price)}; of the budget of {self.describe(self.amount)}, "
            f"{self.describe(left)} are left"
        )

    def update(self, records: Sequence[Run], elapsed: float = 0.0) -> None:
        """Compute the amount spent from all records.

        Parameters
        ----------
        records : sequence of Run
            All records in the journal; `charged_records` tells which of them count.
        elapsed : float
            Seconds that the choice has taken in all sessions.
        """
        if self.budget is None:
            return
        counted = [r for r in charged_records(records) if 0 < r.size < self.target or r.part_of in PRETRAINED_SCORES]
        if self.budget.kind == "seconds":
            self.spent = elapsed
            # The highest speed so far: small runs mostly load and compile. A run that takes longer than estimated is
            # stopped when the budget is spent.
            speeds = [
                r.seconds / (self.flops_per_sample[r.candidate] * r.size)
                for r in counted
                if not r.part_of and r.test_loss is not None and r.candidate in self.flops_per_sample
            ]
            if speeds:
                self.prices = {n: TIME_MARGIN * own * min(speeds) for n, own in self.flops_per_sample.items()}
        elif self.budget.kind == "share":
            self.spent = sum(self.prices.get(r.candidate, 0.0) * r.size for r in counted if not r.part_of)
        elif self.budget.kind == "samples":
            self.spent = float(sum(r.samples for r in counted))
        else:
            self.spent = float(sum(r.flops for r in counted))
            self.spent_on_scores = float(sum(r.flops for r in counted if r.part_of in PRETRAINED_SCORES))
