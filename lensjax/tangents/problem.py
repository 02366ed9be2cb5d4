"""What a tangent computation is about: a function, its parameters, which of them count, and two sets of examples."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import sys
import types
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lensjax.errors import InputError
from lensjax.tangents import ir
from lensjax.tangents.plan import Plan, make_plan

Function = Callable[[Any, Any], Any]
Select = Callable[[str, Any], bool] | str | Sequence[str] | None
ByLayer = bool | Literal["parameter"] | Callable[[str], str]

FROZEN = "(frozen) "
"""What the names of arrays begin with that a model holds beside its parameters."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one computation.

    Attributes
    ----------
    function : f(params, one example)
    names : path of each parameter leaf
    layers : number of each leaf's layer, None where the leaf is held constant
    layer_names : name of each layer
    outputs : numbers that `function` gives for one example
    scalar : whether it gives one number without axes
    rows, columns : examples on each side of the kernel; columns None: the rows again
    """

    function: Function
    names: tuple[str, ...]
    layers: tuple[int | None, ...]
    layer_names: tuple[str, ...]
    outputs: int
    scalar: bool
    rows: int
    columns: int | None

    def plan(self, params: Any, example: Any) -> Plan:
        """Trace the function for one example and plan its transformation."""
        closed = jax.make_jaxpr(self.function)(abstract(params), example)
        return make_plan(ir.elaborate(closed), len(self.names), self.layers)

    def chosen(self, params: Any) -> list[jax.Array]:
        """Return the leaves that count."""
        return [leaf for leaf, layer in zip(jax.tree.leaves(params), self.layers, strict=True) if layer is not None]

    def flat(self, params: Any, chosen: list[jax.Array], example: Any) -> jax.Array:
        """Apply the function with the leaves that count replaced, and flatten what it gives to (outputs,)."""
        leaves, structure = jax.tree.flatten(params)
        values = iter(chosen)
        replaced = [leaf if layer is None else next(values) for leaf, layer in zip(leaves, self.layers, strict=True)]
        results = jax.tree.leaves(self.function(jax.tree.unflatten(structure, replaced), example))
        return jnp.concatenate([jnp.reshape(r, -1) for r in results])


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


def make_problem(function: Function, params: Any, x1: Any, x2: Any, parameters: Select, by_layer: ByLayer) -> Problem:
    """Check the input of a computation and collect its facts.

    Raises
    ------
    InputError
        If there are no examples or parameters, sizes disagree, a parameter that counts is no real array, a pattern
        selects none, there is no such `by_layer`, or the function's output is not real.
    """
    function = held(function)
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    rows = count_examples(x1, "x1")
    columns = None if x2 is None else count_examples(x2, "x2")
    if x2 is not None and one_example(x1) != one_example(x2):
        raise InputError(
            f"x1 and x2 must agree in structure, shapes and dtypes after the first axis: {one_example(x1)} is not "
            f"{one_example(x2)}; pad or cast one of them."
        )
    named = list(zip(names, leaves, strict=True))
    _refuse((n, a) for n, a in named if not (_is_array(a) or isinstance(a, int | float | complex)))
    chosen = selection(parameters, names, leaves)
    _refuse((n, a) for (n, a), c in zip(named, chosen, strict=True) if c and not (_is_array(a) and _is_real(a)))
    chosen = [c and bool(jnp.issubdtype(a.dtype, jnp.floating)) for a, c in zip(leaves, chosen, strict=True)]
    if not any(chosen):
        raise _none(f"parameters={parameters!r}", names)
    of_layer = [layer_name(by_layer, name) for name in names]
    layer_names = tuple(dict.fromkeys(n for n, c in zip(of_layer, chosen, strict=True) if c))
    layers = tuple(layer_names.index(n) if c else None for n, c in zip(of_layer, chosen, strict=True))
    shapes = jax.tree.leaves(jax.eval_shape(function, abstract(params), one_example(x1)))
    if not shapes or not all(jnp.issubdtype(s.dtype, jnp.floating) for s in shapes):
        raise InputError(
            f"f must return real floating-point arrays, not {[str(s.dtype) for s in shapes]}; cast or split its output."
        )
    outputs = sum(math.prod(s.shape) for s in shapes)
    scalar = len(shapes) == 1 and shapes[0].shape == ()
    return Problem(function, names, layers, layer_names, outputs, scalar, rows, columns)


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


_COMPILED: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def compiled(function: Function, key: Hashable, make: Callable[[Callable[[], Function]], Any]) -> Any:
    """Return `make(get_function)`, kept as long as `function` lives, so that a second call compiles nothing.

    A bound method is a new object wherever it is written, and counts as the same one as long as its object lives. For
    what cannot be referenced weakly or hashed nothing is kept: see `held`. `make` must not hold `function` itself, or
    neither would ever be freed.
    """
    owner, method = _parts(function)
    try:
        reference, unbound = weakref.ref(owner), None if method is None else weakref.ref(method)
        kept = _COMPILED.setdefault(owner, {})
        key = key, unbound
        hash(key)
    except TypeError:
        return make(lambda: function)

    def get() -> Function:
        found = reference()
        assert found is not None
        if unbound is None:
            return found
        of_class = unbound()
        assert of_class is not None
        return types.MethodType(of_class, found)

    # Another owner that compares equal may have made it, and be gone.
    if key not in kept or kept[key][0]() is None:
        kept[key] = reference, make(get)
    return kept[key][1]


def held(function: Function) -> Function:
    """Return the function, or what stands for it in one call where `compiled` can keep nothing with it.

    That is for callable objects without hash, which may change between calls, or without weak references.
    """
    try:
        owner, _ = _parts(function)
        hash(owner)
        weakref.ref(owner)
    except TypeError:
        return lambda params, example: function(params, example)
    return function


def _parts(function: Any) -> tuple[Any, Any]:
    """Return what a bound method is of, and the function in its class; of anything else it and None."""
    return (function.__self__, function.__func__) if isinstance(function, types.MethodType) else (function, None)
