"""Running a stack of layers: unrolled or scanned, kept or recomputed, their parameters apart or in stacked arrays."""

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
"""Ways of running layers."""

POLICIES = (
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)
"""Names of `jax.checkpoint_policies` that say by themselves what the forward pass keeps; the others need arguments."""

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


def checkpointed(remat: bool | str) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """Return what makes a layer's function recompute its activations in the backward pass.

    Parameters
    ----------
    remat : bool or str
        False keeps everything, True recomputes everything, a name of `POLICIES` keeps what the policy says.

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
    """A part of a stack in which `period` layers repeat.

    Attributes
    ----------
    start : int
        Its first layer.
    period, repeats : int
        Layers `start + i` and `start + i + period` have the same structure; there are `period * repeats` of them.
    """

    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        """The layer after the last."""
        return self.start + self.period * self.repeats


def repeating_runs(kinds: Sequence[Hashable]) -> list[Run]:
    """Cut a sequence into runs that repeat, each as long as can be; what repeats nowhere is a run of one.

    Parameters
    ----------
    kinds : sequence
        What is equal may be scanned together, such as the layers' graph definitions.
    """
    names = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    ids, found, start = [names[kind] for kind in kinds], list[Run](), 0
    while start < len(ids):
        best = Run(start, 1, 1)
        for period in range(1, (len(ids) - start) // 2 + 1):
            stop = start + period
            while stop < len(ids) and ids[stop] == ids[stop - period]:
                stop += 1
            run = Run(start, period, (stop - start) // period)
            if run.repeats > 1 and run.stop > best.stop:
                best = run
        found.append(best)
        start = best.stop
    return found


class Segment(nnx.Module):
    """A `Run` of layers in stacked storage.

    Attributes
    ----------
    period : nnx.List of modules
        The layers of one period; their variables have a leading axis over the repeats where `run.repeats` exceeds 1.
    run : Run
    """

    def __init__(self, layers: Sequence[nnx.Module], run: Run):
        parts = [[nnx.split(layers[i]) for i in range(run.start + j, run.stop, run.period)] for j in range(run.period)]
        self.period = nnx.List([nnx.merge(same[0][0], stacked([state for _, state in same])) for same in parts])
        self.run = run


class StackedLayers(nnx.Module):
    """Layers whose parameters lie stacked, as "scan" needs them; takes the place of an `nnx.List` of layers."""

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
    """Return pytrees as one, their leaves stacked along a new first axis; a single one as it is."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def sliced(tree: Any, index: int) -> Any:
    """Return a pytree with one entry of each leaf's first axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stack_layers(model: AnyModule) -> AnyModule:
    """Return a model whose layers' parameters are stored as "scan" needs them, and which runs with "scan".

    With execution "scan" and layers stored one by one, each call stacks the parameters and takes their gradients
    apart again: a copy of both, and programs that grow with the layers. A model from here does neither. Its parameters
    have other names (`layers.segments...`) and a leading axis; `unstack_layers` gives the usual ones, which saving
    needs.

    Parameters
    ----------
    model : nnx.Module
        Every `nnx.List` called `layers` in it is replaced; layers that repeat in a pattern, such as the dense and
        sparse ones of Switch Transformer, are stacked by their place in the pattern, those that repeat nowhere stay.

    Returns
    -------
    model like the one given, which stays as it is; the arrays of layers are copies, all others are shared.
    """
    return _with_layers(model, nnx.List, StackedLayers, "scan")


def unstack_layers(model: AnyModule) -> AnyModule:
    """Return the model that `stack_layers` was given: layers stored one by one, execution "unroll"."""
    return _with_layers(model, StackedLayers, lambda layers: nnx.List(list(layers)), "unroll")


def is_stacked(model: nnx.Module) -> bool:
    """Tell whether a model comes from `stack_layers`."""
    return any(isinstance(module, StackedLayers) for _, module in nnx.iter_modules(model))


def _with_layers(model: AnyModule, kind: Any, make: Callable[[Any], Any], execution: str) -> AnyModule:
    model = nnx.clone(model)
    if hasattr(model, "execution"):
        model.execution = execution
    for module in [module for _, module in nnx.iter_modules(model)]:
        layers = getattr(module, "layers", None)
        if isinstance(layers, kind):
            setattr(module, "layers", make(layers))  # noqa: B010 - no attribute of every module
    return model


def run_layers(
    layers: Iterable[nnx.Module],
    x: jax.Array,
    each: Any,
    *shared: Any,
    execution: str = "unroll",
    remat: bool | str = False,
) -> jax.Array:
    """Run `x = layer(x, each[i], *shared)` through a stack of layers.

    Parameters
    ----------
    layers : nnx.List of modules, or StackedLayers
    x : array, or pytree of arrays
        Activations.
    each : pytree whose leaves have a leading axis of the number of layers
        What differs from layer to layer besides the parameters (dropout keys, scales).
    shared : pytrees
        What all layers get (masks).
    execution : {"unroll", "scan"}
        "scan" compiles layers that are alike, or that alternate in a pattern, once. Layers stored one by one are
        stacked in each call, see `stack_layers`.
    remat : bool or str
        Whether the backward pass recomputes each layer instead of keeping its activations: see `checkpointed`. On CPU
        this saves memory only with "scan": XLA recognises unrolled recomputation as the same work and undoes it.

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
    keep = checkpointed(remat)
    if execution == "unroll":
        for i, layer in enumerate(layers):
            graph, state = nnx.split(layer)
            x = keep(partial(_run_one, graph))(x, state, sliced(each, i), shared)
        return x
    if not isinstance(layers, StackedLayers):
        layers = StackedLayers(list(layers))
    for segment in layers.segments:
        run, parts = segment.run, [nnx.split(layer) for layer in segment.period]
        functions = [keep(partial(_run_one, graph)) for graph, _ in parts]

        def period(x: Any, own: tuple[Any, Any], functions: list[Any] = functions) -> tuple[Any, None]:
            states, each = own
            for j, (function, state) in enumerate(zip(functions, states, strict=True)):
                x = function(x, state, sliced(each, j), shared)
            return x, None

        part = jax.tree.map(lambda leaf, run=run: leaf[run.start : run.stop], each)
        states = [state for _, state in parts]
        if run.repeats == 1:
            x = period(x, (states, part))[0]
            continue
        part = jax.tree.map(lambda leaf, run=run: leaf.reshape(run.repeats, run.period, *leaf.shape[1:]), part)
        x = jax.lax.scan(period, x, (states, part))[0]
    return x


def _run_one(graph: Any, x: Any, state: Any, own: Any, shared: tuple[Any, ...]) -> Any:
    return nnx.merge(graph, state)(x, own, *shared)
