"""The models to choose from, and what is known of them before they are loaded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lensjax import data, models
from lensjax.errors import InputError
from lensjax.finetune import tuning_flops
from lensjax.jobs.defaults import ADAPTED, DEMO_MODELS
from lensjax.models import Lora
from lensjax.models.checkpoints.gguf import is_gguf
from lensjax.models.checkpoints.hub import Listing, listing

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


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One model to choose from, and one way to fine-tune it.

    Attributes
    ----------
    name : str
        In the report.
    path : Path
        Where its files are, those of a hub id in the hub's cache; or its GGUF file.
    config : ModelConfig
    parameters : int
    trainable : int
        Parameters that fine-tuning changes: all, or those of the adapters.
    fingerprint : str
        Changes whenever a file of the checkpoint or the adapters' settings do.
    tokenizer : str
        Changes with what its tokenizer does, whatever files it is made from; encoder-decoders have their own.
    lora : Lora, optional
        Its adapters.
    listing : Listing, optional
        Of a model on the hub whose weights were not fetched: `path` holds its configuration and tokenizer only.
    asked : str
        What the user typed for it; of a demo model its path.
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
        Whether to fetch the weights of models on the hub that are not here yet. Without them all is checked that they
        are here for: the headers of the weight files are read on the hub.
    locate : callable (path) -> path
        Returns where a path is to be opened, if it is meant from another directory than the current one.

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
    """Return what a candidate is called in reports, if no other is called so."""
    plain = path.removesuffix(ADAPTED)
    return os.path.basename(os.path.abspath(plain)) + path[len(plain) :] if os.path.exists(plain) else path


def _check_spelling(asked: str) -> None:
    """Refuse what is neither a path nor an id because several models, or adapters, are written in another way."""
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
    fingerprint, tokenizer = _digests(_files(place) if listed is None else _hub_files(listed))
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
    """Return what identifies a tokenizer by what it does: class, vocabulary and rules, special tokens, chat template.

    transformers makes other tokenizers of the same tokenizer.json when config.json has another model type, and equal
    ones of different files.

    Parameters
    ----------
    place : Path
    fingerprint : str
        Of all files: what is remembered of a place is forgotten when one of them changes.
    files : str
        Of the tokenizer's files, for tokenizers that do not tell their rules.
    """
    tokenizer = models.load_tokenizer(place)
    rules = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else files
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    parts = [type(tokenizer).__name__, rules, special, template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _digests(files: Iterable[tuple[str, Callable[[], bytes]]]) -> tuple[str, str]:
    """Return what identifies a checkpoint, and its tokenizer alone: the contents of the files that matter."""
    whole, tokenizer = hashlib.sha256(), hashlib.sha256()
    files = list(files)
    weights = ".safetensors" if any(name.endswith(".safetensors") for name, _ in files) else ".bin"
    for name, digest in files:
        suffix = Path(name).suffix
        of_tokenizer = name.startswith(TOKENIZER_FILES) or suffix in (".model", ".gguf")
        if not (of_tokenizer or name == "config.json" or suffix == weights):
            continue
        contents = name.encode() + digest()
        whole.update(contents)
        if of_tokenizer:
            tokenizer.update(contents)
    return whole.hexdigest()[:16], tokenizer.hexdigest()[:16]


def _files(place: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield name and `_contents` of the files of a checkpoint."""
    for file in [place] if place.is_file() else sorted(place.iterdir()):
        if file.is_file():
            yield file.name, functools.partial(_contents, file)


def _hub_files(listed: Listing) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield what `_files` would after everything was fetched."""
    for file in listed.files:
        yield file.name, file.digest.encode


def _contents(file: Path) -> bytes:
    """Return what changes with a file's contents."""
    # The hub's cache names a file after its contents: there is no need to read it.
    blob = file.resolve()
    if blob.parent.name == "blobs":
        return blob.name.encode()
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
