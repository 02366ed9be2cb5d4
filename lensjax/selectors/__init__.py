"""Selectors: visible losses and facts about the candidates in, score and predicted loss out."""

from collections.abc import Mapping

from lensjax.errors import InputError
from lensjax.selectors.base import Scores, Selector, require_points
from lensjax.selectors.baselines import ats, model_size, subtuning, zero_shot
from lensjax.selectors.scaling import lens, power, rectified
from lensjax.selectors.stopping import GAMMA, TAU, Stop, check_rule, descend, should_stop

SELECTORS: Mapping[str, Selector] = {
    "lens": lens,
    "ats": ats,
    "rectified": rectified,
    "power": power,
    "subtuning": subtuning,
    "zero_shot": zero_shot,
    "model_size": model_size,
}

__all__ = [
    "GAMMA",
    "SELECTORS",
    "TAU",
    "Scores",
    "Selector",
    "Stop",
    "ats",
    "check_rule",
    "descend",
    "get_selector",
    "lens",
    "model_size",
    "power",
    "rectified",
    "require_points",
    "should_stop",
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
        raise InputError(f"method {name!r} is unknown; there are: {', '.join(SELECTORS)} and all.")
    return SELECTORS[name]
