"""Writing models as Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lensjax.errors import InputError
from lensjax.models.base import LanguageModel
from lensjax.models.checkpoints.safetensors_files import INDEX
from lensjax.models.execution import is_stacked, unstack_layers
from lensjax.models.lora import adapters
from lensjax.models.registry import family_of

SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def export_tensors(model: LanguageModel, dtype: Any = None) -> dict[str, np.ndarray]:
    """Return the model's parameters with the names and shapes of a Hugging Face checkpoint.

    To export gradients, merge them into the model in place of the parameters.

    Parameters
    ----------
    model : LanguageModel
    dtype : optional
        Data type of the arrays; by default that of the parameters.

    Raises
    ------
    InputError
        If the model has adapters, which such a checkpoint cannot store.
    """
    if adapters(model):
        raise InputError(
            "The model has LoRA adapters: merge them first (lensjax.models.merge_lora), or save them alone "
            "(lensjax.models.save_lora)."
        )
    if is_stacked(model):
        model = unstack_layers(model)
    table = family_of(model.config).table(model.config)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        rule, names = table.sources(".".join(map(str, path)))
        array = np.asarray(leaf[...])
        array = array if dtype is None else array.astype(jnp.dtype(dtype))
        for name, part in zip(names, rule.save(array), strict=True):
            tensors[table.full(name)] = np.ascontiguousarray(part)
    return tensors


def save_pretrained(
    model: LanguageModel,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    dtype: Any = None,
    *,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a model as config.json and model.safetensors (or shards and their index), which transformers can load.

    Parameters
    ----------
    model : LanguageModel
    directory : str or path
        Created if it does not exist. Files of the same names are replaced, and other weight files that lensjax or
        transformers wrote (model*.safetensors and their index) are removed.
    tokenizer : transformers tokenizer, optional
        Saved in the same directory; special token ids that config.json lacks are taken from it.
    dtype : optional
        Data type of the tensors in the file; by default that of the parameters.
    max_shard_size : int or str
        Size of the largest file in bytes, or as "500MB" (a megabyte is 10^6 bytes); a larger tensor gets its own file.

    Raises
    ------
    InputError
        If `max_shard_size` is not a size, or the model has adapters.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    tensors = export_tensors(model, dtype)
    try:
        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError("no file is that small")
        plan = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda array: array.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise InputError(
            f"max_shard_size is {max_shard_size!r}; give a positive number of bytes, or '500MB'."
        ) from error
    raw = json.loads(model.config.raw)
    kinds = sorted({str(array.dtype) for array in tensors.values()})
    raw["dtype"] = kinds[0]
    raw.pop("torch_dtype", None)
    raw.pop("auto_map", None)  # names code that is not saved with the model
    if tokenizer is not None:
        # The families' defaults (50256 for GPT-2) are outside small vocabularies, which transformers warns about.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw.setdefault(name, getattr(tokenizer, name, None))
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / "config.json", raw)
    for file, names in plan.filename_to_tensors.items():
        unfinished = target / f"{file}.tmp"
        save_file({name: tensors[name] for name in names}, unfinished, metadata={"format": "pt"})
        unfinished.chmod(0o644)  # safetensors creates files that only their owner can read
    for file in plan.filename_to_tensors:
        os.replace(target / f"{file}.tmp", target / file)
    index = target / INDEX
    if plan.is_sharded:
        _write_json(index, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    else:
        index.unlink(missing_ok=True)
    # Remove the files of a model saved here before, which would otherwise be loaded too.
    for stale in target.glob("model*.safetensors"):
        if stale.name not in plan.filename_to_tensors and SHARD.fullmatch(stale.name):
            stale.unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(target)


def _write_json(file: Path, value: Any) -> None:
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
    os.replace(unfinished, file)
