"""The Hugging Face hub: fetching models, asking what they are made of, importing transformers without its advice."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from lensjax.errors import InputError

TOKENIZER_ANY = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Files of which transformers needs one to make a tokenizer."""

FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""What is fetched besides the weights."""

WEIGHTS = "*.safetensors"


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of a model on the hub that loading the model would fetch.

    Attributes
    ----------
    name : str
    size : int
        Bytes.
    digest : str
        Of its contents; the name it has in the hub's cache.
    here : bool
        Whether it is in the hub's cache.
    """

    name: str
    size: int
    digest: str
    here: bool


@dataclasses.dataclass(frozen=True)
class Listing:
    """What loading a model from the hub would fetch.

    Attributes
    ----------
    name : str
        Its id.
    revision : str
        The commit.
    files : tuple of HubFile
        Those in the cache already too.
    """

    name: str
    revision: str
    files: tuple[HubFile, ...]

    @property
    def weights(self) -> tuple[HubFile, ...]:
        """The files of weights; the others are small."""
        return tuple(file for file in self.files if fnmatchcase(file.name, WEIGHTS))

    @property
    def missing(self) -> int:
        """Bytes of weights that are not in the cache yet."""
        return sum(file.size for file in self.weights if not file.here)

    @property
    def complete(self) -> bool:
        """Whether the weights are in the cache, as far as the model has some."""
        return bool(self.weights) and all(file.here for file in self.weights)


def resolve(name_or_path: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """Return the local directory of a model, fetching it from the Hugging Face hub if it is an id.

    Parameters
    ----------
    name_or_path : str or path
        A directory, or an id such as "gpt2" or "facebook/opt-350m".
    revision : str, optional
        Branch, tag or commit on the hub.
    weights : bool
        Whether the weights are needed, or only configuration and tokenizer.

    Raises
    ------
    InputError
        If there is no such directory, or the hub does not give the model (no network, no such id, offline mode).
    """
    local = _local(name_or_path)
    if local is not None:
        return local
    name = os.fspath(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*FILES, *([WEIGHTS] if weights else [])]
    try:
        # Files in sub-folders are other formats (onnx, openvino) of the same weights.
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _refusal(name, error) from error


def listing(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Listing | None:
    """Ask the hub what files a model has, without fetching any.

    Parameters
    ----------
    name_or_path, revision
        As in `resolve`.

    Returns
    -------
    Listing or None
        None for a local directory, and for a model whose weights are in the cache while the hub is out of reach:
        `resolve` then fetches nothing.

    Raises
    ------
    InputError
        As `resolve`.
    """
    if _local(name_or_path) is not None:
        return None
    name = os.fspath(name_or_path)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:
        # What the network makes the library raise has types of other libraries. As when fetching, an answer that there
        # is no such model counts; silence does not where the cache has it.
        if not isinstance(error, HfHubHTTPError):
            with contextlib.suppress(LocalEntryNotFoundError, HFValidationError, OSError):
                cached = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
                if any(Path(cached).glob(WEIGHTS)):
                    return None
        raise _refusal(name, error) from error
    commit = found.sha or revision or "main"
    files = []
    for file in found.siblings or ():
        if "/" in file.rfilename or not any(fnmatchcase(file.rfilename, pattern) for pattern in (*FILES, WEIGHTS)):
            continue
        digest = (file.lfs.sha256 if file.lfs is not None else file.blob_id) or ""
        here = isinstance(huggingface_hub.try_to_load_from_cache(name, file.rfilename, revision=commit), str)
        files.append(HubFile(file.rfilename, file.size or 0, digest, here))
    return Listing(name, commit, tuple(sorted(files, key=lambda file: file.name)))


def _local(name_or_path: str | os.PathLike[str]) -> Path | None:
    """Return a local model directory, or None if this is an id of the hub.

    Raises
    ------
    InputError
        If it is neither.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix.lower() == ".gguf":
        raise InputError(
            f"{name}: is a GGUF file, but here a directory is needed: load it with lensjax.models.from_pretrained and "
            "save it with save_pretrained, model and tokenizer."
        )
    if path.is_file():
        raise InputError(f"{name}: is a file; name the directory that holds config.json and model.safetensors.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or isinstance(name_or_path, Path):
        raise InputError(f"{name}: no such directory; name a model directory or a Hugging Face id.")
    return None


def _refusal(name: str, error: Exception) -> InputError:
    from huggingface_hub.errors import HfHubHTTPError

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, HfHubHTTPError):
        # The text says 404, the class what was not found.
        reason = f"{type(error).__name__}: {reason}"
    return InputError(
        f"{name}: is no directory here and could not be had from the Hugging Face hub ({reason}). "
        "Check the id and the network, or download the model and name its directory."
    )


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Keep from users what transformers says when it is first imported: that torch is missing."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # its own
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
