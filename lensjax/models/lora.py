"""Low-rank adapters (LoRA) for every family: added to frozen weights, trained, and merged into them.

References
----------
Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.
Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lensjax.errors import InputError
from lensjax.models import layers
from lensjax.models.execution import is_stacked, stack_layers, unstack_layers
from lensjax.models.registry import Table, family_of

Model = TypeVar("Model", bound=nnx.Module)

DROPOUT_STREAM = 1 << 30
"""Folded into the dropout key for the adapters. The model splits its own keys from the same key, and the first keys of
a split do not depend on how many are split off, so without this the adapters would repeat the model's keys."""


class Frozen(nnx.Variable):
    """A frozen weight of a model with adapters. As it is not an `nnx.Param`, training `nnx.Param` skips it."""


class DropoutKey(nnx.Variable):
    """The dropout key of an adapter during one call."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of low-rank adapters.

    Attributes
    ----------
    rank : int
        Rank of the update of each matrix.
    alpha : float
        The update is multiplied by `alpha / rank`.
    dropout : float
        Dropout rate of an adapter's inputs in training; in [0, 1).
    target : tuple of str, or None
        Which linear layers get an adapter: the last parts of their names, either ours (`attention.query`, see
        `adaptable`) or the checkpoint's (`q_proj`), with the wildcards of `fnmatch`. None means all of attention and
        MLPs, including the experts of Switch Transformer, but not its routers. Embeddings and heads cannot have one.
    layers : tuple of int, or None
        Which layers of the model, counted from 0, both in encoder and decoder; None means all.
    rank_stabilised : bool
        Multiply by `alpha / sqrt(rank)` instead, so the update does not shrink with the rank.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(f"LoRA's rank is {self.rank!r}; it must be a whole number of at least 1, such as 8.")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise InputError(f"LoRA's alpha is {self.alpha!r}; it must be a positive number, such as 16.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA's dropout is {self.dropout!r}; it must be at least 0 and less than 1.")
        for name in ("target", "layers"):  # lists are accepted, but settings must be hashable
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, (str, int)) else tuple(value))

    @property
    def scale(self) -> float:
        """Factor that multiplies the product of an adapter's two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class Adapter(nnx.Module):
    """A frozen linear layer and its low-rank update: `base(x) + scale * dropout(x) @ lora_a @ lora_b`.

    The update is computed in the adapter's dtype, at least float32, and added in the dtype of the base's output.

    Parameters
    ----------
    base : nnx.Linear, or nnx.Variable (E, d, f)
        A variable holds the matrices of E experts; each expert gets its own update.
    lora : Lora
    key : PRNG key
        For `lora_a`, which is uniform between `-d**-0.5` and `d**-0.5` as in the authors' code and in peft; `lora_b`
        starts at 0.
    """

    def __init__(self, base: Any, lora: Lora, key: jax.Array):
        self.base = base
        kernel = self.kernel
        *experts, inputs, outputs = kernel.shape
        dtype = jnp.promote_types(jnp.float32, kernel.dtype)
        bound = inputs**-0.5
        self.lora_a = nnx.LoRAParam(jax.random.uniform(key, (*experts, inputs, lora.rank), dtype, -bound, bound))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*experts, lora.rank, outputs), dtype))
        self.scale, self.dropout = lora.scale, lora.dropout
        self.key: DropoutKey | None = None

    @property
    def kernel(self) -> Any:
        """The frozen matrix, a variable (..., d, f)."""
        return self.base if isinstance(self.base, nnx.Variable) else self.base.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply to x (M, d), or (N, E, C, d) if there are experts."""
        y = layers.per_expert(self.base, x) if isinstance(self.base, nnx.Variable) else self.base(x)
        a, b = self.lora_a[...], self.lora_b[...]
        inputs = layers.drop(x.astype(a.dtype), self.dropout, None if self.key is None else self.key[...])
        return y + (self.scale * (inputs @ a @ b)).astype(y.dtype)

    def merged(self) -> Any:
        """Return the linear layer with the update added to its matrix."""
        kernel = self.kernel
        a, b = self.lora_a[...], self.lora_b[...]
        kernel[...] = (kernel[...].astype(a.dtype) + self.scale * (a @ b)).astype(kernel.dtype)
        return self.base


class ParameterCounts(NamedTuple):
    """Number of a model's weights including adapters, and how many of them are trained."""

    total: int
    trainable: int


