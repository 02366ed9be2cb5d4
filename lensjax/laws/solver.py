"""The solver behind `lensjax.laws.fit`, and its implicit derivative: the only module that knows jaxopt.

`minimize` and `implicit_vjp` are all that `fit` uses. Many small problems (a handful of variables each) are solved
together; a problem is one column: variables have shape (P, N), every array of `data` ends in the axis N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxopt import base
from jaxopt.implicit_diff import root_vjp

ProblemData = Any


class Terms(NamedTuple):
    """Residuals (R, N), their weights, and a mask of those that enter as squares instead of Huber losses."""

    values: jax.Array
    weights: jax.Array
    square: jax.Array


Residuals = Callable[[jax.Array, ProblemData], Terms]
"""(variables (P, N), data) -> Terms of shape (R, N); problems must not mix"""

# Relative to the largest eigenvalue of the free block of the Hessian.
SINGULAR_TOLERANCE = 1e-12
# Iterations with nearly no gain after which a problem counts as flat.
MAX_IDLE = 12
# Share of a cotangent's norm that may lie in undetermined directions; above it the derivative is NaN.
NULL_SPACE_TOLERANCE = 1e-6


class Box(NamedTuple):
    """Bounds (P, N) of the variables, and the longest step (P, N) they may take in one iteration."""

    lower: jax.Array
    upper: jax.Array
    max_step: jax.Array


class Minimum(NamedTuple):
    """Where `minimize` stopped.

    Attributes
    ----------
    variables : (P, N)
    value : (N,)
    side : int32 (P, N)
        -1 or 1 where a bound holds the variable back, 0 where it is free.
    converged : bool (N,)
    isolated : bool (N,)
        Whether Newton's method settled; False also where it ended in a flat valley.
    determined : bool (N,)
        Whether it is isolated and the Hessian of the free variables safely positive definite.
    iterations : int32 ()
    """

    variables: jax.Array
    value: jax.Array
    side: jax.Array
    converged: jax.Array
    isolated: jax.Array
    determined: jax.Array
    iterations: jax.Array


class _State(NamedTuple):
    iter_num: jax.Array
    value: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    majorant_weight: jax.Array
    damping: jax.Array
    width: jax.Array
    restarted: jax.Array
    idle: jax.Array
    done: jax.Array


def lowest(values: jax.Array) -> jax.Array:
    """Index (int32) of the smallest value along the last axis.

    `jnp.argmin` of float64 cannot be lowered inside a caller's float32 `jax.jit`: its lowering rule runs after
    `enable_x64` has been left, and makes its constants float32. That of `top_k` is safe.
    """
    return jax.lax.top_k(-values, 1)[1][..., 0]


def huber_sums(residuals: Residuals, variables: jax.Array, data: ProblemData, width: jax.Array) -> jax.Array:
    """Objectives (N,): the weighted sums of the Huber losses of the residuals."""
    terms = residuals(variables, data)
    size = jnp.abs(terms.values)
    loss = jnp.where(terms.square | (size <= width), 0.5 * terms.values**2, width * (size - 0.5 * width))
    return jnp.sum(terms.weights * loss, 0)


def _side(variables: jax.Array, gradient: jax.Array, box: Box) -> jax.Array:
    """Bounds that hold a variable back: -1 lower, 1 upper, 0 none."""
    below = (variables <= box.lower) & (gradient > 0)
    above = (variables >= box.upper) & (gradient < 0)
    return above.astype(jnp.int32) - below.astype(jnp.int32)


@jax.custom_jvp
def _influence(values: jax.Array, width: jax.Array, majorant_weight: jax.Array) -> jax.Array:
    """Differentiate the Huber loss; the result's own derivative is blended with that of a parabola above the loss.

    In the linear zone the Huber loss has no curvature; the parabola that touches it there and lies above it
    everywhere has width / |value|. A `majorant_weight` of 1 takes that instead (steps are safe and slow), 0 is exact.
    """
    return jnp.clip(values, -width, width)


@_influence.defjvp
def _influence_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    values, width, majorant_weight = primals
    size = jnp.abs(values)
    slope = jnp.where(size <= width, 1.0, majorant_weight * width / jnp.maximum(size, width))
    return _influence(*primals), slope * tangents[0]


def _derivatives(
    residuals: Residuals, variables: jax.Array, data: ProblemData, width: jax.Array, majorant_weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Value (N,), gradient (P, N) and Hessian (P, P, N) of all problems; of the last, see `_influence`."""
    size, number = variables.shape

    def gradient(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def split(y: jax.Array) -> tuple[jax.Array, Terms]:
            terms = residuals(y, data)
            return terms.values, terms

        # Problems do not mix: the gradient of their sum holds the gradient of each.
        values, vjp, terms = jax.vjp(split, x, has_aux=True)
        influence = jnp.where(terms.square, values, _influence(values, width, majorant_weight))
        value = jnp.sum(terms.weights * influence * (values - 0.5 * influence), 0)
        return vjp(terms.weights * influence)[0], value

    slope, push, value = jax.linearize(gradient, variables, has_aux=True)
    units = jnp.broadcast_to(jnp.eye(size)[:, :, None], (size, size, number))
    return value, slope, jax.vmap(push)(units)


def _solve(matrix: jax.Array, rhs: jax.Array, free: jax.Array) -> jax.Array:
    """Solve the free block of N small symmetric systems (P, P, N) by Gauss-Jordan elimination; 0 elsewhere.

    Pivots are replaced by their absolute values, so that a Newton step descends whatever the curvature.
    """
    size = rhs.shape[0]
    unit = jnp.eye(size)[:, :, None]
    block = jnp.where(free[:, None] & free[None, :], matrix, unit)
    floor = 1e-13 * jnp.max(jnp.abs(block * unit * free[None]), (0, 1)) + 1e-300
    table = jnp.concatenate([block, jnp.where(free, rhs, 0.0)[:, None]], 1)
    for i in range(size):
        row = table[i] / jnp.maximum(jnp.abs(table[i, i]), floor)
        others = jnp.arange(size, dtype=jnp.int32)[:, None, None] != i
        table = jnp.where(others, table - table[:, i, None] * row, row)
    return table[:, size]


def _step(variables: jax.Array, state: _State, box: Box) -> jax.Array:
    """Damped Newton step (P, N) in the box: what would leave is put on its bound, and the rest solved again."""
    size = variables.shape[0]
    unit = jnp.eye(size)[:, :, None]
    diagonal = jnp.abs(jnp.sum(state.hessian * unit, 0))
    matrix = state.hessian + unit * (state.damping * jnp.maximum(diagonal, 1e-6 * diagonal.max(0)))
    at_bound = _side(variables, state.gradient, box) != 0

    def again(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        fixed, step = carry
        rhs = -state.gradient - jnp.sum(matrix * jnp.where(fixed, step, 0.0)[None], 1)
        step = jnp.where(fixed, step, _solve(matrix, rhs, ~fixed))
        target = variables + step
        inside = jnp.clip(target, box.lower, box.upper)
        return fixed | (inside != target), inside - variables

    _, step = jax.lax.fori_loop(0, 2, again, (at_bound, jnp.zeros_like(variables)))
    return step / jnp.maximum(1.0, jnp.max(jnp.abs(step) / box.max_step, 0))


@dataclasses.dataclass(eq=False)
class GraduatedNewton(base.IterativeSolver):
    """Newton's method with exact Hessians in a box, for sums of Huber losses, on N problems at once.

    A Huber loss of small width is nearly an absolute value, whose kinks stall Newton's method. So the width
    starts at `first_width` and shrinks by `shrink` each time the present minimum is nearly reached, down to
    the width asked for. Damping, in the metric of the Huber loss's quadratic majorant, grows when a step fails.
    """

    residuals: Residuals
    num_starts: int = 1
    maxiter: int = 100
    patience: int = 50
    first_width: float = 0.02
    shrink: float = 0.25
    damping: float = 1e-3
    damping_decrease: float = 0.2
    damping_increase: float = 5.0
    majorant_decay: float = 0.3
    jit: bool = False

    def optimality_fun(self, params: jax.Array, data: ProblemData, width: jax.Array) -> jax.Array:
        """Gradient (P, N) of the objectives."""
        return jax.grad(lambda x: jnp.sum(huber_sums(self.residuals, x, data, width)))(params)

    def init_state(self, init_params: jax.Array, data: ProblemData, width: jax.Array, box: Box) -> _State:
        """Return a state whose first update only evaluates the start."""
        size, number = init_params.shape
        flags = jnp.zeros(number, bool)
        return _State(
            iter_num=jnp.zeros((), jnp.int32),
            value=jnp.zeros(number),
            gradient=jnp.zeros((size, number)),
            hessian=jnp.zeros((size, size, number)),
            majorant_weight=jnp.ones(number),
            damping=jnp.full(number, self.damping),
            width=jnp.maximum(width, self.first_width),
            restarted=~flags,
            idle=jnp.zeros(number, jnp.int32),
            done=flags,
        )

    def update(self, params: jax.Array, state: _State, data: ProblemData, width: jax.Array, box: Box) -> base.OptStep:
        """Take one step in every problem that is not done."""
        move = jnp.where(state.restarted | state.done, 0.0, _step(params, state, box))
        trial = params + move
        majorant_weight = jnp.where(state.restarted, state.majorant_weight, self.majorant_decay * state.majorant_weight)
        value, gradient, hessian = _derivatives(self.residuals, trial, data, state.width, majorant_weight)

        curved = jnp.sum(move[:, None] * state.hessian * move[None, :], (0, 1))
        predicted = -jnp.sum(state.gradient * move, 0) - 0.5 * curved
        actual = state.value - value
        # Log losses carry errors of about 1e-16, which near the minimum drown the gain: that is no failure.
        rounding = 1e-15 * (jnp.minimum(jnp.sqrt(state.value), state.width) + state.value)
        accept = (state.restarted | (actual >= -rounding)) & ~state.done
        good, poor = actual >= 0.75 * predicted - rounding, actual < 0.25 * predicted
        factor = jnp.where(
            accept, jnp.where(good, self.damping_decrease, jnp.where(poor, 3.0, 1.0)), self.damping_increase
        )
        damping = jnp.where(state.restarted, state.damping, jnp.maximum(state.damping * factor, 1e-15))

        gain = jnp.abs(predicted)
        # Full Newton steps square the error: after one with hardly any gain there is nothing left to gain.
        exact = (state.damping <= 1e-6) & (state.majorant_weight <= 1e-3)
        ended = (accept & (gain <= 1e-3 * rounding + 1e-30)) | (exact & (gain <= 1e-11 * state.value))
        settled = ~state.restarted & (ended | (damping > 1e14))
        nearly = settled | (~state.restarted & accept & (gain <= 1e-2 * value))
        # A regular minimum is reached within a few steps of nearly no gain; along a flat valley they never end.
        idle = jnp.where(gain <= 1e-7 * value + 1e-14, state.idle + ~state.restarted, 0)
        last = state.width <= width
        sharpen = nearly & ~last

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(accept, new, old)

        new = _State(
            iter_num=state.iter_num + 1,
            value=keep(value, state.value),
            gradient=keep(gradient, state.gradient),
            hessian=keep(hessian, state.hessian),
            majorant_weight=jnp.where(sharpen, 1.0, keep(majorant_weight, state.majorant_weight)),
            damping=jnp.where(sharpen, self.damping, damping),
            width=jnp.where(sharpen, jnp.maximum(self.shrink * state.width, width), state.width),
            restarted=sharpen,
            idle=jnp.where(sharpen | state.done, jnp.where(sharpen, 0, state.idle), idle),
            done=state.done | ((settled | (idle >= MAX_IDLE)) & last),
        )
        return base.OptStep(keep(trial, params), new)

    def run(self, init_params: jax.Array, data: ProblemData, width: jax.Array, box: Box) -> base.OptStep:
        """Iterate until every problem is done, or `maxiter` times.

        After `patience` iterations, only until every group of `num_starts` problems has a minimum that none undercuts.
        """

        def unfinished(step: base.OptStep) -> jax.Array:
            state = step.state
            reached = jnp.where(state.done, state.value, jnp.inf).reshape(-1, self.num_starts).min(1)
            lowest_yet = jnp.where(state.width <= width, state.value, jnp.inf).reshape(-1, self.num_starts).min(1)
            enough = jnp.all(jnp.isfinite(reached) & (reached <= lowest_yet)) & (state.iter_num >= self.patience)
            return ~(jnp.all(state.done) | enough) & (state.iter_num < self.maxiter)

        start = base.OptStep(init_params, self.init_state(init_params, data, width, box))
        return jax.lax.while_loop(
            unfinished, lambda step: self.update(step.params, step.state, data, width, box), start
        )


def minimize(residuals: Residuals, starts: jax.Array, data: ProblemData, width: jax.Array, box: Box) -> Minimum:
    """Minimise each of N problems from K starts and keep the lowest minimum of each.

    Parameters
    ----------
    residuals : callable (variables (P, N), data) -> Terms
    starts : (P, N, K)
    data : pytree of arrays (..., N)
    width : (N,)
        Huber width of each problem.
    box : Box of arrays (P, N)

    Returns
    -------
    Minimum
    """
    size, number, num_starts = starts.shape
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, num_starts, -1), (data, width, box))
    solver = GraduatedNewton(residuals, num_starts=num_starts)
    variables, state = solver.run(starts.reshape(size, -1), *repeated)

    # A problem that has not arrived at the width asked for has the value of another objective.
    arrived = jnp.isfinite(state.value) & (state.width <= repeated[1])
    value = jnp.where(arrived, state.value, jnp.inf).reshape(number, num_starts)
    best = jnp.arange(number, dtype=jnp.int32) * num_starts + lowest(value)
    variables, gradient, hessian = variables[:, best], state.gradient[:, best], state.hessian[:, :, best]
    side = _side(variables, gradient, box)
    free = side == 0
    curvature = jnp.linalg.eigvalsh(jnp.where(free[:, None] & free[None, :], hessian, 0.0).transpose(2, 0, 1))
    # Held variables leave zero eigenvalues behind: the smallest free one is found by count.
    at_bound = jnp.sum(~free, 0, dtype=jnp.int32)
    threshold = SINGULAR_TOLERANCE * curvature[:, -1]
    positive = jnp.sum(curvature > threshold[:, None], 1, dtype=jnp.int32)
    converged = state.done[best] & jnp.isfinite(state.value[best])
    isolated = converged & (state.idle[best] < MAX_IDLE)
    return Minimum(
        variables=variables,
        value=state.value[best],
        side=side,
        converged=converged,
        isolated=isolated,
        determined=isolated & (positive + at_bound == size),
        iterations=state.iter_num,
    )


