"""What the live benchmark measures of a model's derivatives: kernels in each output choice, and Hessian traces."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lensjax.tangents import hessian_trace, model_loss, ntk, ntk_outputs

OUTPUTS = ("loss", "gold_probability", "gold_logit", "projections")
TARGETS = {"loss": 0.0, "gold_probability": 1.0}
"""What training drives an output to (y of eq. 9), where there is such a value."""

PROBES = 8


def measure_tangents(model: Any, batch: Any, before: dict[str, np.ndarray] | None = None) -> tuple[dict[str, Any], Any]:
    """Measure kernels and traces on one batch.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
    batch : mapping of arrays
    before : kernels before fine-tuning, to compare with

    Returns
    -------
    found : dict, for JSON
        For each output: ``eigenvalues`` of the kernel, ascending (summed over outputs where there are several);
        ``residual``, outputs less their targets along its eigenvectors, from which F(Theta, t) of eq. 9 follows (none
        where no target exists); ``cosine``, the mean off the diagonal of the normalised kernel; ``cosine_low``, the
        same over the half of the examples with the lowest gold-token probability; ``alignment`` with the residual's
        outer product; ``change`` and ``kept``: relative Frobenius distance to the kernel before, and their cosine.
    kernels : dict of (N, N) arrays
    """
    model.attention = "plain"  # flash attention has no second derivative
    kernels: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    for output in OUTPUTS:
        f, params = ntk_outputs(model, output)
        kernel = np.asarray(ntk(f, params, batch, outputs="trace" if output == "projections" else "full"), np.float64)
        kernels[output] = (kernel + kernel.T) / 2
        if output in TARGETS:
            values[output] = np.asarray(jax.jit(jax.vmap(f, in_axes=(None, 0)))(params, batch), np.float64)
    unsure = np.argsort(values["gold_probability"])[: len(values["gold_probability"]) // 2]
    found: dict[str, Any] = {}
    for output, kernel in kernels.items():
        eigenvalues, vectors = np.linalg.eigh(kernel)
        own: dict[str, Any] = {"eigenvalues": rounded(eigenvalues), "cosine": cosine(kernel)}
        own["cosine_low"] = cosine(kernel[np.ix_(unsure, unsure)])
        if output in TARGETS:
            residual = values[output] - TARGETS[output]
            own["residual"] = rounded(vectors.T @ residual)
            own["alignment"] = float(residual @ kernel @ residual / (np.linalg.norm(kernel) * (residual @ residual)))
        if before is not None:
            other = before[output]
            own["change"] = float(np.linalg.norm(kernel - other) / np.linalg.norm(other))
            own["kept"] = float((kernel * other).sum() / (np.linalg.norm(kernel) * np.linalg.norm(other)))
        found[f"ntk_{output}"] = own
    loss, params = model_loss(model)
    for matrix in ("hessian", "gauss_newton"):
        trace = hessian_trace(loss, params, batch, key=jax.random.key(0), probes=PROBES, matrix=matrix)
        found[f"trace_{matrix}"] = {"total": float(trace.trace), "standard_error": float(trace.standard_error)}
    return found, kernels


def cosine(kernel: np.ndarray) -> float:
    """Return the mean off the diagonal of a kernel normalised to ones on it."""
    scale = np.sqrt(np.maximum(np.diagonal(kernel), np.finfo(float).tiny))
    normalised, n = kernel / np.outer(scale, scale), len(kernel)
    return float((normalised.sum() - np.trace(normalised)) / (n * (n - 1)))


def rounded(values: np.ndarray) -> list[float]:
    """Return values to six digits: what float32 kernels hold."""
    return [float(f"{value:.6g}") for value in values]
