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
from lensjax.tasks.example import ENCODING_VERSION, Example

VARIABLE = "LENSJAX_CACHE"
FACTS, NOT_PACKED = ("truncated", "separate", "target_bytes", "packed"), -1


def directory() -> Path:
    """Return where lensjax keeps files that it can make again: `LENSJAX_CACHE`, or the user's cache directory."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lensjax"


def key_of(examples: Sequence[Example], tokenizer: str, *settings: object) -> str:
    """Return a name for an encoding, from all that it depends on.

    Parameters
    ----------
    examples : sequence of Example
    tokenizer : str
        Its fingerprint.
    *settings
        All else; each needs a stable `repr`.
    """
    libraries = version("transformers"), version("tokenizers")
    digest = hashlib.sha256(repr((ENCODING_VERSION, *libraries, tokenizer, *settings)).encode())
    for example in examples:
        digest.update(repr((example.input, example.target, example.template)).encode())
    return digest.hexdigest()[:32]


def cached(key: str, make: Callable[[], Encoded]) -> Encoded:
    """Return an encoding from disk, or make it and put it there.

    A file that cannot be read, or holds no encoding, is replaced. Where the directory cannot be written, nothing is
    kept.
    """
    path = directory() / "tokens" / f"{key}.npz"
    try:
        return _read(path)
    except (OSError, ValueError):
        encoded = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, encoded)
    return encoded


def _write(path: Path, encoded: Encoded) -> None:
    lengths = encoded.token_counts
    packed = NOT_PACKED if encoded.packed is None else encoded.packed
    facts = [encoded.truncated, encoded.separate, encoded.target_bytes, packed]  # in the order of `FACTS`
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
    """Read an encoding back.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it holds no encoding.
    """
    try:
        with path.open("rb") as file, np.load(file) as stored:
            _check_sizes(stored.zip.infolist(), path.stat().st_size)
            facts, lengths, ids, prompts = (stored[name] for name in ("facts", "lengths", "ids", "prompt_lengths"))
    except OSError:
        raise
    except Exception as error:
        # Of many types: NumPy, zipfile and zlib each have their own for damaged archives.
        raise ValueError(f"{path}: is no archive of tokens ({error})") from error
    whole = (array.dtype.kind in "iu" and array.ndim == 1 for array in (facts, lengths, ids, prompts))
    if not all(whole) or ids.dtype != np.int32 or len(facts) != len(FACTS) or len(prompts) != len(lengths):
        raise ValueError(f"{path}: arrays are of another kind")
    truncated, separate, target_bytes, packed = map(int, facts)
    sensible = (lengths >= 0).all() and (prompts >= 0).all() and (prompts <= lengths).all() and (ids >= 0).all()
    if not sensible or lengths.sum() != len(ids) or separate not in (0, 1) or truncated < 0 or target_bytes < 0:
        raise ValueError(f"{path}: lengths do not fit")
    if packed != NOT_PACKED and packed < 1:
        raise ValueError(f"{path}: rows of {packed} tokens")
    ends = np.cumsum(lengths)
    samples = tuple(ids[end - length : end] for end, length in zip(ends, lengths, strict=True))
    return Encoded(samples, prompts, truncated, bool(separate), target_bytes, None if packed < 0 else packed)


def _check_sizes(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse an archive that unpacks to more than it holds: arrays are stored as they are, not compressed."""
    if any(member.file_size > size for member in members):
        raise ValueError("it unpacks to more than its own size")
