"""`fit`: all curves of a table in one compiled call, in float64, differentiable by the implicit function theorem."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax._tracing import concrete
from lensjax.errors import InputError
from lensjax.laws.fits import Fits
from lensjax.laws.laws import LAWS, log_kernel_residual
from lensjax.laws.parametrization import PARAMETRIZATIONS, CurveData, Parametrization, starts
from lensjax.laws.solver import Terms, huber_sums, implicit_vjp, lowest, minimize

Inputs = dict[str, Any]

# On CPU these halve the time to compile the fit, to code just as fast. JAX takes options from the outermost jit only.
QUICK_TO_COMPILE: dict[str, bool | int] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_backend_optimization_level": 1,
}


def _safe_log(values: jax.Array) -> jax.Array:
    return jnp.where(values > 0, jnp.log(jnp.where(values > 0, values, 1.0)), -jnp.inf)


def _curve_data(inputs: Inputs, name: str) -> tuple[CurveData, jax.Array]:
    """Return the curves as `lensjax.laws.parametrization` expects them, curves last, and the Huber widths (M,)."""
    given = {key: jnp.asarray(value, jnp.float64) for key, value in inputs.items()}
    losses = given["losses"]
    curves, points = losses.shape
    sizes = jax.lax.stop_gradient(jnp.broadcast_to(given["sizes"], losses.shape))
    weights = jnp.broadcast_to(given["weights"], losses.shape)

    used = ~jnp.isnan(losses)
    if name == "power":
        used &= sizes > 0
    counted = used & (weights > 0)
    log_size = jnp.log(jnp.where(sizes > 0, sizes, 1.0))
    anchor = counted & (sizes > 0)
    first = jnp.where(anchor, log_size, jnp.inf).min(1)
    last = jnp.where(anchor, log_size, -jnp.inf).max(1)
    some = anchor.any(1)
    log_ref = jnp.where(some, first, 0.0)
    log_loss = jnp.log(jnp.where(used, losses, 1.0))
    data: CurveData = {
        "x": jnp.where(used & (sizes > 0), log_size - log_ref[:, None], 0.0).T,
        "positive": (sizes > 0).astype(jnp.float64).T,
        "used": used.astype(jnp.float64).T,
        "weight": jnp.where(used, weights, 0.0).T,
        "log_loss": log_loss.T,
        "log_ref": log_ref,
        # One octave at least: the levels of a law are read at both ends.
        "span": jnp.maximum(jnp.where(some, last - first, 0.0), np.log(2.0)),
        "log_top": jnp.where(counted.any(1), jnp.where(counted, log_loss, -jnp.inf).max(1), 0.0),
        "count": counted.astype(jnp.float64).sum(1),
    }
    if "prior_mean" in given:
        data["prior_mean"] = jnp.broadcast_to(given["prior_mean"], (len(given["prior_mean"]), curves))
        data["prior_strength"] = jnp.broadcast_to(given["prior_strength"], data["prior_mean"].shape)
    if "eigenvalues" in given:
        eigenvalues = jnp.broadcast_to(given["eigenvalues"], (curves, given["eigenvalues"].shape[-1]))
        projections = jnp.broadcast_to(given["projections"], eigenvalues.shape)
        rate = jnp.broadcast_to(given["learning_rate"], (curves,))
        if name == "lens, kernel":
            largest = eigenvalues.max(1)
            least = jnp.where(eigenvalues > 1e-12 * largest[:, None], eigenvalues, jnp.inf).min(1)
            data["spectrum"] = (eigenvalues / largest[:, None]).T
            data["projections"] = projections.T
            data["log_rate"] = jnp.log(2.0 * rate * largest)
            data["largest_spread"] = jax.lax.stop_gradient(jnp.log1p(50.0 * largest / least))
        else:
            t = jnp.broadcast_to(given["t"], (curves, points))
            data["log_F"] = jax.vmap(log_kernel_residual)(
                t, eigenvalues[:, None], projections[:, None], rate[:, None, None]
            ).T
    if "F" in given:
        data["log_F"] = _safe_log(jnp.broadcast_to(given["F"], (curves, points))).T
    if "log_F" in data:
        data["log_F"] = jnp.where(used.T, data["log_F"], 0.0)
        at = lowest(jnp.where(anchor, log_size, jnp.inf))
        data["log_F_ref"] = jnp.take_along_axis(data["log_F"], at[None], 0)[0]
    return data, jnp.broadcast_to(given["huber_delta"], (curves,))


def _residuals(form: Parametrization, coordinates: jax.Array, data: CurveData) -> Terms:
    """Log residuals of the curves, then the deviations from the priors."""
    values = jnp.where(data["used"] > 0, form.log_loss(coordinates, data) - data["log_loss"], 0.0)
    weights, square = data["weight"], jnp.zeros(values.shape, bool)
    if "prior_mean" in data:
        raw = form.to_raw(coordinates, data)
        values = jnp.concatenate([values, raw - data["prior_mean"]])
        weights = jnp.concatenate([weights, data["prior_strength"]])
        square = jnp.concatenate([square, jnp.ones(raw.shape, bool)])
    return Terms(values, weights, square)


def _results(name: str, variables: jax.Array, inputs: Inputs) -> dict[str, jax.Array]:
    """Return what is differentiable about the minimum, given where it is."""
    form = PARAMETRIZATIONS[name]
    data, width = _curve_data(inputs, name)
    return {
        "raw": form.to_raw(variables, data),
        "params": form.to_params(variables, data),
        "objective": huber_sums(functools.partial(_residuals, form), variables, data, width),
    }


def _jit_quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with QUICK_TO_COMPILE where that is possible: on CPU, and not while tracing."""
    plain, quick = jax.jit(function), jax.jit(function, compiler_options=QUICK_TO_COMPILE)

    def call(*args: Any) -> Any:
        outermost = all(concrete(leaf) is not None for leaf in jax.tree.leaves(args))
        return (quick if outermost and jax.default_backend() == "cpu" else plain)(*args)

    return call


