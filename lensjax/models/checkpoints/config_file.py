"""Reading and checking a model's config.json or the configuration in a GGUF file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lensjax._files import read_json
from lensjax.errors import InputError
from lensjax.models.checkpoints.gguf import GGUFFile, gguf_config, is_gguf
from lensjax.models.checkpoints.hub import resolve
from lensjax.models.registry import FAMILIES, ModelConfig, family

ADAPTER = "adapter_config.json"

TEXT_MODELS = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM")}
"""model_type of a multimodal model -> model_type and class of its language model, which is loaded alone."""


def conversion(encoder_decoder: bool) -> str:
    """Return the Python statement that loads a model with transformers and saves it as safetensors."""
    kind = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    return f"transformers.{kind}.from_pretrained(SOURCE).save_pretrained(TARGET)."


def load_config(
    name_or_path: str | os.PathLike[str] | Mapping[str, Any], *, revision: str | None = None
) -> ModelConfig:
    """Read and check a model's configuration without touching its weights.

    Parameters
    ----------
    name_or_path : str, path or mapping
        As in `from_pretrained`, or the contents of a config.json.
    revision : str, optional
        As in `from_pretrained`.

    Returns
    -------
    ModelConfig
        Of the model's family.

    Raises
    ------
    InputError
        If the model or its config.json is missing or unreadable, or its family is not supported.
    """
    if isinstance(name_or_path, Mapping):
        return _config(dict(name_or_path), "the configuration")
    if is_gguf(name_or_path):
        return gguf_config(GGUFFile.open(name_or_path))
    file = resolve(name_or_path, revision=revision, weights=False) / "config.json"
    if not file.is_file():
        raise InputError(f"{os.fspath(name_or_path)}: has no config.json; {_instead(file.parent)}.")
    raw = read_json(file, "download it again")
    if not isinstance(raw, dict):
        raise InputError(f"{file}: must hold a JSON object, found {type(raw).__name__}; download it again.")
    return _config(raw, os.fspath(name_or_path))


def _instead(directory: Path) -> str:
    """Return the advice for a directory without config.json."""
    if (directory / ADAPTER).is_file():
        try:
            base = f" {read_json(directory / ADAPTER)['base_model_name_or_path']}"
        except (OSError, ValueError, KeyError, TypeError):
            base = ""
        return (
            f"it holds adapters ({ADAPTER}), not a model: name their base model{base}, or merge them into it with "
            "peft's merge_and_unload() and name what that saves"
        )
    inner = [file.parent for pattern in ("*", "snapshots/*") for file in directory.glob(f"{pattern}/config.json")]
    if not inner:
        return "name a directory in Hugging Face format"
    # The checkpoint of a Trainer with the most steps.
    last = max(inner, key=lambda place: ([int(n) for n in re.findall(r"\d+", place.name)][-1:], place.name))
    return f"name {last}, which has one"


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the language model in a multimodal checkpoint, given the config.json of the whole."""
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
    model_type, model_class = TEXT_MODELS[raw["model_type"]]
    outer = {name: raw[name] for name in shared if name in raw}
    return outer | dict(raw["text_config"]) | {"model_type": model_type, "architectures": [model_class]}


def _config(raw: dict[str, Any], source: str) -> ModelConfig:
    # auto_map names code that comes with the model. The families that lensjax supports do not need it.
    if not isinstance(raw.get("model_type"), str):
        raise InputError(f'{source}: config.json has no model_type; add it, for instance "model_type": "gpt2".')
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise InputError(
            f"{source}: its weights are quantised ({method or 'quantization_config in config.json'}), which cannot be "
            "fine-tuned as they are; name the model they were made from, or a GGUF file. If they are floating-point "
            "numbers again, remove quantization_config from config.json."
        )
    if raw.get("auto_map") and raw["model_type"] not in FAMILIES.keys() | TEXT_MODELS.keys():
        raise InputError(
            f"{source}: model_type {raw['model_type']!r} is not supported, and the code that comes with the model "
            f"(auto_map in config.json) is not run; supported: {', '.join(sorted(FAMILIES))}."
        )
    if raw["model_type"] in TEXT_MODELS and isinstance(raw.get("text_config"), Mapping):
        raw = text_config(raw)
    return family(raw["model_type"], source).config.from_dict(raw, source)
