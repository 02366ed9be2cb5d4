"""Between weight files and models: a source of tensors, checking it against a model, filling the model from it.

A format brings a `Tensors`; `assemble` does the rest. Peak memory is that of the parameters, one tensor more, and a
slab: tensors are read slab by slab straight into the dtype wanted, the largest first.
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
from lensjax.models.registry import Family, ModelConfig, Table, family

FEW_LAYERS = 64
MOST = 20
"""Problems of a checkpoint that are listed."""

SLAB = 1 << 20
"""Elements read at once."""


class Tensors:
    """The tensors of one checkpoint under their Hugging Face names: shapes now, contents on demand.

    Attributes
    ----------
    shapes : mapping, name -> shape
        Of every tensor there is.
    described_by, remedy : str
        Where the configuration stands, and what to do if the tensors do not fit it, for messages.
    """

    shapes: Mapping[str, tuple[int, ...]]
    described_by: ClassVar[str] = "config.json"
    remedy: ClassVar[str] = "Use the config.json that these weights were saved with, or download both again."

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of the tensor's first axis, of any dtype; a scalar whole."""
        raise NotImplementedError

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """Return a tensor as an array of `dtype` that nothing else refers to."""
        return self.filled(name, self.shapes[name], dtype)

    def filled(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return a tensor that `rows` gives with the shape `shape`, of `dtype`; never twice in memory."""
        found = np.empty(shape, dtype)
        for start, stop in slabs(shape):
            found[slice(start, stop) if shape else ...] = self.rows(name, start, stop)
        return found


def slabs(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the bounds on the first axis that cut an array of this shape into pieces of about `SLAB` elements.

    Vectors are one piece, whatever their length, and so is a scalar, with bounds (0, 1).
    """
    if len(shape) < 2:
        return [(0, math.prod(shape))]
    step = max(1, SLAB // max(1, math.prod(shape[1:])))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def family_of(config: ModelConfig) -> Family:
    """Return the family that a configuration belongs to."""
    return family(config.model_type, config.model_type)


class _OneKey:
    """Stands in for `nnx.Rngs` where only shapes count: every draw gets the same key.

    `nnx.Rngs` counts its draws in an array. While a model is traced, each count is computed from all before it, which
    takes time quadratic in the number of parameters: 13 seconds for gpt2-xl.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        """Return the key."""
        return self._key


def abstract_model(config: ModelConfig, lora: Lora | None = None, dtype: Any = jnp.float32) -> Any:
    """Return the model with shapes in place of weights: nothing is computed or kept in memory.

    Parameters
    ----------
    config : ModelConfig
    lora : Lora, optional
        Of the adapters that it has.
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
    """Return the model of a configuration, filled from a checkpoint.

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
        As `match`; also if `dtype` is no floating-point type, or a tied tensor is there twice and the two differ.
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
    # The largest first: what is held besides the parameters is then largest while few of them are there.
    for path, dotted, leaf in sorted(flat, key=lambda item: -item[2].size):
        rule, wanted = table.sources(dotted)
        if any(name not in names for name in wanted):
            value = jnp.zeros(leaf.shape, dtype)
        else:
            # Not jnp.asarray, which copies once more on the way.
            value = jax.device_put(rule.load([tensors.read(names[name], dtype) for name in wanted]))
        # Transfers run in the background: without waiting, several tensors would be in memory twice.
        filled[path] = leaf.replace(jax.block_until_ready(value))
    for copy, original in table.same.items():
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
    """Return the configuration, or the one without tied tables where the family allows for that and the tables differ.

    transformers 5 writes for every T5 and mT5 that its head is tied, also where the head is one of its own.
    """
    table = family_of(config).table(config)
    untied = table.untied
    if untied is None:
        return config
    names, _ = _short_names(table, tensors)
    for copy in table.same.keys() - family_of(untied).table(untied).same.keys():
        original = table.same[copy]
        if copy in names and original in names and not _equal(tensors, names[copy], names[original]):
            return untied
    return config


def _short_names(table: Table, tensors: Tensors) -> tuple[dict[str, str], list[str]]:
    """Return short name -> name in the file, and problems; a tied table may stand there under another of its names."""
    names: dict[str, str] = {}
    problems = []
    for name in tensors.shapes:
        short = table.short(name)
        if short in names:
            problems.append(f"both {names[short]} and {name} are there")
        names[short] = name
    # Whoever writes each shared tensor once may keep any of its names.
    for copy, original in table.same.items():
        if copy in names:
            names.setdefault(original, names[copy])
    return names, problems


def match(table: Table, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, source: str) -> dict[str, str]:
    """Check that a checkpoint and a model's parameters fit together, without reading a tensor.

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
        With everything that does not fit in one message.
    """
    names, problems = _short_names(table, tensors)
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
            shape_made = rule.load([np.broadcast_to(np.zeros((), np.uint8), s) for s in found]).shape
        except ValueError:
            shape_made = None
        if shape_made != tuple(shape):
            problems.append(
                f"wrong shape: {', '.join(names[name] for name in wanted)} has {' and '.join(map(str, found))}, "
                f"which does not make {tuple(shape)} for {path}"
            )
    problems += [f"unused: {names[name]}" for name in names if name not in used and not table.is_ignored(name)]
    if problems:
        listed = problems if len(problems) <= MOST else [*problems[:MOST], f"and {len(problems) - MOST} more"]
        raise InputError(
            f"{source}: the checkpoint does not fit its {tensors.described_by}, {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}:\n  " + "\n  ".join(listed) + f"\n{tensors.remedy}"
        )
    return names
