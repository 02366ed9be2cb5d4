"""Batches and losses of decoders."""

from functools import partial

import jax
import numpy as np
from flax import nnx


def make_batch(vocabulary, samples=3, length=9, seed=0):
    ids = np.random.default_rng(seed).integers(0, vocabulary, (samples, length)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}


@partial(jax.jit, static_argnums=0)
def compiled_losses(graph, state, batch, key):
    return nnx.merge(graph, state).loss_sums(batch, dropout_key=key)


def losses(model, batch, key=None):
    """Return `model.loss_sums(batch)`, compiled as one program: op by op it takes seconds."""
    return compiled_losses(*nnx.split(model), batch, key)