def implicit_vjp(
    residuals: Residuals,
    variables: jax.Array,
    side: jax.Array,
    problem: Callable[[Any], tuple[ProblemData, jax.Array]],
    args: Any,
    cotangent: jax.Array,
) -> Any:
    """Pull a cotangent (P, N) of the minimum back to the `args` that lead to it, by the implicit function theorem.

    Variables that are held at a bound stay there. Where the Hessian is singular, a cotangent that does not see the
    undetermined directions is pulled back; one that does gives NaN, for its derivative does not exist.

    Parameters
    ----------
    residuals, variables, side
        As given to, and found by, `minimize`.
    problem : callable args -> (data, width)
    args : pytree of float arrays
    cotangent : (P, N)

    Returns
    -------
    pytree like `args`
    """
    free = side == 0

    def optimality(x: jax.Array, inputs: Any) -> jax.Array:
        data, width = problem(inputs)
        x = jnp.where(free, x, jax.lax.stop_gradient(x))
        return jnp.where(free, GraduatedNewton(residuals).optimality_fun(x, data, width), 0.0)

    def solve(matvec: Callable[[jax.Array], jax.Array], rhs: jax.Array) -> jax.Array:
        units = jnp.broadcast_to(jnp.eye(rhs.shape[0])[:, :, None], (rhs.shape[0], *rhs.shape))
        matrix = jax.vmap(matvec)(units).transpose(2, 0, 1)
        values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.transpose(0, 2, 1)))
        rhs = jnp.where(free, rhs, 0.0)
        components = jnp.einsum("nij,in->nj", vectors, rhs)
        regular = values > SINGULAR_TOLERANCE * values[:, -1:]
        undefined = jnp.linalg.norm(
            jnp.where(regular, 0.0, components), axis=1
        ) > NULL_SPACE_TOLERANCE * jnp.linalg.norm(components, axis=1)
        components = jnp.where(regular, components / jnp.where(regular, values, 1.0), 0.0)
        return jnp.where(undefined, jnp.nan, jnp.einsum("nij,nj->in", vectors, components))

    return root_vjp(optimality, variables, (args,), cotangent, solve)[0]
