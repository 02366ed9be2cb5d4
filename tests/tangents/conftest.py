"""What several tests of tangents need."""

import jax
import pytest


@pytest.fixture
def quick_to_compile():
    """For models and programs of a few weights: nearly all of the time is compilation."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
