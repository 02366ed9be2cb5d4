"""Selectors: visible losses and facts about the candidates in, score and predicted loss out.

The names below load on first use: the table of methods is read by `--help` too.
"""

from typing import TYPE_CHECKING

from lensjax._lazy import lazy_names

if TYPE_CHECKING:
    from lensjax.selectors.allocation import DEFAULT_RACE, Proposal, Race, full_cost, propose
    from lensjax.selectors.baselines import ats, by_log_me, by_nlp_metrics, model_size, subtuning, zero_shot
    from lensjax.selectors.bayesian_average import averaged
    from lensjax.selectors.certainty import CREDIBLE_LEVEL, best_probability, smallest_credible_set
    from lensjax.selectors.logme import log_me
    from lensjax.selectors.methods import DEFAULT, METHODS, SELECTORS, Method, get_selector, method
    from lensjax.selectors.scaling import lens, power, rectified
    from lensjax.selectors.scores import Scores, Selector, require_points
    from lensjax.selectors.spectra import NlpMetrics, nlp_metrics
    from lensjax.selectors.stopping import GAMMA, TAU, StoppingDecision, check_rule, replay_stopping_rule, should_stop

_HOMES = {
    name: f"lensjax.selectors.{module}"
    for module, names in {
        "allocation": ("DEFAULT_RACE", "Proposal", "Race", "full_cost", "propose"),
        "baselines": ("ats", "by_log_me", "by_nlp_metrics", "model_size", "subtuning", "zero_shot"),
        "bayesian_average": ("averaged",),
        "certainty": ("CREDIBLE_LEVEL", "best_probability", "smallest_credible_set"),
        "logme": ("log_me",),
        "methods": ("DEFAULT", "METHODS", "SELECTORS", "Method", "get_selector", "method"),
        "scaling": ("lens", "power", "rectified"),
        "scores": ("Scores", "Selector", "require_points"),
        "spectra": ("NlpMetrics", "nlp_metrics"),
        "stopping": ("GAMMA", "TAU", "StoppingDecision", "check_rule", "replay_stopping_rule", "should_stop"),
    }.items()
    for name in names
}

__all__ = [
    "CREDIBLE_LEVEL",
    "DEFAULT",
    "DEFAULT_RACE",
    "GAMMA",
    "METHODS",
    "SELECTORS",
    "TAU",
    "Method",
    "NlpMetrics",
    "Proposal",
    "Race",
    "Scores",
    "Selector",
    "StoppingDecision",
    "ats",
    "averaged",
    "best_probability",
    "by_log_me",
    "by_nlp_metrics",
    "check_rule",
    "full_cost",
    "get_selector",
    "lens",
    "log_me",
    "method",
    "model_size",
    "nlp_metrics",
    "power",
    "propose",
    "rectified",
    "replay_stopping_rule",
    "require_points",
    "should_stop",
    "smallest_credible_set",
    "subtuning",
    "zero_shot",
]

__getattr__, __dir__ = lazy_names(__name__, globals(), _HOMES)
