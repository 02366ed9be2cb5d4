"""The empirical neural tangent kernel of any differentiable function."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lensjax.errors import InputError
from lensjax.tangents.kernel.blockwise import by_blocks
from lensjax.tangents.kernel.compute import (
    Method,
    Outputs,
    check_bounded,
    choose_method,
    layer_kernels,
    reduce_gradients,
    reverse_mode,
    validate,
)
from lensjax.tangents.kernel.memory_limit import plan_memory
from lensjax.tangents.kernel.problem import is_crossed
from lensjax.tangents.kernel.report import NtkReport, report_of
from lensjax.tangents.language_models import split_model_args
from lensjax.tangents.parameters import ByLayer, Select
from lensjax.tangents.program.reductions import GramReduction, SquaredNorm


def ntk(
    f: Any,
    params: Any,
    x1: Any = None,
    x2: Any = None,
    *,
    output: str = "loss",
    method: Method = "auto",
    parameters: Select = None,
    by_layer: ByLayer = False,
    outputs: Outputs = "full",
    memory: int | None = None,
    return_report: bool = False,
) -> Any:
    """Return the empirical neural tangent kernel: inner products of the parameter gradients of examples.

    Called as ``ntk(f, params, x1, x2)`` for any function, or as ``ntk(model, batch1, batch2, output="loss")`` for a
    language model of `lensjax.models` (or any with its methods).

    Parameters
    ----------
    f : callable (params, one example) -> real array, or pytree of real arrays
        Differentiable in reverse mode; plain JAX, or any library's pure apply function. C is how many numbers it
        returns, flattened in order.
    params : pytree of arrays
    x1, x2 : pytrees whose leaves have a leading axis of N and M examples
        The kernel's rows and columns. Without `x2` the columns are the rows.
    output : str
        For models, what the model's outputs are: see `lensjax.tangents.OUTPUTS`. Refused for other functions.
    method : {"auto", "transform", "jacobian", "ntvp"}
        "transform": one backward pass by program transformation, see Notes. "jacobian": per-example gradients of all
        parameters exist at once. "ntvp": kernel-vector products, N * C of them. "auto" takes the first that works,
        and the second where an example has more outputs than there are parameters, but not with `memory`, where
        reverse mode does not exist (`while_loop`), or where f cannot be transformed; the report says which and why.
    parameters : callable (path, array) -> bool, or pattern or patterns for the path ("layers.*.kernel"), optional
        Which parameters are selected; default all floating-point ones. The others are constants. Each pattern must
        match.
    by_layer : bool, "parameter", or callable path -> layer name
        Return one kernel for each layer; their sum is the whole. True: a layer is a path without its last part.
    outputs : {"full", "trace", "diagonal"}
        Which pairs of outputs: all; equal ones, summed; equal ones, one by one.
    memory : int, optional
        Bytes that the computation may take beside the parameters and the examples, by XLA's analysis of the compiled
        program; with the kernel where all examples go at once, else with that of two blocks only. For method
        "transform". Models of `lensjax.models` then run their layers in a loop and recompute as much of
        them on the way back as is necessary; where that, or any other function, does not fit, the kernel is computed
        in blocks as by `ntk_blocks(memory=)`, which repeats the backward pass for each block and cannot be done under
        `jax.jit`. The report says which.
    return_report : bool
        Return `(kernel, report)`.

    Returns
    -------
    float array, at least float32: (N, M) if f returns one number without axes or for "trace"; (N, C, M, C) for "full";
    (N, M, C) for "diagonal". With `by_layer` a dict of them. Unit: that of f squared over that of a parameter squared.

    Raises
    ------
    InputError
        If the input does not fit together, a selected parameter is no real array, or a method that needs reverse mode
        is asked for where `f` has none; or if with `memory` nothing fits, the method cannot be "transform", or there
        have to be blocks under `jax.jit`; see the message.
    UnsupportedBackendError
        Where the installed jaxlib computes wrong derivatives.

    Notes
    -----
    The kernel is exact, and can be differentiated with respect to parameters and examples by `jax.grad` and `jax.jvp`
    whatever the method, as far as f itself has second derivatives. Indices beyond a table are treated as in JAX's
    gradient of the lookup; "ntvp" also multiplies by JAX's forward-mode derivative, which is another one there. The
    contribution of a weight that is applied once is computed in the backward pass; of weights with several uses the
    inputs and cotangents are kept; a parameter that is used in any other operation has per-example gradients. The
    report names those.

    Compiled once for each `f` object and shapes. As with `jax.jit`, what `f` holds beside its arguments is read then:
    what changes between calls belongs to `params` or the examples. Bound methods of one object are the same `f`.
    Callable objects that cannot be hashed or referenced weakly are compiled anew in each call.

    References
    ----------
    Jacot et al. 2018, arXiv:1806.07572; Novak et al. 2022, arXiv:2206.08720, for the three ways to contract it;
    LensLLM (ICML 2025), eq. 8.

    Examples
    --------
    >>> kernel = ntk(lambda w, x: jnp.dot(w, x), jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> kernel  # of a linear function: inner products of the examples
    Array([[ 5., 11.],
           [11., 25.]], dtype=float32)
    """
    model = f
    f, params, x1, x2 = split_model_args(f, output, params, x1, x2)
    problem = validate(f, params, x1, x2, parameters, by_layer, outputs=outputs, method=method)
    reduction = GramReduction(problem.rows, problem.columns, is_crossed(problem, outputs))
    chosen, reason = choose_method(problem, method, params, x1, x2, bounded=memory is not None, reduction=reduction)
    if memory is not None:
        check_bounded(memory, chosen, reason, "leave `memory` out" if method == "auto" else "leave one out")
        with reverse_mode(f"memory={memory}", "leave it out, and choose method='auto' or 'jacobian'"):
            choice = plan_memory(problem, model, params, x1, x2, output, outputs, memory, by_layer=bool(by_layer))
        problem = dataclasses.replace(problem, function=choice.variant.function)
        params, reason = choice.variant.params, f"{reason}; {choice.how}"
        if choice.block is not None:
            try:
                whole, report = by_blocks(
                    problem, chosen, reason, params, x1, x2, parameters=parameters, outputs=outputs, block=choice.block
                )
            except jax.errors.TracerArrayConversionError:
                raise InputError(
                    f"memory={memory} bytes allows blocks of {choice.block} examples only, and blocks cannot be "
                    "computed under jax.jit or another transformation; call ntk outside of it, or allow more."
                ) from None
            return (jnp.asarray(whole), report()) if return_report else jnp.asarray(whole)
    layers = layer_kernels(problem, chosen, params, x1, x2, outputs)
    kernel = layers if by_layer else layers[""]
    if not return_report:
        return kernel
    return kernel, report_of(problem, chosen, reason, params, x1)


def explain(
    f: Any,
    params: Any,
    x1: Any = None,
    x2: Any = None,
    *,
    output: str = "loss",
    method: Method = "auto",
    parameters: Select = None,
) -> NtkReport:
    """Return the report of `ntk` without computing anything.

    Parameters
    ----------
    f, params, x1, x2, output, method, parameters : as in `ntk`
        Arrays may be shapes, `jax.ShapeDtypeStruct`.

    Returns
    -------
    NtkReport

    Raises
    ------
    InputError, UnsupportedBackendError : as `ntk`
    """
    f, params, x1, x2 = split_model_args(f, output, params, x1, x2)
    problem = validate(f, params, x1, x2, parameters, False, method=method)
    return report_of(problem, *choose_method(problem, method, params, x1, x2), params, x1)


def gradient_norms(
    f: Any, params: Any, x: Any = None, *, output: str = "loss", parameters: Select = None, by_layer: ByLayer = False
) -> Any:
    """Return the norm of each example's gradient, in one backward pass; the squares are the kernel's diagonal.

    Parameters
    ----------
    f, params, x, output, parameters, by_layer : as in `ntk`

    Returns
    -------
    float array (N,), or (N, C) if f returns several numbers; with `by_layer` a dict of them.

    Raises
    ------
    InputError, UnsupportedBackendError : as `ntk`
        Also if `f` cannot be differentiated backwards.
    """
    f, params, x = split_model_args(f, output, params, x)
    problem = validate(f, params, x, None, parameters, by_layer)
    with reverse_mode("gradient_norms", "take the root of the diagonal of ntk(f, ..., method='jacobian')"):
        squares = reduce_gradients(problem, SquaredNorm(problem.rows), params, x)
    result = {}
    for layer, name in enumerate(problem.layer_names):
        norms = jnp.sqrt(squares.get(layer, jnp.zeros((problem.outputs, problem.rows)))).T
        result[name] = norms[:, 0] if problem.scalar else norms
    return result if by_layer else result[""]