@functools.lru_cache(maxsize=64)
def _program(name: str, num_starts: int) -> Callable[[Inputs], dict[str, jax.Array]]:
    """Compiled fit of one form: inputs -> results, with its derivative; float64 inside, whatever runs around it.

    Under a float32 trace, JAX differentiates and transposes after `enable_x64` has been left; so both directions
    are compiled here, each under its own `enable_x64`, and JAX sees one opaque operation (custom_vjp).
    """
    form = PARAMETRIZATIONS[name]
    residuals = functools.partial(_residuals, form)

    @_jit_quickly
    def forward(inputs: Inputs) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array]:
        data, width = _curve_data(inputs, name)
        found = minimize(residuals, starts(form, data, num_starts), data, width, form.box(data))
        known = data["count"] + jnp.sum(data["prior_strength"] > 0, 0) if "prior_mean" in data else data["count"]
        enough = known >= len(form.bounds)
        results = jax.tree.map(lambda leaf: jnp.where(enough, leaf, jnp.nan), _results(name, found.variables, inputs))
        facts = {
            "points": data["count"].astype(jnp.int32),
            "enough": enough,
            "side": jnp.where(enough, found.side, 0),
            "converged": found.converged & enough,
            "determined": found.determined,
            "iterations": found.iterations,
        }
        return results | facts, found.variables, found.side, found.isolated & enough

    @_jit_quickly
    def backward(
        inputs: Inputs, variables: jax.Array, side: jax.Array, sound: jax.Array, cotangent: dict[str, jax.Array]
    ) -> Inputs:
        results = functools.partial(_results, name)
        to_variables, direct = jax.vjp(results, variables, inputs)[1](cotangent)
        # Where nothing was found there is no derivative either: say so, unless nobody asks.
        to_variables = jnp.where(sound | (to_variables == 0), to_variables, jnp.nan)
        through = implicit_vjp(residuals, variables, side, lambda x: _curve_data(x, name), inputs, to_variables)
        return jax.tree.map(lambda a, b, like: (a + b).astype(like.dtype), direct, through, inputs)

    @jax.custom_vjp
    def run(inputs: Inputs) -> dict[str, jax.Array]:
        with jax.enable_x64(True):
            return forward(inputs)[0]

    def run_forward(inputs: Inputs) -> tuple[dict[str, jax.Array], Any]:
        with jax.enable_x64(True):
            results, *where = forward(inputs)
        return results, (inputs, *where)

    def run_backward(kept: Any, cotangent: dict[str, jax.Array]) -> tuple[Inputs]:
        with jax.enable_x64(True):
            return (backward(*kept, {key: cotangent[key] for key in ("raw", "params", "objective")}),)

    run.defvjp(run_forward, run_backward)
    return run


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise InputError(message)


