"""The Hugging Face hub: fetching models, and importing transformers without its advice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*FILES, *(["*.safetensors"] if weights else [])]
    try:
        # Files in sub-folders are other formats (onnx, openvino) of the same weights.
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, HfHubHTTPError):
            # The text says 404, the class what was not found.
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(
            f"{name}: is no directory here and could not be had from the Hugging Face hub ({reason}). "
            "Check the id and the network, or download the model and name its directory."
        ) from error


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
