"""Selectors: visible losses and facts about the candidates in, score and predicted loss out."""

from collections.abc import Mapping

from lensjax._messages import did_you_mean
from lensjax.errors import InputError
from lensjax.selectors.allocation import RACE, Proposal, Race, full_cost, propose
from lensjax.selectors.baselines import ats, by_log_me, by_nlp_metrics, model_size, subtuning, zero_shot
from lensjax.selectors.bayesian_average import averaged
from lensjax.selectors.certainty import CERTAINTY, best_probability, smallest_set
from lensjax.selectors.logme import log_me
from lensjax.selectors.scaling import lens, power, rectified
from lensjax.selectors.scores import Scores, Selector, require_points
from lensjax.selectors.spectra import NlpMetrics, nlp_metrics
from lensjax.selectors.stopping import GAMMA, TAU, Stop, check_rule, descend, should_stop

SELECTORS: Mapping[str, Selector] = {
    "averaged": averaged,
    "lens": lens,
    "ats": ats,
    "rectified": rectified,
    "power": power,
    "subtuning": subtuning,
    "zero_shot": zero_shot,
    "model_size": model_size,
    "nlp_metrics": by_nlp_metrics,
    "log_me": by_log_me,
}

DEFAULT = "averaged"

__all__ = [
    "CERTAINTY",
    "DEFAULT",
    "GAMMA",
    "RACE",
    "SELECTORS",
    "TAU",
    "NlpMetrics",
    "Proposal",
    "Race",
    "Scores",
    "Selector",
    "Stop",
    "ats",
    "averaged",
    "best_probability",
    "by_log_me",
    "by_nlp_metrics",
    "check_rule",
    "descend",
    "full_cost",
    "get_selector",
    "lens",
    "log_me",
    "model_size",
    "nlp_metrics",
    "power",
    "propose",
    "rectified",
    "require_points",
    "should_stop",
    "smallest_set",
    "subtuning",
    "zero_shot",
]


def get_selector(name: str) -> Selector:
    """Return a selector by name.

    Raises
    ------
    InputError
        If there is none of that name; the message lists those there are.
    """
    if name not in SELECTORS:
        hint = did_you_mean(name.replace("-", "_"), SELECTORS)
        raise InputError(f"method {name!r} is unknown; there are: {', '.join(SELECTORS)} and all.{hint}")
    return SELECTORS[name]
