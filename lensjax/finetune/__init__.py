"""Fine-tuning runs, jit-compiled: plan, search over learning rates and batch sizes, sharding, cost.

The names below load on first use: `lensjax.finetune.choices` is read by `--help` too.
"""

from typing import TYPE_CHECKING

from lensjax._lazy import lazy_names

if TYPE_CHECKING:
    from lensjax.finetune.config import Plan, Search
    from lensjax.finetune.cost import tuning_flops
    from lensjax.finetune.features import target_features
    from lensjax.finetune.results import DivergedError, Outcome, Progress, Trial, Weights
    from lensjax.finetune.search import tune
    from lensjax.finetune.tuner import FineTuner

_HOMES = {
    name: f"lensjax.finetune.{module}"
    for module, names in {
        "config": ("Plan", "Search"),
        "cost": ("tuning_flops",),
        "features": ("target_features",),
        "results": ("DivergedError", "Outcome", "Progress", "Trial", "Weights"),
        "search": ("tune",),
        "tuner": ("FineTuner",),
    }.items()
    for name in names
}

__all__ = [
    "DivergedError",
    "FineTuner",
    "Outcome",
    "Plan",
    "Progress",
    "Search",
    "Trial",
    "Weights",
    "target_features",
    "tune",
    "tuning_flops",
]

__getattr__, __dir__ = lazy_names(__name__, globals(), _HOMES)
