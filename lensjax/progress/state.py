"""The state of a running selection, which a `Console` shows."""

from __future__ import annotations

import dataclasses

import numpy as np

from lensjax.selectors import Scores


@dataclasses.dataclass
class ActiveRun:
    """The run that is under way.

    Attributes
    ----------
    name : str
        Candidate.
    size : int or None
        Training samples, one of the state's sizes; None if the run measures something else than a loss.
    activity : str
        What it is doing, in words.
    fraction : float
        Share of it that is done at least, from 0 to 1.
    """

    name: str
    size: int | None
    activity: str
    fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class RankedCandidate:
    """What a ranking says of one candidate.

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
    """The state of a running selection. The session updates it; a `Console` that follows it shows it.

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
    ranking : dict of candidate to RankedCandidate
        The ranking so far, without the candidates that have no score yet.
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
    ranking: dict[str, RankedCandidate] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    running: ActiveRun | None = None
    spent: str = ""
    time_left: str = ""

    def update_ranking(self, scores: Scores | None) -> None:
        """Replace the ranking by that of these scores; None if there is no ranking yet."""
        self.ranking = {}
        if scores is None:
            return
        chances = scores.best_probability
        for rank, row in enumerate(scores.order, start=1):
            if np.isfinite(scores.score[row]):
                chance = float("nan") if chances is None else float(chances[row])
                self.ranking[scores.names[row]] = RankedCandidate(rank, float(scores.predicted_loss[row]), chance)