def _floating(value: Any) -> Any:
    """Return an array of floats: NumPy float64 if the value is concrete, else a tracer of its own float type."""
    known = concrete(value)
    if known is not None:
        return np.asarray(known, np.float64)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


def _spread(value: Any, shape: tuple[int, ...], what: str) -> Any:
    value = _floating(value)
    try:
        fits_in = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits_in = False
    _require(fits_in, f"{what} has shape {value.shape}, which does not broadcast to {shape}.")
    return value


def _full(value: Any, shape: tuple[int, ...]) -> Any:
    """Broadcast what is concrete, so that one compiled fit serves numbers and arrays."""
    return np.broadcast_to(value, shape) if isinstance(value, np.ndarray) else value


def _checked(value: Any, valid: Callable[[np.ndarray], Any], what: str) -> None:
    """Raise unless all entries that can be looked at (not traced) are valid."""
    known = concrete(value)
    if known is not None and not np.all(good := valid(known)):
        raise InputError(f"{what}, found {known[~np.broadcast_to(good, known.shape)].flat[0]:g}.")


def _prior(prior: Mapping[str, tuple[Any, Any]], form: Parametrization, law: str, curves: int) -> Inputs:
    unknown = sorted(set(prior) - set(form.raw))
    _require(not unknown, f"prior on {unknown}: the law '{law}' has {', '.join(form.raw)} to put priors on.")
    means, strengths = [], []
    for name in form.raw:
        mean, strength = (_spread(v, (curves,), f"prior on {name}") for v in prior.get(name, (0.0, 0.0)))
        _checked(mean, np.isfinite, f"prior on {name}: the mean must be finite")
        _checked(
            strength, lambda s: np.isfinite(s) & (s >= 0), f"prior on {name}: the strength must be >= 0 and finite"
        )
        means.append(mean)
        strengths.append(strength)

    def stack(values: list[Any]) -> Any:
        library = np if all(isinstance(v, np.ndarray) for v in values) else jnp
        return library.stack([library.broadcast_to(v, (curves,)) for v in values])

    return {"prior_mean": stack(means), "prior_strength": stack(strengths)}


