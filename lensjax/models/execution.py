"""Executing a stack of layers: unrolled or scanned, with or without rematerialisation, parameters stacked or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lensjax.errors import InputError

EXECUTIONS = ("unroll", "scan")
"""Modes of executing layers."""

POLICIES = (
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)
"""Names of `jax.checkpoint_policies` that are policies by themselves; the others are functions that return policies."""

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


def checkpointed(remat: bool | str) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Return a decorator that makes a layer's function recompute its activations in the backward pass.

    Parameters
    ----------
    remat : bool or str
        False stores all activations, True recomputes all, and with a name of `POLICIES` the policy decides.

    Raises
    ------
    InputError
        If there is no such policy.
    """
    if isinstance(remat, bool):
        return jax.checkpoint if remat else lambda function: function
    if remat not in POLICIES:
        raise InputError(f"remat {remat!r} is not known; choose False, True or one of {', '.join(POLICIES)}.")
    return partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, remat))


@dataclasses.dataclass(frozen=True)
class Run:
    """A part of a stack in which `period` consecutive layers repeat.

    Attributes
    ----------
    start : int
        Index of its first layer.
    period, repeats : int
        Layers `start + i` and `start + i + period` have the same structure; the run has `period * repeats` layers.
    """

    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        """Index of the first layer after the run."""
        return self.start + self.period * self.repeats


