"""The models to choose from, checked and described before their weights are loaded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from lensjax import data, models
from lensjax.errors import InputError
from lensjax.finetune import tuning_flops
from lensjax.jobs.defaults import ADAPTED, DEMO_MODELS
from lensjax.models import Lora
from lensjax.models.checkpoints.gguf import is_gguf
from lensjax.models.checkpoints.hub import Listing, listing
from lensjax.models.checkpoints.safetensors_files import INDEX, shards_of

TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
    "chat_template",
)
"""How names of files begin that decide what a tokenizer does."""
WEIGHTS_SUFFIX, SINGLE_FILE = ".safetensors", "model.safetensors"
HUB_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # SHA-1 of a Git blob, SHA-256 of a large file


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One model to choose from, and one way to fine-tune it.

    Attributes
    ----------
    name : str
        In the report.
    path : Path
        Directory of its files (in the hub's cache if it was named by an id), or its GGUF file.
    config : ModelConfig
    parameters : int
    trainable : int
        Parameters that fine-tuning changes: all of them, or those of the adapters.
    fingerprint : str
        Digest of the files that are loaded and of the adapters' settings.
    tokenizer : str
        Digest of what its tokenizer does, whatever files it is made from; other for encoder-decoders.
    lora : Lora, optional
        Its adapters.
    listing : Listing, optional
        Of a model on the hub whose weights were not fetched: `path` holds its configuration and tokenizer only.
    asked : str
        How the user named it; for a demo model, its path.
    """

    name: str
    path: Path
    config: models.ModelConfig
    parameters: int
    trainable: int
    fingerprint: str
    tokenizer: str
    lora: Lora | None = None
    listing: Listing | None = None
    asked: str = ""

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of training on one token, as `lensjax.finetune.Outcome` counts them."""
        return tuning_flops(self.parameters, self.trainable, 1)


def find_candidates(
    paths: tuple[str, ...], lora: Lora, *, fetch: bool = True, locate: Callable[[str], object] = str
) -> tuple[Candidate, ...]:
    """Check the candidates without loading them.

    Parameters
    ----------
    paths : tuple of str
        Directories, GGUF files or Hugging Face ids, each with or without `ADAPTED`; empty: the demo models.
    lora : Lora
        Of those with `ADAPTED`.
    fetch : bool
        Whether to download the weights of models on the hub that are not in the cache. Otherwise the headers of their
        weight files are read on the hub, and the checks are the same.
    locate : callable (path) -> path
        Returns where to open a path that is relative to another directory than the current one.

    Raises
    ------
    InputError
        See `lensjax.models.check_checkpoint`; fewer than two candidates, or one that is named twice.
    """
    asked = list(paths) or [str(p) for p in sorted(data.path(*DEMO_MODELS).iterdir()) if p.is_dir()]
    if len(asked) < 2:
        raise InputError(f"--models: {len(asked)} model ({asked[0]}); choosing needs at least two candidates.")
    located = [str(locate(path)) for path in asked]
    names = [name_of(path) for path in located]
    if len(set(names)) < len(names):
        names = asked
    found: list[Candidate] = []
    for name, path, typed in zip(names, located, asked, strict=True):
        candidate = dataclasses.replace(find_candidate(path, lora, name, fetch=fetch), asked=typed)
        same = next((c for c in found if c.name == name or c.fingerprint == candidate.fingerprint), None)
        if same is not None:
            raise InputError(f"--models: {same.name} and {name} are the same model; name each candidate once.")
        found.append(candidate)
    return tuple(found)


def name_of(path: str) -> str:
    """Return the name of a candidate in reports, as long as no other candidate has the same."""
    plain = path.removesuffix(ADAPTED)
    return os.path.basename(os.path.abspath(plain)) + path[len(plain) :] if os.path.exists(plain) else path


def _check_spelling(asked: str) -> None:
    """Refuse a name that is neither a path nor an id: several models joined by commas, or a wrong ending."""
    plain = asked.removesuffix(ADAPTED)
    if Path(plain).expanduser().exists():
        return
    if "," in plain:
        raise InputError(f"--models {asked}: no such model; put spaces between models, not commas.")
    name, _, ending = plain.rpartition("+")
    if name and "/" not in ending:
        raise InputError(
            f"--models {asked}: a model's name does not end in +{ending}; low-rank adapters are asked for by "
            f"{name}{ADAPTED}."
        )


def find_candidate(asked: str, lora: Lora, name: str | None = None, *, fetch: bool = True) -> Candidate:
    """Check one candidate without loading it, see `find_candidates`.

    Parameters
    ----------
    asked : str
        Directory, GGUF file or Hugging Face id, with or without `ADAPTED`.
    lora : Lora
        If with it.
    name : str, optional
        In the report; by default `name_of`.
    fetch : bool
        See `find_candidates`.

    Raises
    ------
    InputError
    """
    _check_spelling(asked)
    path, adapters = asked.removesuffix(ADAPTED), lora if asked.endswith(ADAPTED) else None
    listed = None if fetch or is_gguf(path) else listing(path)
    if listed is not None and listed.complete:
        listed = None
    config = models.check_checkpoint(path, listing=listed)
    place = Path(path).expanduser() if is_gguf(path) else models.resolve(path, weights=listed is None)
    files = _files(place) if listed is None else _hub_files(listed)
    fingerprint, tokenizer = _digests(files | _files_of_index(place, files))
    tokenizer = _tokenizer_digest(place, fingerprint, tokenizer)
    if getattr(config, "is_encoder_decoder", False):
        tokenizer += "-separate"  # it reads the same tokens in another arrangement
    parameters = trainable = models.count_parameters(config)
    if adapters is not None:
        parameters, trainable = models.parameter_counts(models.abstract_model(config, adapters))
        settings = json.dumps(dataclasses.asdict(adapters), sort_keys=True)
        fingerprint = hashlib.sha256(f"{fingerprint} {settings}".encode()).hexdigest()[:16]
    name = name_of(asked) if name is None else name
    return Candidate(name, place, config, parameters, trainable, fingerprint, tokenizer, adapters, listed, asked)


@functools.lru_cache(maxsize=64)
def _tokenizer_digest(place: Path, fingerprint: str, files: str) -> str:
    """Return a digest of what a tokenizer does: class, vocabulary and rules, special tokens, chat template.

    transformers makes other tokenizers of the same tokenizer.json when config.json has another model type, and equal
    ones of different files.

    Parameters
    ----------
    place : Path
    fingerprint : str
        Of all files of the checkpoint: when one changes, the tokenizer is loaded again.
    files : str
        Digest of the tokenizer's files, for tokenizers whose rules cannot be read as text.
    """
    tokenizer = models.load_tokenizer(place)
    rules = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else files
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    parts = [type(tokenizer).__name__, rules, special, template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


Files = Mapping[str, Callable[[], bytes]]
"""Names of files, and what returns a digest of each one's contents."""


