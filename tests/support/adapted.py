"""Tiny models, and adapters as if trained."""

import jax
import jax.numpy as jnp
from flax import nnx

from lensjax.models import init_model
from lensjax.models.lora import adapters
from support.families import make_config


def make_model(name, count=2, dtype=jnp.float32):
    return init_model(make_config(name, count), jax.random.key(0), dtype)


def trained(model, seed=1):
    """Return the model as if trained: the adapters' second matrices, which start at 0, are random."""
    model = nnx.clone(model)
    for i, adapter in enumerate(adapters(model).values()):
        b = adapter.lora_b
        b[...] = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), b.shape, b.dtype)
    return model
