"""LogME: how well a linear model on a candidate's features explains the labels, before any fine-tuning.

For each class, labels that are 1 at its positions and 0 elsewhere are explained by y = F m + noise with Gaussian
weights m; the score is the evidence of that model, maximised over the precisions of weights and noise.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.errors import InputError
from lensjax.selectors.golden_section import golden_section_minimum

BLOCK_ROWS = 4096  # positions of one block of the Gram matrix
BLOCK_CLASSES = 256  # classes maximised together
GRID_POINTS = 128
REFINEMENTS = 40


def log_me(features: Any, labels: Any) -> float:
    """Mean log evidence per position of one linear model per class, nats; higher is better.

    Parameters
    ----------
    features : float array (N, d)
        One vector for each position, for a language model the last hidden state from which the target token is
        predicted. As in the paper they are not centred; a constant column is the caller's choice.
    labels : int array (N,)
        Class of each position, for a language model the target token. Only classes that occur take part.

    Returns
    -------
    float
        Average over the classes. With token labels it depends on the tokenizer: compare candidates that share one, or
        give labels that all candidates share.

    Raises
    ------
    InputError
        If the shapes do not fit, there are fewer than two classes, or a feature is not a finite number.

    References
    ----------
    You et al. 2021 (ICML, arXiv 2102.11005), eq. 2 and Algorithm 1.
    """
    return float(class_evidence(features, labels).mean())


def class_evidence(features: Any, labels: Any) -> np.ndarray:
    """Log evidence per position of each class that occurs, ascending by label: float64 (K,); see `log_me`."""
    labels = np.asarray(labels)
    if np.ndim(features) != 2 or labels.shape != np.shape(features)[:1]:
        raise InputError(
            f"features have shape {np.shape(features)} and labels {labels.shape}; needed are (N, d) and (N,), one "
            "label for each position."
        )
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"LogME needs at least two classes, found {len(classes)}. Give more positions.")
    with jax.enable_x64(True):
        gram, moments = _moments(features, index, len(classes))
        if not bool(jnp.isfinite(jnp.trace(gram))):
            raise InputError("a feature is not a finite number (or its square overflows); check the model's weights.")
        values, vectors = jnp.linalg.eigh(gram)
        values = jnp.maximum(values, 0.0)
        squares = (moments @ vectors) ** 2
        found = []
        for start in range(0, len(classes), BLOCK_CLASSES):
            block = slice(start, start + BLOCK_CLASSES)
            missing = BLOCK_CLASSES - len(counts[block])
            best = _maximise(
                jnp.pad(squares[block], ((0, missing), (0, 0))),
                jnp.pad(jnp.asarray(counts[block], jnp.float64), (0, missing), constant_values=1.0),
                values,
                jnp.asarray(float(len(labels))),
            )
            found.append(np.asarray(best)[: len(counts[block])])
    return np.concatenate(found) / len(labels)


def _moments(features: Any, index: np.ndarray, classes: int) -> tuple[jax.Array, jax.Array]:
    """F^T F (d, d) and the sum of the features of each class (K, d), both float64, block by block."""
    width = np.shape(features)[1]
    gram, moments = jnp.zeros((width, width)), jnp.zeros((classes, width))
    for start in range(0, len(index), BLOCK_ROWS):
        block = np.asarray(features[start : start + BLOCK_ROWS], np.float64)
        label = index[start : start + BLOCK_ROWS]
        missing = -len(block) % min(BLOCK_ROWS, max(len(index), 1))
        gram, moments = _add(
            gram, moments, np.pad(block, ((0, missing), (0, 0))), np.pad(label, (0, missing)).astype(np.int32)
        )
    return gram, moments


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(gram: jax.Array, moments: jax.Array, block: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gram + block.T @ block, moments.at[label].add(block)


@jax.jit
def _maximise(squares: jax.Array, norms: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
    """Largest log evidence (K,) from (V^T F^T y)^2 (K, d), y^T y (K,), the eigenvalues of F^T F (d,) and N.

    With t = (precision of the weights) / (precision of the noise) the best noise is known in closed form, and of the
    evidence there remains a function of log t alone.
    """
    # Where all features are 0 every positive scale gives the same result.
    scale = jnp.where(values[-1] > 0, values[-1], 1.0)

    def evidence(log_t: jax.Array) -> jax.Array:
        """(K,) -> (K,)."""
        t = scale * jnp.exp(log_t)[:, None]
        misfit = norms - (squares / (values + t)).sum(axis=1)
        misfit = jnp.maximum(misfit, 1e-12 * norms)  # perfect separation would be infinitely likely
        shrinking = jnp.log1p(values / t).sum(axis=1)
        return 0.5 * count * (jnp.log(count / (2 * jnp.pi * misfit)) - 1) - 0.5 * shrinking

    grid = jnp.linspace(jnp.log(1e-9), jnp.log(1e9), GRID_POINTS)
    coarse = jax.lax.map(lambda g: evidence(jnp.full(norms.shape, g)), grid)
    middle = grid[jnp.argmax(coarse, axis=0)]
    reach = grid[1] - grid[0]
    best = golden_section_minimum(lambda log_t: -evidence(log_t), middle - reach, middle + reach, REFINEMENTS)
    return evidence(best)
