"""The ranking of what is measured so far, shown while a selection runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lensjax._display import number, percent
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.job import first_line
from lensjax.progress.console import Console
from lensjax.progress.state import SelectionState
from lensjax.select.request import Prepared
from lensjax.selectors import Method, Scores

TIME_SHARE = 0.03  # of the time so far that interim rankings may have taken


class InterimRanking:
    """Ranks when there is news and it takes little of the time; an error here never stops the selection.

    Parameters
    ----------
    console : Console
    state : SelectionState
        Gets the ranking.
    """

    def __init__(self, console: Console, state: SelectionState) -> None:
        self.console, self.state = console, state
        self._known: tuple[int, ...] = (0, 0, 0)
        self._seconds = 0.0

    def update(self, news: tuple[int, ...], compute: Callable[[], Scores | None], *, last: bool = False) -> None:
        """Rank the candidates and show it, if somebody watches.

        Parameters
        ----------
        news : tuple of int
            Numbers of runs, failures and scores so far; where they are the same as before, nothing is done.
        compute : callable () -> Scores or None
        last : bool
            Whether there will be no other ranking: then it may take its time.
        """
        console = self.console
        if news == self._known or not (console.live or console.verbose):
            return
        begun = console.elapsed
        if self._seconds > TIME_SHARE * begun and not last:
            return
        self._known, scores = news, None
        try:
            scores = compute()
        except Exception as error:
            console.detail(f"no ranking so far: {first_line(error)}")
        self._seconds += console.elapsed - begun
        self.state.update_ranking(scores)
        if scores is not None and not console.live:
            console.detail(f"ranking so far: {_in_words(scores)}")


def rankable(
    prepared: Prepared,
    chosen: Method,
    measured: Collection[tuple[str, int]],
    pretrained_scores: Mapping[str, Mapping[str, Any]],
    failures: Collection[str],
) -> list[Candidate]:
    """Return the candidates that are measured as far as a method needs.

    Parameters
    ----------
    prepared : Prepared
    chosen : Method
    measured : collection of (candidate, size)
    pretrained_scores : mapping of score to mapping of candidate to measurement
    failures : collection of candidates
    """
    needed, largest = chosen.sizes_to_rank(prepared.request.gamma), prepared.sizes[-1]
    ready = []
    for candidate in prepared.candidates:
        sizes = [size for name, size in measured if name == candidate.name and size <= largest]
        scored = all(candidate.name in pretrained_scores[score] for score in chosen.pretrained_scores)
        if sizes and sum(s > 0 for s in sizes) >= needed and scored and candidate.name not in failures:
            ready.append(candidate)
    return ready


def _in_words(scores: Scores) -> str:
    """Return the candidates in their order, with predicted losses and probabilities."""
    parts = []
    for row in scores.order:
        text = f"{scores.names[row]} {number(float(scores.predicted_loss[row]), 4)}"
        if scores.best_probability is not None:
            text += f" ({percent(float(scores.best_probability[row]), 0)} %)"
        parts.append(text)
    return ", ".join(parts)
