"""What a tangent computation is about: a function, its parameters, which of them count, and two sets of examples."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lensjax.errors import InputError
from lensjax.tangents import ir
from lensjax.tangents.models import FROZEN
from lensjax.tangents.plan import Plan, make_plan

Function = Callable[[Any, Any], Any]
Select = Callable[[str, Any], bool] | str | Sequence[str] | None
ByLayer = bool | Literal["parameter"] | Callable[[str], str]


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
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    return tuple(name.removesuffix(".value") for name in names)  # Flax NNX: a Variable holds its array as "value"


def make_problem(function: Function, params: Any, x1: Any, x2: Any, parameters: Select, by_layer: ByLayer) -> Problem:
    """Check the input of a computation and collect its facts.

    Raises
    ------
    InputError
        If there are no examples or parameters, sizes disagree, no parameter is selected, or the function's output
        is not real.
    """
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    rows = count_examples(x1, "x1")
    columns = None if x2 is None else count_examples(x2, "x2")
    if x2 is not None and one_example(x1) != one_example(x2):
        raise InputError(
            f"x1 and x2 must agree in structure, shapes and dtypes after the first axis: {one_example(x1)} is not "
            f"{one_example(x2)}; pad or cast one of them."
        )
    chosen = [
        not name.startswith(FROZEN) and select(parameters, name, leaf) for name, leaf in zip(names, leaves, strict=True)
    ]
    chosen = [c and bool(jnp.issubdtype(leaf.dtype, jnp.floating)) for c, leaf in zip(chosen, leaves, strict=True)]
    if not any(chosen):
        raise InputError(
            f"parameters={parameters!r} selects none of the {len(names)} parameters ({', '.join(names[:8])}, ...); "
            "give a predicate (path, array) -> bool or patterns such as 'layers.*.kernel'."
        )
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


def select(parameters: Select, name: str, leaf: Any) -> bool:
    """Whether a parameter counts."""
    if parameters is None:
        return True
    if callable(parameters):
        return bool(parameters(name, leaf))
    patterns = [parameters] if isinstance(parameters, str) else parameters
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def layer_name(by_layer: ByLayer, name: str) -> str:
    """Return the layer that a parameter belongs to."""
    if callable(by_layer):
        return by_layer(name)
    if by_layer == "parameter":
        return name
    if by_layer:
        return name.rpartition(".")[0] or name
    return ""


_COMPILED: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def compiled(function: Function, key: Hashable, make: Callable[[Callable[[], Function]], Any]) -> Any:
    """Return `make(get_function)`, kept as long as `function` lives, so that a second call compiles nothing.

    `make` must not hold `function` itself, or neither would ever be freed.
    """
    try:
        reference = weakref.ref(function)
        kept = _COMPILED.setdefault(function, {})
        hash(key)
    except TypeError:
        return make(lambda: function)

    def get() -> Function:
        found = reference()
        assert found is not None
        return found

    if key not in kept:
        kept[key] = make(get)
    return kept[key]
