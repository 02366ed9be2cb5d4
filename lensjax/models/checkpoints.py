"""Checkpoints: finding them, checking them, reading them tensor by tensor, writing them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lensjax.errors import InputError
from lensjax.models.base import LanguageModel
from lensjax.models.registry import Family, ModelConfig, Table, family

PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "tf_model.h5", "flax_model*.msgpack")
CONVERSION = "transformers.AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET)."
TOKENIZER_ANY = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


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
    if path.is_file():
        raise InputError(f"{name}: is a file; name the directory that holds config.json and model.safetensors.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or isinstance(name_or_path, Path):
        raise InputError(f"{name}: no such directory; name a model directory or a Hugging Face id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*TOKENIZER_FILES, *(["*.safetensors"] if weights else [])]
    try:
        # Files in sub-folders are other formats (onnx, openvino) of the same weights.
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: is no directory here and could not be had from the Hugging Face hub ({reason}). "
            "Check the id and the network, or download the model and name its directory."
        ) from error


def load_config(
    name_or_path: str | os.PathLike[str] | Mapping[str, Any], *, revision: str | None = None
) -> ModelConfig:
    """Read and check a model's configuration without touching its weights.

    Parameters
    ----------
    name_or_path : str, path or mapping
        As in `from_pretrained`, or the contents of a config.json.
    revision : str, optional
        As in `from_pretrained`.

    Returns
    -------
    ModelConfig
        Of the model's family.

    Raises
    ------
    InputError
        If the model or its config.json is missing or unreadable, brings code of its own, or is of no supported family.
    """
    if isinstance(name_or_path, Mapping):
        return _config(dict(name_or_path), "the configuration")
    file = resolve(name_or_path, revision=revision, weights=False) / "config.json"
    if not file.is_file():
        raise InputError(f"{os.fspath(name_or_path)}: has no config.json; name a directory in Hugging Face format.")
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file}: must hold a JSON object, found {type(raw).__name__}.")
    return _config(raw, os.fspath(name_or_path))


def _config(raw: dict[str, Any], source: str) -> ModelConfig:
    if raw.get("auto_map"):
        raise InputError(
            f"{source}: config.json has auto_map, that is, code of its own, which lensjax does not run; "
            "use a checkpoint of the same model in the standard format."
        )
    if not isinstance(raw.get("model_type"), str):
        raise InputError(f'{source}: config.json has no model_type; add it, for instance "model_type": "gpt2".')
    return family(raw["model_type"], source).config.from_dict(raw, source)


def _family(config: ModelConfig) -> Family:
    return family(config.model_type, config.model_type)


def _abstract(config: ModelConfig, dtype: Any) -> LanguageModel:
    return nnx.eval_shape(lambda: _family(config).model(config, dtype, nnx.Rngs(0)))


def count_parameters(model: str | os.PathLike[str] | ModelConfig, *, revision: str | None = None) -> int:
    """Count a model's parameters from its configuration alone; a tied head counts once.

    Parameters
    ----------
    model : str, path or ModelConfig
        As in `from_pretrained`, or a configuration already loaded.
    revision : str, optional
        As in `from_pretrained`.
    """
    config = model if isinstance(model, ModelConfig) else load_config(model, revision=revision)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(_abstract(config, jnp.float32), nnx.Param)))


def init_model(config: ModelConfig | Mapping[str, Any], key: jax.Array, dtype: Any = jnp.float32) -> LanguageModel:
    """Build a model with random weights, drawn as its family does before pre-training.

    Parameters
    ----------
    config : ModelConfig or mapping
        From `load_config`, or the contents of a config.json.
    key : PRNG key
    dtype : dtype of the parameters
    """
    if not isinstance(config, ModelConfig):
        config = load_config(config)
    return _family(config).model(config, dtype, nnx.Rngs(key))


class _Tensors:
    """The tensors of one checkpoint: names and shapes now, contents one at a time."""

    def __init__(self, directory: Path, source: str):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        with contextlib.ExitStack() as stack:
            self.handles: dict[str, Any] = {}
            for file in self._find(directory, source):
                try:
                    handle = stack.enter_context(safe_open(file, "np"))
                except (SafetensorError, OSError) as error:
                    raise InputError(f"{file}: cannot be read as safetensors ({error}); download it again.") from error
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                    if name in self.handles:
                        raise InputError(f"{source}: tensor {name} is in two shards, {self.files[name]} and {file}.")
                    self.handles[name], self.files[name] = handle, file
                    self.shapes[name] = tuple(handle.get_slice(name).get_shape())
            self.close = stack.pop_all().close

    @staticmethod
    def _find(directory: Path, source: str) -> list[Path]:
        index = directory / "model.safetensors.index.json"
        if (directory / "model.safetensors").is_file():
            return [directory / "model.safetensors"]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, AttributeError) as error:
                raise InputError(f"{index}: is not a valid index of shards ({error!r}); download it again.") from error
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise InputError(f"{source}: shards named in {index.name} are missing: {', '.join(missing)}.")
            return [directory / name for name in names]
        pickled = sorted(file.name for pattern in PICKLED for file in directory.glob(pattern))
        if pickled:
            raise InputError(
                f"{source}: has only {', '.join(pickled)}, which lensjax does not open: such files can run code. "
                f"Convert it once, where you trust it and have torch: {CONVERSION}"
            )
        raise InputError(
            f"{source}: has no model.safetensors and no model.safetensors.index.json. If it comes with pickled weights "
            f"only (pytorch_model.bin), convert it once where you trust it: {CONVERSION}"
        )

    def read(self, name: str) -> np.ndarray:
        return self.handles[name].get_tensor(name)


@contextlib.contextmanager
def _open(directory: Path, source: str) -> Iterator[_Tensors]:
    tensors = _Tensors(directory, source)
    try:
        yield tensors
    finally:
        tensors.close()


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: Any = jnp.float32, revision: str | None = None
) -> LanguageModel:
    """Load a model without its tokenizer; see `from_pretrained`."""
    config = load_config(name_or_path, revision=revision)
    source = os.fspath(name_or_path)
    table = _family(config).table(config)
    graph, *states = nnx.split(_abstract(config, dtype), nnx.Param, ...)
    abstract, rest = states
    flat = [(path, ".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(abstract)]
    with _open(resolve(name_or_path, revision=revision), source) as tensors:
        names = _check(table, {path: leaf.shape for _, path, leaf in flat}, tensors, source)
        leaves = []
        for path, dotted, leaf in flat:
            rule, wanted = table.sources(dotted)
            if any(name not in names for name in wanted):
                leaves.append((path, leaf.replace(jnp.zeros(leaf.shape, dtype))))
                continue
            array = rule.load([tensors.read(names[name]) for name in wanted])
            leaves.append((path, leaf.replace(jnp.asarray(array.astype(dtype, copy=False)))))
        for copy, original in table.same.items():
            if copy in names and not np.array_equal(tensors.read(names[copy]), tensors.read(names[original])):
                raise InputError(
                    f"{source}: config.json ties {copy} to {original}, but the two differ in the checkpoint; "
                    "set tie_word_embeddings to false in config.json."
                )
    return nnx.merge(graph, nnx.from_flat_state(leaves), rest)


def check_checkpoint(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> ModelConfig:
    """Check that a model can be loaded, from its configuration and the headers of its weight files alone.

    Returns
    -------
    ModelConfig

    Raises
    ------
    InputError
        As `from_pretrained` would, except for what only the tensors' contents or the tokenizer can show.
    """
    config = load_config(name_or_path, revision=revision)
    source = os.fspath(name_or_path)
    flat = nnx.to_flat_state(nnx.state(_abstract(config, jnp.float32), nnx.Param))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in flat}
    with _open(resolve(name_or_path, revision=revision), source) as tensors:
        _check(_family(config).table(config), shapes, tensors, source)
    return config


def _check(table: Table, shapes: Mapping[str, tuple[int, ...]], tensors: _Tensors, source: str) -> dict[str, str]:
    """Return short name -> name in the file, or raise with everything that does not fit."""
    names: dict[str, str] = {}
    problems = []
    for name in tensors.shapes:
        short = table.short(name)
        if short in names:
            problems.append(f"both {names[short]} and {name} are there")
        names[short] = name
    used = set(table.same)
    for path, shape in shapes.items():
        rule, wanted = table.sources(path)
        used.update(wanted)
        absent = [table.full(name) for name in wanted if name not in names]
        if absent and all(name in table.optional for name in wanted):
            continue
        if absent:
            problems.append(f"missing: {', '.join(absent)}")
            continue
        found = [tensors.shapes[names[name]] for name in wanted]
        try:
            # Views of one zero: the rule's own code decides which shape it makes, and no tensor is read.
            made = rule.load([np.broadcast_to(np.zeros((), np.uint8), s) for s in found]).shape
        except ValueError:
            made = None
        if made != tuple(shape):
            problems.append(
                f"wrong shape: {', '.join(names[name] for name in wanted)} has {' and '.join(map(str, found))}, "
                f"which does not make {tuple(shape)} for {path}"
            )
    problems += [f"unused: {names[name]}" for name in names if name not in used and not table.is_ignored(name)]
    if problems:
        raise InputError(
            f"{source}: the checkpoint does not fit its config.json, {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}:\n  " + "\n  ".join(problems)
        )
    return names


def export_tensors(model: LanguageModel, dtype: Any = None) -> dict[str, np.ndarray]:
    """Return the model's parameters under the names and in the shapes of its Hugging Face checkpoint.

    Also for gradients: merge them into the model in place of the parameters.

    Parameters
    ----------
    model : LanguageModel
    dtype : optional
        Type of the arrays; default: that of the parameters.
    """
    table = _family(model.config).table(model.config)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        rule, names = table.sources(".".join(map(str, path)))
        array = np.asarray(leaf[...])
        array = array if dtype is None else array.astype(jnp.dtype(dtype))
        for name, part in zip(names, rule.save(array), strict=True):
            tensors[table.full(name)] = np.ascontiguousarray(part)
    return tensors


def save_pretrained(
    model: LanguageModel, directory: str | os.PathLike[str], tokenizer: Any = None, dtype: Any = None
) -> None:
    """Write a model as config.json and model.safetensors, which transformers loads.

    Parameters
    ----------
    model : LanguageModel
        Of a supported family.
    directory : str or path
        Made if it is not there; files of the same names are replaced.
    tokenizer : transformers tokenizer, optional
        Saved beside the model; config.json gets its special token ids where it has none.
    dtype : optional
        Type of the tensors on disk; default: that of the parameters.
    """
    tensors = export_tensors(model, dtype)
    raw = json.loads(model.config.raw)
    kinds = sorted({str(array.dtype) for array in tensors.values()})
    raw["dtype"] = kinds[0]
    raw.pop("torch_dtype", None)
    if tokenizer is not None:
        # The families' defaults (50256 for GPT-2) lie outside small vocabularies, and transformers complains.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw.setdefault(name, getattr(tokenizer, name, None))
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", "utf-8")
    unfinished = target / "model.safetensors.tmp"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(unfinished, target / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(target)


def load_tokenizer(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Load a model's tokenizer through transformers.

    Raises
    ------
    InputError
        If the model has no tokenizer that transformers can read.
    """
    directory = resolve(name_or_path, revision=revision, weights=False)
    # transformers says at import that torch is missing; this is its own switch for such advice.
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
    try:
        if not any((directory / file).is_file() for file in TOKENIZER_ANY):
            # transformers would make an empty tokenizer without a word.
            raise OSError(f"none of {', '.join(TOKENIZER_ANY)} is there")
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{os.fspath(name_or_path)}: its tokenizer cannot be loaded ({reason}); put tokenizer.json and "
            "tokenizer_config.json beside config.json."
        ) from error


def from_pretrained(
    name_or_path: str | os.PathLike[str], *, dtype: Any = jnp.float32, revision: str | None = None
) -> tuple[LanguageModel, Any]:
    """Load a model and its tokenizer.

    Tensors are read one at a time, so that memory stays near that of the parameters.

    Parameters
    ----------
    name_or_path : str or path
        A directory with config.json, model.safetensors (or shards with their index) and tokenizer files, or a
        Hugging Face id.
    dtype : dtype of the parameters and of the computation
    revision : str, optional
        Branch, tag or commit on the hub.

    Returns
    -------
    model : LanguageModel
        See its class.
    tokenizer : transformers tokenizer

    Raises
    ------
    InputError
        If the model cannot be found or is not supported, or if the checkpoint does not fit its configuration: then
        with all unused, missing and misshapen tensors in one message.
    """
    model = load_model(name_or_path, dtype=dtype, revision=revision)
    return model, load_tokenizer(name_or_path, revision=revision)