def parameter_counts(model: nnx.Module) -> ParameterCounts:
    """Count a model's weights; a tied head counts once."""
    count = lambda kind: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))  # noqa: E731
    trainable = count(nnx.Param)
    return ParameterCounts(trainable + count(Frozen), trainable)


def adaptable(model: Any) -> dict[str, tuple[str, ...]]:
    """Return the linear layers that can have an adapter.

    Returns
    -------
    dict
        Our dotted name, such as `layers.0.attention.query` -> the names in the checkpoint, such as
        `model.layers.0.self_attn.q_proj`; there are several only for experts.
    """
    table = family_of(model.config).table(model.config)
    names = {}
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if name.endswith(".base"):
            continue
        if isinstance(module, nnx.Linear) or (isinstance(module, Adapter) and isinstance(module.base, nnx.Linear)):
            names[name] = _checkpoint_modules(table, f"{name}.kernel")
        for expert in getattr(type(module), "EXPERTS", ()):
            names[f"{name}.{expert}"] = _checkpoint_modules(table, f"{name}.{expert}")
    return dict(sorted(names.items(), key=lambda item: _natural_order(item[0])))


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 10 after layer 9."""
    return [(int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _checkpoint_modules(table: Table, path: str) -> tuple[str, ...]:
    return tuple(table.full(name).removesuffix(".weight") for name in table.sources(path)[1])


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a dotted name belongs to, or None if it belongs to none."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return None if match is None else int(match[1])


def targets(model: Any, lora: Lora) -> list[str]:
    """Return the names of the linear layers that get an adapter with these settings.

    Raises
    ------
    InputError
        If a target matches no name or a layer does not exist; the message lists the existing ones.
    """
    known = adaptable(model)
    kind = model.config.model_type
    count = 1 + max((layer_of(name) or 0 for name in known), default=0)
    wrong = [i for i in lora.layers or () if not 0 <= i < count]
    if wrong:
        raise InputError(f"LoRA's layers {wrong} are not there: this {kind} model has layers 0 to {count - 1}.")
    if lora.target is None:
        names = [name for name in known if layer_of(name) is not None and not name.endswith(".router")]
    else:
        matches = {target: [name for name in known if _matches(target, (name, *known[name]))] for target in lora.target}
        unknown = [target for target, matched in matches.items() if not matched]
        if unknown or not matches:
            listed = ", ".join(map(repr, unknown)) or "()"
            raise InputError(
                f"LoRA's target {listed} names no linear map of this {kind} model; "
                f"it has: {', '.join(_short_names(known))}."
            )
        names = [name for name in known if any(name in matched for matched in matches.values())]
    names = [name for name in names if lora.layers is None or layer_of(name) in lora.layers]
    if not names:
        raise InputError(f"LoRA's target {lora.target} is in none of the layers {lora.layers} of this {kind} model.")
    return names


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase("." + name, "*." + target) for name in names)


def _short_names(known: dict[str, tuple[str, ...]]) -> list[str]:
    """Return each kind of linear layer once: our name inside a layer, and the last part of the checkpoint's name."""
    short = (
        f"{re.sub(r'^.*?layers[.][0-9]+[.]', '', name)} ({theirs[0].split('.')[-1]})" for name, theirs in known.items()
    )
    return list(dict.fromkeys(short))


