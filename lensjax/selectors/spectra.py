"""NLPmetrics: how heavy-tailed the spectra of a model's weight matrices are, no data needed.

The eigenvalues of W^T W of a well-trained layer have a tail close to a power law, the heavier the more correlated the
layer. A law is fitted to each matrix by maximum likelihood above the smallest eigenvalue that belongs to the tail,
which is the one at which the power law is closest to the data (Kolmogorov-Smirnov).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.errors import InputError
from lensjax.selectors.golden_section import golden_section_minimum

MIN_EIGENVALUES = 50
PAD_MULTIPLE = 64  # spectra are padded to a multiple of this, so that one compiled program serves many matrices
PANELS, NODES = 32, 16  # of the composite Gauss-Legendre rule
BISECTIONS = 55
MAX_EXPONENT_GAP = 1000.0  # how far the truncated exponent may lie below the plain one


@dataclasses.dataclass(frozen=True, eq=False)
class NlpMetrics:
    """Tail exponents and norms of W weight matrices; all arrays float64 (W,).

    Attributes
    ----------
    names : tuple of str
        Path of each matrix in the pytree, with the position in brackets where matrices are stacked.
    pl_alpha : array
        Exponent of the power law, p(x) ~ x^-alpha for x >= xmin: the smaller the heavier the tail.
    e_tpl_alpha, e_tpl_lambda : array
        Exponents of the exponentially truncated power law, p(x) ~ x^-alpha exp(-lambda x) for x >= xmin; lambda is in
        units of one over an eigenvalue, 0 where the tail is at least as heavy as the power law.
    xmin : array
        Smallest eigenvalue of the tail.
    distance : array
        Kolmogorov-Smirnov distance of the tail from the power law.
    tail : int array
        Eigenvalues in the tail.
    log_norm, log_spectral_norm : array
        log10 of the squared Frobenius norm and of the largest eigenvalue.
    """

    names: tuple[str, ...]
    pl_alpha: np.ndarray
    e_tpl_alpha: np.ndarray
    e_tpl_lambda: np.ndarray
    xmin: np.ndarray
    distance: np.ndarray
    tail: np.ndarray
    log_norm: np.ndarray
    log_spectral_norm: np.ndarray

    def mean(self, metric: str = "pl_alpha") -> float:
        """Average of a metric over the matrices: a score of the model, lower is better.

        Raises
        ------
        InputError
            If there is no such metric; the message lists those there are.
        """
        known = [f.name for f in dataclasses.fields(self) if f.name not in ("names", "tail", "xmin", "distance")]
        if metric not in known:
            raise InputError(f"metric {metric!r} is unknown; there are: {', '.join(known)}.")
        return float(np.mean(getattr(self, metric)))


@dataclasses.dataclass(frozen=True, eq=False)
class Tails:
    """Tail laws of W spectra, see `NlpMetrics`; all arrays (W,)."""

    pl_alpha: np.ndarray
    e_tpl_alpha: np.ndarray
    e_tpl_lambda: np.ndarray
    xmin: np.ndarray
    distance: np.ndarray
    tail: np.ndarray


def nlp_metrics(
    params: Any, *, min_eigenvalues: int = MIN_EIGENVALUES, include: Callable[[str], bool] | None = None
) -> NlpMetrics:
    """Fit power laws to the spectra of all weight matrices of a model.

    Parameters
    ----------
    params : pytree
        Weights, as arrays of any float dtype. Every leaf with two or more axes counts; the last two are the matrix,
        those before them number stacked matrices (layers under `scan`, experts).
    min_eigenvalues : int
        Matrices whose smaller side is below this are left out: so few numbers show no tail.
    include : callable, optional
        Predicate on a matrix's path that says whether to include it; by default all are included, embeddings too.

    Returns
    -------
    NlpMetrics

    Raises
    ------
    InputError
        If no matrix is large enough, or one of them holds a number that is not finite, or is 0 everywhere.

    References
    ----------
    Yang et al. 2023 (arXiv 2202.02842): PL_alpha and E_TPL_lambda. Martin and Mahoney 2021 (JMLR 22:165).
    Clauset, Shalizi and Newman 2009 (SIAM Review 51:661) for the fits.
    """
    names, spectra = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        label = jax.tree_util.keystr(path, simple=True, separator=".")
        if leaf.ndim < 2 or min(leaf.shape[-2:]) < min_eigenvalues or not (include is None or include(label)):
            continue
        stack = leaf.reshape(-1, *leaf.shape[-2:])
        for at in range(len(stack)):
            name = label if leaf.ndim == 2 else f"{label}[{at}]"
            values = eigenvalues(stack[at])
            if not (np.isfinite(values).all() and values[-1] > 0):
                raise InputError(
                    f"{name}: this weight matrix is {'not finite' if not np.isfinite(values).all() else '0 everywhere'}"
                    ", so it has no spectrum. Load the weights anew, or leave it out (include)."
                )
            names.append(name)
            spectra.append(values)
    if not spectra:
        raise InputError(
            f"no weight matrix has at least {min_eigenvalues} rows and columns, so there is no spectrum to fit. Use a "
            "larger model, or lower min_eigenvalues."
        )
    tails = fit_tails(spectra, names)
    return NlpMetrics(
        names=tuple(names),
        **{field.name: getattr(tails, field.name) for field in dataclasses.fields(tails)},
        log_norm=np.log10([v.sum() for v in spectra]),
        log_spectral_norm=np.log10([v[-1] for v in spectra]),
    )


def eigenvalues(matrix: Any) -> np.ndarray:
    """Eigenvalues of W^T W, or of W W^T if that is smaller: float64 (min(rows, columns),), ascending.

    Computed in float64 on the default device, at the cost of one product and one symmetric eigenproblem.
    """
    with jax.enable_x64(True):
        found = _eigenvalues(jnp.asarray(matrix).astype(jnp.float64))
        # Rounding leaves the smallest ones of a singular matrix just below 0.
        return np.maximum(np.asarray(found), 0.0) if bool(jnp.isfinite(found).all()) else np.asarray(found)


@jax.jit
def _eigenvalues(matrix: jax.Array) -> jax.Array:
    small = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return jnp.linalg.eigvalsh(jnp.matmul(small.T, small, precision="highest"))


def fit_tails(spectra: list[np.ndarray], names: Sequence[str] = ()) -> Tails:
    """Fit both laws to the tails of several sets of positive numbers.

    Parameters
    ----------
    spectra : list of arrays (n_i,)
        Positive numbers; zeros are left out. At least 4 different ones in each.
    names : sequence of str, optional
        Names for error messages.

    Returns
    -------
    Tails

    Raises
    ------
    InputError
        If a set has fewer than 4 different positive numbers.
    """
    # Eigenvalues that are 0 up to rounding do not belong to a tail.
    positive = [np.sort(s[s > 1e-14 * s.max()]) for s in (np.asarray(s, np.float64) for s in spectra)]
    for at, values in enumerate(positive):
        if (different := len(np.unique(values))) < 4:
            name = names[at] if names else f"spectrum {at}"
            raise InputError(
                f"{name} has {different} different positive eigenvalue(s); a tail needs at least 4. Leave matrices of "
                "low rank out."
            )
    length = max(map(len, positive))
    length += -length % PAD_MULTIPLE
    logs = np.full((len(positive), length), np.inf)  # padding lies behind the largest
    for row, values in zip(logs, positive, strict=True):
        row[: len(values)] = np.log(values)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    rule = (nodes[None] + 1) / 2 + np.arange(PANELS)[:, None]
    with jax.enable_x64(True):
        found = _fit_tails(
            jnp.asarray(logs),
            jnp.asarray([len(v) for v in positive]),
            jnp.asarray(rule.ravel() / PANELS),
            jnp.asarray(np.tile(weights / 2 / PANELS, PANELS)),
        )
        alpha, start, distance, tail, truncated, rate = (np.asarray(v) for v in found)
    # Numbers themselves, not exp(log): the caller may look for them in the spectrum.
    xmin = np.array([values[i] for values, i in zip(positive, start, strict=True)])
    return Tails(alpha, truncated, rate / xmin, xmin, distance, tail)


@jax.jit
def _fit_tails(logs: jax.Array, counts: jax.Array, nodes: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        return _fit_tail(*row, nodes, weights)

    return jax.lax.map(one, (logs, counts))


def _fit_tail(logs: jax.Array, count: jax.Array, nodes: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Ascending logarithms (n,), of which `count` count: power law, start and distance of the tail, truncated law."""
    position = jnp.arange(len(logs))
    known = position < count
    y = jnp.where(known, logs, 0.0)
    above = jnp.cumsum(y[::-1])[::-1]
    tail = jnp.maximum(count - position, 1)
    mean = above / tail - y  # of log(x / xmin), for xmin at each position
    exponents = 1 / jnp.where(mean > 0, mean, 1.0)  # alpha - 1

    def distance(start: jax.Array) -> jax.Array:
        law = -jnp.expm1(-exponents[start] * (y - y[start]))
        inside = known & (position >= start)
        steps = (position - start) / tail[start]
        return jnp.max(jnp.where(inside, jnp.abs(law - steps), 0.0))

    distances = jax.lax.map(distance, position, batch_size=min(64, len(logs)))
    # A tail has 3 numbers at least, and equal numbers are one start, the first of them.
    highest = y[count - 1]
    second = jnp.max(jnp.where(known & (y < highest), y, -jnp.inf))
    allowed = known & (y < second) & (mean > 0) & jnp.concatenate([jnp.array([True]), y[1:] > y[:-1]])
    start = jnp.argmin(jnp.where(allowed, distances, jnp.inf))
    inside = known & (position >= start)
    size = jnp.where(inside, jnp.exp(y - y[start]), 0.0).sum() / tail[start]
    alpha, rate = _truncated(exponents[start] + 1, mean[start], size, nodes, weights)
    return exponents[start] + 1, start, distances[start], tail[start], alpha, rate


