"""The parameters of a function: their names, which of them are selected, and in which layer each belongs."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lensjax.errors import InputError

Function = Callable[[Any, Any], Any]
Select = Callable[[str, Any], bool] | str | Sequence[str] | None
ByLayer = bool | Literal["parameter"] | Callable[[str], str]

FROZEN = "(frozen) "
"""Prefix of the names of arrays that a model holds beside its parameters."""


@jax.tree_util.register_pytree_with_keys_class
class WithFrozen:
    """Parameters and the other arrays of a model, such as the frozen weights under LoRA adapters.

    As a pytree it has the leaves of both, those of the parameters first and under the names that they have by
    themselves.
    """

    def __init__(self, params: Any, frozen: Any) -> None:
        self.params, self.frozen = params, frozen

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Return the leaves with their names, and the structure of both parts."""
        children, structures = [], []
        for prefix, tree in (("", self.params), (FROZEN, self.frozen)):
            leaves, structure = jax.tree.flatten(tree)
            names = [prefix + name for name in leaf_names(tree)]
            children += [(jax.tree_util.DictKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)]
            structures.append((structure, len(leaves)))
        return children, tuple(structures)

    @classmethod
    def tree_unflatten(cls, structures: Any, leaves: Any) -> WithFrozen:
        """Put the leaves back."""
        (own, count), (frozen, _) = structures
        leaves = list(leaves)
        return cls(jax.tree.unflatten(own, leaves[:count]), jax.tree.unflatten(frozen, leaves[count:]))


def without_frozen(params: Any) -> Any:
    """Return the parameters of a function, without a model's other arrays."""
    return params.params if isinstance(params, WithFrozen) else params


@dataclasses.dataclass(frozen=True)
class ParameterSelection:
    """Which parameters of a function a computation is about; the others are constants.

    Attributes
    ----------
    names : path of each parameter leaf
    layers : number of each leaf's layer, None where the leaf is not selected
    layer_names : name of each layer
    """

    names: tuple[str, ...]
    layers: tuple[int | None, ...]
    layer_names: tuple[str, ...]

    @property
    def selected_layers(self) -> list[int]:
        """The number of the layer of each selected leaf."""
        return [layer for layer in self.layers if layer is not None]

    def selected(self, params: Any) -> list[Any]:
        """Return the selected leaves of a tree like the parameters, with or without frozen arrays."""
        leaves = jax.tree.leaves(params)
        layers = self.layers[: len(leaves)]
        return [leaf for leaf, layer in zip(leaves, layers, strict=True) if layer is not None]

    def replace(self, params: Any, selected: Sequence[Any], others: Callable[[Any], Any] | None = None) -> Any:
        """Return a tree like the parameters with the selected leaves replaced, and `others` applied to the rest."""
        leaves, structure = jax.tree.flatten(params)
        values, layers = iter(selected), self.layers[: len(leaves)]
        new = [
            next(values) if layer is not None else leaf if others is None else others(leaf)
            for leaf, layer in zip(leaves, layers, strict=True)
        ]
        return jax.tree.unflatten(structure, new)


def select_layers(names: Sequence[str], selected: Sequence[bool], by_layer: ByLayer) -> ParameterSelection:
    """Return a selection whose leaves are grouped by `by_layer`.

    Raises
    ------
    InputError
        If there is no such `by_layer`.
    """
    layer_of = {i: layer_name(by_layer, names[i]) for i, own in enumerate(selected) if own}
    layer_names = tuple(dict.fromkeys(layer_of.values()))
    layers = tuple(layer_names.index(layer_of[i]) if own else None for i, own in enumerate(selected))
    return ParameterSelection(tuple(names), layers, layer_names)


def abstract(tree: Any) -> Any:
    """Return the shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jax.typeof(a).shape, jax.typeof(a).dtype), tree)


def same_structure(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    return bool(structures[0] == structures[1])


def one_example(x: Any) -> Any:
    """Return the shapes and dtypes of one example of `x`, whose leaves have a leading axis."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), abstract(x))


