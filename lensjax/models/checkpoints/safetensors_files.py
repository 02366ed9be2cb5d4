"""The tensors of a model's safetensors files, in a directory or, by their headers alone, on the hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lensjax._files import read_json
from lensjax._textfiles import LFS, POINTER
from lensjax.errors import InputError
from lensjax.models.base import Seq2SeqConfig
from lensjax.models.checkpoints.config_file import conversion
from lensjax.models.checkpoints.hub import Listing, resolve
from lensjax.models.checkpoints.mapping import Tensors
from lensjax.models.registry import ModelConfig, Table

PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "tf_model.h5", "flax_model*.msgpack")
FLOATS = ("F16", "BF16", "F32", "F64")
INDEX = "model.safetensors.index.json"


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
        for file in weight_files(directory, config, source):
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
            weight_files(resolve(listing.name, revision=listing.revision, weights=False), config, listing.name)
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


def weight_files(directory: Path, config: ModelConfig, source: str) -> list[Path]:
    """Return the safetensors files of a model directory; arguments as `SafeTensors`.

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
