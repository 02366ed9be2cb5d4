"""The generalisation bound of fine-tuned models, term by term, and what the Hessian's trace says of the phases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lensjax._display import table
from lensjax.errors import InputError
from lensjax.laws import fit
from lensjax.tangents.parameters import ByLayer, layer_name, leaf_names, same_structure

Form = Literal["hessian", "isotropic"]


@dataclasses.dataclass(frozen=True)
class LayerTerm:
    """What one layer adds to the bound.

    Attributes
    ----------
    distance : float
        |v_i|, how far fine-tuning moved the layer's weights.
    form : float
        H_i of the bound: v_i^T Hess_i^+ v_i, or |v_i|^2 tr(Hess_i).
    value : float
        (1 + epsilon) sqrt(C H_i / n), nats.
    """

    distance: float
    form: float
    value: float


@dataclasses.dataclass(frozen=True)
class Bound:
    """Theorem 2 of LensLLM with every term, without its remainder xi = O(n^(-3/4)), whose constant is not known.

    Attributes
    ----------
    value : float
        `empirical` + `complexity`, nats.
    empirical : float
        (1 + epsilon) * training loss.
    complexity : float
        Sum of the layers' terms.
    layers : dict layer name -> LayerTerm
    proposition : float
        The complexity with sqrt(layers * sum of H_i) for the sum of roots: Proposition 1, never smaller.
    remainder : float
        n^(-3/4), what xi is of the order of; in no other number.
    form : {"hessian", "isotropic"}
    epsilon, loss_bound, train_loss : float
    n : int
    test_loss : float or None
    """

    value: float
    empirical: float
    complexity: float
    layers: dict[str, LayerTerm]
    proposition: float
    remainder: float
    form: Form
    epsilon: float
    loss_bound: float
    train_loss: float
    n: int
    test_loss: float | None

    def _repr_html_(self) -> str:
        """Show the bound and its terms in a notebook."""
        words = f"Bound {self.value:.4g} = {self.empirical:.4g} + {self.complexity:.4g} (n = {self.n}, {self.form})"
        if self.test_loss is not None:
            words += f"; test loss {self.test_loss:.4g}"
        rows = ((name, term.distance, term.form, term.value) for name, term in self.layers.items())
        return table(words, ["layer", "distance", "form", "value"], rows)

    @property
    def violated(self) -> bool | None:
        """Whether the test loss exceeds the bound (without its remainder); None without a test loss."""
        return None if self.test_loss is None else self.test_loss > self.value

    @property
    def looseness(self) -> float | None:
        """Bound over test loss; None without a test loss."""
        if self.test_loss is None:
            return None
        return self.value / self.test_loss if self.test_loss else math.inf


def layer_distances(params: Any, initial: Any, *, by_layer: ByLayer = True) -> dict[str, float]:
    """Return |v_i| of each layer: how far its weights are from those before fine-tuning.

    Parameters
    ----------
    params, initial : pytrees of arrays of the same structure
    by_layer : as in `curvature_operator`

    Raises
    ------
    InputError
        If the two differ in structure or shapes.
    """
    shapes, others = ([np.shape(a) for a in jax.tree.leaves(t)] for t in (params, initial))
    if not same_structure(params, initial) or shapes != others:
        raise InputError("params and initial must have the same structure and shapes: give the weights of one model.")
    squares: dict[str, float] = {}
    leaves = zip(leaf_names(params), jax.tree.leaves(params), jax.tree.leaves(initial), strict=True)
    for name, a, b in leaves:
        layer = layer_name(by_layer, name)
        change = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        squares[layer] = squares.get(layer, 0.0) + float(np.sum(change**2))
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def generalization_bound(
    train_loss: float,
    n: int,
    distances: Mapping[str, float],
    *,
    quadratic_forms: Mapping[str, float] | None = None,
    traces: Mapping[str, float] | None = None,
    loss_bound: float,
    epsilon: float = 0.1,
    test_loss: float | None = None,
) -> Bound:
    """Return the bound of LensLLM's Theorem 2 on the test loss, term by term.

    ``L <= (1 + eps) train_loss + (1 + eps) / sqrt(n) * sum_i sqrt(C H_i) + xi``, with probability 0.99.

    Parameters
    ----------
    train_loss : float
        Mean loss on the n training samples, nats.
    n : int
        Training samples.
    distances : mapping layer -> |v_i|
        From `layer_distances`.
    quadratic_forms : mapping layer -> max over examples of v_i^T Hess_i^+ v_i, optional
        From `per_example_quadratic_forms`. The maximum should be over all examples; over some of them it is an estimate
        from below.
    traces : mapping layer -> trace of the layer's Hessian, optional
        Used where `quadratic_forms` is not given: H_i = |v_i|^2 tr(Hess_i), which follows from noise of the same size
        in all directions. Traces of Gauss-Newton matrices are never negative; a negative trace counts as 0,
        for such noise
        then costs nothing.
    loss_bound : float
        C, the largest loss an example can have; so not less than `train_loss`, their mean.
    epsilon : float
        Greater than 0. The smaller, the larger the constant in xi.
    test_loss : float, optional
        To be compared with the bound.

    Returns
    -------
    Bound

    Raises
    ------
    InputError
        If neither or both of `quadratic_forms` and `traces` are given, layers differ, or a number is not finite or out
        of range (`loss_bound` must not be below `train_loss`).

    References
    ----------
    LensLLM (ICML 2025, arXiv 2505.03793), Theorem 2 and Proposition 1; Ju et al. 2022, arXiv:2206.02659.
    """
    if (quadratic_forms is None) == (traces is None):
        raise InputError("give either quadratic_forms (Theorem 2) or traces (noise of one size in all directions).")
    if not (n >= 1 and 0 < epsilon < math.inf and 0 < loss_bound < math.inf):
        raise InputError(f"n={n}, epsilon={epsilon} and loss_bound={loss_bound} must be positive and finite.")
    given: Mapping[str, float] = quadratic_forms if quadratic_forms is not None else traces or {}
    if not given or set(given) != set(distances):
        raise InputError(
            f"distances are of the layers {sorted(distances)}, but curvature of {sorted(given)}: use one by_layer."
        )
    numbers = [train_loss, *([] if test_loss is None else [test_loss]), *given.values(), *distances.values()]
    if not all(math.isfinite(x) for x in numbers) or min(distances.values()) < 0:
        raise InputError(f"losses, distances and curvatures must be finite and distances not negative: {numbers}.")
    if loss_bound < train_loss * (1 - 1e-6):  # a mean of equal losses may be rounded up
        raise InputError(
            f"loss_bound={loss_bound} is less than train_loss={train_loss}, but it is the largest loss an example can "
            "have: give one that no example exceeds."
        )
    layers = {}
    for name, distance in distances.items():
        form = max(float(given[name]), 0.0) * (1.0 if quadratic_forms is not None else distance**2)
        layers[name] = LayerTerm(float(distance), form, (1 + epsilon) * math.sqrt(loss_bound * form / n))
    complexity = sum(term.value for term in layers.values())
    together = len(layers) * sum(term.form for term in layers.values())
    return Bound(
        (1 + epsilon) * train_loss + complexity,
        (1 + epsilon) * train_loss,
        complexity,
        layers,
        (1 + epsilon) * math.sqrt(loss_bound * together / n),
        n**-0.75,
        "hessian" if quadratic_forms is not None else "isotropic",
        epsilon,
        loss_bound,
        train_loss,
        n,
        test_loss,
    )


@dataclasses.dataclass(frozen=True)
class PowerLawFit:
    """``values = prefactor * n^(-exponent)``, fitted by least squares in logarithms.

    Attributes
    ----------
    exponent, standard_error : float
        The error is NaN for two points.
    prefactor : float
    r_squared : float
        Share of the logarithms' variance explained; NaN if they do not vary.
    points : int
    """

    exponent: float
    standard_error: float
    prefactor: float
    r_squared: float
    points: int

    def at(self, n: Any) -> Any:
        """Return the fitted values at `n` samples."""
        return self.prefactor * np.asarray(n, np.float64) ** -self.exponent


def fit_power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLawFit:
    """Fit how traces, or the complexities of bounds, fall with the number of training samples.

    Of complexities this gives C3 (`prefactor`) and beta3 (`exponent`) of Corollary 1; of traces the beta of
    Proposition 1.

    Parameters
    ----------
    sizes : (S,), training samples, positive, at least two different ones
    values : (S,), positive

    Raises
    ------
    InputError
        If values or sizes are not finite and positive, or there are fewer than two different sizes.
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(values, np.float64)
    usable = bool(np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all())
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 2 or not usable:
        raise InputError(
            "a power of n needs finite positive values at two different positive sizes, not "
            f"{y.tolist()} at {x.tolist()}."
        )
    log_x, log_y = np.log(x), np.log(y)
    centred = log_x - log_x.mean()
    slope = float(centred @ log_y / (centred @ centred))
    rest = log_y - log_y.mean() - slope * centred
    spread = float(np.sum((log_y - log_y.mean()) ** 2))
    error = math.sqrt(float(rest @ rest) / (len(x) - 2) / float(centred @ centred)) if len(x) > 2 else math.nan
    prefactor = math.exp(float(log_y.mean()) - slope * float(log_x.mean()))
    explained = 1 - float(rest @ rest) / spread if spread > 0 else math.nan
    return PowerLawFit(-slope, error, prefactor, explained, len(x))