def leaf_names(params: Any) -> tuple[str, ...]:
    """Return the path of each parameter, as "layers.0.mlp_in.kernel"."""
    nnx = sys.modules.get("flax.nnx")  # where that was never imported there are no Variables
    variable = () if nnx is None else nnx.Variable
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, variable)):
        for inside, _ in jax.tree_util.tree_leaves_with_path(leaf):
            # A Variable holds its array as an attribute, "value", that no path of a model has.
            parts = (*path, *inside[isinstance(leaf, variable) :])
            names.append(jax.tree_util.keystr(parts, simple=True, separator="."))
    return tuple(names)


def count_examples(x: Any, name: str) -> int:
    """Return the length of the leading axis that all leaves of `x` share.

    Raises
    ------
    InputError
    """
    leaves = jax.tree.leaves(x)
    sizes = {a.shape[0] if getattr(a, "ndim", 0) else None for a in leaves}
    if len(sizes) != 1 or None in sizes or sizes == {0}:
        raise InputError(
            f"{name}: every leaf needs the examples as its first axis, at least one; found shapes "
            f"{[getattr(a, 'shape', a) for a in leaves]}."
        )
    return int(sizes.pop())  # type: ignore[arg-type]


def match_parameters(parameters: Select, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Return which of the leaves are selected; frozen arrays never are.

    Raises
    ------
    InputError
        If `parameters` is neither a predicate nor patterns, or a pattern matches no parameter.
    """
    if parameters is not None and not callable(parameters):
        # An iterator would be used up by whoever reads it first.
        if not isinstance(parameters, Collection) or not all(isinstance(p, str) for p in parameters):
            raise InputError(
                f"parameters={parameters!r} must be a predicate (path, array) -> bool, a pattern such as "
                "'layers.*.kernel', or a list of patterns."
            )
        for pattern in [parameters] if isinstance(parameters, str) else parameters:
            if not fnmatch.filter([n for n in names if not n.startswith(FROZEN)], pattern):
                raise none_selected(f"parameters: {pattern!r}", names)
    return [not n.startswith(FROZEN) and select(parameters, n, a) for n, a in zip(names, leaves, strict=True)]


def none_selected(what: str, names: Sequence[str]) -> InputError:
    """Return the error to raise where `what` selects no parameter."""
    own = [name for name in names if not name.startswith(FROZEN)]
    some = ", ".join(own[:8]) + (", ..." if len(own) > 8 else "")
    return InputError(
        f"{what} selects none of the {len(own)} parameters ({some}) or none with real floating-point numbers; give a "
        "predicate (path, array) -> bool or patterns such as 'layers.*.kernel'."
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_array_or_number(leaf: Any) -> bool:
    """Whether a leaf can be an argument of a compiled program."""
    return is_array(leaf) or isinstance(leaf, int | float | complex)


def is_not_complex(leaf: Any) -> bool:
    """Whether a leaf is an array of real numbers, integers among them."""
    return is_array(leaf) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def is_real_float(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating-point numbers: what can be differentiated."""
    return is_array(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def refuse_undifferentiable(leaves: Iterable[tuple[str, Any]], allowed: Callable[[Any], bool], remedy: str) -> None:
    """Raise InputError if some leaves (name, leaf) are not `allowed`; `remedy` ends the message."""
    wrong = [
        f"{name or 'the whole'} ({getattr(leaf, 'dtype', type(leaf).__name__)})"
        for name, leaf in leaves
        if not allowed(leaf)
    ]
    if wrong:
        raise InputError(f"params: {', '.join(wrong[:4])} cannot be differentiated{remedy}")


def select(parameters: Select, name: str, leaf: Any) -> bool:
    """Whether a parameter is selected."""
    if parameters is None:
        return True
    if callable(parameters):
        return bool(parameters(name, leaf))
    patterns = [parameters] if isinstance(parameters, str) else parameters
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def layer_name(by_layer: ByLayer, name: str) -> str:
    """Return the layer that a parameter belongs to.

    Raises
    ------
    InputError
        If there is no such `by_layer`.
    """
    if callable(by_layer):
        return by_layer(name)
    if by_layer == "parameter":
        return name
    if isinstance(by_layer, str):
        raise InputError(f"by_layer={by_layer!r} is not known; choose True, 'parameter' or a function path -> layer.")
    if by_layer:
        return name.rpartition(".")[0] or name
    return ""
