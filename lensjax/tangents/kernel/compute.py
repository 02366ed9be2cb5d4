"""Validation of a kernel's arguments, the choice of a method, and the computation by it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lensjax.environment import require_exact_backend
from lensjax.errors import InputError
from lensjax.tangents.differentiation import NO_REVERSE_MODE, no_forward_mode
from lensjax.tangents.kernel import reference
from lensjax.tangents.kernel.problem import KernelProblem, is_crossed, make_problem
from lensjax.tangents.kernel.transformed import transformed, transformed_program, without_function
from lensjax.tangents.parameters import ByLayer, Function, Select, abstract, one_example
from lensjax.tangents.program.compile_cache import cached_compile
from lensjax.tangents.program.reductions import GramReduction, Reduction

Method = Literal["auto", "transform", "jacobian", "ntvp"]
Outputs = Literal["full", "trace", "diagonal"]


@contextlib.contextmanager
def reverse_mode(what: str, remedy: str) -> Iterator[None]:
    """Raise InputError where reverse mode is needed of a function that does not have it."""
    try:
        yield
    except ValueError as error:
        if not NO_REVERSE_MODE.search(str(error)):
            raise
        raise InputError(
            f"f has a while_loop (or a fori_loop of unknown length), which cannot be differentiated backwards as "
            f"{what} needs it; {remedy}, or use a scan in f."
        ) from None
    except TypeError as error:
        if not no_forward_mode(error):
            raise
        raise InputError(
            "f has a backward rule of its own (jax.custom_vjp) which cannot be differentiated forwards, as a "
            "derivative of its kernel by jax.jvp needs it; differentiate the kernel by jax.grad or jax.jacrev."
        ) from None
    except NotImplementedError as error:
        raise InputError(f"f has an operation that JAX cannot map over examples ({error}); {remedy}.") from error


def validate(
    f: Function, params: Any, x1: Any, x2: Any, parameters: Select, by_layer: ByLayer, **choices: str
) -> KernelProblem:
    """Check the arguments of a public function and return the problem; raises what `ntk` does."""
    require_exact_backend()
    valid = {"outputs": ("full", "trace", "diagonal"), "method": ("auto", "transform", "jacobian", "ntvp")}
    for name, value in choices.items():
        if value not in valid[name]:
            raise InputError(f"{name}={value!r} is not known; choose one of {', '.join(valid[name])}.")
    if not callable(f):
        raise InputError(f"f must be a function of (params, one example) or a language model, not {type(f).__name__}.")
    return make_problem(f, params, x1, x2, parameters, by_layer)


def choose_method(
    problem: KernelProblem,
    method: Method,
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    bounded: bool = False,
    reduction: Reduction | None = None,
) -> tuple[str, str]:
    """Return the method and the reason for it; with a memory limit the one whose memory is bounded, if it works.

    Parameters
    ----------
    problem, method, params, x1, x2 : of the computation
    bounded : whether there is a memory limit
    reduction : what will be computed, if that is known: its program is then traced once for both
    """
    if method != "auto":
        return method, "asked for"
    shapes = jax.tree.leaves((abstract(params), one_example(x1)))
    key = ("choice", without_function(problem), bounded, *shapes)
    reduction = reduction or GramReduction(problem.rows, problem.columns, problem.outputs > 1)
    return cached_compile(
        problem.function, key, lambda get: _choose_automatically(problem, params, x1, x2, bounded, reduction)
    )


def check_bounded(memory: int, method: str, reason: str, remedy: str) -> None:
    """Raise InputError where the method's memory cannot be limited."""
    if method != "transform":
        raise InputError(f"memory={memory} bounds method='transform', but here it is {method!r} ({reason}); {remedy}.")


