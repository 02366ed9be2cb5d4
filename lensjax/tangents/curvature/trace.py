"""Traces of Hessians and Gauss-Newton matrices from random probes, in total and for each block of parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from lensjax_kernels import rademacher_like
from lensjax_kernels.gram import EXACT

from lensjax._display import table
from lensjax.errors import InputError
from lensjax.tangents.curvature.losses import split_loss_args
from lensjax.tangents.curvature.operator import CurvatureOperator, concatenate_leaves
from lensjax.tangents.curvature.problem import (
    Batches,
    CurvatureProblem,
    Matrix,
    check_finite,
    check_weight,
    iterate_batches,
    make_curvature_problem,
)
from lensjax.tangents.curvature.quadratic_forms import dot
from lensjax.tangents.parameters import ByLayer, Select
from lensjax.tangents.program.compile_cache import cached_compile

Method = Literal["hutchinson", "hutch++"]


@dataclasses.dataclass(frozen=True, eq=False)
class TraceEstimate:
    """A trace with its standard error, in total and by block.

    Attributes
    ----------
    trace, standard_error : float
        Unit: loss / parameter^2. The error is that of the random probes for these data. NaN with a single probe, which
        has no scatter.
    by_layer, standard_errors : dict block name -> float
        The blocks' traces, which add up to the total, and their standard errors, which do not.
    samples : float64 array (probes, blocks)
        The value of each random probe; their mean is the estimate ("hutchinson"), or its random part ("hutch++").
    probes : int
        Number of random probes, from whose scatter the error is estimated.
    matvecs : int
        Products with the matrix of a batch.
    weight : float
        Total weight of the batches: labelled tokens for models, else examples.
    method, matrix : str
    """

    trace: float
    standard_error: float
    by_layer: dict[str, float]
    standard_errors: dict[str, float]
    samples: np.ndarray
    probes: int
    matvecs: int
    weight: float
    method: str
    matrix: str

    def __repr__(self) -> str:
        return (
            f"TraceEstimate({self.matrix} trace {self.trace:.4g} +- {self.standard_error:.2g}, {len(self.by_layer)} "
            f"blocks, {self.probes} probes, {self.method})"
        )

    def _repr_html_(self) -> str:
        """Show the blocks' traces in a notebook."""
        rows = ((name, value, self.standard_errors[name]) for name, value in self.by_layer.items())
        return table(repr(self), ["block", "trace", "standard error"], rows)


def hessian_trace(
    f: Any,
    params: Any,
    batches: Batches = None,
    *,
    key: jax.Array,
    probes: int = 16,
    method: Method = "hutchinson",
    matrix: Matrix = "hessian",
    parameters: Select = None,
    by_layer: ByLayer = True,
    weight: Callable[[Any], Any] | None = None,
    chunk: int = 8,
) -> TraceEstimate:
    """Estimate the trace of a loss's Hessian or Gauss-Newton matrix, in total and for each block of parameters.

    Called as ``hessian_trace(f, params, batches, key=key)`` for any function, or as
    ``hessian_trace(model, batches, key=key)`` for a language model.

    Parameters
    ----------
    f, params, batches, matrix, parameters, by_layer, weight : as in `curvature_operator`
        For "hutchinson" `batches` may be an iterator: they are read once, one at a time.
    key : PRNG key
        Of the random signs; each batch has its own.
    probes : int
        Products with the matrix for each batch, at least 1; for "hutch++" at least 3.
    method : {"hutchinson", "hutch++"}
        See Notes.
    chunk : int
        Probes in one compiled call, one after the other; "hutchinson" only.

    Returns
    -------
    TraceEstimate

    Raises
    ------
    InputError
        As `curvature_operator`; if there are too few probes; or if the result is not finite.

    Notes
    -----
    "hutchinson": the mean over probes v of v_i . (H v)_i, with v random signs over all parameters, is unbiased for the
    trace of each diagonal block i at once. The variance of the total is 2 ||H - diag H||_F^2 / probes. The forms are
    computed in one forward and one backward pass, without the product H v, which would cost a third more; the memory is
    that of the signs, as large as the parameters, and of two to three times a gradient's activations. For a function
    with a `jax.custom_vjp` Hessian-vector and Gauss-Newton-vector products are used instead, in reverse mode twice
    where the rule cannot be differentiated in forward mode (because its forward part calls the function itself).
    "hutch++": a third of the products finds the range Q of H applied to random vectors, a third computes the trace
    on it exactly, and the rest are random probes of the remainder, (1 - Q Q^T) H (1 - Q Q^T). It pays where a few
    eigenvalues, fewer than a third of the probes, hold most of the Frobenius norm; on a flat spectrum its error is
    larger by sqrt(3), because only a third of the probes is averaged. On a small language model it paid from about 48
    products on before fine-tuning, and for the Hessian after fine-tuning never (benchmarks/trace_methods.py).
    It keeps `probes` / 3 vectors as long as the parameters, several times over while they are made orthogonal: not for
    billions of parameters.

    References
    ----------
    Hutchinson 1990, doi:10.1080/03610919008812866; Meyer et al. 2021, Hutch++, arXiv:2010.09649; LensLLM (ICML 2025),
    Proposition 1, which needs the sum of the layers' traces.

    Examples
    --------
    >>> def loss(w, x):
    ...     return jnp.mean((x @ w["a"]) ** 2) + w["b"] ** 2
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(())}
    >>> estimate = hessian_trace(loss, params, jnp.eye(2), key=jax.random.key(0))
    >>> float(estimate.trace), {name: float(value) for name, value in sorted(estimate.by_layer.items())}
    (4.0, {'a': 2.0, 'b': 2.0})
    """
    f, params, batches = split_loss_args(f, params, batches)
    problem = make_curvature_problem(f, params, matrix, parameters, by_layer, weight)
    least = {"hutchinson": 1, "hutch++": 3}
    if method not in least:
        raise InputError(f"method={method!r} is not known; choose one of {', '.join(least)}.")
    if probes < least[method] or chunk < 1:
        raise InputError(f"probes={probes} must be at least {least[method]} ({method}) and chunk={chunk} at least 1.")
    if method == "hutchinson":
        return _hutchinson(problem, f, params, batches, key, probes, min(chunk, probes))
    if isinstance(batches, Iterator):
        raise InputError("batches is an iterator, but 'hutch++' reads them all again and again; give a list.")
    return _hutch_plus_plus(problem, f, params, list(iterate_batches(batches)), key, probes)


