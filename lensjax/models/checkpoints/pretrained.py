"""Checkpoints: finding them, checking them, reading them tensor by tensor, writing them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lensjax._files import read_json
from lensjax._textfiles import LFS, POINTER
from lensjax.errors import InputError
from lensjax.models.base import LanguageModel, Seq2SeqConfig
from lensjax.models.checkpoints.gguf import GGUFFile, GGUFTensors, gguf_config, gguf_tokenizer, load_gguf
from lensjax.models.checkpoints.hub import TOKENIZER_ANY, Listing, resolve, without_advice
from lensjax.models.checkpoints.mapping import (
    Tensors,
    assemble,
    check_layer_count,
    family_of,
    match,
    parameter_shapes,
)
from lensjax.models.execution import is_stacked, unstack_layers
from lensjax.models.lora import adapters
from lensjax.models.registry import ModelConfig, Table, family

PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "tf_model.h5", "flax_model*.msgpack")
FLOATS = ("F16", "BF16", "F32", "F64")
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def is_gguf(name_or_path: str | os.PathLike[str]) -> bool:
    """Tell whether a model is named by a GGUF file."""
    return os.fspath(name_or_path).lower().endswith(".gguf")


def _conversion(encoder_decoder: bool) -> str:
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
        If the model or its config.json is missing or unreadable, brings code of its own, or is of no supported family.
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
    """Say what to name instead of a directory without a config.json."""
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
    # Of a Trainer's checkpoints, the one furthest on.
    last = max(inner, key=lambda place: ([int(n) for n in re.findall(r"\d+", place.name)][-1:], place.name))
    return f"name {last}, which has one"


def _config(raw: dict[str, Any], source: str) -> ModelConfig:
    if raw.get("auto_map"):
        raise InputError(
            f"{source}: config.json has auto_map, that is, code of its own, which lensjax does not run. If "
            "transformers has the model itself, load it there without that code (trust_remote_code=False) and save it: "
            f"{_conversion(bool(raw.get('is_encoder_decoder')))}"
        )
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
    return family(raw["model_type"], source).config.from_dict(raw, source)


def count_parameters(model: str | os.PathLike[str] | ModelConfig, *, revision: str | None = None) -> int:
    """Count a model's parameters from its configuration alone; a tied head counts once.

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
    """Build a model with random weights, drawn as its family does before pre-training.

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


class SafeTensors(Tensors):
    """The tensors of a model directory's safetensors files.

    Parameters
    ----------
    directory : Path
    config : ModelConfig
        Decides what the way to convert other files is.
    source : str
        Names the checkpoint in error messages.

    Raises
    ------
    InputError
        If there are no such files, only pickled ones, a file is damaged, or a tensor is there twice.
    """

    def __init__(self, directory: Path, config: ModelConfig, source: str):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        self.source = source
        for file in self._find(directory, config, source):
            try:
                with safe_open(file, "np") as handle:
                    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                    found = {name: tuple(part.get_shape()) for name, part in slices.items()}
                    self.kinds |= {name: part.get_dtype() for name, part in slices.items()}
            except (SafetensorError, OSError) as error:
                with file.open("rb") as stream:
                    pointer = stream.read(len(LFS)) == LFS
                reason = f": {POINTER}" if pointer else f" ({error}); download it again"
                raise InputError(f"{file}: cannot be read as safetensors{reason}.") from error
            for name, shape in found.items():
                if name in self.files:
                    raise InputError(f"{source}: tensor {name} is in two shards, {self.files[name]} and {file}.")
                self.files[name], self.shapes[name] = file, shape

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of the tensor's first axis, as stored; a scalar whole."""
        # Opened anew each time: the file is mapped, and what was read of it counts as memory until it is closed.
        with safe_open(self.files[name], "np") as handle:
            return handle.get_slice(name)[start:stop] if self.shapes[name] else handle.get_tensor(name)

    def check_kinds(self, table: Table) -> None:
        """Refuse weights that are no floating-point numbers as models are trained in; `match` comes first.

        Raises
        ------
        InputError
        """
        for name, kind in self.kinds.items():
            if kind not in FLOATS and not table.is_ignored(table.short(name)):
                raise InputError(
                    f"{self.source}: {name} is stored as {kind}, so its weights are quantised; name the model they "
                    "were made from, or a GGUF file."
                )

    @staticmethod
    def _find(directory: Path, config: ModelConfig, source: str) -> list[Path]:
        index = directory / INDEX
        if (directory / "model.safetensors").is_file():
            return [directory / "model.safetensors"]
        if index.is_file():
            names = shards_of(index)
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise InputError(
                    f"{source}: shards named in {index.name} are missing: {', '.join(missing)}; download them again."
                )
            return [directory / name for name in names]
        pickled = sorted(file.name for pattern in PICKLED for file in directory.glob(pattern))
        if pickled:
            raise InputError(
                f"{source}: has only {', '.join(pickled)}, which lensjax does not open: such files can run code. "
                f"Convert it once, where you trust it and have torch: {_conversion(isinstance(config, Seq2SeqConfig))}"
            )
        raise InputError(
            f"{source}: has no model.safetensors and no model.safetensors.index.json. If it comes with pickled weights "
            "only (pytorch_model.bin), convert it once where you trust it: "
            f"{_conversion(isinstance(config, Seq2SeqConfig))}"
        )