def _digests(files: Files) -> tuple[str, str]:
    """Return digests of a checkpoint and of its tokenizer's files: of the files that loading reads."""
    whole, tokenizer = hashlib.sha256(), hashlib.sha256()
    weights = WEIGHTS_SUFFIX if any(name.endswith(WEIGHTS_SUFFIX) for name in files) else ".bin"
    for name, digest in files.items():
        suffix = Path(name).suffix
        of_tokenizer = name.startswith(TOKENIZER_FILES) or suffix in (".model", ".gguf")
        if not (of_tokenizer or name in ("config.json", INDEX) or suffix == weights):
            continue
        contents = name.encode() + digest()
        whole.update(contents)
        if of_tokenizer:
            tokenizer.update(contents)
    return whole.hexdigest()[:16], tokenizer.hexdigest()[:16]


def _files(place: Path) -> dict[str, Callable[[], bytes]]:
    """Return the files of a checkpoint directory, or the GGUF file; the index of shards is left out."""
    entries = [place] if place.is_file() else sorted(place.iterdir())
    return {e.name: functools.partial(_digest, e) for e in entries if e.is_file() and e.name != INDEX}


def _hub_files(listed: Listing) -> dict[str, Callable[[], bytes]]:
    """Return what `_files` would return if everything were downloaded."""
    return {file.name: file.digest.encode for file in listed.files if file.name != INDEX}


def _files_of_index(place: Path, files: Files) -> dict[str, Callable[[], bytes]]:
    """Return the index of shards, and the shards that it names elsewhere than in the checkpoint's directory.

    An index that names exactly the weight files of the directory is left out: no tensor may be in two of them, so it
    adds nothing, and the fingerprints of such models stay those of the first journals.
    """
    index = place / INDEX
    weights = {name for name in files if name.endswith(WEIGHTS_SUFFIX)}
    if SINGLE_FILE in weights or not index.is_file():
        return {}
    named = shards_of(index)
    if set(named) == weights:
        return {}
    elsewhere = {name: functools.partial(_digest, place / name) for name in named if name not in weights}
    return {INDEX: functools.partial(_digest, index), **elsewhere}


def _digest(file: Path) -> bytes:
    """Return a digest of a file's contents."""
    # The hub's cache names a file after a digest of its contents: there is no need to read it.
    blob = file.resolve()
    in_cache = file.is_symlink() and blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    if in_cache and HUB_DIGEST.fullmatch(blob.name):
        return blob.name.encode()
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
