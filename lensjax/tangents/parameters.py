"""What a tangent computation is about: a function, its parameters, which of them count, and two sets of examples."""

from __future__ import annotations

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
"""What the names of arrays begin with that a model holds beside its parameters."""


def abstract(tree: Any) -> Any:
    """Return the shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jax.typeof(a).shape, jax.typeof(a).dtype), tree)


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


def selection(parameters: Select, names: Sequence[str], leaves: Sequence[Any]) -> list[bool]:
    """Return which of the leaves count; frozen ones never do.

    Raises
    ------
    InputError
        If `parameters` is none of the things it may be, or a pattern is of no parameter.
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
                raise _none(f"parameters: {pattern!r}", names)
    return [not n.startswith(FROZEN) and select(parameters, n, a) for n, a in zip(names, leaves, strict=True)]


def _none(what: str, names: Sequence[str]) -> InputError:
    own = [name for name in names if not name.startswith(FROZEN)]
    some = ", ".join(own[:8]) + (", ..." if len(own) > 8 else "")
    return InputError(
        f"{what} selects none of the {len(own)} parameters ({some}) or none with real floating-point numbers; give a "
        "predicate (path, array) -> bool or patterns such as 'layers.*.kernel'."
    )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_real(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _refuse(leaves: Iterable[tuple[str, Any]]) -> None:
    wrong = [f"{name or 'the whole'} ({getattr(leaf, 'dtype', type(leaf).__name__)})" for name, leaf in leaves]
    if wrong:
        raise InputError(
            f"params: {', '.join(wrong[:4])} cannot be differentiated. Make numbers arrays (jnp.asarray), hold complex "
            "arrays as two real ones, keep functions outside of params, or leave such leaves out (parameters=...)."
        )


def select(parameters: Select, name: str, leaf: Any) -> bool:
    """Whether a parameter counts."""
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
