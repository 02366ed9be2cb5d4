"""`Fits`, the result of `lensjax.laws.fit`: parameters, status and predictions of the fitted laws."""

from __future__ import annotations

import dataclasses
import functools
import html
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax._display import table
from lensjax._tracing import concrete
from lensjax.errors import InputError
from lensjax.laws.laws import LAWS, kernel_residual, phase_transition
from lensjax.laws.parametrization import PARAMETRIZATIONS


@functools.lru_cache(maxsize=256)
def _in_float64(fun: Callable[..., jax.Array], dtype: Any) -> Callable[..., jax.Array]:
    """`fun` in float64, both ways, under any caller; result of type `dtype`."""

    def wide(*args: Any) -> jax.Array:
        return fun(*(jnp.asarray(a, jnp.float64) for a in args)).astype(dtype)

    forward = jax.jit(wide)
    backward = jax.jit(lambda args, cotangent: jax.vjp(wide, *args)[1](cotangent))

    @jax.custom_vjp
    def call(*args: Any) -> jax.Array:
        with jax.enable_x64(True):
            return forward(*args)

    def call_forward(*args: Any) -> tuple[jax.Array, Any]:
        return call(*args), args

    def call_backward(args: Any, cotangent: jax.Array) -> Any:
        with jax.enable_x64(True):
            return backward(args, cotangent)

    call.defvjp(call_forward, call_backward)
    return call


def _evaluate(fun: Callable[..., jax.Array], *args: Any) -> Any:
    """`fun(*args)` computed in float64: NumPy float64 if concrete, else in the caller's default float type."""
    traced = any(concrete(a) is None for a in args)
    dtype = np.dtype(jnp.result_type(float)) if traced else np.dtype(np.float64)
    with jax.enable_x64(True):
        value = _in_float64(fun, dtype)(*args)
    return value if traced else np.asarray(value)


