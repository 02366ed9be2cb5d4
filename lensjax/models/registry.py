"""What a family of models has to bring, and which families there are.

A family is one module of `lensjax.models.families` with a configuration (`ModelConfig` subclass with `from_dict`), an
NNX model class built as `Model(config, dtype, rngs)`, and `table(config)`, its checkpoint's names. `FAMILIES` names all
three under the `model_type` of config.json; modules are imported when first needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np

from lensjax.errors import InputError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
MOST_LAYERS = 10_000
MOST = 2**31 - 1
"""The largest size that indices of 32 bits reach."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What every family's configuration says.

    Attributes
    ----------
    model_type : str
        The family, as in config.json.
    raw : str
        The whole config.json, as sorted JSON; what is saved again with the model.
    vocab_size, width, heads, layers : int
        Entries of the vocabulary, width of the residual stream, attention heads, layers.
    max_length : int or None
        Longest input in tokens; None if the positions set no limit.
    """

    model_type: str
    raw: str = dataclasses.field(repr=False)
    vocab_size: int
    width: int
    heads: int
    layers: int
    max_length: int | None

    @classmethod
    def base(cls, raw: Mapping[str, Any], **values: Any) -> Self:
        """Build the configuration and keep `raw` beside it as text, which can be hashed."""
        return cls(model_type=raw["model_type"], raw=json.dumps(dict(raw), sort_keys=True), **values)

    @classmethod
    def own_values(cls, raw: Mapping[str, Any], source: str, *, without: Collection[str] = ()) -> dict[str, Any]:
        """Return what `raw` says of the fields that the family adds, by name, each of the type of its default.

        Those in `without` are left to the family.

        Raises
        ------
        InputError
            See `typed`.
        """
        own = {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(ModelConfig)}
        return {
            name: typed(raw, name, getattr(cls, name), source) for name in sorted(own - set(without)) if name in raw
        }


def typed(raw: Mapping[str, Any], name: str, default: Any, source: str) -> Any:
    """Return a value of a config.json, of the type of its default; an int may stand for a float.

    Raises
    ------
    InputError
        If it is of another type.
    """
    value = raw.get(name, default)
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise InputError(
            f"{source}: {name} is {value!r} in config.json; it must be a {type(default).__name__} such as {default!r}."
        )
    return value


def positive(raw: Mapping[str, Any], name: str, default: int, source: str) -> int:
    """Return the size called `name` in a config.json, or `default` where it is absent or null.

    Raises
    ------
    InputError
        If it is not a positive whole number.
    """
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{source}: {name} is {value!r}; it must be a positive whole number: correct config.json.")
    # A configuration may hold something for every layer, before any weights file is looked at.
    if name in LAYER_COUNTS and value > MOST_LAYERS:
        raise InputError(f"{source}: {name} is {value}; no model has more than {MOST_LAYERS}: correct config.json.")
    if value > MOST:
        raise InputError(f"{source}: {name} is {value}; no size is more than {MOST}: correct config.json.")
    return value


def check_multiple(name: str, value: int, divisor_name: str, divisor: int, source: str) -> None:
    """Refuse a size of a config.json that another one does not divide.

    Raises
    ------
    InputError
        If `value` is not a multiple of `divisor`.
    """
    if value % divisor:
        raise InputError(
            f"{source}: {name} {value} is not a multiple of {divisor_name} {divisor}; correct config.json."
        )


def _single(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0]


def _as_list(array: np.ndarray) -> list[np.ndarray]:
    return [array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one kind of parameter stands in the checkpoint.

    Attributes
    ----------
    ours : str
        Path of the parameter with dots; ``{i}``, ``{e}`` ... stand for numbers.
    theirs : str or tuple of str
        Name or names of the tensors it is made of, with the same placeholders.
    load : callable, list of arrays -> array
        From the checkpoint's tensors to the parameter. Must use NumPy views and concatenation only.
    save : callable, array -> list of arrays
        Its inverse.
    """

    ours: str
    theirs: str | tuple[str, ...]
    load: Callable[[Sequence[np.ndarray]], np.ndarray] = _single
    save: Callable[[np.ndarray], list[np.ndarray]] = _as_list

    def match(self, path: str) -> tuple[str, ...] | None:
        """Return the tensors that make the parameter at `path`, or None if the rule is not about it."""
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(self.ours))
        found = re.fullmatch(pattern, path)
        if found is None:
            return None
        names = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        return tuple(name.format(**found.groupdict()) for name in names)