def repeating_runs(kinds: Sequence[Hashable]) -> list[Run]:
    """Divide a sequence into repeating runs, each as long as possible; an element that does not repeat is its own run.

    Parameters
    ----------
    kinds : sequence
        Elements that compare equal may be scanned together, such as the layers' graph definitions.
    """
    first_index = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    ids, runs, start = [first_index[kind] for kind in kinds], list[Run](), 0
    while start < len(ids):
        best = Run(start, 1, 1)
        for period in range(1, (len(ids) - start) // 2 + 1):
            stop = start + period
            while stop < len(ids) and ids[stop] == ids[stop - period]:
                stop += 1
            run = Run(start, period, (stop - start) // period)
            if run.repeats > 1 and run.stop > best.stop:
                best = run
        runs.append(best)
        start = best.stop
    return runs


class Segment(nnx.Module):
    """A `Run` of layers whose parameters are stacked.

    Attributes
    ----------
    period : nnx.List of modules
        The layers of one period; their variables have a leading axis over the repeats if `run.repeats` exceeds 1.
    run : Run
    """

    def __init__(self, layers: Sequence[nnx.Module], run: Run):
        parts = [[nnx.split(layers[i]) for i in range(run.start + j, run.stop, run.period)] for j in range(run.period)]
        self.period = nnx.List([nnx.merge(same[0][0], stacked([state for _, state in same])) for same in parts])
        self.run = run


class StackedLayers(nnx.Module):
    """Layers whose parameters are stacked, as "scan" needs them; replaces an `nnx.List` of layers."""

    def __init__(self, layers: Sequence[nnx.Module]):
        runs = repeating_runs([nnx.graphdef(layer) for layer in layers])
        self.segments = nnx.List([Segment(layers, run) for run in runs])

    def __len__(self) -> int:
        return sum(segment.run.period * segment.run.repeats for segment in self.segments)

    def __iter__(self) -> Iterator[nnx.Module]:
        """Yield each layer with its own slice of the arrays."""
        for segment in self.segments:
            parts = [nnx.split(layer) for layer in segment.period]
            for i in range(segment.run.repeats):
                for graph, state in parts:
                    yield nnx.merge(graph, state if segment.run.repeats == 1 else sliced(state, i))


def stacked(trees: Sequence[Any]) -> Any:
    """Return one pytree with the leaves of all stacked along a new first axis; a single one is returned unchanged."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def sliced(tree: Any, index: int) -> Any:
    """Return a pytree with one entry of each leaf's first axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stack_layers(model: AnyModule) -> AnyModule:
    """Return a copy of the model that stores the layers' parameters stacked and has execution "scan".

    With execution "scan" and layers stored one by one, each call stacks the parameters and unstacks their gradients:
    both are copied, and the program grows with the number of layers. Stacked storage avoids this. The parameters then
    have other names (`layers.segments...`) and a leading axis; `unstack_layers` restores the usual ones, which saving
    needs.

    Parameters
    ----------
    model : nnx.Module
        Every `nnx.List` called `layers` is replaced in the copy. Layers that repeat in a pattern, such as the dense and
        sparse layers of Switch Transformer, are stacked by their position in the pattern; layers that do not repeat
        are not stacked.

    Returns
    -------
    model of the same class
        The layers' arrays are copies; all other arrays are shared with the argument, which is not changed.
    """
    return _with_layers(model, nnx.List, StackedLayers, "scan")


def unstack_layers(model: AnyModule) -> AnyModule:
    """Undo `stack_layers`: return a copy of the model with layers stored one by one and execution "unroll"."""
    return _with_layers(model, StackedLayers, lambda layers: nnx.List(list(layers)), "unroll")


def is_stacked(model: nnx.Module) -> bool:
    """Return whether a model has stacked layers; see `stack_layers`."""
    return any(isinstance(module, StackedLayers) for _, module in nnx.iter_modules(model))


def _with_layers(model: AnyModule, kind: Any, convert: Callable[[Any], Any], execution: str) -> AnyModule:
    model = nnx.clone(model)
    if hasattr(model, "execution"):
        model.execution = execution
    for module in [module for _, module in nnx.iter_modules(model)]:
        layers = getattr(module, "layers", None)
        if isinstance(layers, kind):
            setattr(module, "layers", convert(layers))  # noqa: B010 - not every module has this attribute
    return model


def run_layers(
    layers: Iterable[nnx.Module],
    x: jax.Array,
    per_layer: Any,
    *shared: Any,
    execution: str = "unroll",
    remat: bool | str = False,
) -> jax.Array:
    """Apply `x = layer(x, per_layer[i], *shared)` for each layer of a stack.

    Parameters
    ----------
    layers : nnx.List of modules, or StackedLayers
    x : array, or pytree of arrays
        Activations.
    per_layer : pytree whose leaves have a leading axis of the number of layers
        Arguments that differ between layers (dropout keys, scales).
    shared : pytrees
        Arguments that all layers get (masks).
    execution : {"unroll", "scan"}
        "scan" compiles layers of the same structure, or that alternate in a pattern, once. Layers stored one by one
        are stacked in each call, see `stack_layers`.
    remat : bool or str
        Whether the backward pass recomputes each layer instead of storing its activations, see `checkpointed`. On the
        CPU this saves memory only with "scan": XLA recognises unrolled recomputation as duplicate work and removes it.

    Returns
    -------
    array like `x`.

    Raises
    ------
    InputError
        If `execution` or `remat` is not known.
    """
    if execution not in EXECUTIONS:
        raise InputError(f"execution {execution!r} is not known; choose 'unroll' or 'scan'.")
    rematerialised = checkpointed(remat)
    if execution == "unroll":
        for i, layer in enumerate(layers):
            graph, state = nnx.split(layer)
            x = rematerialised(partial(_run_one, graph))(x, state, sliced(per_layer, i), shared)
        return x
    if not isinstance(layers, StackedLayers):
        layers = StackedLayers(list(layers))
    for segment in layers.segments:
        run, parts = segment.run, [nnx.split(layer) for layer in segment.period]
        functions = [rematerialised(partial(_run_one, graph)) for graph, _ in parts]

        def period(x: Any, inputs: tuple[Any, Any], functions: list[Any] = functions) -> tuple[Any, None]:
            states, arguments = inputs
            for j, (function, state) in enumerate(zip(functions, states, strict=True)):
                x = function(x, state, sliced(arguments, j), shared)
            return x, None

        arguments = jax.tree.map(lambda leaf, run=run: leaf[run.start : run.stop], per_layer)
        states = [state for _, state in parts]
        if run.repeats == 1:
            x = period(x, (states, arguments))[0]
            continue
        arguments = jax.tree.map(
            lambda leaf, run=run: leaf.reshape(run.repeats, run.period, *leaf.shape[1:]), arguments
        )
        x = jax.lax.scan(period, x, (states, arguments))[0]
    return x


def _run_one(graph: Any, x: Any, state: Any, argument: Any, shared: tuple[Any, ...]) -> Any:
    return nnx.merge(graph, state)(x, argument, *shared)