@functools.lru_cache(maxsize=256)
def _row(which: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda values: values[which]


@functools.lru_cache(maxsize=32)
def _prediction(law: str, names: tuple[str, ...], count: int, source: str) -> Callable[..., jax.Array]:
    """(params (Q, M), D (K,) or (), what F comes from...) -> losses (M, K)."""

    def predict(params: jax.Array, D: jax.Array, *rest: jax.Array) -> jax.Array:
        D = D.reshape(-1)
        values = {name: params[i][:, None] for i, name in enumerate(names)}
        if source == "F":
            values["F"] = jnp.broadcast_to(rest[0], (count, D.shape[-1]))
        elif source == "t":
            t, eigenvalues, projections, rate = rest
            spectrum = jnp.broadcast_to(eigenvalues, (count, eigenvalues.shape[-1]))
            values["F"] = kernel_residual(
                jnp.broadcast_to(t, (count, D.shape[-1])),
                spectrum[:, None],
                jnp.broadcast_to(projections, spectrum.shape)[:, None],
                jnp.broadcast_to(rate, (count,))[:, None, None],
            )
        return jnp.exp(LAWS[law](values, D))

    return predict


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["results", "given"], meta_fields=["law", "parametrization"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Fits:
    """Laws fitted to M curves. A pytree: it may be returned from `jax.jit`.

    Numbers are NumPy float64; inside a JAX transformation they are traced, in the caller's default float type
    (and float64 all the same inside). A fit that failed has NaN for every number.

    Attributes
    ----------
    law : str
        "lens", "rectified" or "power".
    params : dict name -> (M,)
        Natural parameters: B, E, beta and D_l / F / F and t / alpha; as the functions of `LAWS` take them.
    raw : dict name -> (M,)
        Unconstrained parameters, on which priors are put: log_B, E, beta and log_D_l / log_F / log_t / log_alpha.
    objective : (M,)
        Huber sum (and prior penalty) at the minimum.
    converged : bool (M,)
        Whether a minimum in the box was reached, be it at a bound or not unique.
    status : tuple of M str
        "converged", with what is special about the minimum, or "failed" and why. For humans; see the next three.
    at_bound : int (P, M)
        -1 or 1 where a parameter is held by its lower or upper bound; the rows are named by `bounds`.
    determined : bool (M,)
        False where the points leave a direction in parameter space free (singular Hessian).
    points : int (M,)
        Measured points with positive weight.
    transition : (M,)
        Samples at which the power phase begins, F^(1/beta); NaN for the power law, and where F differs by size.

    Examples
    --------
    >>> from lensjax import fit, read_losses
    >>> fits = fit(read_losses("published:flan").visible(204800), law="rectified")
    >>> fits
    Fits(law='rectified', 30 curves, 30 converged)
    >>> fits.predict(1_638_400).shape
    (30,)
    """

    law: str
    parametrization: str
    results: dict[str, Any]
    given: dict[str, Any]

    def _has_single_f(self) -> bool:
        """Whether one F holds for all sizes of a curve."""
        if (
            "F" in PARAMETRIZATIONS[self.parametrization].params
            or "D_l" in PARAMETRIZATIONS[self.parametrization].params
        ):
            return True
        given = self.given.get("F")
        return given is not None and (given.ndim == 0 or given.shape[-1] == 1)

    def _column(self, kind: str, which: Any) -> Any:
        known = concrete(self.results[kind])
        return _evaluate(_row(which), self.results[kind]) if known is None else known[which]

    @property
    def params(self) -> dict[str, Any]:
        """Natural parameters, each (M,)."""
        values = {n: self._column("params", i) for i, n in enumerate(PARAMETRIZATIONS[self.parametrization].params)}
        if self.parametrization == "lens, F given" and self._has_single_f():
            values["F"] = _evaluate(_flat(len(self)), self.given["F"])
        return values

    @property
    def raw(self) -> dict[str, Any]:
        """Unconstrained parameters, each (M,)."""
        return {n: self._column("raw", i) for i, n in enumerate(PARAMETRIZATIONS[self.parametrization].raw)}

    @property
    def objective(self) -> Any:
        """Objective at the minimum (M,)."""
        return self._column("objective", ...)

    def _fact(self, name: str) -> Any:
        known = concrete(self.results[name])
        return self.results[name] if known is None else known

    @property
    def converged(self) -> Any:
        """Whether a minimum in the box was reached (M,)."""
        return self._fact("converged")

    @property
    def determined(self) -> Any:
        """Whether the points determine all parameters (M,)."""
        return self._fact("determined")

    @property
    def at_bound(self) -> Any:
        """Side of the bound that holds each coordinate, or 0 (P, M)."""
        return self._fact("side")

    @property
    def points(self) -> Any:
        """Measured points with positive weight (M,)."""
        return self._fact("points")

    @property
    def iterations(self) -> int:
        """Iterations of the slowest fit of the table."""
        return int(self._fact("iterations"))

    @property
    def bounds(self) -> tuple[tuple[str, str], ...]:
        """For each row of `at_bound`, what the lower and the upper bound mean."""
        return PARAMETRIZATIONS[self.parametrization].bounds

    @property
    def status(self) -> tuple[str, ...]:
        """One readable sentence a curve."""
        names = ("points", "enough", "side", "converged", "determined")
        facts = {name: known for name in names if (known := concrete(self.results[name])) is not None}
        if len(facts) < len(names):
            raise InputError("Fits.status is text: read it outside of jax.jit, jax.grad and jax.vmap.")
        return tuple(self._describe({key: value[..., m] for key, value in facts.items()}) for m in range(len(self)))

    def _describe(self, fact: dict[str, Any]) -> str:
        free = len(self.bounds)
        if not fact["enough"]:
            return f"failed: too few points ({fact['points']} for {free} free parameters)"
        if not fact["converged"]:
            return "failed: no minimum reached"
        words = ["converged"]
        at_bound = [ends[int(side > 0)] for ends, side in zip(self.bounds, fact["side"], strict=True) if side]
        if at_bound:
            words.append("at a bound: " + ", ".join(at_bound))
        if not fact["determined"]:
            words.append("parameters not determined by these points (singular Hessian)")
        return "; ".join(words)

    def __len__(self) -> int:
        return int(self.results["objective"].shape[-1])

    @property
    def transition(self) -> Any:
        """Samples at which the power phase begins (M,)."""
        params = self.params
        F = params.get("F", params.get("D_l"))
        if F is None or self.law == "power":
            return np.full(len(self), np.nan)
        return _evaluate(phase_transition, F, params["beta"])

    def predict(self, D: Any, *, F: Any = None, t: Any = None) -> Any:
        """Losses that the fitted laws predict.

        Parameters
        ----------
        D : float or (K,)
            Training samples.
        F : float array broadcastable to (M, K), optional
            F(Theta, t) at `D`; needed after a fit with F or t given for each size.
        t : float array broadcastable to (M, K), optional
            Training steps at `D`, after a fit with a kernel: F(t) is computed from it.

        Returns
        -------
        float array (M,) for a number `D`, (M, K) for an array: nats per token.

        Raises
        ------
        InputError
            If F is needed and not given, or given and not used.
        """
        if self.law != "lens" and (F is not None or t is not None):
            raise InputError(f"predict: the law '{self.law}' has no F or t to give.")
        if F is not None and t is not None:
            raise InputError("predict: give F or t, not both.")
        single = np.ndim(D) == 0
        names = PARAMETRIZATIONS[self.parametrization].params
        extra: tuple[Any, ...] = ()
        source = "fit"
        if F is not None:
            source, extra = "F", (F,)
        elif t is not None:
            if "eigenvalues" not in self.given:
                raise InputError("predict: t needs a fit with eigenvalues and projections; give F instead.")
            source, extra = "t", (t, *(self.given[k] for k in ("eigenvalues", "projections", "learning_rate")))
        elif self.law == "lens" and not self._has_single_f():
            raise InputError("predict: this fit had its own F at each size; give F= or t= at the sizes to predict.")
        elif self.parametrization == "lens, F given":
            source, extra = "F", (self.given["F"],)
        if np.ndim(D) > 1:
            raise InputError(f"predict: D has shape {np.shape(D)}; it must be a number or one-dimensional.")
        fun = _prediction(self.law, names, len(self), source)
        losses = _evaluate(fun, self.results["params"], D if concrete(D) is None else np.asarray(D, np.float64), *extra)
        return losses[:, 0] if single else losses

    def __repr__(self) -> str:
        known = concrete(self.results["converged"])
        if known is None or known.ndim != 1:
            return f"Fits(law={self.law!r})"
        return f"Fits(law={self.law!r}, {len(self)} curves, {int(known.sum())} converged)"

    def _repr_html_(self) -> str:
        """Show the fits in a notebook."""
        if concrete(self.results["converged"]) is None or self.results["objective"].ndim != 1:
            return f"<pre>{html.escape(repr(self))}</pre>"
        params = {name: np.asarray(values) for name, values in self.params.items()}
        rows = ((m, *(float(values[m]) for values in params.values()), status) for m, status in enumerate(self.status))
        return table(repr(self), ["curve", *params, "status"], rows)


@functools.lru_cache(maxsize=32)
def _flat(count: int) -> Callable[[jax.Array], jax.Array]:
    def flat(F: jax.Array) -> jax.Array:
        return jnp.broadcast_to(F, (count, 1))[:, 0]

    return flat
