"""TODO"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from lensjax.selectors import Scores

if TYPE_CHECKING:
    pass


@dataclasses.dataclass
class ActiveRun:
    """What is being measured now.

    Attributes
    ----------
    name : str
        Candidate.
    size : int or None
        Training samples, a column of the board; None if no loss is being measured.
    doing : str
        In words.
    done : float
        Share that is done at least.
    """

    name: str
    size: int | None
    doing: str
    done: float = 0.0


@dataclasses.dataclass(frozen=True)
class RankedCandidate:
    """A candidate's place in a ranking.

    Attributes
    ----------
    rank : int
        From 1.
    predicted : float
        Loss at the target; NaN if the method predicts none.
    probability : float
        Of being the best; NaN if the method does not say.
    """

    rank: int
    predicted: float
    probability: float


@dataclasses.dataclass
class SelectionState:
    """All there is to see of a selection under way; whoever selects writes here, a `Console` shows it.

    Attributes
    ----------
    title : str
    unit : str
        Of the losses.
    names : tuple of str
        Candidates.
    sizes : tuple of int
        Sizes that may be measured, ascending; 0 is zero-shot.
    target : int
    losses : dict of (candidate, size) to float
        Measured so far.
    places : dict of candidate to RankedCandidate
        The ranking so far, of those it can say something about.
    failures : dict of candidate to reason
    running : ActiveRun or None
    spent : str
        What was spent, and what is left.
    time_left : str
    """

    title: str
    unit: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    target: int
    losses: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    places: dict[str, RankedCandidate] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    running: ActiveRun | None = None
    spent: str = ""
    time_left: str = ""

    def rank(self, scores: Scores | None) -> None:
        """Take over a ranking; None: there is none."""
        self.places = {}
        if scores is None:
            return
        chances = scores.best_probability
        for rank, row in enumerate(scores.order, start=1):
            if np.isfinite(scores.score[row]):
                chance = float("nan") if chances is None else float(chances[row])
                self.places[scores.names[row]] = RankedCandidate(rank, float(scores.predicted_loss[row]), chance)
