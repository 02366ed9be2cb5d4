"""Budget allocation by racing: which candidate to train next, and on how many samples.

Every candidate is trained on a few small subsets. Then follow stages (the rungs of successive halving), each with a
larger subset and a share of the remaining budget: candidates are trained in the order of their predicted losses until
the stage's share is spent. There are no runs at sizes between the stages: every run starts from the pre-trained
weights, so they would cost a lot for what they add.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.selectors.bayesian_average import DEFAULT_SETTINGS, Settings, posterior


@dataclasses.dataclass(frozen=True)
class Race:
    """The stages of a race. The defaults are chosen in benchmarks/allocation.py.

    Attributes
    ----------
    common : tuple of int
        Divisors of the target: the sizes that every candidate is trained on are target / divisor.
    stages : tuple of (int, float)
        Divisor of the target that gives the stage's size, and the share of the remaining budget it may spend.
    """

    common: tuple[int, ...] = (4096, 1024, 256)
    stages: tuple[tuple[int, float], ...] = ((64, 0.5), (8, 1.0))

    def sizes(
        self, target: float, smallest: float = 1, largest: float = math.inf
    ) -> tuple[tuple[int, ...], tuple[tuple[int, float], ...]]:
        """Return the sizes that every candidate is trained on, ascending, and the stages as (size, share).

        Sizes below `smallest` are raised to it, and stages above `largest` are left out. There are at least
        two common sizes, for one point has no slope.
        """
        common = sorted({max(int(target // d), int(smallest)) for d in self.common})
        if len(common) < 2:
            common = [int(smallest), 2 * int(smallest)]
        stages = tuple((int(target // d), share) for d, share in self.stages if common[-1] < target // d <= largest)
        return tuple(common), stages


DEFAULT_RACE = Race()


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The next run.

    Attributes
    ----------
    name : str
        Candidate.
    size : int
        Training samples.
    cost : float
        Weights x samples.
    reason : str
        One readable sentence.
    """

    name: str
    size: int
    cost: float
    reason: str


def full_cost(curves: Curves, target: float) -> float:
    """Cost of fine-tuning every candidate on `target` samples, in weights x samples.

    Raises
    ------
    InputError
        If the number of parameters of a candidate is not known.
    """
    return float(_parameters(curves).sum() * target)


def _parameters(curves: Curves) -> np.ndarray:
    if curves.parameters is None or np.isnan(curves.parameters).any():
        name = curves.names[0 if curves.parameters is None else int(np.argmax(np.isnan(curves.parameters)))]
        raise InputError(
            f"{curves.source}: the number of parameters of {name} is not known, without which a run has no cost. Add "
            "a column 'parameters'."
        )
    return curves.parameters


def propose(
    curves: Curves,
    target: float,
    budget: float,
    *,
    smallest: float = 1,
    largest: float = math.inf,
    race: Race = DEFAULT_RACE,
    settings: Settings = DEFAULT_SETTINGS,
) -> tuple[Proposal, ...]:
    """Return the next runs, in order: those of the current stage that are not done.

    There is no hidden state: the answer depends on the arguments only, so an interrupted race goes on where it was.

    Parameters
    ----------
    curves : Curves
        Losses measured so far, NaN where there is none, with the numbers of parameters. Of the columns, those at the
        race's sizes count as runs that were paid for.
    target : float
        Training samples the choice is made for.
    budget : float
        What all runs together may cost, in weights x samples; a share of `full_cost`.
    smallest, largest : float
        Fewest and most samples to train on.
    race, settings
        Constants.

    Returns
    -------
    tuple of Proposal
        Empty when the budget buys no further run of the race.

    Raises
    ------
    InputError
        If the budget does not cover the common sizes, or parameters are not known.
    """
    parameters = _parameters(curves)
    common, stages = race.sizes(target, smallest, largest)
    needed = float(parameters.sum() * sum(common))
    if needed > budget:
        raise InputError(
            f"--budget {budget / full_cost(curves, target):.3g}: training every candidate on "
            f"{', '.join(map(str, common))} samples alone costs {needed / full_cost(curves, target):.3g} of "
            "fine-tuning all on all samples. Raise --budget, or lower --smallest."
        )
    measured = {size: np.isfinite(curves.at(size)) for size in (*common, *(size for size, _ in stages))}
    # Candidate by candidate, so that a model is loaded and compiled once.
    missing = tuple(
        Proposal(name, size, float(parameters[row] * size), "small subsets, for all")
        for row, name in enumerate(curves.names)
        for size in common[::-1]
        if not measured[size][row]
    )
    if missing:
        return missing
    spent = needed
    for number, (size, share) in enumerate(stages, start=1):
        # Rank by what was known before the stage: its own results count only from the next stage on.
        predicted = np.exp(posterior(curves.visible(size - 1), target, settings).log_loss_with_ats)
        limit = spent + share * (budget - spent)
        order = np.argsort(predicted, kind="stable")
        found = []
        for rank, row in enumerate(order, start=1):
            cost = float(parameters[row] * size)
            if spent + cost > limit:
                continue
            spent += cost
            if not measured[size][row]:
                reason = (
                    f"stage {number} of {len(stages)}: number {rank} of {len(curves)} with a predicted loss of "
                    f"{predicted[row]:.4f}"
                )
                found.append(Proposal(curves.names[row], size, cost, reason))
        if found:
            return tuple(found)
    return ()
