"""The selection methods, each described once: its function, what has to be measured for it, how it is explained.

Nothing heavy is imported here, for `--help` lists the methods too; a method's function is loaded on first use.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lensjax._messages import did_you_mean
from lensjax.errors import InputError

if TYPE_CHECKING:
    from lensjax.selectors.scores import Selector

NLP_METRICS, LOG_ME = "nlp_metrics", "log_me"
PRETRAINED_SCORES = (NLP_METRICS, LOG_ME)
"""Scores of a candidate that need no fine-tuning, in the order in which they are measured."""

ALL = "all"
"""Names all methods together."""

DEFAULT = "averaged"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to rank candidates.

    Attributes
    ----------
    name : str
    module, function : str
        Where its `Selector` is; empty for `ALL`.
    description : str
        How it works, for readers of a report.
    subsets : {"all", "largest", "none"}
        Which of the subset sizes it needs fine-tuning runs on.
    subsets_needed : int or None
        How many subset sizes it needs at least, beside the loss before fine-tuning; None: `gamma` of Algorithm 1.
    subsets_to_rank : int or None
        How many of them a single candidate must have to be ranked, where that is fewer.
    stops_early : bool
        Whether Algorithm 1 decides after each run, from the largest subset downwards, if another one is made.
    races : bool
        Whether candidates race when there is a budget: those that cannot win are not trained on larger subsets.
    pretrained_scores : tuple of str
        Which of `PRETRAINED_SCORES` it ranks by.
    stopping_options : mapping
        What its function calls `gamma` and `tau`.
    curve : {"average", "law", "line", "none"}
        What its predictions lie on: the average over laws, one fitted law, a straight line in log-log coordinates.
    law : str
        Which of `lensjax.laws.LAWS`, where `curve` is "law".
    """

    name: str
    module: str
    function: str
    description: str
    subsets: Literal["all", "largest", "none"] = "all"
    subsets_needed: int | None = 0
    subsets_to_rank: int | None = None
    stops_early: bool = False
    races: bool = False
    pretrained_scores: tuple[str, ...] = ()
    stopping_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    curve: Literal["average", "law", "line", "none"] = "none"
    law: str = ""

    @property
    def selector(self) -> Selector:
        """The function that scores candidates."""
        found: Selector = getattr(importlib.import_module(self.module), self.function)
        return found

    def options(self, *, gamma: int, tau: float) -> dict[str, Any]:
        """Return the keyword arguments of its function for Algorithm 1's constants, none where it has no such rule."""
        values = {"gamma": gamma, "tau": tau}
        return {own: values[name] for name, own in self.stopping_options.items()}

    def sizes(self, visible: Sequence[int]) -> tuple[int, ...]:
        """Return those of the visible subset sizes, ascending, that candidates are fine-tuned on."""
        return {"all": tuple(visible), "largest": tuple(visible[-1:]), "none": ()}[self.subsets]

    def sizes_needed(self, gamma: int) -> int:
        """Return how many subset sizes there have to be."""
        return gamma if self.subsets_needed is None else self.subsets_needed

    def sizes_to_rank(self, gamma: int) -> int:
        """Return how many subset sizes a candidate must be measured at to be ranked."""
        return self.sizes_needed(gamma) if self.subsets_to_rank is None else self.subsets_to_rank


