"""Golden-section search against functions whose minimum is known."""

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.selectors.golden_section import golden_section_minimum


def test_many_minima_at_once_in_double_precision():
    with jax.enable_x64(True):
        centres = jnp.array([-3.0, 0.25, 7.5])
        low, high = jnp.full(3, -10.0), jnp.full(3, 10.0)
        found = jax.jit(lambda: golden_section_minimum(lambda x: jnp.abs(x - centres), low, high, 80))()
    np.testing.assert_allclose(found, centres, atol=1e-12)


def test_a_function_that_only_rises_or_falls_gives_an_end():
    with jax.enable_x64(True):
        found = golden_section_minimum(lambda x: jnp.array([1.0, -1.0]) * x, jnp.zeros(2), jnp.ones(2), 60)
    np.testing.assert_allclose(found, [0.0, 1.0], atol=1e-10)
