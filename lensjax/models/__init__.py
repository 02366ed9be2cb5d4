"""Language models in Flax NNX, loaded from and saved to Hugging Face checkpoints."""

from lensjax.models.base import LanguageModel
from lensjax.models.checkpoints import (
    check_checkpoint,
    count_parameters,
    from_pretrained,
    init_model,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    save_pretrained,
)
from lensjax.models.registry import FAMILIES, ModelConfig

__all__ = [
    "FAMILIES",
    "LanguageModel",
    "ModelConfig",
    "check_checkpoint",
    "count_parameters",
    "from_pretrained",
    "init_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve",
    "save_pretrained",
]
