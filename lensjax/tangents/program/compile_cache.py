"""A cache of compiled programs that keeps each as long as the function lives that it was made from."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from lensjax.tangents.parameters import Function

_CACHE: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def cached_compile(function: Function, key: Hashable, make: Callable[[Callable[[], Function]], Any]) -> Any:
    """Return `make(get_function)`, kept as long as `function` lives, so that a second call compiles nothing.

    A bound method is a new object in each attribute access; methods of one object count as the same function. Nothing
    is kept for functions that cannot be hashed or referenced weakly: see `cacheable`. `make` must not refer to
    `function` itself, or neither would ever be freed.
    """
    owner, method = _owner_and_method(function)
    try:
        reference, unbound = weakref.ref(owner), None if method is None else weakref.ref(method)
        kept = _CACHE.setdefault(owner, {})
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

    # It may have been made for another owner that compared equal and has been freed.
    if key not in kept or kept[key][0]() is None:
        kept[key] = reference, make(get)
    return kept[key][1]


def cacheable(function: Function) -> Function:
    """Return the function, or a new wrapper of it where `cached_compile` could not keep anything for it.

    That is the case for callable objects without a hash, which may change between calls, or without weak references.
    """
    try:
        owner, _ = _owner_and_method(function)
        hash(owner)
        weakref.ref(owner)
    except TypeError:
        return lambda params, example: function(params, example)
    return function


def _owner_and_method(function: Any) -> tuple[Any, Any]:
    """Return the object of a bound method and the function in its class; (function, None) for anything else."""
    return (function.__self__, function.__func__) if isinstance(function, types.MethodType) else (function, None)
