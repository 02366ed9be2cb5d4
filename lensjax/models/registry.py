"""The model families, and the interface that each of them implements.

A family is one module of `lensjax.models.families` with a configuration class (a subclass of `ModelConfig` with
`from_dict`), an NNX model class constructed as `Model(config, dtype, rngs)`, and a function `table(config)` that maps
the model's parameters to the tensors of a Hugging Face checkpoint. `FAMILIES` lists them by the `model_type` of
config.json; a module is imported when it is first needed.
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
    """The part of the configuration that all families share.

    Attributes
    ----------
    model_type : str
        The family, as in config.json.
    raw : str
        The complete config.json as sorted JSON; it is written again when the model is saved.
    vocab_size : int
    width : int
        Width of the residual stream.
    heads : int
        Attention heads.
    layers : int
    max_length : int or None
        Longest input in tokens; None if the position encoding sets no limit.
    """

    model_type: str
    raw: str = dataclasses.field(repr=False)
    vocab_size: int
    width: int
    heads: int
    layers: int
    max_length: int | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> ModelConfig:
        """Read the configuration from the contents of a config.json; each family implements this.

        Parameters
        ----------
        raw : mapping
        source : str
            Names the configuration in error messages.

        Raises
        ------
        InputError
            If a setting is invalid or not supported.
        """
        raise NotImplementedError

    @classmethod
    def base(cls, raw: Mapping[str, Any], **values: Any) -> Self:
        """Build the configuration; `raw` is stored as text so that the configuration stays hashable."""
        return cls(model_type=raw["model_type"], raw=json.dumps(dict(raw), sort_keys=True), **values)

    @classmethod
    def optional_fields(
        cls, raw: Mapping[str, Any], source: str, *, without: Collection[str] = (), null_is_absent: bool = False
    ) -> dict[str, Any]:
        """Return the family's own fields that a config.json sets under the same name, checked by `typed`.

        Parameters
        ----------
        raw : mapping
        source : str
            Names the configuration in error messages.
        without : collection of str
            Fields that the family reads by itself.
        null_is_absent : bool
            Whether null means the default; otherwise null is an error.

        Raises
        ------
        InputError
            If a value has another type than the field's default.
        """
        skipped = {field.name for field in dataclasses.fields(ModelConfig)} | set(without)
        names = [field.name for field in dataclasses.fields(cls) if field.name not in skipped]
        return {
            name: typed(raw, name, getattr(cls, name), source)
            for name in names
            if name in raw and not (null_is_absent and raw[name] is None)
        }


def typed(raw: Mapping[str, Any], name: str, default: Any, source: str) -> Any:
    """Return the value called `name` in a config.json, which must have the type of `default`; a float may be an int.

    Raises
    ------
    InputError
        If the value has another type.
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


def width_and_heads(raw: Mapping[str, Any], source: str, **defaults: int) -> tuple[int, int]:
    """Return the width of the residual stream and the number of attention heads, which must divide it.

    Parameters
    ----------
    raw : mapping
        A config.json.
    source : str
        Names the configuration in error messages.
    **defaults : int
        The names of the two settings in the family's config.json, width first, and their defaults.

    Raises
    ------
    InputError
        If one is not a positive whole number, or the width is not a multiple of the heads.
    """
    (width_name, width), (heads_name, heads) = (
        (name, positive(raw, name, default, source)) for name, default in defaults.items()
    )
    check_multiple(width_name, width, heads_name, heads, source)
    return width, heads


def _single(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0]


