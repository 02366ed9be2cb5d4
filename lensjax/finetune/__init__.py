"""Fine-tuning runs, jit-compiled: plan, search over learning rates and batch sizes, sharding, cost."""

from lensjax.finetune.config import Plan, Search
from lensjax.finetune.cost import tuning_flops
from lensjax.finetune.features import target_features
from lensjax.finetune.results import DivergedError, Outcome, Progress, Trial, Weights
from lensjax.finetune.search import tune
from lensjax.finetune.tuner import FineTuner

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
