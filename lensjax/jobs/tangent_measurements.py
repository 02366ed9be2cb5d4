"""A look at a candidate through its derivatives: neural tangent kernel and Hessian trace, before fine-tuning."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lensjax import tangents
from lensjax.tasks import Encoded, batches

PROBES = 4
KERNEL_FLOPS = 6  # per weight and token: one gradient
HVP_FLOPS = 12  # per weight and token: a form of the Hessian is two gradients
COUNTED = f"{KERNEL_FLOPS + HVP_FLOPS * PROBES} for each weight and token, 2 for each weight and pair of samples"


def tangent_flops(parameters: int, tokens: int, samples: int) -> float:
    """Count the floating-point operations of `look` as the paper counts training.

    The kernel takes a backward pass, 6 for each weight and token, and 2 for each weight and pair of samples; each of
    the trace's probes 12 for each weight and token.
    """
    return float(parameters) * ((KERNEL_FLOPS + HVP_FLOPS * PROBES) * tokens + 2 * samples**2)


def look(model: Any, samples: Encoded, pad_id: int, parameters: int) -> dict[str, Any]:
    """Measure a model's kernel and curvature on some samples.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
    samples : Encoded
        Taken as one batch.
    pad_id : int
    parameters : int
        Of the model, for the cost.

    Returns
    -------
    dict
        ``kernel_spectrum``: eigenvalues of the kernel of the samples' losses, descending, loss^2 / parameter^2;
        ``residual``: the losses along its eigenvectors, so that eq. 9 is the sum of
        ``residual^2 exp(-2 rate steps eigenvalue)``; ``trace``, ``trace_error``, ``trace_by_layer``: of the mean
        token loss's Hessian, with the probes' standard error; ``samples``, ``tokens``, ``flops``.
    """
    # Flash attention has no second derivative.
    model.attention = "plain"
    count, longest = len(samples), int(samples.lengths.max())
    (batch,) = batches(samples, batch_size=len(samples.rows[0]), buckets=(-(-longest // 8) * 8,), pad_id=pad_id)
    function, params = tangents.ntk_outputs(model, "loss")
    kernel = np.asarray(tangents.ntk(function, params, batch), np.float64)
    losses = np.asarray(_for_each(function, params, batch), np.float64)
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
        "flops": tangent_flops(parameters, tokens, count),
    }


@jax.jit
def _for_each(function: Any, params: Any, batch: Any) -> jax.Array:
    """Return a function's value of each example; an argument, so that frozen weights are no constants."""
    return jax.vmap(function, in_axes=(None, 0))(params, batch)


def kernel_residual(found: dict[str, Any], rate: float, steps: int) -> float:
    """Return F(Theta, t) of LensLLM's eq. 9 from a look: what linearised training leaves of the losses, nats^2.

    Negative eigenvalues, which only rounding makes, count as 0.
    """
    values = np.maximum(np.array(found["kernel_spectrum"]), 0.0)
    return float((np.array(found["residual"]) ** 2 * np.exp(-2 * rate * steps * values)).sum())
