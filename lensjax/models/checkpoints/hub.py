"""The Hugging Face hub: downloading models, listing their files, and importing transformers without its advice."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from lensjax.errors import InputError

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files that hold a SentencePiece model."""

VOCABULARY_FILES = ("tokenizer.json", *SENTENCEPIECE_FILES, "vocab.json", "vocab.txt")
"""Files that hold a tokenizer's vocabulary; transformers needs one of them."""

BYTE_TOKENIZERS = ("ByT5Tokenizer",)
"""Tokenizer classes without a vocabulary file: their tokens are bytes."""

FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of the files that are downloaded besides the weights."""

WEIGHTS = "*.safetensors"
PICKLED = "pytorch_model*.bin"
"""Weight files that are downloaded if there are no safetensors."""


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file that loading a model would download from the hub.

    Attributes
    ----------
    name : str
    size : int
        Bytes.
    digest : str
        Hash of its contents, which is its name in the hub's cache.
    cached : bool
        Whether it is in the hub's cache.
    """

    name: str
    size: int
    digest: str
    cached: bool


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files that loading a model would download from the hub.

    Attributes
    ----------
    name : str
        The model's id.
    revision : str
        Commit.
    files : tuple of HubFile
        Including those that are already in the cache.
    """

    name: str
    revision: str
    files: tuple[HubFile, ...]

    @property
    def weights(self) -> tuple[HubFile, ...]:
        """The weight files; all other files are small."""
        patterns = (WEIGHTS, PICKLED)
        return tuple(file for file in self.files if any(fnmatchcase(file.name, pattern) for pattern in patterns))

    @property
    def is_pickled(self) -> bool:
        """Whether the weights are in pytorch_model.bin."""
        return any(fnmatchcase(file.name, PICKLED) for file in self.files)

    @property
    def missing(self) -> int:
        """Size in bytes of the weight files that are not in the cache."""
        return sum(file.size for file in self.weights if not file.cached)

    @property
    def complete(self) -> bool:
        """Whether the model has weight files and all of them are in the cache."""
        return bool(self.weights) and all(file.cached for file in self.weights)


def resolve(name_or_path: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """Return the local directory of a model, downloading it from the Hugging Face hub if it is an id.

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
        If the directory does not exist, or the model cannot be downloaded (no network, no such id, offline mode).
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
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
        if weights and not any(snapshot.glob(WEIGHTS)):
            snapshot_download(name, revision=revision, allow_patterns=[PICKLED], ignore_patterns=["*/*"])
        return snapshot
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _refusal(name, error) from error


def listing(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Listing | None:
    """Return the files of a model on the hub, without downloading any.

    Parameters
    ----------
    name_or_path, revision
        As in `resolve`.

    Returns
    -------
    Listing or None
        None for a local directory, and for a model whose weights are in the cache if the hub cannot be reached; in
        both cases `resolve` downloads nothing.

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
        info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:
        # Network problems raise exception types of other libraries. As when downloading, the hub's answer that there is
        # no such model is an error, but a hub that does not answer is not if the model is in the cache.
        if not isinstance(error, HfHubHTTPError):
            with contextlib.suppress(LocalEntryNotFoundError, HFValidationError, OSError):
                snapshot = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
                if any(any(Path(snapshot).glob(pattern)) for pattern in (WEIGHTS, PICKLED)):
                    return None
        raise _refusal(name, error) from error
    commit = info.sha or revision or "main"
    files = []
    siblings = [file for file in info.siblings or () if "/" not in file.rfilename]
    weights = WEIGHTS if any(fnmatchcase(file.rfilename, WEIGHTS) for file in siblings) else PICKLED
    for file in siblings:
        if not any(fnmatchcase(file.rfilename, pattern) for pattern in (*FILES, weights)):
            continue
        digest = (file.lfs.sha256 if file.lfs is not None else file.blob_id) or ""
        cached = isinstance(huggingface_hub.try_to_load_from_cache(name, file.rfilename, revision=commit), str)
        files.append(HubFile(file.rfilename, file.size or 0, digest, cached))
    return Listing(name, commit, tuple(sorted(files, key=lambda file: file.name)))


def _local(name_or_path: str | os.PathLike[str]) -> Path | None:
    """Return the path of a local model directory, or None if the name is an id on the hub.

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
        # The text only has the status code; the class says what was not found.
        reason = f"{type(error).__name__}: {reason}"
    return InputError(
        f"{name}: is no directory here and could not be had from the Hugging Face hub ({reason}). "
        "Check the id and the network, or download the model and name its directory."
    )


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Suppress the warning of transformers, when it is first imported, that torch is missing."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
