"""The signature of a selector, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from lensjax._display import listed, table
from lensjax.errors import InputError
from lensjax.losses.curves import Curves


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """A selector's scores of M candidates.

    Attributes
    ----------
    method : str
        Name of the selector, a key of `lensjax.selectors.SELECTORS`.
    names : tuple of str
    score : float64 array (M,)
        Lower is better. NaN where the method has no score; `status` says why.
    predicted_loss : float64 array (M,)
        Test loss expected after fine-tuning on `target` samples, nats per token; NaN where the method predicts none.
    status : tuple of str
        One readable sentence per candidate.
    used : bool array (M, S)
        The measurements that the scores depend on: a user of this method has to pay for them.
    details : mapping of str to array (M,)
        Parameters of the fitted law under their names in the paper, and other results of the method.
    remarks : tuple of str
        A remark on each fit, "" if there is none; empty for methods without fits.
    interval : float64 array (M, 2) or None
        Losses between which the loss at `target` lies with probability `lensjax.selectors.CREDIBLE_LEVEL`.
    best_probability : float64 array (M,) or None
        Probability of having the lowest loss at `target`, adding to 1.
    credible_set : bool array (M,) or None
        The smallest set that contains the best candidate with probability `CREDIBLE_LEVEL`.

    Examples
    --------
    >>> from lensjax import SELECTORS, read_losses
    >>> curves = read_losses("published:wmt19").visible(51200)
    >>> scores = SELECTORS["averaged"](curves, 1_638_400)
    >>> scores.best in curves.names, scores.interval.shape, round(scores.best_probability.sum(), 6)
    (True, (30, 2), np.float64(1.0))
    """

    method: str
    names: tuple[str, ...]
    score: np.ndarray
    predicted_loss: np.ndarray
    status: tuple[str, ...]
    used: np.ndarray
    details: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    interval: np.ndarray | None = None
    best_probability: np.ndarray | None = None
    credible_set: np.ndarray | None = None

    @property
    def order(self) -> np.ndarray:
        """Positions of the candidates, best first; those without a score last."""
        return np.argsort(np.where(np.isfinite(self.score), self.score, np.inf), kind="stable")

    @property
    def best(self) -> str:
        """Name of the chosen candidate.

        Raises
        ------
        InputError
            If the method could score no candidate.
        """
        if not np.isfinite(self.score).any():
            raise InputError(f"{self.method}: no candidate could be scored: {'; '.join(sorted(set(self.status)))}.")
        return self.names[self.order[0]]

    def __repr__(self) -> str:
        order = [self.names[row] for row in self.order if np.isfinite(self.score[row])]
        return f"Scores({self.method}, {len(self.names)} candidates, best first: {listed(order)})"

    def _repr_html_(self) -> str:
        """Show the ranking in a notebook."""
        header, columns = ["candidate", "predicted loss"], [self.predicted_loss]
        if self.interval is not None:
            header += ["from", "to"]
            columns += [self.interval[:, 0], self.interval[:, 1]]
        if self.best_probability is not None:
            header.append("P(best)")
            columns.append(self.best_probability)
        rows = ((self.names[row], *(float(c[row]) for c in columns), self.status[row]) for row in self.order)
        return table(repr(self), [*header, "status"], rows)


class Selector(Protocol):
    """The one signature: visible losses and facts about the candidates in, score and predicted loss out."""

    def __call__(self, curves: Curves, target: float) -> Scores:
        """Score the candidates of `curves` (visible losses only) for fine-tuning on `target` samples."""
        ...


def require_points(method: str, curves: Curves, needed: int, *, zero_shot: bool) -> None:
    """Refuse curves with too few measured points for a method.

    Raises
    ------
    InputError
        Naming the first candidate with fewer than `needed` points; D = 0 counts only if `zero_shot`.
    """
    measured = np.isfinite(curves.losses)
    if not zero_shot:
        measured = measured[:, curves.sizes > 0]
    counts = measured.sum(axis=1)
    if (counts < needed).any():
        row = int(np.argmin(counts))
        above = "" if zero_shot else " above 0 samples"
        raise InputError(
            f"{curves.source}: {curves.names[row]} has {counts[row]} visible loss(es){above}, but method {method} "
            f"needs {needed}. Measure it at more sizes, make more of them visible (--visible), or leave it out."
        )
