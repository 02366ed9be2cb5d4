"""Parametrizations of the laws for fitting: levels of the curve instead of B and E, with bounds and starting points.

The natural parameters lie in a curved valley: over a few octaves, a smaller E is made up for by a smaller beta.
Levels of the curve itself, at its smallest and largest measured positive sizes D_0 and D_1, are nearly independent.
Sizes enter as x = log(D / D_0), so that the fit does not depend on the unit of D.

rectified, lens with a free number F
    log L(D_0); drop = log(L(D_0) / L(D_1)); u = log((L(D_1) - E) / L(D_1)), 0 at E = 0; s = log(F / D_0^beta).
    beta follows: (F + D_1^beta) / (F + D_0^beta) = (L(D_0) - E) / (L(D_1) - E).
power
    log L(D_0); drop; u, now of L^(1/alpha) = B / D^beta + E; log alpha.
lens with F given, or F(t) from a kernel
    log L(D_0); E / L(D_0); beta; and log(1 + tau), tau = 2 eta lam_max t, where t is fitted.

Inside the boxes exp(beta x) cannot overflow, so these forms need no log-sum-exp; `lensjax.laws.laws` is the
reference they are tested against.

Curves are columns: coordinates (P, N), and a dict of arrays that end in the axis N of the curves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lensjax.laws.laws import log_kernel_residual
from lensjax.laws.solver import Box, lowest

CurveData = dict[str, jax.Array]
"""Measurements of N curves, see `lensjax.laws.fitting`: arrays that end in the axis N."""

# Bounds. A drop of 1e-9 is flat; u = -14 leaves a millionth of L(D_1) to fall; s = -16 makes F 1e-7 of D_0^beta.
MIN_DROP, MAX_DROP = 1e-9, 12.0
MIN_U = -14.0
MIN_S, MAX_S = -16.0, 40.0
LOG_ALPHA = (-3.0, 5.0)
MAX_E = 1.0 - 1e-6
BETA = (1e-3, 5.0)
MIN_TAU = 1e-12

_LEVEL_BOUNDS = ("loss at its smallest", "loss at its largest")
_DROP_BOUNDS = ("beta = 0 (flat curve)", "drop at its largest")
_U_BOUNDS = ("L = E at the largest size", "E = 0")
_COARSE_BETAS = (0.03, 0.06, 0.1, 0.16, 0.24, 0.36, 0.55, 0.85, 1.4)
_NUM_OFFSETS = 8
_NUM_FINE_BETAS = 32


class Parametrization(NamedTuple):
    """How one law is fitted.

    Attributes
    ----------
    raw : names of the unconstrained parameters (`Fits.raw`), on which priors are put
    params : names of the natural parameters (`Fits.params`)
    bounds : for each coordinate, what its lower and its upper bound mean
    log_loss : (coordinates (P, N), data) -> log losses (S, N)
    to_raw : (coordinates (P, N), data) -> (len(raw), N)
    to_params : (coordinates (P, N), data) -> (len(params), N)
    box : data -> Box of arrays (P, N)
    grid : data -> for G shapes, one beta after another: L - E relative to that at D_0, at every size (S, G, N) and
        at D_1 (G, N); and the values (G, N) of beta and of the last coordinate, if it shapes the curve
    num_betas : how many betas the grid has
    to_coordinates : (L - E at D_0, E, ratio of L - E at D_1 and D_0, beta, last coordinate) -> list of P coordinates
    """

    raw: tuple[str, ...]
    params: tuple[str, ...]
    bounds: tuple[tuple[str, str], ...]
    log_loss: Callable[[jax.Array, CurveData], jax.Array]
    to_raw: Callable[[jax.Array, CurveData], jax.Array]
    to_params: Callable[[jax.Array, CurveData], jax.Array]
    box: Callable[[CurveData], Box]
    grid: Callable[[CurveData], tuple[jax.Array, jax.Array, list[jax.Array]]]
    to_coordinates: Callable[..., list[jax.Array]]
    num_betas: int = len(_COARSE_BETAS)


def _box(data: CurveData, *sides: tuple[jax.Array | float, jax.Array | float, float]) -> Box:
    """Stack (lower, upper, max_step) of each coordinate; the level's come first for every law."""
    top = data["log_top"]
    full = [
        jnp.stack([jnp.broadcast_to(jnp.asarray(v, top.dtype), top.shape) for v in f])
        for f in zip((top - 6.0, top + 1.0, 0.3), *sides, strict=True)
    ]
    return Box(*full)


def _powers(beta: jax.Array, x: jax.Array, positive: jax.Array) -> jax.Array:
    """(D / D_0)^beta, 0 at D = 0."""
    return positive * jnp.exp(beta * x)


