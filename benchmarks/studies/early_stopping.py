"""How long and how fast to train, by gradient descent through the kernel regime's closed form.

A small network, its labels noisy, is linearised (`lensjax.ntk`). In that regime the residual after t steps at learning
rate eta is known in closed form (`lensjax.kernel_dynamics`; LensLLM, eq. 8 and 9), so F(Theta, t), and the loss on
examples that were not trained on, have derivatives by t and eta, and so has what a law fitted with F(Theta, t) in it
predicts for the full data (`lensjax.fit`).

Run: PYTHONPATH=.:kernels python benchmarks/studies/early_stopping.py
It writes benchmarks/results/studies/early_stopping.json.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from study import agreement, central, finish, require

import lensjax

INPUTS, WIDTH, NOISE = 5, 64, 0.5
TRAIN, HELD_OUT = 96, 256
STEPS, RATE = 150, 0.15
SIZES = np.array([200.0, 400, 800, 1600, 3200, 6400])
TARGET = 51_200.0


def problem(train: int = TRAIN, held_out: int = HELD_OUT) -> dict[str, Any]:
    """Make a network at its random weights, training examples with noisy labels, and clean held-out ones."""
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "in": jax.random.normal(keys[0], (WIDTH, INPUTS)) / np.sqrt(INPUTS),
        "out": jax.random.normal(keys[1], (WIDTH,)) / np.sqrt(WIDTH),
    }

    def network(w: Any, x: Any) -> Any:
        return jnp.tanh(w["in"] @ x) @ w["out"]

    x = jax.random.normal(keys[2], (train, INPUTS))
    x_held_out = jax.random.normal(keys[3], (held_out, INPUTS))

    def truth(inputs: Any) -> Any:
        return jnp.sin(2 * inputs[:, 0]) + inputs[:, 1] * inputs[:, 2]

    outputs, outputs_held_out = (jax.vmap(lambda one: network(params, one))(inputs) for inputs in (x, x_held_out))
    labels = truth(x) + NOISE * jax.random.normal(keys[4], (train,))
    kernel = lensjax.ntk(network, params, x)
    return {
        "dynamics": lensjax.kernel_dynamics(kernel, outputs, labels),
        "cross": lensjax.ntk(network, params, x_held_out, x),
        "outputs": outputs_held_out,
        "truth": truth(x_held_out),
    }


def residual(instance: dict[str, Any], x: Any) -> Any:
    """F(Theta, t); x: log t and log eta."""
    return instance["dynamics"].residual_norm(jnp.exp(x[0]), jnp.exp(x[1]))


def held_out_loss(instance: dict[str, Any], x: Any) -> Any:
    """Mean squared error on examples that were not trained on, after t steps at learning rate eta."""
    after = instance["dynamics"].predict(jnp.exp(x[0]), instance["cross"], instance["outputs"], jnp.exp(x[1]))
    return jnp.mean((after - instance["truth"]) ** 2)


def predicted_loss(instance: dict[str, Any], x: Any) -> Any:
    """Log loss at the target by a law with F(Theta, t) in it, fitted to losses that were measured at smaller sizes.

    Steps grow with the size, t = t_1 D / D_1; x: log t_1 and log eta.
    """
    dynamics = instance["dynamics"]
    losses = 6 / (6 + SIZES**0.35) + 0.8 + 0.02 * np.sin(np.arange(len(SIZES)))
    steps = jnp.exp(x[0]) * SIZES / SIZES[0]
    # Outside of a trace the fit has values only, which is what finite differences need.
    fits = lensjax.fit(
        SIZES,
        losses,
        law="lens",
        eigenvalues=dynamics.eigenvalues,
        projections=dynamics.projections,
        learning_rate=jnp.exp(x[1]),
        t=steps,
    )
    return jnp.log(fits.predict(TARGET, t=steps[-1:] * TARGET / SIZES[-1]))[0]


def check(instance: dict[str, Any], x: np.ndarray, step: float = 1e-4) -> dict[str, dict[str, float]]:
    """Compare the derivatives of all three by log t and log eta with finite differences."""
    found = {}
    with jax.enable_x64(True):
        for function in (residual, held_out_loss, predicted_loss):
            exact = jax.grad(lambda at, f=function: f(instance, at))(jnp.asarray(x))
            repeated = [central(lambda at, f=function: f(instance, at), x, np.eye(2)[i], step) for i in (0, 1)]
            found[function.__name__] = agreement(exact, repeated)
    return found


def descend(instance: dict[str, Any], steps: int = STEPS) -> tuple[np.ndarray, list[float]]:
    """Find log t and log eta with the least held-out loss by gradient descent (Adam)."""
    x = jnp.array([0.0, np.log(0.1 * instance["dynamics"].largest_stable_rate())])
    adam = optax.adam(RATE)
    state, course = adam.init(x), []
    step = jax.jit(jax.value_and_grad(functools.partial(held_out_loss, instance)))
    for _ in range(steps):
        value, slope = step(x)
        course.append(float(value))
        updates, state = adam.update(slope, state)
        x = x + updates
    return np.asarray(x), course


def main() -> None:
    start = time.perf_counter()
    with jax.enable_x64(True):
        instance = problem()
        at = np.array([np.log(20.0), np.log(0.3 * instance["dynamics"].largest_stable_rate())])
        found = check(instance, at)
        for name, agreed in found.items():
            require(agreed, 1e-5, name)
        x, course = descend(instance)
        times = np.geomspace(1e-2, 1e6, 2001)
        whole = jax.vmap(lambda t: held_out_loss(instance, jnp.stack([jnp.log(t), x[1]])))(jnp.asarray(times))
        grid, end = float(whole.min()), float(whole[-1])
        slope = np.asarray(jax.grad(lambda at: held_out_loss(instance, at))(jnp.asarray(x)))
    print(f"held-out loss: {course[0]:.4f} at the start, {min(course):.4f} by descent, {grid:.4f} by a grid of times")
    print(f"trained to the end it is {end:.4f}; eta t = {np.exp(x.sum()):.3g}")
    # Only the product eta t matters in gradient flow: both derivatives are the same everywhere.
    if not (min(course) <= grid * (1 + 1e-3) and abs(slope[0] - slope[1]) <= 1e-9):
        raise SystemExit("descent did not find the best time")
    finish(
        "early_stopping",
        {
            "what": "derivatives of F(Theta, t), held-out loss and predicted full-data loss by log t and log eta",
            "examples": {"train": TRAIN, "held_out": HELD_OUT},
            "agreement": found,
            "held_out_loss": {"start": course[0], "descent": min(course), "grid": grid, "trained_to_the_end": end},
            "learning_rate_times_steps": float(np.exp(x.sum())),
            "seconds": time.perf_counter() - start,
        },
    )


if __name__ == "__main__":
    main()