def corollary_bound(train_loss: float, n: float, fall: PowerLawFit, *, epsilon: float = 0.1) -> float:
    """Return Corollary 1 without its remainder, ``(1 + eps) train_loss + C3 n^(-beta3)``, with C3 and beta3 fitted.

    Parameters
    ----------
    train_loss : float
        Nats.
    n : float
        Training samples.
    fall : PowerLawFit
        Of the bounds' `complexity`, made with the same `epsilon`, for its factor 1 + epsilon is in C3.
    epsilon : float

    Returns
    -------
    float, nats

    Raises
    ------
    InputError
        If a number is out of range.
    """
    if not (math.isfinite(train_loss) and n > 0 and epsilon > 0):
        raise InputError(f"train_loss={train_loss} must be finite, n={n} and epsilon={epsilon} positive.")
    return (1 + epsilon) * train_loss + float(fall.at(n))


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phase at each size, by the fall of the trace and by the scaling law of the losses.

    Attributes
    ----------
    sizes : tuple of float
    by_trace, by_loss : tuple of {"pre-power", "power", "unknown"}
        "unknown" where the law could not be fitted, or the points do not determine it (a trace that does not fall).
    transition_by_trace, transition_by_loss : float
        Samples at which the power phase begins, NaN if unknown.
    status_of_trace, status_of_loss : str
        Of the fits.
    fall : PowerLawFit
        Of the traces over all sizes.
    """

    sizes: tuple[float, ...]
    by_trace: tuple[str, ...]
    by_loss: tuple[str, ...]
    transition_by_trace: float
    transition_by_loss: float
    status_of_trace: str
    status_of_loss: str
    fall: PowerLawFit


def compare_phases(sizes: Sequence[float], traces: Sequence[float], losses: Sequence[float]) -> Phases:
    """Say which phase each size is in, by the Hessian's traces and by the losses.

    Both are fitted with the same saturating law, ``B / (F + n^beta) + E``, whose power phase begins at F^(1/beta):
    large, constant traces before it, and a fall as n^(-beta) after it (the paper's remarks on Theorem 2).

    Parameters
    ----------
    sizes : (S,), training samples, positive; fewer than four different ones leave the phases unknown
    traces, losses : (S,), positive

    Raises
    ------
    InputError
        If there are fewer than two different sizes, or numbers are not positive.

    References
    ----------
    LensLLM (ICML 2025), section 3.
    """
    fall = fit_power_law(sizes, traces)
    values = np.asarray([traces, losses], np.float64)
    fits = fit(np.asarray(sizes, np.float64), values, "rectified", huber_delta=1.0)
    known = np.asarray(fits.converged) & np.asarray(fits.determined)
    moments = [float(x) if ok else math.nan for x, ok in zip(fits.transition, known, strict=True)]

    def phases(moment: float) -> tuple[str, ...]:
        if math.isnan(moment):
            return ("unknown",) * len(sizes)
        return tuple("power" if n >= moment else "pre-power" for n in sizes)

    by_trace, by_loss = (phases(moment) for moment in moments)
    status = fits.status
    whole = tuple(float(n) for n in sizes)
    return Phases(whole, by_trace, by_loss, moments[0], moments[1], status[0], status[1], fall)