def _hutchinson(
    problem: CurvatureProblem, f: Any, params: Any, batches: Batches, key: jax.Array, probes: int, chunk: int
) -> TraceEstimate:
    def make(get: Callable[[], Any]) -> Any:
        def batch_quadratic_forms(params: Any, batch: Any, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            quadratic_forms, weight = problem.quadratic_form_fn(get(), params, batch)
            selected = problem.selected(params)
            return jax.lax.map(lambda key: quadratic_forms(rademacher_like(key, selected)), keys), weight

        return jax.jit(batch_quadratic_forms)

    compiled = cached_compile(f, ("quadratic forms", problem), make)
    sums, total, matvecs = np.zeros((probes, len(problem.block_names))), 0.0, 0
    for number, batch in enumerate(iterate_batches(batches)):
        keys = jax.random.split(jax.random.fold_in(key, number), probes)
        for start in range(0, probes, chunk):
            values, weight = compiled(params, batch, keys[start : start + chunk])
            numbers = np.asarray(values, np.float64)
            check_finite(numbers, problem.block_names, f"batch {number}: the curvature")
            sums[start : start + chunk] += numbers
        total += float(weight)
        matvecs += probes
    check_weight(total)
    return _estimate(problem, sums / total, np.zeros(len(problem.block_names)), matvecs, total, "hutchinson")


def _hutch_plus_plus(
    problem: CurvatureProblem, f: Any, params: Any, batches: list[Any], key: jax.Array, probes: int
) -> TraceEstimate:
    operator = CurvatureOperator(problem, f, params, batches)
    selected = problem.selected(params)
    rank = min(probes // 3, operator.size)
    keys = jax.random.split(key, probes)

    def random(number: int) -> jax.Array:
        return concatenate_leaves(rademacher_like(keys[number], selected))

    basis = jnp.linalg.qr(jnp.stack([operator.flat(random(i)) for i in range(rank)], axis=1))[0]
    # H = P H + H P - P H P + (1 - P) H (1 - P), P = Q Q^T: the first three from H Q, the last by probes.
    inside = np.zeros(len(problem.block_names))
    columns = []
    for i in range(rank):
        product = operator.flat(basis[:, i])
        inside += 2 * np.asarray(_block_products(operator, basis[:, i], product), np.float64)
        columns.append(_along(basis, product))
    twice = jnp.matmul(basis, jnp.stack(columns, axis=1), precision=EXACT)
    inside -= np.asarray(_block_products(operator, basis, twice), np.float64)
    samples = []
    for i in range(rank, probes - rank):
        sign = random(i)
        left = _outside(basis, sign)
        product = operator.flat(left)
        samples.append(_block_products(operator, sign, _outside(basis, product)))
    weight = sum(float(problem.batch_weight(f, batch)) for batch in batches)
    numbers = np.asarray(samples, np.float64)
    check_finite(numbers, problem.block_names, "the curvature")
    return _estimate(problem, numbers, inside, operator.matvecs * len(batches), weight, "hutch++")


@jax.jit
def _along(basis: jax.Array, v: jax.Array) -> jax.Array:
    """Return Q^T v (rank,) for Q (size, rank); a matrix product adds in order on CPU, see `dot`."""
    return jax.lax.map(lambda i: dot(basis[:, i], v), jnp.arange(basis.shape[1]))


def _outside(basis: jax.Array, v: jax.Array) -> jax.Array:
    """Return (1 - Q Q^T) v."""
    return v - jnp.matmul(basis, _along(basis, v), precision=EXACT)


def _block_products(operator: CurvatureOperator, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the sums of a * b (size, ...) over the rows of each block, (blocks,)."""
    sums, start = [], 0
    for leaf in operator.unflatten(jnp.zeros(operator.size)):
        rows = slice(start, start + leaf.size)
        sums.append(dot(a[rows], b[rows]))
        start += leaf.size
    return operator.problem.block_sums(sums)


def _estimate(
    problem: CurvatureProblem, samples: np.ndarray, exact: np.ndarray, matvecs: int, weight: float, method: str
) -> TraceEstimate:
    probes = len(samples)

    def error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / math.sqrt(probes)) if probes > 1 else math.nan

    traces = exact + samples.mean(0)
    return TraceEstimate(
        float(traces.sum()),
        error(samples.sum(1)),
        dict(zip(problem.block_names, traces.tolist(), strict=True)),
        {name: error(samples[:, i]) for i, name in enumerate(problem.block_names)},
        samples,
        probes,
        matvecs,
        weight,
        method,
        problem.matrix,
    )
