"""How the predicted full-data loss depends on the Huber width and the weights of the points, through the fit.

The derivative of a minimum with respect to what defines the objective comes from the implicit function theorem, in
`lensjax.fit`; no fit is unrolled and none repeated. Here it serves twice: to say which measurement a forecast hangs on,
and to choose width and weights by gradient descent for other tables than those they are judged on.

Run: PYTHONPATH=.:kernels python benchmarks/studies/fit_hyperparameters.py
It writes benchmarks/results/studies/fit_hyperparameters.json.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from study import agreement, central, finish, require

import lensjax

VISIBLE, TARGET = 204_800, 1_638_400
WIDTH = 1e-3
RATIO = 8  # target over the largest size that is visible
STEPS, RATE = 30, 0.1


def log_losses(curves: lensjax.Curves, target: float, width: Any, weights: Any) -> Any:
    """Predicted log losses (M,) at the target."""
    fits = lensjax.fit(curves.sizes, curves.losses, law="rectified", huber_delta=width, weights=weights)
    return jnp.log(fits.predict(target))


def sensitivities(curves: lensjax.Curves, target: float, width: float = WIDTH) -> dict[str, np.ndarray]:
    """Differentiate predicted log losses: by log width (M,), and by the weight of each point (M, S)."""
    shape = curves.losses.shape

    # Curves do not mix, so the gradient of the sum holds that of each.
    def total(log_widths: Any, weights: Any) -> Any:
        return log_losses(curves, target, jnp.exp(log_widths), weights).sum()

    by_width, by_weight = jax.grad(total, (0, 1))(jnp.full(shape[:1], jnp.log(width)), jnp.ones(shape))
    return {"width": np.asarray(by_width), "weights": np.asarray(by_weight)}


def differences(curves: lensjax.Curves, target: float, width: float = WIDTH) -> dict[str, np.ndarray]:
    """Find the same by finite differences: fits repeated with everything moved a little."""
    count, points = curves.losses.shape

    def by_width(log_width: np.ndarray) -> Any:
        return log_losses(curves, target, np.exp(log_width), 1.0)

    def by_weights(weights: np.ndarray) -> Any:
        return log_losses(curves, target, width, np.broadcast_to(weights, (count, points)))

    columns = [central(by_weights, np.ones(points), np.eye(points)[j], 1e-3) for j in range(points)]
    return {
        "width": central(by_width, np.full(count, np.log(width)), np.ones(count), 1e-4),
        "weights": np.stack(columns, axis=1),
    }


def check(curves: lensjax.Curves, target: float, width: float = WIDTH) -> dict[str, Any]:
    """Compare both where the derivative exists: a curve whose points leave a parameter free has none."""
    with jax.enable_x64(True):
        exact, repeated = sensitivities(curves, target, width), differences(curves, target, width)
    sound = np.isfinite(exact["width"]) & np.isfinite(exact["weights"]).all(axis=1)
    known = np.isfinite(curves.losses)
    return {
        "with_derivative": int(sound.sum()),
        "width": agreement(exact["width"][sound], repeated["width"][sound]),
        "weights": agreement(exact["weights"][sound][known[sound]], repeated["weights"][sound][known[sound]]),
        "by_width": exact["width"],
        "by_weight": exact["weights"],
    }


def error(curves: lensjax.Curves, target: float, x: Any) -> Any:
    """Mean Huber loss of the log errors at the target; x: log width, and how fast weights fade from the largest size.

    A size half as large counts exp(-fade). One wild forecast must not decide for all, hence no squares.
    """
    seen, truth = curves.visible(target / RATIO), np.log(curves.at(target))
    halvings = np.log2(seen.sizes[-1]) - np.log2(np.maximum(seen.sizes, seen.sizes[1] / 2))  # zero-shot: one more
    away = log_losses(seen, target, jnp.exp(x[0]), jnp.exp(-x[1] * halvings)) - truth
    return jnp.mean(optax.losses.huber_loss(away[np.isfinite(truth)], delta=0.05))


def tune(tables: list[lensjax.Curves], target: float, steps: int = STEPS) -> tuple[np.ndarray, list[float]]:
    """Choose log width and fade by gradient descent (Adam) through the fits of whole tables."""

    def mean(x: Any) -> Any:
        return jnp.stack([error(curves, target, x) for curves in tables]).mean()

    x = jnp.array([np.log(WIDTH), 0.0])
    adam = optax.adam(RATE)
    state, course = adam.init(x), []
    best = (np.inf, np.asarray(x))
    for _ in range(steps):
        value, slope = jax.value_and_grad(mean)(x)
        course.append(float(value))
        best = min(best, (float(value), np.asarray(x)), key=lambda found: found[0])
        # A table in which some fit has no derivative gives none for the mean.
        updates, state = adam.update(jnp.nan_to_num(slope), state)
        x = x + updates
    return best[1], course


def main() -> None:
    start = time.perf_counter()
    flan = lensjax.read_losses("published:flan").visible(VISIBLE)
    found = check(flan, TARGET)
    require(found["width"], 1e-5, "by Huber width")
    require(found["weights"], 1e-3, "by weights")
    hangs = {}
    for row in np.argsort(-np.nan_to_num(np.abs(found["by_weight"]).max(axis=1)))[:5]:
        column = int(np.abs(found["by_weight"][row]).argmax())
        hangs[flan.names[row]] = {"samples": flan.sizes[column], "derivative": float(found["by_weight"][row, column])}
        print(f"the forecast of {flan.names[row]} hangs most on {flan.sizes[column]:g} samples")

    tables = {name: lensjax.read_losses(f"published:{name}") for name in ("flan", "gigaword", "wmt19")}
    tuned = {}
    with jax.enable_x64(True):
        for judged, curves in tables.items():
            others = [table for name, table in tables.items() if name != judged]
            x, course = tune(others, TARGET)
            before, after = (float(error(curves, TARGET, jnp.asarray(v))) for v in ([np.log(WIDTH), 0.0], x))
            tuned[judged] = {
                "huber_delta": float(np.exp(x[0])),
                "fade": float(x[1]),
                "others": {"before": course[0], "after": min(course)},
                "judged": {"before": before, "after": after},
            }
            print(f"{judged}: error {before:.2e} -> {after:.2e} with width {np.exp(x[0]):.1e}, fade {x[1]:.2f}")
    finish(
        "fit_hyperparameters",
        {
            "what": "derivatives of predicted log losses by Huber width and point weights; both chosen by descent",
            "candidates": len(flan),
            "with_derivative": found["with_derivative"],
            "agreement": {"width": found["width"], "weights": found["weights"]},
            "hangs_most_on": hangs,
            "tuned_on_the_other_two_tables": tuned,
            "seconds": time.perf_counter() - start,
        },
    )


if __name__ == "__main__":
    main()
