"""Shapes, dtypes and finite values of the public functions of laws, with and without jit."""

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from lensjax.laws import LAWS, fit, kernel_residual, lens_law, log_kernel_residual, phase_transition

CURVES, SIZES, MODES = 3, 5, 4
D = np.array([50.0, 100.0, 200.0, 400.0, 800.0])
PARAMS = {"B": 20.0, "E": 1.0, "beta": 0.5, "alpha": 0.3, "D_l": 60.0, "F": 40.0}


class LawShapes(chex.TestCase):
    """What laws promise: the shape of parameters and sizes broadcast together."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ((), (), ()), ((), (SIZES,), (SIZES,)), ((CURVES, 1), (SIZES,), (CURVES, SIZES)), ((CURVES,), (), (CURVES,))
    )
    def test_parameters_and_sizes_are_broadcast(self, of_params, of_sizes, shape):
        sizes = jnp.full(of_sizes, 100.0)
        params = {name: jnp.full(of_params, value) for name, value in PARAMS.items()}
        for law in LAWS.values():
            values = self.variant(law)(params, sizes)
            chex.assert_shape(values, shape)
            chex.assert_type(values, jnp.float32)
            chex.assert_tree_all_finite(values)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(("log", log_kernel_residual), ("plain", kernel_residual))
    def test_residuals_of_a_kernel_have_the_shape_of_the_times(self, function):
        eigenvalues, projections = jnp.arange(1.0, 1 + MODES), jnp.ones(MODES)
        values = self.variant(function)(jnp.arange(float(SIZES)), eigenvalues, projections)
        chex.assert_shape(values, (SIZES,))
        chex.assert_type(values, jnp.float32)
        chex.assert_tree_all_finite(values)

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_phase_transition_for_each_curve(self):
        found = self.variant(phase_transition)(jnp.full(CURVES, 40.0), jnp.full(CURVES, 0.5))
        chex.assert_shape(found, (CURVES,))
        chex.assert_type(found, jnp.float32)


class FitShapes(chex.TestCase):
    """What `fit` promises: a row for each curve."""

    def test_parameters_and_predictions_have_a_row_for_each_curve(self):
        losses = np.stack([np.asarray(lens_law({**PARAMS, "E": e}, D)) for e in (1.0, 1.2, 1.5)])
        fits = fit(jnp.asarray(D), jnp.asarray(losses))
        chex.assert_shape([fits.params[name] for name in fits.params], (CURVES,))
        chex.assert_shape(fits.predict(6400.0), (CURVES,))
        chex.assert_tree_all_finite(fits.predict(6400.0))
