"""Quadratic forms v^T g(H) v of functions of a Hessian, and its spectrum, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lensjax_kernels.gram import EXACT

from lensjax.errors import InputError
from lensjax.tangents.curvature.losses import split_loss_args
from lensjax.tangents.curvature.operator import CurvatureOperator, concatenate_leaves, split_like
from lensjax.tangents.curvature.problem import Matrix, make_curvature_problem
from lensjax.tangents.curvature.quadratic_forms import dot
from lensjax.tangents.parameters import ByLayer, Select, count_examples
from lensjax.tangents.program.compile_cache import cached_compile

CUT = 1e-6
"""Eigenvalues below this fraction of the largest are treated as zero in a pseudo-inverse."""


def positive_part(eigenvalues: np.ndarray) -> np.ndarray:
    """Return eigenvalues with the negative ones set to 0: H^+ of LensLLM's Theorem 2."""
    return np.maximum(eigenvalues, 0.0)


def pseudo_inverse(eigenvalues: np.ndarray) -> np.ndarray:
    """Return the inverses of eigenvalues, 0 for those below `CUT` times the largest absolute value."""
    small = np.abs(eigenvalues) <= CUT * np.abs(eigenvalues).max(initial=0.0)
    return np.where(small, 0.0, 1.0 / np.where(small, 1.0, eigenvalues))


def identity(eigenvalues: np.ndarray) -> np.ndarray:
    """Return the eigenvalues themselves: v^T H v."""
    return eigenvalues


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": identity,
    "positive_part": positive_part,
    "pseudo_inverse": pseudo_inverse,
}


@dataclasses.dataclass(frozen=True, eq=False)
class QuadraticForm:
    """v^T g(H) v.

    Attributes
    ----------
    value : float
    change : float
        Relative change of the value by the last step: an estimate of the remaining error where the steps converge.
    residual : float
        Norm of the part of H v_k outside the Krylov space so far, over the largest eigenvalue: 0 where that space is
        invariant and the value exact.
    steps : int
        Products with H.
    eigenvalues, weights : float64 arrays (steps,)
        Ritz values, and the fraction of |v|^2 for each: the quadrature ``value = |v|^2 sum_k w_k g(lam_k)``.
    """

    value: float
    change: float
    residual: float
    steps: int
    eigenvalues: np.ndarray
    weights: np.ndarray


