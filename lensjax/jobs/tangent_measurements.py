"""Neural tangent kernel and Hessian trace of a candidate before fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lensjax import tangents
from lensjax.tasks import Encoded, batches

PROBES = 4
KERNEL_FLOPS = 6  # per weight and token: one gradient
HVP_FLOPS = 12  # per weight and token: a quadratic form of the Hessian costs two gradients
FLOPS_TEXT = f"{KERNEL_FLOPS + HVP_FLOPS * PROBES} for each weight and token, 2 for each weight and pair of samples"


def tangent_flops(parameters: int, tokens: int, samples: int) -> float:
    """Count the floating-point operations of `measure` as the paper counts training.

    The kernel takes a backward pass, 6 for each weight and token, and 2 for each weight and pair of samples; each of
    the trace's probes 12 for each weight and token.
    """
    return float(parameters) * ((KERNEL_FLOPS + HVP_FLOPS * PROBES) * tokens + 2 * samples**2)


def measure(model: Any, samples: Encoded, pad_id: int) -> dict[str, Any]:
    """Measure a model's kernel and curvature on some samples.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
        Unchanged afterwards.
    samples : Encoded
        N samples, taken as one batch.
    pad_id : int

    Returns
    -------
    dict
        ``kernel_spectrum``: the N eigenvalues of the kernel of the samples' losses, descending, loss^2 / parameter^2;
        ``residual``: the losses along its eigenvectors, so that eq. 9 is the sum of
        ``residual^2 exp(-2 rate steps eigenvalue)``; ``trace``, ``trace_error``, ``trace_by_layer``: of the mean
        token loss's Hessian, with the standard error over probes; ``samples``, ``tokens``.
    """
    count, longest = len(samples), int(samples.lengths.max())
    (batch,) = batches(samples, batch_size=len(samples.rows[0]), buckets=(-(-longest // 8) * 8,), pad_id=pad_id)
    with _plain_attention(model):
        function, params = tangents.ntk_outputs(model, "loss")
        kernel = np.asarray(tangents.ntk(function, params, batch), np.float64)
        losses = np.asarray(_each_example(function, params, batch), np.float64)
        values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
        trace = tangents.hessian_trace(model, [batch], key=jax.random.key(0), probes=PROBES)
    tokens = int(samples.token_counts.sum())
    return {
        "kernel_spectrum": values[::-1].tolist(),
        "residual": (vectors.T @ losses)[::-1].tolist(),
        "trace": trace.trace,
        "trace_error": trace.standard_error,
        "trace_by_layer": trace.by_layer,
        "samples": count,
        "tokens": tokens,
    }


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Have a model compute attention without the flash kernel, which has no second derivative, while in use."""
    before = model.attention
    model.attention = "plain"
    try:
        yield
    finally:
        model.attention = before


@jax.jit
def _each_example(function: Any, params: Any, batch: Any) -> jax.Array:
    """Return a function's values for each example; it is an argument, so that jit takes its weights as inputs."""
    return jax.vmap(function, in_axes=(None, 0))(params, batch)