def transposed(ours: str, theirs: str) -> Rule:
    """Return the rule for a matrix the checkpoint stores as (out, in), as torch's linear layers do."""
    return Rule(ours, theirs, lambda arrays: arrays[0].T, lambda array: [array.T])


@dataclasses.dataclass(frozen=True)
class Table:
    """A family's checkpoint: every parameter has exactly one rule, every tensor one use or one reason to be ignored.

    Attributes
    ----------
    rules : tuple of Rule
    prefix : str
        Stands before all names but those `outside`; files of the bare model lack it.
    outside : tuple of str
        Names that never carry the prefix.
    same : mapping
        Tensors that may be there only as a copy of another, or in its place: name -> the other's name.
    optional : tuple of str
        Tensors whose absence means zeros.
    ignored : tuple of str
        Regular expressions of tensors that are no parameters.
    untied : ModelConfig or None
        The configuration that holds instead where tensors of `same` that it does not tie differ.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    outside: tuple[str, ...] = ()
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    untied: ModelConfig | None = None

    def sources(self, path: str) -> tuple[Rule, tuple[str, ...]]:
        """Return the rule about the parameter at `path` and the tensors that make it, without prefix."""
        found = [(rule, names) for rule in self.rules if (names := rule.match(path)) is not None]
        if len(found) != 1:
            raise LookupError(f"{len(found)} rules of the mapping table are about the parameter {path}.")
        return found[0]

    def short(self, name: str) -> str:
        """Return a tensor's name without the prefix."""
        return name.removeprefix(self.prefix)

    def full(self, name: str) -> str:
        """Return a tensor's name as the family's files have it."""
        return name if name in self.outside else self.prefix + name

    def is_ignored(self, name: str) -> bool:
        """Tell whether a tensor (name without prefix) may be there although the model has no such parameter."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: its configuration class, model class and mapping table."""

    config: Any
    model: Any
    table: Callable[[Any], Table]


FAMILIES: dict[str, tuple[str, str, str]] = {
    "gpt2": ("gpt2", "GPT2Config", "GPT2"),
    "bart": ("bart", "BartConfig", "Bart"),
    "mt5": ("mt5", "MT5Config", "MT5"),
    "switch_transformers": ("switch_transformers", "SwitchConfig", "SwitchTransformer"),
    "t5": ("t5", "T5Config", "T5"),
    "llama": ("llama", "LlamaConfig", "Llama"),
    "mistral": ("mistral", "MistralConfig", "Mistral"),
    "qwen2": ("qwen2", "Qwen2Config", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3Config", "Qwen3"),
    "opt": ("opt", "OPTConfig", "OPT"),
    "phi": ("phi", "PhiConfig", "Phi"),
    "gemma3_text": ("gemma3", "Gemma3Config", "Gemma3"),
}
"""model_type -> module, configuration class, model class."""


def family(model_type: str, source: str) -> Family:
    """Return the family of a `model_type`; `source` names the model in the message.

    Raises
    ------
    InputError
        If the family is not supported.
    """
    if model_type not in FAMILIES:
        raise InputError(
            f"{source}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}."
        )
    name, config, model = FAMILIES[model_type]
    module = importlib.import_module(f"lensjax.models.families.{name}")
    return Family(getattr(module, config), getattr(module, model), module.table)