def _with_params(
    to_raw: Callable[[jax.Array, CurveData], jax.Array], logs: tuple[int, ...]
) -> Callable[..., jax.Array]:
    def to_params(c: jax.Array, data: CurveData) -> jax.Array:
        raw = to_raw(c, data)
        return jnp.stack([jnp.exp(raw[i]) if i in logs else raw[i] for i in range(len(raw))])

    return to_params


# --- F a free number -------------------------------------------------------------------------------------------------


def _free_shape(c: jax.Array, data: CurveData) -> tuple[jax.Array, ...]:
    """L - E at D_0, E, beta, F / D_0^beta."""
    first = jnp.exp(c[0])
    last = first * jnp.exp(-c[1])
    offset = jnp.exp(c[3])
    rise = -jnp.expm1(-c[1]) / jnp.exp(-c[1] + c[2])
    E = last * (1.0 - jnp.exp(c[2]))
    return first - E, E, jnp.log1p(rise * (1.0 + offset)) / data["span"], offset


def _free_log_loss(c: jax.Array, data: CurveData) -> jax.Array:
    amplitude, E, beta, offset = _free_shape(c, data)
    return jnp.log(amplitude * (1.0 + offset) / (offset + _powers(beta, data["x"], data["positive"])) + E)


def _free_raw(c: jax.Array, data: CurveData) -> jax.Array:
    amplitude, E, beta, offset = _free_shape(c, data)
    shift = beta * data["log_ref"]
    return jnp.stack([jnp.log(amplitude) + jnp.log1p(offset) + shift, E, beta, c[3] + shift])


def _free_box(data: CurveData) -> Box:
    # The upper bound of s keeps beta, which grows with it, below about 20 on curves of few octaves.
    return _box(
        data,
        (MIN_DROP, MAX_DROP, 0.3),
        (MIN_U, 0.0, 1.0),
        (MIN_S, jnp.minimum(MAX_S, 10.0 * data["span"]), 3.0),
    )


def _free_grid(data: CurveData) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    beta = jnp.asarray(_COARSE_BETAS)[:, None, None]
    s = jnp.linspace(0.0, 1.0, _NUM_OFFSETS)[None, :, None] * (beta * data["span"] + 7.0) - 4.0
    offset = jnp.exp(s)
    powers = _powers(beta, *(data[k][:, None, None] for k in ("x", "positive")))
    values = (1.0 + offset) / (offset + powers)
    last = (1.0 + offset) / (offset + jnp.exp(beta * data["span"]))
    flat = (-1, s.shape[-1])
    return (
        values.reshape(len(values), *s.shape).reshape(len(values), *flat),
        last.reshape(flat),
        [jnp.broadcast_to(beta, s.shape).reshape(flat), s.reshape(flat)],
    )


def _levels_to_coordinates(
    amplitude: jax.Array, E: jax.Array, ratio: jax.Array, beta: jax.Array, last: jax.Array
) -> list[jax.Array]:
    end = amplitude * ratio + E
    return [jnp.log(amplitude + E), jnp.log((amplitude + E) / end), jnp.log(amplitude * ratio / end), last]


def _free(name: str) -> Parametrization:
    return Parametrization(
        raw=("log_B", "E", "beta", f"log_{name}"),
        params=("B", "E", "beta", name),
        bounds=(_LEVEL_BOUNDS, _DROP_BOUNDS, _U_BOUNDS, (f"{name} = 0", f"{name} at its largest")),
        log_loss=_free_log_loss,
        to_raw=_free_raw,
        to_params=_with_params(_free_raw, (0, 3)),
        box=_free_box,
        grid=_free_grid,
        to_coordinates=_levels_to_coordinates,
    )


# --- power law -------------------------------------------------------------------------------------------------------


