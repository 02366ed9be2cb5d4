"""Golden-section search of many functions at once, inside compiled programs (scipy.optimize.golden does neither)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def golden_section_minimum(
    function: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array, iterations: int
) -> jax.Array:
    """Where each function is smallest between its ends `low` and `high`, if it has one minimum there.

    `function` maps points of any shape to its value at each of them; `low`, `high` and the result have that shape.
    Each iteration shortens the interval by the golden ratio (0.618); the middle of the last one is returned.
    """
    golden = (jnp.sqrt(5.0) - 1) / 2

    def narrow(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        a, b = high - golden * (high - low), low + golden * (high - low)
        left = function(a) < function(b)
        return jnp.where(left, low, a), jnp.where(left, b, high)

    low, high = jax.lax.fori_loop(0, iterations, narrow, (low, high))
    return (low + high) / 2