def _choose_automatically(
    problem: KernelProblem, params: Any, x1: Any, x2: Any, bounded: bool, reduction: Reduction
) -> tuple[str, str]:
    count = sum(leaf.size for leaf in problem.selected(params))
    if count < problem.outputs and not bounded:
        return "jacobian", f"{count} parameters are fewer than {problem.outputs} outputs of an example"
    if not reference.has_reverse_mode(problem, params, x1):
        return "jacobian", "a while_loop has no reverse mode; forward mode, one pass for each parameter"
    if why := why_not_transformed(problem, reduction, params, x1, x2):
        return "jacobian", f"f cannot be transformed, {why}"
    return "transform", "exact in one backward pass"


def layer_kernels(
    problem: KernelProblem, method: str, params: Any, x1: Any, x2: Any, outputs: str
) -> dict[str, jax.Array]:
    """Return the kernel of each layer by a method that is not "auto", in the shape that `ntk` promises."""
    crossed = is_crossed(problem, outputs)
    reduction = GramReduction(problem.rows, problem.columns, crossed)
    with reverse_mode(f"method={method!r}", "choose method='auto' or 'jacobian'"):
        if method == "transform":
            blocks = transformed(problem, reduction, params, x1, x2)
        else:
            blocks = _from_reference(problem, method, reduction, params, x1, x2)
    names = enumerate(problem.layer_names)
    return {name: _shaped(blocks, layer, problem, outputs, crossed) for layer, name in names}


def reduce_gradients(
    problem: KernelProblem, reduction: Reduction, params: Any, x: Any, key: Any = None
) -> dict[int, jax.Array]:
    """Return a reduction of each layer's gradients, by program transformation where that works, else from Jacobians."""
    if why_not_transformed(problem, reduction, params, x, None, key):
        return _from_reference(problem, "jacobian", reduction, params, x, None, key)
    return transformed(problem, reduction, params, x, None, key)


def why_not_transformed(
    problem: KernelProblem, reduction: Reduction, params: Any, x1: Any, x2: Any = None, key: Any = None
) -> str:
    """Return why a function's program cannot be transformed, "" if it can; raises only where it has no reverse mode.

    The trace made here is the one that is compiled afterwards.
    """
    given = abstract((params, x1, x2, key))

    def check(get: Callable[[], Function]) -> str:
        try:
            transformed_program(problem, reduction).eval_shape(*given)
        except (
            Exception
        ) as error:  # of any kind: there is another method, with a better message if f itself is at fault
            if isinstance(error, ValueError) and NO_REVERSE_MODE.search(str(error)):
                raise
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return ""

    return cached_compile(
        problem.function, ("why not", without_function(problem), reduction, *jax.tree.leaves(given)), check
    )


def _from_reference(
    problem: KernelProblem, method: str, reduction: Reduction, params: Any, x1: Any, x2: Any, key: Any = None
) -> dict[int, jax.Array]:
    static = without_function(problem)

    def make(get: Callable[[], Function]) -> Any:
        def run(params: Any, x1: Any, x2: Any, key: Any) -> dict[int, jax.Array]:
            own = dataclasses.replace(static, function=get())
            if method == "jacobian":
                return reference.by_jacobian(own, params, x1, x2, reduction, key)
            return reference.by_products(own, params, x1, x2, reduction.crossed)

        return jax.jit(run)

    return cached_compile(problem.function, (static, method, reduction), make)(params, x1, x2, key)


def _shaped(blocks: dict[int, jax.Array], layer: int, problem: KernelProblem, outputs: str, crossed: bool) -> jax.Array:
    columns = problem.rows if problem.columns is None else problem.columns
    count = problem.outputs
    shape = (problem.rows, count, columns, count) if crossed else (count, problem.rows, columns)
    # A selected parameter that the function never reads contributes nothing.
    block = blocks.get(layer)
    block = jnp.zeros(shape) if block is None else block
    if crossed:
        return block
    if outputs == "trace":
        return block.sum(0)
    if problem.scalar:
        return block[0]
    return block.transpose(1, 2, 0) if outputs == "diagonal" else block.transpose(1, 0, 2)[..., None]