def _power_shape(c: jax.Array, data: CurveData) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Share of E in L(D_0)^(1/alpha), beta, alpha."""
    alpha = jnp.exp(c[3])
    fall = jnp.exp(-c[1] / alpha)
    beta = jnp.log1p(-jnp.expm1(-c[1] / alpha) / (fall * jnp.exp(c[2]))) / data["span"]
    return (1.0 - jnp.exp(c[2])) * fall, beta, alpha


def _power_log_loss(c: jax.Array, data: CurveData) -> jax.Array:
    share, beta, alpha = _power_shape(c, data)
    return c[0] + alpha * jnp.log((1.0 - share) * jnp.exp(-beta * data["x"]) + share)


def _power_raw(c: jax.Array, data: CurveData) -> jax.Array:
    share, beta, alpha = _power_shape(c, data)
    level = c[0] / alpha
    return jnp.stack([level + jnp.log1p(-share) + beta * data["log_ref"], share * jnp.exp(level), beta, c[3]])


def _fine_betas() -> jax.Array:
    return jnp.geomspace(0.01, 4.0, _NUM_FINE_BETAS)[:, None]


def _power_grid(data: CurveData) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    beta = _fine_betas()
    last = jnp.exp(-beta * data["span"])
    # log alpha = 0: the law is linear in B and E there.
    return jnp.exp(-beta * data["x"][:, None]), last, [jnp.broadcast_to(beta, last.shape), jnp.zeros_like(last)]


_POWER = Parametrization(
    raw=("log_B", "E", "beta", "log_alpha"),
    params=("B", "E", "beta", "alpha"),
    bounds=(_LEVEL_BOUNDS, _DROP_BOUNDS, _U_BOUNDS, ("alpha = 0.05", "alpha = 148")),
    log_loss=_power_log_loss,
    to_raw=_power_raw,
    to_params=_with_params(_power_raw, (0, 3)),
    box=lambda data: _box(data, (MIN_DROP, MAX_DROP, 0.3), (MIN_U, 0.0, 1.0), (*LOG_ALPHA, 0.5)),
    grid=_power_grid,
    to_coordinates=_levels_to_coordinates,
    num_betas=_NUM_FINE_BETAS,
)


# --- F given at each size, or F(t) from a kernel ---------------------------------------------------------------------


def _given_offsets(c: jax.Array, data: CurveData) -> tuple[jax.Array, jax.Array]:
    """F / D_0^beta at every size, and at D_0."""
    shift = c[2] * data["log_ref"]
    return jnp.exp(data["log_F"] - shift), jnp.exp(data["log_F_ref"] - shift)


def _log_kernel(spread: jax.Array, data: CurveData) -> jax.Array:
    """Log F (..., N) at log(1 + tau) (..., N)."""
    return log_kernel_residual(jnp.expm1(spread), data["spectrum"].T, data["projections"].T, 0.5)


def _kernel_offsets(c: jax.Array, data: CurveData) -> tuple[jax.Array, jax.Array]:
    offset = jnp.exp(_log_kernel(c[3], data) - c[2] * data["log_ref"])
    return offset, offset


def _known(
    offsets: Callable[[jax.Array, CurveData], tuple[jax.Array, jax.Array]],
) -> tuple[Callable[..., jax.Array], ...]:
    """Return log_loss and the raw log_B, E, beta, for a law whose F is known."""

    def log_loss(c: jax.Array, data: CurveData) -> jax.Array:
        here, ref = offsets(c, data)
        # An unused point with F = 0 and D = 0 must not divide by 0.
        total = jnp.where(data["used"] > 0, here + _powers(c[2], data["x"], data["positive"]), 1.0)
        return c[0] + jnp.log((1.0 - c[1]) * (1.0 + ref) / total + c[1])

    def raw(c: jax.Array, data: CurveData) -> jax.Array:
        log_B = c[0] + jnp.log1p(-c[1]) + jnp.log1p(offsets(c, data)[1]) + c[2] * data["log_ref"]
        return jnp.stack([log_B, c[1] * jnp.exp(c[0]), c[2]])

    return log_loss, raw


_KNOWN_BOUNDS = (_LEVEL_BOUNDS, ("E = 0", "E = L at the smallest size"), (f"beta = {BETA[0]:g}", f"beta = {BETA[1]:g}"))
_KNOWN_SIDES: tuple[tuple[float, float, float], ...] = ((0.0, MAX_E, 0.3), (*BETA, 0.5))


def _known_to_coordinates(
    amplitude: jax.Array, E: jax.Array, ratio: jax.Array, beta: jax.Array, *last: jax.Array
) -> list[jax.Array]:
    return [jnp.log(amplitude + E), E / (amplitude + E), beta, *last]


def _given() -> Parametrization:
    log_loss, to_raw = _known(_given_offsets)

    def grid(data: CurveData) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        beta = _fine_betas()
        shift = beta * data["log_ref"]
        total = jnp.exp(data["log_F"][:, None] - shift) + _powers(beta, data["x"][:, None], data["positive"][:, None])
        values = (1.0 + jnp.exp(data["log_F_ref"] - shift)) / jnp.where(data["used"][:, None] > 0, total, 1.0)
        return values, jnp.ones_like(shift), [jnp.broadcast_to(beta, shift.shape)]

    return Parametrization(
        raw=("log_B", "E", "beta"),
        params=("B", "E", "beta"),
        bounds=_KNOWN_BOUNDS,
        log_loss=log_loss,
        to_raw=to_raw,
        to_params=_with_params(to_raw, (0,)),
        box=lambda data: _box(data, *_KNOWN_SIDES),
        grid=grid,
        to_coordinates=_known_to_coordinates,
        num_betas=_NUM_FINE_BETAS,
    )


def _kernel() -> Parametrization:
    log_loss, known_raw = _known(_kernel_offsets)

    def to_raw(c: jax.Array, data: CurveData) -> jax.Array:
        # log t is -inf at the bound t = 0, and its derivative infinite: it ends at a tau of no effect.
        log_tau = jnp.log(jnp.maximum(jnp.expm1(c[3]), MIN_TAU))
        return jnp.concatenate([known_raw(c, data), (log_tau - data["log_rate"])[None]])

    def to_params(c: jax.Array, data: CurveData) -> jax.Array:
        log_B, E, beta = known_raw(c, data)
        t = jnp.expm1(c[3]) * jnp.exp(-data["log_rate"])
        return jnp.stack([jnp.exp(log_B), E, beta, jnp.exp(_log_kernel(c[3], data)), t])

    def grid(data: CurveData) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        beta = jnp.asarray(_COARSE_BETAS)[:, None, None]
        spread = jnp.linspace(0.01, 0.99, 12)[:, None] * data["largest_spread"]
        offset = jnp.exp(_log_kernel(spread, data) - beta * data["log_ref"])
        powers = _powers(beta, *(data[k][:, None, None] for k in ("x", "positive")))
        flat = (-1, offset.shape[-1])
        values = ((1.0 + offset) / (offset + powers)).reshape(len(powers), *flat)
        return (
            values,
            jnp.ones_like(offset).reshape(flat),
            [jnp.broadcast_to(v, offset.shape).reshape(flat) for v in (beta, spread)],
        )

    return Parametrization(
        raw=("log_B", "E", "beta", "log_t"),
        params=("B", "E", "beta", "F", "t"),
        bounds=(*_KNOWN_BOUNDS, ("t = 0", "t at its largest")),
        log_loss=log_loss,
        to_raw=to_raw,
        to_params=to_params,
        box=lambda data: _box(data, *_KNOWN_SIDES, (0.0, data["largest_spread"], 2.0)),
        grid=grid,
        to_coordinates=_known_to_coordinates,
    )


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "power": _POWER,
    "rectified": _free("D_l"),
    "lens": _free("F"),
    "lens, F given": _given(),
    "lens, kernel": _kernel(),
}


def starts(form: Parametrization, data: CurveData, number: int) -> jax.Array:
    """Best few points (P, N, number) of a grid over the shape; amplitude and E by nonnegative least squares.

    The squares are those of relative errors of the loss, which are the errors of its logarithm to first order.
    Points that are kept differ in beta.
    """
    shape, ratio, coordinates = form.grid(data)
    weight, inverse = data["weight"][:, None], jnp.exp(-data["log_loss"])[:, None]
    scaled = shape * inverse
    aa, ae, ee = (weight * scaled**2).sum(0), (weight * scaled * inverse).sum(0), (weight * inverse**2).sum(0)
    a1, e1 = (weight * scaled).sum(0), (weight * inverse).sum(0)
    determinant = aa * ee - ae**2
    regular = determinant > 1e-12 * aa * ee
    bottom = jnp.where(regular, determinant, 1.0)
    amplitude, E = (ee * a1 - ae * e1) / bottom, (aa * e1 - ae * a1) / bottom
    both = regular & (E >= 0)
    amplitude = jnp.where(both, amplitude, a1 / jnp.where(aa > 0, aa, 1.0))
    E = jnp.where(both, E, 0.0)
    tiny = 1e-6 * jnp.exp(data["log_top"])
    E = jnp.where(amplitude > tiny, E, e1 / jnp.where(ee > 0, ee, 1.0))
    amplitude = jnp.maximum(amplitude, tiny)
    misfit = amplitude**2 * aa + 2 * amplitude * E * ae + E**2 * ee - 2 * (amplitude * a1 + E * e1)
    misfit = jnp.where(jnp.isfinite(misfit), misfit, jnp.inf)

    # One candidate for each beta (their values follow one another), then the best of these.
    by_beta = misfit.reshape(form.num_betas, -1, misfit.shape[-1])
    chosen = jax.lax.top_k(-by_beta.min(1).T, number)[1].T
    inner = lowest(by_beta.transpose(0, 2, 1))
    which = chosen * by_beta.shape[1] + jnp.take_along_axis(inner, chosen, 0)
    picked = (
        jnp.take_along_axis(v, which, 0) for v in (amplitude, jnp.broadcast_to(E, misfit.shape), ratio, *coordinates)
    )
    box = form.box(data)
    points = jnp.clip(jnp.stack(form.to_coordinates(*picked)), box.lower[:, None], box.upper[:, None])
    return points.transpose(0, 2, 1)