def add_lora(
    model: Model,
    *,
    key: jax.Array,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    rank_stabilised: bool = False,
) -> Model:
    """Return the model with adapters, which are its only `nnx.Param`s; its outputs do not change yet.

    All other weights become `Frozen`. `nnx.split(model, nnx.Param, ...)` then returns only the adapters, so fine-tuning
    and `lensjax.ntk` compute no gradients and no optimiser state for the other weights.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
        It is not changed, and shares the arrays of its weights with the result.
    key : PRNG key
        For the adapters' initial weights.
    rank, alpha, dropout, target, layers, rank_stabilised
        See `Lora`.

    Returns
    -------
    model of the same class
        A `dropout_key` passed to its `loss_sums` or `__call__` also enables the adapters' dropout.

    Raises
    ------
    InputError
        If a setting is invalid, a target or layer does not exist in this model, or the model already has adapters.
    """
    lora = Lora(rank, alpha, dropout, target, layers, rank_stabilised)  # type: ignore[arg-type]  # converted to tuples
    return with_adapters(model, lora, targets(unstack_layers(model), lora), key)


def with_adapters(model: Model, lora: Lora, names: Sequence[str], key: jax.Array) -> Model:
    """Return the model with an adapter on each linear layer in `names` (keys of `adaptable`); see `add_lora`."""
    if adapters(model):
        raise InputError("The model has adapters already; merge them into its weights first, with merge_lora.")
    was_stacked = is_stacked(model)
    plain: Any = unstack_layers(model) if was_stacked else nnx.clone(model)
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(plain)}
    _retype(modules.values(), nnx.Param, Frozen)
    for name, adapter_key in zip(names, jax.random.split(key, len(names)), strict=True):
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, Adapter(getattr(modules[parent], attribute), lora, adapter_key))
    plain.lora = lora
    return stack_layers(plain) if was_stacked else plain


def adapters(model: nnx.Module) -> dict[str, Adapter]:
    """Return the model's adapters by dotted name; empty if it has none."""
    modules = nnx.iter_modules(model)
    return {".".join(map(str, path)): module for path, module in modules if isinstance(module, Adapter)}


def merge_lora(model: Model) -> Model:
    """Return the model without adapters, with their updates added to the weights.

    Its outputs are the same up to rounding: the sum is rounded to the dtype of the weights, and bfloat16 loses the low
    bits of the update.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
        From `add_lora`; it is not changed.

    Raises
    ------
    InputError
        If the model has no adapters.
    """
    if not adapters(model):
        raise InputError("The model has no adapters to merge; give it some with add_lora.")
    plain: Any = nnx.clone(model)
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(plain)}
    for name, adapter in adapters(plain).items():
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, adapter.merged())
    _retype([module for _, module in nnx.iter_modules(plain)], Frozen, nnx.Param)
    plain.lora = None
    return plain


def _retype(modules: Iterable[nnx.Module], old: type[nnx.Variable], new: type[nnx.Variable]) -> None:
    for module in modules:
        for name, value in list(vars(module).items()):
            if type(value) is old:
                setattr(module, name, new(value[...]))


def with_dropout(model: Model, key: jax.Array | None) -> Model:
    """Return the model with a dropout key set in each adapter, for one call; without a key, return the model itself."""
    if key is None or not any(adapter.dropout > 0 for adapter in adapters(model).values()):
        return model
    model = nnx.clone(model)
    all_adapters = adapters(model).values()
    keys = jax.random.split(jax.random.fold_in(key, DROPOUT_STREAM), len(all_adapters))
    for adapter, adapter_key in zip(all_adapters, keys, strict=True):
        matrix_axes = 3 if isinstance(adapter.base, nnx.Variable) else 2
        # An adapter of stacked layers needs one key per layer.
        repeats = adapter.lora_a.shape[: adapter.lora_a.ndim - matrix_axes]
        adapter.key = nnx.data(DropoutKey(jax.random.split(adapter_key, repeats) if repeats else adapter_key))
    return model
