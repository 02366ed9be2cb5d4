"""Loading models and tokenizers by name, and checking in advance that they can be loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lensjax._files import read_json
from lensjax.errors import InputError
from lensjax.models.base import LanguageModel
from lensjax.models.checkpoints.config_file import load_config
from lensjax.models.checkpoints.gguf import GGUFFile, GGUFTensors, gguf_config, gguf_tokenizer, is_gguf, load_gguf
from lensjax.models.checkpoints.hub import (
    BYTE_TOKENIZERS,
    SENTENCEPIECE_FILES,
    VOCABULARY_FILES,
    Listing,
    resolve,
    without_advice,
)
from lensjax.models.checkpoints.mapping import (
    Tensors,
    assemble,
    check_layer_count,
    fitting_config,
    match,
    parameter_shapes,
)
from lensjax.models.checkpoints.pickled import PickledTensors, has_pickled_weights
from lensjax.models.checkpoints.safetensors_files import FileTensors, HubTensors, SafeTensors, has_safetensors
from lensjax.models.registry import ModelConfig, family_of


def count_parameters(model: str | os.PathLike[str] | ModelConfig, *, revision: str | None = None) -> int:
    """Return a model's number of parameters, from its configuration only; a tied head counts once.

    Parameters
    ----------
    model : str, path or ModelConfig
        As in `from_pretrained`, or a configuration already loaded.
    revision : str, optional
        As in `from_pretrained`.
    """
    config = model if isinstance(model, ModelConfig) else load_config(model, revision=revision)
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def init_model(config: ModelConfig | Mapping[str, Any], key: jax.Array, dtype: Any = jnp.float32) -> LanguageModel:
    """Return a model with random weights, initialised as its family is before pre-training.

    Parameters
    ----------
    config : ModelConfig or mapping
        From `load_config`, or the contents of a config.json.
    key : PRNG key
    dtype : dtype of the parameters
    """
    if not isinstance(config, ModelConfig):
        config = load_config(config)
    return family_of(config).model(config, dtype, nnx.Rngs(key))


def open_weights(directory: Path, config: ModelConfig, source: str) -> FileTensors:
    """Return the tensors of a model directory: of its safetensors files, or else of pytorch_model.bin.

    Raises
    ------
    InputError
        If there are no such files, or they are damaged.
    """
    if not has_safetensors(directory) and has_pickled_weights(directory):
        return PickledTensors(directory, source)
    return SafeTensors(directory, config, source)


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: Any = jnp.float32, revision: str | None = None
) -> LanguageModel:
    """Load a model without its tokenizer; see `from_pretrained`."""
    if is_gguf(name_or_path):
        return load_gguf(name_or_path, dtype=dtype)
    config = load_config(name_or_path, revision=revision)
    source = os.fspath(name_or_path)
    tensors = open_weights(resolve(name_or_path, revision=revision), config, source)
    tensors.check_kinds(family_of(config).table(config))
    return assemble(fitting_config(config, tensors), tensors, dtype, source)


def check_checkpoint(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, listing: Listing | None = None
) -> ModelConfig:
    """Check that a model can be loaded, reading only its configuration and the headers of its weight files.

    Parameters
    ----------
    name_or_path, revision
        As in `from_pretrained`.
    listing : Listing, optional
        Files of a model on the hub; then only the headers of its weight files are downloaded, not the weights.

    Returns
    -------
    ModelConfig

    Raises
    ------
    InputError
        As `from_pretrained`, except for errors in the tensors' contents or the tokenizer.
    """
    source = os.fspath(name_or_path)
    if is_gguf(name_or_path):
        file = GGUFFile.open(name_or_path)
        config = gguf_config(file)
        tensors: Tensors = GGUFTensors(file, config)
    else:
        config = load_config(name_or_path, revision=revision)
        if listing is None:
            tensors = open_weights(resolve(name_or_path, revision=revision), config, source)
            config = fitting_config(config, tensors)
        elif listing.is_pickled:
            return config  # the names of the tensors are inside the weight file, which is not downloaded here
        else:
            tensors = HubTensors(listing, config)
    check_layer_count(config, tensors, source)
    table = family_of(config).table(config)
    match(table, parameter_shapes(config), tensors, source)
    if isinstance(tensors, FileTensors):
        tensors.check_kinds(table)
    return config


def load_tokenizer(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Load a model's tokenizer through transformers.

    Raises
    ------
    InputError
        If transformers cannot load the tokenizer.
    """
    if is_gguf(name_or_path):
        return gguf_tokenizer(GGUFFile.open(name_or_path))
    directory = resolve(name_or_path, revision=revision, weights=False)
    sentencepiece = [name for name in SENTENCEPIECE_FILES if (directory / name).is_file()]
    if sentencepiece and not (directory / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        # Without it, transformers asks for another package, which does not help.
        raise InputError(
            f"{os.fspath(name_or_path)}: its tokenizer is only in {sentencepiece[0]}, and reading it needs the "
            "sentencepiece package: pip install sentencepiece."
        )
    with without_advice():
        from transformers import AutoTokenizer
    try:
        if not _has_vocabulary(directory):
            # Without a vocabulary, transformers silently returns an empty tokenizer.
            raise OSError(f"none of {', '.join(VOCABULARY_FILES)} is there")
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Of damaged files transformers and tokenizers raise errors of every type, tokenizers plain Exception too.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{os.fspath(name_or_path)}: its tokenizer cannot be loaded ({reason}); put tokenizer.json and "
            "tokenizer_config.json beside config.json."
        ) from error


def _has_vocabulary(directory: Path) -> bool:
    """Return whether a directory has a tokenizer's vocabulary, or names a tokenizer that needs none."""
    if any((directory / name).is_file() for name in VOCABULARY_FILES):
        return True
    try:
        settings = read_json(directory / "tokenizer_config.json")
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("tokenizer_class") in BYTE_TOKENIZERS


def from_pretrained(
    name_or_path: str | os.PathLike[str], *, dtype: Any = jnp.float32, revision: str | None = None
) -> tuple[LanguageModel, Any]:
    """Load a model and its tokenizer.

    Peak memory is little more than that of the parameters, see `lensjax.models.checkpoints.mapping`.

    Parameters
    ----------
    name_or_path : str or path
        A directory with config.json, model.safetensors (or shards and their index) and tokenizer files; a GGUF file;
        or a Hugging Face id.
    dtype : dtype of the parameters and of the computation
    revision : str, optional
        Branch, tag or commit on the hub.

    Returns
    -------
    model : LanguageModel
    tokenizer : transformers tokenizer

    Raises
    ------
    InputError
        If the model cannot be found or is not supported, or the checkpoint does not fit its configuration (with all
        unused and missing tensors and wrong shapes in one message).

    Examples
    --------
    >>> from lensjax import data
    >>> model, tokenizer = from_pretrained(data.path("demo", "models", "bible-tiny"))
    >>> model.config.model_type, tokenizer.decode(tokenizer("In the beginning")["input_ids"])
    ('gpt2', 'In the beginning')
    """
    if is_gguf(name_or_path):
        file = GGUFFile.open(name_or_path)
        tokenizer = gguf_tokenizer(file)
        return load_gguf(file, dtype=dtype), tokenizer
    model = load_model(name_or_path, dtype=dtype, revision=revision)
    return model, load_tokenizer(name_or_path, revision=revision)