def tridiagonal(
    multiply: Callable[[jax.Array], jax.Array], v: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run Lanczos with full reorthogonalisation; it can be compiled and mapped.

    Parameters
    ----------
    multiply : callable (P,) -> (P,)
        Product with a symmetric matrix.
    v : float array (P,)
        Start; the zero vector gives zeros.
    steps : int

    Returns
    -------
    The diagonal (steps,) and the off-diagonal (steps,) of the tridiagonal matrix, where the last off-diagonal entry is
    that of the next step; and |v|. Once the Krylov space is invariant, all further entries are zero.

    References
    ----------
    Golub and Meurant 2010, Matrices, moments and quadrature with applications, chapters 4 and 6.
    """
    norm = jnp.linalg.norm(v)
    tiny = jnp.sqrt(jnp.finfo(v.dtype).tiny)
    start = v / jnp.maximum(norm, tiny)
    basis = jnp.zeros((steps, v.shape[0]), v.dtype).at[0].set(start)

    def step(k: jax.Array, state: Any) -> Any:
        basis, diagonal, off_diagonal, largest = state
        w = multiply(basis[k])
        a, w = _orthogonal(basis, k, w)
        b = jnp.linalg.norm(w)
        largest = jnp.maximum(largest, jnp.maximum(jnp.abs(a), b))
        b = jnp.where(b > 30 * jnp.finfo(v.dtype).eps * largest, b, 0.0)
        following = jnp.where(b > 0, w / jnp.where(b > 0, b, 1.0), 0.0)
        basis = basis.at[k + 1].set(following, mode="drop")
        return basis, diagonal.at[k].set(a), off_diagonal.at[k].set(b), largest

    zeros = jnp.zeros(steps, v.dtype)
    _, diagonal, off_diagonal, _ = jax.lax.fori_loop(0, steps, step, (basis, zeros, zeros, jnp.zeros((), v.dtype)))
    return diagonal, off_diagonal, norm


def _orthogonal(basis: jax.Array, k: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return v_k . w, and the part of w orthogonal to the basis (K, P), whose row k is v_k."""
    along = dot(basis[k], w)
    # The large part first: matrix products over P add in order on CPU, see `dot`.
    w = w - along * basis[k]
    for _ in range(2):  # twice is enough
        w = w - jnp.matmul(jnp.matmul(basis, w, precision=EXACT), basis, precision=EXACT)
    return along, w


def quadrature(
    diagonal: Any, off_diagonal: Any, norm: Any, function: Callable[[np.ndarray], np.ndarray]
) -> QuadraticForm:
    """Return |v|^2 e_1^T g(T) e_1 for the tridiagonal matrix of `tridiagonal`, in float64."""
    diagonal, off_diagonal = np.asarray(diagonal, np.float64), np.asarray(off_diagonal, np.float64)
    ends = np.flatnonzero(off_diagonal == 0)
    steps = int(ends[0]) + 1 if len(ends) else len(diagonal)

    def decompose(count: int) -> tuple[np.ndarray, np.ndarray]:
        matrix = (
            np.diag(diagonal[:count]) + np.diag(off_diagonal[: count - 1], 1) + np.diag(off_diagonal[: count - 1], -1)
        )
        eigenvalues, vectors = np.linalg.eigh(matrix)
        return eigenvalues, vectors[0] ** 2

    square = float(norm) ** 2
    eigenvalues, weights = decompose(steps)
    value = square * float(weights @ function(eigenvalues))
    change = 0.0
    if len(ends) == 0 and steps > 1:
        fewer, their_weights = decompose(steps - 1)
        before = square * float(their_weights @ function(fewer))
        change = abs(value - before) / max(abs(value), np.finfo(float).tiny)
    elif len(ends) == 0:
        change = 1.0
    largest = float(np.abs(eigenvalues).max())
    residual = float(off_diagonal[steps - 1]) / largest if largest > 0 else 0.0
    return QuadraticForm(value, change, residual, steps, eigenvalues, weights)


def quadratic_form(
    operator: CurvatureOperator,
    v: Any,
    function: str | Callable[[np.ndarray], np.ndarray] = "positive_part",
    *,
    steps: int = 20,
) -> QuadraticForm:
    """Return v^T g(H) v for a function g of the eigenvalues of H.

    Parameters
    ----------
    operator : CurvatureOperator
    v : pytree like the parameters
        Its selected leaves are used.
    function : {"identity", "positive_part", "pseudo_inverse"} or callable eigenvalues (K,) -> (K,)
        "positive_part": negative eigenvalues are set to 0, H^+ of LensLLM's Theorem 2. "pseudo_inverse": inverses,
        small eigenvalues left out (`CUT`); Lanczos resolves small eigenvalues last, so look at `change`.
    steps : int
        Products with H at most. Fewer where the Krylov space becomes invariant. Their results are kept: `steps`
        vectors as long as the parameters.

    Returns
    -------
    QuadraticForm

    Raises
    ------
    InputError
        If `v` is not like the parameters, `steps` is not positive, there is no such function, or a product is not
        finite.

    References
    ----------
    Golub and Meurant 2010; LensLLM (ICML 2025), Theorem 2.
    """
    chosen = function if callable(function) else FUNCTIONS.get(function)
    if chosen is None:
        raise InputError(f"function={function!r} is not known; choose one of {', '.join(FUNCTIONS)} or give one.")
    return quadrature(*_lanczos(operator, v, steps), chosen)


def _lanczos(operator: CurvatureOperator, v: Any, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Run Lanczos with one call for each product, for batches that do not fit into one compiled call."""
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1.")
    flat = operator.flatten(v)
    norm = float(jnp.linalg.norm(flat))
    steps = min(steps, operator.size)
    diagonal, off_diagonal = np.zeros(steps), np.zeros(steps)
    if norm == 0:
        return diagonal, off_diagonal, 0.0
    basis = jnp.zeros((steps + 1, flat.shape[0]), flat.dtype).at[0].set(flat / norm)
    largest = 0.0
    for k in range(steps):
        basis, a, b = _extend(basis, k, operator.flat(basis[k]))
        diagonal[k], length = float(a), float(b)
        if not np.isfinite(diagonal[k]):
            raise InputError(
                "the product with a vector is not finite: check the parameters and the batches for NaN, and the loss "
                "for points without a second derivative."
            )
        largest = max(largest, abs(diagonal[k]), length)
        if length <= 30 * float(jnp.finfo(flat.dtype).eps) * largest or k + 1 == operator.size:
            return diagonal[: k + 1], off_diagonal[: k + 1], norm
        off_diagonal[k] = length
    return diagonal, off_diagonal, norm


@functools.partial(jax.jit, donate_argnums=0)
def _extend(basis: jax.Array, k: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append to row k of an orthonormal basis the part of w orthogonal to it; also return v_k . w and its norm."""
    along, w = _orthogonal(basis, k, w)
    length = jnp.linalg.norm(w)
    return basis.at[k + 1].set(w / jnp.where(length > 0, length, 1.0)), along, length


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Spectral density from stochastic Lanczos quadrature.

    Attributes
    ----------
    eigenvalues, weights : float64 arrays (K,)
        Ascending Ritz values of all probes and the fraction of the spectrum for each; the weights add up to 1.
    smallest, largest : float
        Extreme Ritz values; the extreme eigenvalues lie outside of them.
    probes : int
    """

    eigenvalues: np.ndarray
    weights: np.ndarray
    smallest: float
    largest: float
    probes: int


def spectrum(operator: CurvatureOperator, *, key: jax.Array, probes: int = 4, steps: int = 30) -> Spectrum:
    """Estimate the distribution of the eigenvalues, and the extreme ones.

    Parameters
    ----------
    operator : CurvatureOperator
    key : PRNG key
    probes : int
        Random starts, at least 1.
    steps : int
        Products for each probe.

    Returns
    -------
    Spectrum

    Raises
    ------
    InputError
        If `probes` or `steps` is not positive, or a product is not finite.

    References
    ----------
    Ubaru, Chen and Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, doi:10.1137/16M1104974.
    """
    if probes < 1:
        raise InputError(f"probes={probes} must be at least 1.")
    found = []
    for own in jax.random.split(key, probes):
        start = operator.rademacher(own)
        found.append(quadrature(*_lanczos(operator, start, steps), identity))
    values = np.concatenate([q.eigenvalues for q in found])
    weights = np.concatenate([q.weights for q in found]) / probes
    order = np.argsort(values)
    return Spectrum(values[order], weights[order], float(values.min()), float(values.max()), probes)


def per_example_quadratic_forms(
    f: Any,
    params: Any,
    v: Any,
    batch: Any = None,
    *,
    function: str = "positive_part",
    steps: int = 10,
    matrix: Matrix = "hessian",
    parameters: Select = None,
    by_layer: ByLayer = True,
) -> dict[str, np.ndarray]:
    """Return v_i^T g(H_i) v_i of each example's loss and each diagonal block H_i of its Hessian.

    Their maxima over examples are the H_i of LensLLM's Theorem 2. Called as
    ``per_example_quadratic_forms(f, params, v, batch)``, or as ``per_example_quadratic_forms(model, v, batch)``.

    Parameters
    ----------
    f, params, matrix, parameters, by_layer : as in `curvature_operator`
    v : pytree like the parameters
        For the theorem: fine-tuned minus pre-trained weights.
    batch : pytree whose leaves have a leading axis of N examples
        `f` is called with one at a time, with a leading axis of 1.
    function, steps : as in `quadratic_form`

    Returns
    -------
    dict block name -> float64 array (N,)

    Raises
    ------
    InputError
        As `curvature_operator` and `quadratic_form`, and if the leaves of `batch` do not share their first axis.
    """
    f, params, v, batch = split_loss_args(f, params, v, batch)
    problem = make_curvature_problem(f, params, matrix, parameters, by_layer, None)
    if function not in FUNCTIONS:
        raise InputError(f"function={function!r} is not known; choose one of {', '.join(FUNCTIONS)}.")
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1.")
    count_examples(batch, "batch")
    operator = CurvatureOperator(problem, f, params, [jax.tree.map(lambda a: a[:1], batch)])
    sizes = list(operator.block_sizes().values())
    steps, largest = min(steps, max(sizes)), max(sizes)
    # The leaves are ordered by block, so that a block is contiguous and the basis as long as the largest block only.
    own = problem.selection.selected_layers
    order = sorted(range(len(own)), key=own.__getitem__)

    def make(get: Callable[[], Any]) -> Any:
        def run(params: Any, flat: jax.Array, examples: Any, start: jax.Array, size: jax.Array) -> Any:
            f, selected = get(), problem.selected(params)
            arranged = [selected[i] for i in order]

            def piece(vector: jax.Array) -> jax.Array:
                part = jax.lax.dynamic_slice_in_dim(jnp.pad(vector, (0, largest)), start, largest)
                return jnp.where(jnp.arange(largest) < size, part, 0)

            def one(example: Any) -> Any:
                product, weight = problem.product_fn(f, params, jax.tree.map(lambda a: a[None], example))

                def multiply(w: jax.Array) -> jax.Array:
                    whole = jnp.zeros(flat.shape[0] + largest, w.dtype)
                    whole = jax.lax.dynamic_update_slice_in_dim(whole, w, start, 0)
                    leaves = dict(zip(order, split_like(whole, arranged), strict=True))
                    out = product([leaves[i] for i in range(len(order))])
                    return piece(concatenate_leaves([out[i] for i in order])) / jnp.maximum(weight, 1)

                return tridiagonal(multiply, piece(flat), steps)

            return jax.lax.map(one, examples)

        return jax.jit(run)

    run = cached_compile(f, ("per-example quadratic forms", problem, steps), make)
    leaves = operator.unflatten(operator.flatten(v))
    flat = concatenate_leaves([leaves[i] for i in order])
    result = {}
    for block, name in enumerate(problem.block_names):
        start, size = sum(sizes[:block]), sizes[block]
        of_block = run(params, flat, batch, jnp.array(start), jnp.array(size))
        found = [np.asarray(a, np.float64) for a in of_block]
        if not all(np.isfinite(a).all() for a in found):
            raise InputError(f"the curvature of an example's loss is not finite in {name}: check the batch for NaN.")
        lines = zip(*found, strict=True)
        result[name] = np.array([quadrature(a, b, c, FUNCTIONS[function]).value for a, b, c in lines])
    return result
