"""Encoded samples on disk, so that a task is tokenised once for each tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lensjax.tasks.encoding import Encoded
from lensjax.tasks.example import ENCODING, Example

VARIABLE = "LENSJAX_CACHE"


def directory() -> Path:
    """Return where lensjax keeps what can be made again: `LENSJAX_CACHE`, or the user's cache directory."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lensjax"


def key_of(examples: Sequence[Example], tokenizer: str, *settings: object) -> str:
    """Return what names an encoding: the texts, the tokenizer's fingerprint, and all else it depends on."""
    libraries = version("transformers"), version("tokenizers")
    digest = hashlib.sha256(repr((ENCODING, *libraries, tokenizer, *settings)).encode())
    for example in examples:
        digest.update(repr((example.input, example.target, example.template)).encode())
    return digest.hexdigest()[:32]


def cached(key: str, make: Callable[[], Encoded]) -> Encoded:
    """Return an encoding from disk, or make it and put it there.

    A file that cannot be read is made again; a directory that cannot be written is done without.
    """
    path = directory() / "tokens" / f"{key}.npz"
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        encoded = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, encoded)
    return encoded


def _write(path: Path, encoded: Encoded) -> None:
    lengths = encoded.token_counts
    packed = -1 if encoded.packed is None else encoded.packed
    facts = [encoded.truncated, encoded.separate, encoded.target_bytes, packed]
    # Two selections may write the same file at once: each its own, and the last rename wins.
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                ids=np.concatenate([np.zeros(0, np.int32), *encoded.ids]),
                lengths=lengths,
                prompt_lengths=encoded.prompt_lengths,
                facts=np.array(facts, np.int64),
            )
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path) -> Encoded:
    with path.open("rb") as file, np.load(file) as stored:
        truncated, separate, target_bytes, packed = map(int, stored["facts"])
        lengths, ids, prompts = stored["lengths"], stored["ids"], stored["prompt_lengths"]
    if lengths.sum() != len(ids) or len(prompts) != len(lengths):
        raise ValueError(f"{path}: lengths do not fit")
    ends = np.cumsum(lengths)
    samples = tuple(ids[end - length : end] for end, length in zip(ends, lengths, strict=True))
    return Encoded(samples, prompts, truncated, bool(separate), target_bytes, None if packed < 0 else packed)