def _as_list(array: np.ndarray) -> list[np.ndarray]:
    return [array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one kind of parameter is stored in the checkpoint.

    Attributes
    ----------
    ours : str
        Dotted path of the parameter in our model; ``{i}``, ``{e}`` ... stand for numbers.
    theirs : str or tuple of str
        Name or names of the checkpoint's tensors that hold it, with the same placeholders.
    load : callable, list of arrays -> array
        Computes the parameter from the checkpoint's tensors. May use NumPy views and concatenation only.
    save : callable, array -> list of arrays
        The inverse of `load`.
    """

    ours: str
    theirs: str | tuple[str, ...]
    load: Callable[[Sequence[np.ndarray]], np.ndarray] = _single
    save: Callable[[np.ndarray], list[np.ndarray]] = _as_list

    def match(self, path: str) -> tuple[str, ...] | None:
        """Return the names of the tensors that hold the parameter at `path`, or None if this is not its rule."""
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(self.ours))
        numbers = re.fullmatch(pattern, path)
        if numbers is None:
            return None
        return tuple(name.format(**numbers.groupdict()) for name in self.patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The tensors' names with placeholders, as a tuple also where there is one."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def transposed(ours: str, theirs: str) -> Rule:
    """Return the rule for a matrix that the checkpoint stores as (out, in), as torch's linear layers do."""
    return Rule(ours, theirs, lambda arrays: arrays[0].T, lambda array: [array.T])


def linear_rules(ours: str, theirs: str) -> list[Rule]:
    """Return the rules for a linear layer stored as (out, in), and for its bias if it has one."""
    return [transposed(f"{ours}.kernel", f"{theirs}.weight"), Rule(f"{ours}.bias", f"{theirs}.bias")]


def norm_rules(ours: str, theirs: str) -> list[Rule]:
    """Return the rules for the scale of a norm, and for its bias if it has one."""
    return [Rule(f"{ours}.scale", f"{theirs}.weight"), Rule(f"{ours}.bias", f"{theirs}.bias")]


@dataclasses.dataclass(frozen=True)
class Table:
    """How a family's checkpoint stores the parameters.

    Exactly one rule applies to each parameter. Each tensor of a checkpoint belongs to a rule, is a copy of another, or
    is ignored; any other tensor is an error.

    Attributes
    ----------
    rules : tuple of Rule
    prefix : str
        Every name begins with it, except those in `unprefixed`; checkpoints of the model without its head lack it.
    unprefixed : tuple of str
        Names that never have the prefix.
    copies : mapping
        Tied tensors: name -> name of the tensor that it must equal. A checkpoint may store either name or both.
    optional : tuple of str
        Tensors that are zero where the checkpoint does not have them.
    ignored : tuple of str
        Regular expressions for names of tensors that are not parameters.
    untied : ModelConfig or None
        The same configuration without tied tables. It replaces this one if the checkpoint stores different values for
        a tensor of `copies` that it does not tie.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    unprefixed: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    untied: ModelConfig | None = None

    def sources(self, path: str) -> tuple[Rule, tuple[str, ...]]:
        """Return the rule of the parameter at `path`, and the names without prefix of the tensors that hold it."""
        matches = [(rule, names) for rule in self.rules if (names := rule.match(path)) is not None]
        if len(matches) != 1:
            raise LookupError(f"{len(matches)} rules of the mapping table are about the parameter {path}.")
        return matches[0]

    def short(self, name: str) -> str:
        """Return a tensor's name without the prefix."""
        return name.removeprefix(self.prefix)

    def full(self, name: str) -> str:
        """Return a tensor's name with the prefix, as checkpoints have it."""
        return name if name in self.unprefixed else self.prefix + name

    def is_ignored(self, name: str) -> bool:
        """Tell whether a tensor (name without prefix) may be there although the model has no such parameter."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


ROTARY_BUFFERS = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""The rotary frequencies of each layer, which old checkpoints store as a buffer."""


def causal_table(
    rules: Sequence[Rule],
    *,
    tied: bool,
    embedding: str,
    prefix: str,
    unprefixed: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> Table:
    """Return the table of a causal model: the family's own rules, and its head lm_head.weight.

    Parameters
    ----------
    rules : sequence of Rule
        For everything but the head's weight.
    tied : bool
        Whether the head is the table of token embeddings.
    embedding : str
        Name of that table without prefix.
    prefix, unprefixed, ignored
        See `Table`; lm_head.weight never has the prefix.
    """
    head = "lm_head.weight"
    return Table(
        rules=tuple(rules) if tied else (*rules, Rule("head.embedding", head)),
        prefix=prefix,
        unprefixed=(head, *unprefixed),
        copies={head: embedding} if tied else {},
        ignored=ignored,
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's configuration class, model class and function that returns its mapping table."""

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
"""model_type -> module of `lensjax.models.families`, configuration class, model class."""


def family(model_type: str, source: str) -> Family:
    """Return the family of a `model_type`; `source` names the model in the error message.

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


def family_of(config: ModelConfig) -> Family:
    """Return the family that a configuration belongs to."""
    return family(config.model_type, config.model_type)