def fit(
    curves: Any,
    losses: Any = None,
    law: str = "lens",
    *,
    weights: Any = None,
    huber_delta: Any = 1e-3,
    prior: Mapping[str, tuple[Any, Any]] | None = None,
    starts: int = 2,
    F: Any = None,
    eigenvalues: Any = None,
    projections: Any = None,
    learning_rate: Any = 1.0,
    t: Any = None,
) -> Fits:
    """Fit a scaling law to every curve of a table.

    Minimises, for each curve, ``sum_i w_i Huber_delta(log L(D_i) - log L_i) + sum_q strength_q / 2 (raw_q - mean_q)^2``
    over a documented box, from several starts, all curves in one compiled call. Float64 inside, whether the caller
    has enabled it or not, also under the caller's `jax.jit`, `jax.grad` (reverse mode) and `jax.vmap`.

    Parameters
    ----------
    curves : object with `sizes` and `losses` (lensjax.losses.curves.Curves), or float array (S,) or (M, S)
        Training samples of each point, >= 0 (0: zero-shot).
    losses : float array (M, S) or (S,), if `curves` are sizes
        Test losses in nats per token, > 0; NaN: not measured. Points in any order; curves of different lengths
        are padded with NaN.
    law : {"lens", "rectified", "power"}
        See `lensjax.laws.LAWS`. The power law, which diverges at 0, leaves zero-shot points out.
    weights : float array broadcastable to (M, S), optional
        Weight of each point, >= 0; default 1.
    huber_delta : float or (M,), default 1e-3
        Where the Huber loss turns from square to linear, in units of log loss. Large: least squares.
    prior : mapping name -> (mean, strength), optional
        Gaussian priors on unconstrained parameters ("log_B", "E", "beta", "log_F" / "log_D_l" / "log_t" /
        "log_alpha", as in `Fits.raw`); strength is 1 / variance in units of the objective; numbers or (M,).
    starts : int, default 2
        Starting points refined for each curve: the best of a grid over the shape parameters.
    F : float array broadcastable to (M, S), optional, law "lens"
        Known F(Theta, t_i) at each size: phase fitting of B, E, beta.
    eigenvalues, projections : float arrays (M, K) or (K,), optional, law "lens"
        lam_k and u_k . r of the kernel, which give F(t) (see `kernel_residual`).
    learning_rate : float or (M,)
        eta in F(t).
    t : float array broadcastable to (M, S), optional, with `eigenvalues`
        Observed training steps at each size: phase fitting. Without it, one t for each curve is fitted too.

    Returns
    -------
    Fits

    Raises
    ------
    InputError
        If a shape, a value or a combination of arguments cannot be used.

    Notes
    -----
    Derivatives of parameters, objective and predictions exist with respect to `losses`, `weights`, `huber_delta`,
    `prior`, `F`, `t`, `eigenvalues`, `projections` and `learning_rate`. A parameter held by a bound stays there
    (the derivative is that of the constrained fit; at the very point where a bound begins to hold, it is one-sided).
    Where the Hessian is singular, what depends on the undetermined direction has derivative NaN. So has
    everything about a fit that failed, or that ended in a flat valley. Forward-mode and second derivatives are
    not defined.

    Why not rely on `enable_x64` alone under a float32 trace: JAX lowers and transposes after it has been left, and
    some of its rules then make float32 constants (an error for `argmin`, silent truncation elsewhere).

    References
    ----------
    LensLLM (ICML 2025, arXiv 2505.03793): eq. 2, 9, 10 and the fitting objective.
    Blondel et al. (NeurIPS 2022, arXiv 2105.15183): implicit differentiation as in jaxopt.

    Examples
    --------
    >>> sizes = np.array([0.0, 200, 400, 800, 1600, 3200])
    >>> losses = 30 / (10 + sizes**0.4) + 1
    >>> fits = fit(sizes, losses, law="rectified")
    >>> fits.status, fits.params["beta"].round(4), fits.predict(1e6).round(4)
    (('converged',), array([0.4]), array([1.1149]))

    The derivative of a prediction by the losses goes through the fit, by implicit differentiation:

    >>> slope = jax.grad(lambda losses: fit(sizes, losses, law="rectified").predict(1e6).sum())(losses)
    >>> slope.shape, bool(jnp.isfinite(slope).all())
    ((6,), True)
    """
    if losses is None:
        _require(
            hasattr(curves, "sizes") and hasattr(curves, "losses"),
            f"fit needs curves (with sizes and losses) or sizes and losses; found {type(curves).__name__} alone.",
        )
        sizes, losses = curves.sizes, curves.losses
    else:
        sizes = curves
    _require(law in LAWS, f"law '{law}' is not known; choose from {', '.join(LAWS)}.")
    _require(isinstance(starts, int) and 1 <= starts <= 8, f"starts is {starts!r}; it must be an integer from 1 to 8.")
    losses = _floating(losses)
    losses = losses[None] if losses.ndim == 1 else losses
    _require(losses.ndim == 2, f"losses have shape {losses.shape}; they must be (curves, sizes).")
    shape = losses.shape
    _require(0 not in shape, f"losses have shape {shape}: there is nothing to fit.")

    inputs: Inputs = {
        "sizes": _spread(sizes, shape, "sizes"),
        "losses": losses,
        "weights": _full(_spread(1.0 if weights is None else weights, shape, "weights"), shape),
        "huber_delta": _full(_spread(huber_delta, shape[:1], "huber_delta"), shape[:1]),
    }
    _require(inputs["sizes"].shape[-1:] == shape[-1:], f"there are {shape[-1]} losses a curve for one size.")
    _checked(inputs["sizes"], lambda d: np.isfinite(d) & (d >= 0), "sizes must be finite and >= 0")
    _checked(losses, lambda x: np.isnan(x) | (np.isfinite(x) & (x > 0)), "losses must be positive and finite, or NaN")
    _checked(inputs["weights"], lambda w: np.isfinite(w) & (w >= 0), "weights must be finite and >= 0")
    _checked(inputs["huber_delta"], lambda d: d > 0, "huber_delta must be > 0")

    name = law
    if F is not None or eigenvalues is not None or t is not None or projections is not None:
        _require(law == "lens", f"F, eigenvalues, projections and t belong to the law 'lens', not to '{law}'.")
        _require((eigenvalues is None) == (projections is None), "eigenvalues and projections come together.")
        _require(F is None or eigenvalues is None, "give F, or eigenvalues and projections, not both.")
        _require(t is None or eigenvalues is not None, "t needs eigenvalues and projections to give F(t).")
        name = "lens, kernel" if F is None and t is None else "lens, F given"
    if F is not None:
        inputs["F"] = _spread(F, shape, "F")
        _checked(inputs["F"], lambda f: np.isfinite(f) & (f >= 0), "F must be finite and >= 0")
        known = [z for z in map(concrete, (inputs["F"], inputs["sizes"], losses)) if z is not None]
        if len(known) == 3:
            clash = (known[0] == 0) & (known[1] == 0) & ~np.isnan(known[2])
            _require(not np.any(clash), "F is 0 at a measured size 0: the law is infinite there; leave that point out.")
    if eigenvalues is not None:
        width = np.shape(eigenvalues)[-1:]
        _require(width and width[0], f"eigenvalues have shape {np.shape(eigenvalues)}; they must be (curves, K).")
        inputs["eigenvalues"] = _spread(eigenvalues, (shape[0], *width), "eigenvalues")
        inputs["projections"] = _spread(projections, (shape[0], *width), "projections")
        inputs["learning_rate"] = _spread(learning_rate, shape[:1], "learning_rate")
        _checked(inputs["eigenvalues"], lambda x: np.isfinite(x) & (x >= 0), "eigenvalues must be finite and >= 0")
        _checked(
            inputs["eigenvalues"].max(-1), lambda x: x > 0, "a kernel needs one eigenvalue > 0; the largest must be > 0"
        )
        _checked(inputs["projections"], np.isfinite, "projections must be finite")
        _checked((inputs["projections"] ** 2).sum(-1), lambda x: x > 0, "the residual's projections must not all be 0")
        _checked(inputs["learning_rate"], lambda x: np.isfinite(x) & (x > 0), "learning_rate must be finite and > 0")
    if t is not None:
        inputs["t"] = _spread(t, shape, "t")
        _checked(inputs["t"], lambda x: np.isfinite(x) & (x >= 0), "t must be finite and >= 0")
    if prior:
        inputs |= _prior(prior, PARAMETRIZATIONS[name], law, shape[0])

    with jax.enable_x64(True):
        found = _program(name, starts)(inputs)
    given: dict[str, Any] = {
        key: inputs[key] for key in ("F", "eigenvalues", "projections", "learning_rate", "t") if key in inputs
    }
    return Fits(law=law, parametrization=name, results=found, given=given)
