"""Functions of a model's parameters that carry the model's other arrays, and hand these to programs as arguments."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax

from lensjax.tangents.parameters import WithFrozen


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenModel:
    """A function of a Flax NNX model's parameters that holds the model's other arrays; base of outputs and losses.

    A subclass is registered as a pytree whose leaves are those of `frozen`, and its further fields are hashable.

    Attributes
    ----------
    graph : what Flax NNX needs beside the arrays
    frozen : nnx.State of the arrays that are no parameters
    """

    graph: Any
    frozen: Any

    @classmethod
    def split(cls, model: Any, *options: Any) -> tuple[Self, Any]:
        """Return the function of a model and the nnx.State of its parameters.

        Parameters
        ----------
        model : nnx.Module
        *options : further fields of the class

        Returns
        -------
        f : the same object for models of the same structure without frozen arrays
        params : nnx.State
        """
        from flax import nnx

        graph, params, frozen = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
        kind: Any = cls
        f = empty_model(kind, graph, *options)
        return (dataclasses.replace(f, frozen=frozen) if jax.tree.leaves(frozen) else f), params

    def model(self, params: Any) -> Any:
        """Return the model with the given parameters; frozen arrays that come with these replace its own."""
        from flax import nnx

        frozen = self.frozen
        if isinstance(params, WithFrozen):
            params, frozen = params.params, params.frozen
        return nnx.merge(self.graph, params, frozen)

    @property
    def options(self) -> tuple[Any, ...]:
        """The fields of a subclass."""
        own = dataclasses.fields(self)[len(dataclasses.fields(FrozenModel)) :]
        return tuple(getattr(self, field.name) for field in own)


@functools.lru_cache(maxsize=64)
def empty_model(cls: Any, graph: Any, *options: Any) -> Any:
    """Return the function without any frozen array: one object for all models of a structure."""
    from flax import nnx

    return cls(graph, nnx.State({}), *options)


def frozen_as_arguments(f: Any, params: Any) -> tuple[Any, Any]:
    """Return a function and its parameters, the arrays that a `FrozenModel` holds frozen among the latter.

    A program of the function then has no weight among its constants, and serves all models of the same structure.
    """
    if not isinstance(f, FrozenModel) or not jax.tree.leaves(f.frozen):
        return f, params
    kind: Any = type(f)
    return empty_model(kind, f.graph, *f.options), WithFrozen(params, f.frozen)