_BASELINES, _LAWS = "lensjax.selectors.baselines", "lensjax.selectors.scaling"
_METHODS = (
    Method(
        "averaged",
        "lensjax.selectors.bayesian_average",
        "averaged",
        "Each candidate was fine-tuned on small parts of the data. Test losses fall along curves of a known "
        "family as data grow; every curve of it is weighted by how well it explains what was measured, and their "
        "average is read off at the full size, leaning towards the higher losses. What remains undecided between the "
        "curves is the interval. In the order, a loss that owes less to extrapolation counts for more.",
        subsets_needed=2,
        subsets_to_rank=1,
        races=True,
        curve="average",
    ),
    Method(
        "lens",
        _LAWS,
        "lens",
        "Each candidate was fine-tuned on small parts of the data, from the largest part downwards, until its "
        "losses left a straight line (LensLLM, Algorithm 1). The law L(D) = B / (F + D^beta) + E is fitted to them and "
        "read off at the full size.",
        subsets_needed=None,
        stops_early=True,
        stopping_options={"gamma": "gamma", "tau": "tau"},
        curve="law",
        law="lens",
    ),
    Method(
        "ats",
        _BASELINES,
        "ats",
        "A straight line through the losses of the larger sizes, both axes logarithmic, is read off at the full size.",
        subsets_needed=2,
        stops_early=True,
        stopping_options={"gamma": "k", "tau": "delta"},
        curve="line",
    ),
    Method(
        "rectified",
        _LAWS,
        "rectified",
        "The law L(D) = B / (D_l + D^beta) + E is fitted to all losses and read off at the full size.",
        subsets_needed=3,
        curve="law",
        law="rectified",
    ),
    Method(
        "power",
        _LAWS,
        "power",
        "The law L(D) = (B / D^beta + E)^alpha is fitted to all losses and read off at the full size.",
        subsets_needed=4,
        curve="law",
        law="power",
    ),
    Method(
        "subtuning",
        _BASELINES,
        "subtuning",
        "The candidates are ranked by their losses after fine-tuning on the largest part of the data.",
        subsets="largest",
        subsets_needed=1,
    ),
    Method(
        "zero_shot",
        _BASELINES,
        "zero_shot",
        "The candidates are ranked by their losses before any fine-tuning.",
        subsets="none",
    ),
    Method(
        "model_size",
        _BASELINES,
        "model_size",
        "The candidates are ranked by their size; no loss is looked at.",
        subsets="none",
    ),
    Method(
        NLP_METRICS,
        _BASELINES,
        "by_nlp_metrics",
        "The candidates are ranked by their weights alone: the eigenvalues of a well-trained layer have a "
        "heavy tail, and the smaller the exponent of its power law, on average over all weight matrices, the better.",
        subsets="none",
        pretrained_scores=(NLP_METRICS,),
    ),
    Method(
        LOG_ME,
        _BASELINES,
        "by_log_me",
        "The candidates are ranked by how well a linear model explains the answers' tokens by what each "
        "candidate makes of the text before any fine-tuning (LogME). Candidates with different "
        "tokenizers are hard to compare so.",
        subsets="none",
        pretrained_scores=(LOG_ME,),
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _METHODS}
"""Every method by its name, the default first."""

NAMES = (*METHODS, ALL)
"""What can be asked for."""

_EVERY = Method(ALL, "", "", "", subsets_needed=None, pretrained_scores=PRETRAINED_SCORES)


def method(name: str) -> Method:
    """Return what is known of a method, or of `ALL` of them together.

    Raises
    ------
    InputError
        If there is none of that name; the message lists those there are.
    """
    if name == ALL:
        return _EVERY
    if name not in METHODS:
        raise _unknown(name)
    return METHODS[name]


def get_selector(name: str) -> Selector:
    """Return the function of a method.

    Raises
    ------
    InputError
        If there is none of that name; the message lists those there are.
    """
    if name not in METHODS:
        raise _unknown(name)
    return METHODS[name].selector


def _unknown(name: str) -> InputError:
    hint = did_you_mean(name.replace("-", "_"), METHODS)
    return InputError(f"method {name!r} is unknown; there are: {', '.join(METHODS)} and all.{hint}")


class _Selectors(Mapping[str, "Selector"]):
    """The function of each method, loaded when it is asked for."""

    def __getitem__(self, name: str) -> Selector:
        return METHODS[name].selector

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


SELECTORS: Mapping[str, Selector] = _Selectors()
"""Name of a method -> its function."""