def _truncated(
    plain: jax.Array, mean_log: jax.Array, mean: jax.Array, nodes: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Maximum likelihood of p(s) ~ s^-alpha exp(-c s), s >= 1, from the means of log s and s: alpha and c.

    The law is an exponential family in (alpha, c), so minus its log-likelihood is convex, and so is its minimum over
    alpha as a function of c: one number is searched inside the search for the other, and Newton's method does the
    last digits. (Alone it can get stuck close to c = 0.) The normaliser is integrated over u = log s.
    """
    # c = 0 is best, that is no truncation, where even the plain power law has a mean of at most the observed one.
    heavy = (plain > 2) & ((plain - 1) / jnp.where(plain > 2, plain - 2, 1.0) <= mean)

    def integrand(alpha: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Beyond this end the integrand is below 1e-26 of its largest value.
        end = jax.lax.stop_gradient(jnp.log1p((60 + 4 * jnp.maximum(1 - alpha, 0.0)) / c))
        u = nodes * end
        return u, (1 - alpha) * u - c * jnp.expm1(u), end

    def objective(v: jax.Array) -> jax.Array:
        alpha, c = v
        exponent, end = integrand(alpha, c)[1:]
        normaliser = jax.scipy.special.logsumexp(exponent, b=weights) + jnp.log(end)
        return alpha * mean_log + c * (mean - 1) + normaliser

    def best_alpha(c: jax.Array) -> jax.Array:
        """Bisection: the expected log s falls with alpha."""

        def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = (low + high) / 2
            u, exponent = integrand(middle, c)[:2]
            density = weights * jnp.exp(exponent - exponent.max())
            larger = (density * u).sum() > mean_log * density.sum()
            return jnp.where(larger, middle, low), jnp.where(larger, high, middle)

        # A truncated law needs a smaller exponent than the plain one.
        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (plain - MAX_EXPONENT_GAP, plain))
        return (low + high) / 2

    def profile(log_c: jax.Array) -> jax.Array:
        c = jnp.exp(log_c)
        return objective(jnp.array([best_alpha(c), c]))

    unit = 1 / jnp.maximum(mean - 1, 1e-12)
    ends = jnp.log(1e-12 * unit), jnp.log(10 * MAX_EXPONENT_GAP * unit)
    c = jnp.exp(golden_section_minimum(profile, *ends, BISECTIONS))
    start = jnp.array([best_alpha(c), c])

    def step(_: int, v: jax.Array) -> jax.Array:
        slope = jax.grad(objective)(v)
        new = v - jnp.linalg.solve(jax.hessian(objective)(v), slope)
        # The search is accurate to the square root of the precision: a longer Newton step is rounding error.
        near = (jnp.abs(new[1] / start[1] - 1) < 0.1) & (jnp.abs(new[0] - start[0]) < 0.1 * (1 + jnp.abs(start[0])))
        return jnp.where(near, new, v)

    found = jax.lax.fori_loop(0, 3, step, start)
    return jnp.where(heavy, plain, found[0]), jnp.where(heavy, 0.0, found[1])
