"""From the tensors of a checkpoint to a model: checking names and shapes, and loading the parameters.

A file format implements `Tensors`; `assemble` does the rest. Peak memory is that of the parameters, one more tensor and
one slab: tensors are read in slabs directly into the requested dtype, the largest tensor first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lensjax.errors import InputError
from lensjax.models.base import LanguageModel
from lensjax.models.lora import Lora, add_lora
from lensjax.models.registry import ModelConfig, Table, family_of

FEW_LAYERS = 64
MAX_LISTED = 20
"""How many problems of a checkpoint an error message lists."""

SLAB = 1 << 20
"""Number of elements read at a time."""


WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""Prefixes of all names in a checkpoint of torch's DataParallel or compiled modules, or of peft's models."""

OTHER_HEADS = ("score", "classifier", "classification_head", "qa_outputs", "v_head")
"""First parts of the names of heads for classification, question answering and values."""


class Tensors:
    """The tensors of a checkpoint under their Hugging Face names; shapes are known, contents are read on demand.

    Attributes
    ----------
    shapes : mapping, name -> shape
        Of all tensors in the checkpoint.
    described_by : str
        What holds the configuration, for error messages.
    remedy : str
        What the user can do if the tensors do not fit the configuration, for error messages.
    """

    shapes: Mapping[str, tuple[int, ...]]
    described_by: ClassVar[str] = "config.json"
    remedy: ClassVar[str] = "Use the config.json that these weights were saved with, or download both again."

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of the tensor's first axis, of any dtype; all of a scalar."""
        raise NotImplementedError

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """Return a tensor as a new array of `dtype`."""
        return self.read_in_slabs(name, self.shapes[name], dtype)

    def read_in_slabs(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return a tensor, whose `rows` have the shape `shape`, as `dtype`; it is never in memory twice."""
        result = np.empty(shape, dtype)
        for start, stop in slabs(shape):
            result[slice(start, stop) if shape else ...] = self.rows(name, start, stop)
        return result


def slabs(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return bounds on the first axis that divide an array of this shape into slabs of about `SLAB` elements.

    A vector of any length is one slab, and so is a scalar, with bounds (0, 1).
    """
    if len(shape) < 2:
        return [(0, math.prod(shape))]
    step = max(1, SLAB // max(1, math.prod(shape[1:])))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


class _OneKey:
    """Replacement for `nnx.Rngs` when only shapes matter: every parameter gets the same key.

    `nnx.Rngs` counts the keys it gives in an array. While a model is traced, each count depends on all before it, which
    takes time quadratic in the number of parameters: 13 seconds for gpt2-xl.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        """Return the key."""
        return self._key


def abstract_model(config: ModelConfig, lora: Lora | None = None, dtype: Any = jnp.float32) -> Any:
    """Return the model with shapes instead of weights: nothing is computed or stored.

    Parameters
    ----------
    config : ModelConfig
    lora : Lora, optional
        Settings of its adapters, if it has some.
    dtype : dtype of the weights

    Raises
    ------
    InputError
        If the adapters do not fit the model.
    """

    def make() -> Any:
        model = family_of(config).model(config, dtype, _OneKey())
        return model if lora is None else add_lora(model, key=jax.random.key(0), **dataclasses.asdict(lora))

    return nnx.eval_shape(make)


@functools.lru_cache(maxsize=64)
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return path (with dots) -> shape of all parameters."""
    # Of the parameters alone, not of a model that has to be put together again.
    state = jax.eval_shape(lambda: nnx.state(family_of(config).model(config, jnp.float32, _OneKey()), nnx.Param))
    flat = nnx.to_flat_state(state)
    return MappingProxyType({".".join(map(str, path)): leaf.shape for path, leaf in flat})


def check_layer_count(config: ModelConfig, tensors: Tensors, source: str) -> None:
    """Refuse a number of layers far beyond that of the tensors, before so many layers are built.

    Raises
    ------
    InputError
        If there are more layers than tensors. A few missing layers are left to `match`, which names all that lacks.
    """
    layers, count = config.layers + getattr(config, "decoder_layers", 0), len(tensors.shapes)
    if layers > max(count, FEW_LAYERS):
        raise InputError(
            f"{source}: its configuration says {layers} layers, but its weight files hold {count} tensors; correct the "
            "configuration or download the model again."
        )


def assemble(config: ModelConfig, tensors: Tensors, dtype: Any, source: str) -> LanguageModel:
    """Return the model of a configuration with the parameters of a checkpoint.

    Parameters
    ----------
    config : ModelConfig
    tensors : Tensors
    dtype : dtype of the parameters
    source : str
        Names the checkpoint in error messages.

    Raises
    ------
    InputError
        As `match`; also if `dtype` is not a floating-point type, or the checkpoint has both of two tied tensors and
        they differ.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise InputError(
            f"{source}: dtype is {jnp.dtype(dtype).name}; parameters need a floating-point one, such as float32."
        )
    check_layer_count(config, tensors, source)
    table = family_of(config).table(config)
    graph, *states = nnx.split(abstract_model(config, dtype=dtype), nnx.Param, ...)
    abstract, rest = states
    flat = [(path, ".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(abstract)]
    names = match(table, {dotted: leaf.shape for _, dotted, leaf in flat}, tensors, source)
    filled = {}
    # The largest first, so the temporary copy is largest while few parameters are in memory.
    for path, dotted, leaf in sorted(flat, key=lambda item: -item[2].size):
        rule, sources = table.sources(dotted)
        if any(name not in names for name in sources):
            value = jnp.zeros(leaf.shape, dtype)
        else:
            # Not jnp.asarray, which makes one more copy.
            value = jax.device_put(rule.load([tensors.read(names[name], dtype) for name in sources]))
        # Transfers run in the background; without waiting, several tensors would be in memory twice.
        filled[path] = leaf.replace(jax.block_until_ready(value))
    for copy, original in table.copies.items():
        if copy in names and names[copy] != names[original] and not _equal(tensors, names[copy], names[original]):
            raise InputError(
                f"{source}: config.json ties {copy} to {original}, but the two differ in the checkpoint; "
                "set tie_word_embeddings to false in config.json."
            )
    return nnx.merge(graph, nnx.from_flat_state([(path, filled[path]) for path, _, _ in flat]), rest)


def _equal(tensors: Tensors, name: str, other: str) -> bool:
    shape = tensors.shapes[name]
    return shape == tensors.shapes[other] and all(
        np.array_equal(tensors.rows(name, *bounds), tensors.rows(other, *bounds)) for bounds in slabs(shape)
    )


def fitting_config(config: ModelConfig, tensors: Tensors) -> ModelConfig:
    """Return the configuration, without tying if the family permits that and the checkpoint's tied tensors differ.

    transformers 5 writes tie_word_embeddings: true for every T5 and mT5, even if the head has weights of its own.
    """
    table = family_of(config).table(config)
    untied = table.untied
    if untied is None:
        return config
    names, _ = _short_names(table, tensors)
    for copy in table.copies.keys() - family_of(untied).table(untied).copies.keys():
        original = table.copies[copy]
        if copy in names and original in names and not _equal(tensors, names[copy], names[original]):
            return untied
    return config


def _short_names(table: Table, tensors: Tensors) -> tuple[dict[str, str], list[str]]:
    """Return short name -> name in the file, and problems; a tied tensor may be stored under either of its names."""
    names: dict[str, str] = {}
    problems = []
    for name in tensors.shapes:
        short = table.short(name)
        if short in names:
            problems.append(f"both {names[short]} and {name} are there")
        names[short] = name
    # Tools that write each shared tensor once may choose any of its names.
    for copy, original in table.copies.items():
        if copy in names:
            names.setdefault(original, names[copy])
    return names, problems


def match(table: Table, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, source: str) -> dict[str, str]:
    """Check that a checkpoint has the tensors of a model's parameters, without reading any.

    Parameters
    ----------
    table : Table
    shapes : mapping
        Path -> shape of the parameters, from `parameter_shapes`.
    tensors : Tensors
    source : str
        Names the checkpoint in error messages.

    Returns
    -------
    dict
        Short name (see `Table`) -> name in the file.

    Raises
    ------
    InputError
        With all problems in one message.
    """
    names, problems = _short_names(table, tensors)
    used = set(table.copies)
    for path, shape in shapes.items():
        rule, sources = table.sources(path)
        used.update(sources)
        absent = [table.full(name) for name in sources if name not in names]
        if absent and all(name in table.optional for name in sources):
            continue
        if absent:
            problems.append(f"missing: {', '.join(absent)}")
            continue
        stored = [tensors.shapes[names[name]] for name in sources]
        try:
            # Views of a single zero give the shape that the rule computes, without reading a tensor.
            loaded = rule.load([np.broadcast_to(np.zeros((), np.uint8), s) for s in stored]).shape
        except ValueError:
            loaded = None
        if loaded != tuple(shape):
            described = f"wrong shape: {', '.join(names[n] for n in sources)} has {' and '.join(map(str, stored))}"
            needed = [part.shape for part in rule.save(np.broadcast_to(np.zeros((), np.uint8), shape))]
            # Where the checkpoint stores another shape than the parameter's, the message must give the stored one.
            if needed == [tuple(shape)]:
                problems.append(f"{described}, which does not make {tuple(shape)} for {path}")
            else:
                problems.append(f"{described} and needs {' and '.join(map(str, needed))} for {path}")
    unused = [names[name] for name in names if name not in used and not table.is_ignored(name)]
    problems += [f"unused: {name}" for name in unused]
    if problems:
        more = len(problems) - MAX_LISTED
        listed = problems if more <= 0 else [*problems[:MAX_LISTED], f"and {more} more"]
        raise InputError(
            f"{source}: the checkpoint does not fit its {tensors.described_by}, {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}:\n  "
            + "\n  ".join(listed)
            + f"\n{_remedy(tensors, unused, len(problems))}"
        )
    return names


def _remedy(tensors: Tensors, unused: list[str], problems: int) -> str:
    """Return what the user can do about a checkpoint that does not fit, given its unused tensors."""
    if any(".lora_A." in name or ".lora_B." in name for name in unused):
        return "It has adapters that are not merged: merge them with peft's merge_and_unload() and save the result."
    for prefix in WRAPPERS:
        if unused and all(name.startswith(prefix) for name in tensors.shapes):
            return f"All names begin with {prefix}, which a wrapper around the model adds: save the model inside it."
    if unused and len(unused) == problems and all(name.split(".")[0] in OTHER_HEADS for name in unused):
        return "It is a model for another task, with a head that a language model does not have; name its base model."
    return tensors.remedy
