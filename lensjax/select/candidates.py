"""The models to choose from, and what is known of them before they are loaded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path

import jax
from flax import nnx

from lensjax import data, models
from lensjax.errors import InputError
from lensjax.finetune import tuning_flops
from lensjax.models import Lora
from lensjax.models.checkpoints import is_gguf

DEMO_MODELS = ("demo", "models")
ADAPTED = "+lora"
"""Ends the name of a candidate that only gets adapters."""

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
    fingerprint, tokenizer : str
        Change whenever a file of the checkpoint or the adapters' settings do, or one of its tokenizer.
    lora : Lora, optional
        Its adapters.
    """

    name: str
    path: Path
    config: models.ModelConfig
    parameters: int
    trainable: int
    fingerprint: str
    tokenizer: str
    lora: Lora | None = None

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of training on one token, as `lensjax.finetune.Outcome` counts them."""
        return tuning_flops(self.parameters, self.trainable, 1)


def find_candidates(paths: tuple[str, ...], lora: Lora) -> tuple[Candidate, ...]:
    """Check the candidates without loading them.

    Parameters
    ----------
    paths : tuple of str
        Directories, GGUF files or Hugging Face ids, each with or without `ADAPTED`; empty: the demo models.
    lora : Lora
        Of those with `ADAPTED`.

    Raises
    ------
    InputError
        See `lensjax.models.check_checkpoint`; fewer than two candidates, or one that is named twice.
    """
    asked = list(paths) or [str(p) for p in sorted(data.path(*DEMO_MODELS).iterdir()) if p.is_dir()]
    if len(asked) < 2:
        raise InputError(f"--models: {len(asked)} model ({asked[0]}); choosing needs at least two candidates.")
    names = [_name(path) for path in asked]
    if len(set(names)) < len(names):
        names = asked
    found: list[Candidate] = []
    for name, path in zip(names, asked, strict=True):
        candidate = _candidate(name, path.removesuffix(ADAPTED), lora if path.endswith(ADAPTED) else None)
        same = next((c for c in found if c.name == name or c.fingerprint == candidate.fingerprint), None)
        if same is not None:
            raise InputError(f"--models: {same.name} and {name} are the same model; name each candidate once.")
        found.append(candidate)
    return tuple(found)


def _name(path: str) -> str:
    plain = path.removesuffix(ADAPTED)
    return os.path.basename(os.path.abspath(plain)) + path[len(plain) :] if os.path.exists(plain) else path


def _candidate(name: str, path: str, lora: Lora | None) -> Candidate:
    config = models.check_checkpoint(path)
    place = Path(path).expanduser() if is_gguf(path) else models.resolve(path)
    fingerprint, tokenizer = _digests(place)
    if getattr(config, "is_encoder_decoder", False):
        tokenizer += "-separate"  # it reads the same tokens in another arrangement
    parameters = trainable = models.count_parameters(config)
    if lora is not None:
        adapted = nnx.eval_shape(functools.partial(_adapted, config, lora))
        parameters, trainable = models.parameter_counts(adapted)
        settings = json.dumps(dataclasses.asdict(lora), sort_keys=True)
        fingerprint = hashlib.sha256(f"{fingerprint} {settings}".encode()).hexdigest()[:16]
    return Candidate(name, place, config, parameters, trainable, fingerprint, tokenizer, lora)


def _adapted(config: models.ModelConfig, lora: Lora) -> models.LanguageModel:
    key = jax.random.key(0)
    return models.add_lora(models.init_model(config, key), key=key, **dataclasses.asdict(lora))


def _digests(place: Path) -> tuple[str, str]:
    """Return what identifies a checkpoint, and its tokenizer alone: the contents of the files that matter."""
    whole, tokenizer = hashlib.sha256(), hashlib.sha256()
    for file in [place] if place.is_file() else sorted(place.iterdir()):
        of_tokenizer = file.name.startswith(TOKENIZER_FILES) or file.suffix in (".model", ".gguf")
        wanted = of_tokenizer or file.name == "config.json" or file.suffix == ".safetensors"
        if not (wanted and file.is_file()):
            continue
        contents = file.name.encode() + _contents(file)
        whole.update(contents)
        if of_tokenizer:
            tokenizer.update(contents)
    return whole.hexdigest()[:16], tokenizer.hexdigest()[:16]


def _contents(file: Path) -> bytes:
    """Return what changes with a file's contents."""
    # The hub's cache names a file after its contents: there is no need to read it.
    blob = file.resolve()
    if blob.parent.name == "blobs":
        return blob.name.encode()
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