def shards_of(index: Path) -> list[str]:
    """Return the names of the files that an index of shards names, sorted.

    Raises
    ------
    InputError
        If it is no such index, or names a file that is not below its own directory.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        wrong = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts or not name]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: is not a valid index of shards ({error!r}); download it again.") from error
    if wrong:
        raise InputError(f"{index}: names {wrong[0]!r}, which is not below {index.parent}; move it there.")
    return names


class HubTensors(SafeTensors):
    """The tensors of a model on the hub by name and shape: the headers of its weight files are fetched, nothing else.

    Parameters
    ----------
    listing : Listing
    config : ModelConfig
        Decides what the way to convert other files is.

    Raises
    ------
    InputError
        If the model has no such files, or their headers cannot be had.
    """

    def __init__(self, listing: Listing, config: ModelConfig):
        import huggingface_hub
        from huggingface_hub import errors

        try:
            found = huggingface_hub.get_safetensors_metadata(listing.name, revision=listing.revision)
        except errors.NotASafetensorsRepoError:
            SafeTensors._find(resolve(listing.name, revision=listing.revision, weights=False), config, listing.name)
            raise  # not reached: what the hub has no weights of, no directory of its other files has
        except Exception as error:
            raise InputError(
                f"{listing.name}: the headers of its weight files could not be had from the Hugging Face hub "
                f"({(str(error) or type(error).__name__).splitlines()[0]}). Try again, or download the model."
            ) from error
        headers = {name: info for file in found.files_metadata.values() for name, info in file.tensors.items()}
        self.files, self.source = {}, listing.name
        self.shapes = {name: tuple(info.shape) for name, info in headers.items()}
        self.kinds = {name: info.dtype for name, info in headers.items()}


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: Any = jnp.float32, revision: str | None = None
) -> LanguageModel:
    """Load a model without its tokenizer; see `from_pretrained`."""
    if is_gguf(name_or_path):
        return load_gguf(name_or_path, dtype=dtype)
    config = load_config(name_or_path, revision=revision)
    source = os.fspath(name_or_path)
    tensors = SafeTensors(resolve(name_or_path, revision=revision), config, source)
    tensors.check_kinds(family_of(config).table(config))
    return assemble(config, tensors, dtype, source)


def check_checkpoint(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, listing: Listing | None = None
) -> ModelConfig:
    """Check that a model can be loaded, from its configuration and the headers of its weight files alone.

    Parameters
    ----------
    name_or_path, revision
        As in `from_pretrained`.
    listing : Listing, optional
        Of a model on the hub: its weights are then not fetched, but the headers of their files are.

    Returns
    -------
    ModelConfig

    Raises
    ------
    InputError
        As `from_pretrained` would, except for what only the tensors' contents or the tokenizer can show.
    """
    source = os.fspath(name_or_path)
    if is_gguf(name_or_path):
        file = GGUFFile.open(name_or_path)
        config = gguf_config(file)
        tensors: Tensors = GGUFTensors(file, config)
    else:
        config = load_config(name_or_path, revision=revision)
        if listing is None:
            tensors = SafeTensors(resolve(name_or_path, revision=revision), config, source)
        else:
            tensors = HubTensors(listing, config)
    check_layer_count(config, tensors, source)
    table = family_of(config).table(config)
    match(table, parameter_shapes(config), tensors, source)
    if isinstance(tensors, SafeTensors):
        tensors.check_kinds(table)
    return config


def export_tensors(model: LanguageModel, dtype: Any = None) -> dict[str, np.ndarray]:
    """Return the model's parameters under the names and in the shapes of its Hugging Face checkpoint.

    Also for gradients: merge them into the model in place of the parameters.

    Parameters
    ----------
    model : LanguageModel
    dtype : optional
        Type of the arrays; default: that of the parameters.

    Raises
    ------
    InputError
        If the model has adapters, which its checkpoint has no place for.
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
    """Write a model as config.json and model.safetensors, or shards with their index, which transformers loads.

    Parameters
    ----------
    model : LanguageModel
        Of a supported family.
    directory : str or path
        Made if it is not there; files of the same names are replaced, other weight files of ours or of transformers
        (model*.safetensors and their index) removed.
    tokenizer : transformers tokenizer, optional
        Saved beside the model; config.json gets its special token ids where it has none.
    dtype : optional
        Type of the tensors on disk; default: that of the parameters.
    max_shard_size : int or str
        Largest file in bytes, or as "500MB" (a megabyte is 10^6 bytes); a tensor that is larger gets a file of its own.

    Raises
    ------
    InputError
        If `max_shard_size` is no size, or the model has adapters.
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
    if tokenizer is not None:
        # The families' defaults (50256 for GPT-2) lie outside small vocabularies, and transformers complains.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw.setdefault(name, getattr(tokenizer, name, None))
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / "config.json", raw)
    for file, names in plan.filename_to_tensors.items():
        unfinished = target / f"{file}.tmp"
        save_file({name: tensors[name] for name in names}, unfinished, metadata={"format": "pt"})
        unfinished.chmod(0o644)  # safetensors makes files that only their owner can read
    for file in plan.filename_to_tensors:
        os.replace(target / f"{file}.tmp", target / file)
    index = target / INDEX
    if plan.is_sharded:
        _write_json(index, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    else:
        index.unlink(missing_ok=True)
    # What an earlier model left here would be read in place of this one, or beside it.
    for stale in target.glob("model*.safetensors"):
        if stale.name not in plan.filename_to_tensors and SHARD.fullmatch(stale.name):
            stale.unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(target)


def _write_json(file: Path, value: Any) -> None:
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
    os.replace(unfinished, file)


def load_tokenizer(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Load a model's tokenizer through transformers.

    Raises
    ------
    InputError
        If the model has no tokenizer that transformers can read.
    """
    if is_gguf(name_or_path):
        return gguf_tokenizer(GGUFFile.open(name_or_path))
    directory = resolve(name_or_path, revision=revision, weights=False)
    with without_advice():
        from transformers import AutoTokenizer
    try:
        if not any((directory / file).is_file() for file in TOKENIZER_ANY):
            # transformers would make an empty tokenizer without a word.
            raise OSError(f"none of {', '.join(TOKENIZER_ANY)} is there")
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Of damaged files transformers and tokenizers raise errors of every type, tokenizers plain Exception too.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{os.fspath(name_or_path)}: its tokenizer cannot be loaded ({reason}); put tokenizer.json and "
            "tokenizer_config.json beside config.json."
        ) from error


def from_pretrained(
    name_or_path: str | os.PathLike[str], *, dtype: Any = jnp.float32, revision: str | None = None
) -> tuple[LanguageModel, Any]:
    """Load a model and its tokenizer.

    Memory stays near that of the parameters: see `lensjax.models.checkpoints.mapping`.

    Parameters
    ----------
    name_or_path : str or path
        A directory with config.json, model.safetensors (or shards with their index) and tokenizer files, a GGUF file,
        or a Hugging Face id.
    dtype : dtype of the parameters and of the computation
    revision : str, optional
        Branch, tag or commit on the hub.

    Returns
    -------
    model : LanguageModel
        See its class.
    tokenizer : transformers tokenizer

    Raises
    ------
    InputError
        If the model cannot be found or is not supported, or if the checkpoint does not fit its configuration: then
        with all unused, missing and misshapen tensors in one message.

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
