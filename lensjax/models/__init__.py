"""Language models in Flax NNX, loaded from and saved to Hugging Face checkpoints."""

from lensjax.models.base import LanguageModel
from lensjax.models.checkpoints.adapters import load_lora, save_lora
from lensjax.models.checkpoints.config_file import load_config
from lensjax.models.checkpoints.hub import resolve
from lensjax.models.checkpoints.mapping import abstract_model
from lensjax.models.checkpoints.pretrained import (
    check_checkpoint,
    count_parameters,
    from_pretrained,
    init_model,
    load_model,
    load_tokenizer,
)
from lensjax.models.checkpoints.saving import save_pretrained
from lensjax.models.execution import stack_layers, unstack_layers
from lensjax.models.lora import Lora, ParameterCounts, add_lora, merge_lora, parameter_counts
from lensjax.models.registry import FAMILIES, ModelConfig

__all__ = [
    "FAMILIES",
    "LanguageModel",
    "Lora",
    "ModelConfig",
    "ParameterCounts",
    "abstract_model",
    "add_lora",
    "check_checkpoint",
    "count_parameters",
    "from_pretrained",
    "init_model",
    "load_config",
    "load_lora",
    "load_model",
    "load_tokenizer",
    "merge_lora",
    "parameter_counts",
    "resolve",
    "save_lora",
    "save_pretrained",
    "stack_layers",
    "unstack_layers",
]
