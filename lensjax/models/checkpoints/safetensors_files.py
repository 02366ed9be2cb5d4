"""The tensors of a model's safetensors files: in a directory, or on the hub by reading only the headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lensjax._files import read_json
from lensjax._textfiles import unreadable
from lensjax.errors import InputError
from lensjax.models.base import Seq2SeqConfig
from lensjax.models.checkpoints.config_file import TEXT_MODELS, conversion
from lensjax.models.checkpoints.hub import Listing, resolve
from lensjax.models.checkpoints.mapping import Tensors
from lensjax.models.registry import ModelConfig, Table

PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "tf_model.h5", "flax_model*.msgpack")
FLOATS = ("F16", "BF16", "F32", "F64")
INDEX = "model.safetensors.index.json"
OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
"""Tensors of a multimodal checkpoint that do not belong to its language model."""


class FileTensors(Tensors):
    """The tensors of a model's weight files, with the data types in which they are stored.

    Attributes
    ----------
    kinds : mapping, name -> str
        Data types by their names in safetensors.
    source : str
        Names the checkpoint in error messages.
    """

    kinds: Mapping[str, str]
    source: str

    def check_kinds(self, table: Table) -> None:
        """Check that all weights are floating-point numbers; call `match` first.

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


class SafeTensors(FileTensors):
    """The tensors of a model directory's safetensors files.

    Parameters
    ----------
    directory : Path
    config : ModelConfig
        Only for error messages, which say how to convert other files.
    source : str
        Names the checkpoint in error messages.

    Raises
    ------
    InputError
        If there are no safetensors files, a file is damaged, or a tensor is in two files.
    """

    def __init__(self, directory: Path, config: ModelConfig, source: str):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        self.stored_names: dict[str, str] = {}
        self.source = source
        for file in weight_files(directory, config, source):
            try:
                with safe_open(file, "np") as handle:
                    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                    kinds = {name: part.get_dtype() for name, part in slices.items()}
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file}: cannot be read as safetensors{unreadable(file, error)}.") from error
            for stored, shape in shapes.items():
                name = name_in_language_model(stored, config)
                if name is None:
                    continue
                if name in self.files:
                    raise InputError(f"{source}: tensor {name} is in two shards, {self.files[name]} and {file}.")
                self.files[name], self.shapes[name] = file, shape
                self.stored_names[name], self.kinds[name] = stored, kinds[stored]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of the tensor's first axis, as stored; all of a scalar."""
        # Opened in each call: the file is memory-mapped, and pages that were read count as memory until it is closed.
        with safe_open(self.files[name], "np") as handle:
            stored = self.stored_names[name]
            return handle.get_slice(stored)[start:stop] if self.shapes[name] else handle.get_tensor(stored)


class HubTensors(FileTensors):
    """The tensors of a model on the hub by name and shape; only the headers of its weight files are downloaded.

    Parameters
    ----------
    listing : Listing
    config : ModelConfig
        Only for error messages, which say how to convert other files.

    Raises
    ------
    InputError
        If the model has no safetensors files, or their headers cannot be downloaded.
    """

    def __init__(self, listing: Listing, config: ModelConfig):
        import huggingface_hub
        from huggingface_hub import errors

        try:
            metadata = huggingface_hub.get_safetensors_metadata(listing.name, revision=listing.revision)
        except errors.NotASafetensorsRepoError:
            weight_files(resolve(listing.name, revision=listing.revision, weights=False), config, listing.name)
            raise  # not reached: weight_files raises for a directory without weights
        except Exception as error:
            raise InputError(
                f"{listing.name}: the headers of its weight files could not be had from the Hugging Face hub "
                f"({(str(error) or type(error).__name__).splitlines()[0]}). Try again, or download the model."
            ) from error
        headers = {
            name: info
            for file in metadata.files_metadata.values()
            for stored, info in file.tensors.items()
            if (name := name_in_language_model(stored, config)) is not None
        }
        self.source = listing.name
        self.shapes = {name: tuple(info.shape) for name, info in headers.items()}
        self.kinds = {name: info.dtype for name, info in headers.items()}


def name_in_language_model(name: str, config: ModelConfig) -> str | None:
    """Return a tensor's name in a checkpoint of the language model alone, or None if it belongs to another part.

    Parameters
    ----------
    name : str
        Name in the file, which may be the checkpoint of a multimodal model.
    config : ModelConfig
        Of the language model.
    """
    if config.model_type not in {model_type for model_type, _ in TEXT_MODELS.values()}:
        return name
    if OTHER_PARTS.match(name):
        return None
    # Published checkpoints have language_model.model.layers..., those of newer versions model.language_model.layers...
    return re.sub(r"^model\.language_model\.", "model.", name.removeprefix("language_model."))


def has_safetensors(directory: Path) -> bool:
    """Return whether a directory has weights in safetensors files."""
    return (directory / "model.safetensors").is_file() or (directory / INDEX).is_file()


def weight_files(directory: Path, config: ModelConfig, source: str) -> list[Path]:
    """Return the safetensors files of a model directory; arguments as for `SafeTensors`.

    Raises
    ------
    InputError
        If there are none, or a shard is missing.
    """
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
            f"Convert it once, where you trust it and have torch: {conversion(isinstance(config, Seq2SeqConfig))}"
        )
    raise InputError(
        f"{source}: has no model.safetensors and no model.safetensors.index.json. If it comes with pickled weights "
        "only (pytorch_model.bin), convert it once where you trust it: "
        f"{conversion(isinstance(config, Seq2SeqConfig))}"
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
