"""Scaling laws as pure functions of (parameters, D), in log space, with finite derivatives from D = 0 to 1e12."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.errors import InputError

Array = Any
"""A number or an array, of NumPy or JAX."""


@jax.custom_jvp
def _log_exp_plus(exponent: Array, addend: Array) -> jax.Array:
    """log(exp(exponent) + addend), addend >= 0, with derivatives that stay finite at addend = 0."""
    return jnp.logaddexp(exponent, jnp.log(addend))


@_log_exp_plus.defjvp
def _log_exp_plus_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[jax.Array, jax.Array]:
    # jnp.log(addend) would contribute 0 * inf at addend = 0; the derivative itself, exp(-total), is finite there,
    # and saturates where the dtype cannot hold it.
    total = _log_exp_plus(*primals)
    inverse = jnp.exp(jnp.minimum(-total, 0.99 * jnp.log(jnp.finfo(total.dtype).max)))
    return total, jnp.exp(primals[0] - total) * tangents[0] + inverse * tangents[1]


def _floats(*values: Array) -> list[jax.Array]:
    dtype = jnp.result_type(float, *values)
    return [jnp.asarray(v, dtype) for v in jnp.broadcast_arrays(*values)]


def _log_saturating(B: Array, E: Array, beta: Array, offset: Array, D: Array) -> jax.Array:
    """log(B / (offset + D^beta) + E)."""
    B, E, beta, offset, D = _floats(B, E, beta, offset, D)
    # log D is -inf at 0 and its derivative infinite: a stand-in keeps both branches of the where finite.
    log_power = jnp.where(D > 0, beta * jnp.log(jnp.where(D > 0, D, 1.0)), -jnp.inf)
    return _log_exp_plus(jnp.log(B) - _log_exp_plus(log_power, offset), E)


def power_law(params: Mapping[str, Array], D: Array) -> jax.Array:
    """Log loss under the power law, ``L(D) = (B / D^beta + E)^alpha``.

    Parameters
    ----------
    params : mapping
        "B" > 0, "E" >= 0, "beta" > 0, "alpha" > 0; numbers or arrays that broadcast against `D`.
        B and E are in nats^(1/alpha).
    D : float array
        Training samples. The law diverges at 0: below one sample its value at one sample is returned
        (and `fit` leaves zero-shot losses out for this law).

    Returns
    -------
    float array
        log L, L in nats per token.

    References
    ----------
    LensLLM (ICML 2025, arXiv 2505.03793), eq. 2.

    Examples
    --------
    >>> power_law({"B": 20.0, "E": 1.0, "beta": 0.5, "alpha": 1.0}, 400.0)  # log(20 / 20 + 1)
    Array(0.6931472, dtype=float32)
    """
    B, E, beta, alpha, D = _floats(params["B"], params["E"], params["beta"], params["alpha"], D)
    return alpha * _log_exp_plus(jnp.log(B) - beta * jnp.log(jnp.maximum(D, 1.0)), E)


def rectified_law(params: Mapping[str, Array], D: Array) -> jax.Array:
    """Log loss under the rectified law, ``L(D) = B / (D_l + D^beta) + E``.

    Parameters
    ----------
    params : mapping
        "B" > 0 and "E" >= 0 (B / D_l and E in nats per token), "beta" > 0,
        "D_l" the pre-learned data size, > 0 where D is 0 (in samples^beta).
    D : float array
        Training samples, >= 0; broadcasts against the parameters.

    Returns
    -------
    float array
        log L, L in nats per token.

    References
    ----------
    Rectified Scaling Law (ICML 2024, arXiv 2402.02314).

    Examples
    --------
    >>> rectified_law({"B": 20.0, "E": 1.0, "beta": 0.5, "D_l": 20.0}, 0.0)  # a loss of 20 / 20 + 1 before fine-tuning
    Array(0.6931472, dtype=float32)
    """
    return _log_saturating(params["B"], params["E"], params["beta"], params["D_l"], D)


def lens_law(params: Mapping[str, Array], D: Array) -> jax.Array:
    """Log loss under the LensLLM law, ``L(D) = B / (F + D^beta) + E``.

    Parameters
    ----------
    params : mapping
        "B" > 0 and "E" >= 0, "beta" > 0, and "F", the value of F(Theta, t) (in samples^beta):
        a number, one per D, or the result of `kernel_residual`; > 0 where D is 0.
    D : float array
        Training samples, >= 0; broadcasts against the parameters.

    Returns
    -------
    float array
        log L, L in nats per token.

    References
    ----------
    LensLLM (ICML 2025, arXiv 2505.03793), eq. 10.

    Examples
    --------
    >>> lens_law({"B": 20.0, "E": 1.0, "beta": 0.5, "F": 10.0}, 100.0)  # log(20 / (10 + 10) + 1)
    Array(0.6931472, dtype=float32)
    """
    return _log_saturating(params["B"], params["E"], params["beta"], params["F"], D)


def log_kernel_residual(t: Array, eigenvalues: Array, projections: Array, learning_rate: Array = 1.0) -> jax.Array:
    """Logarithm of `kernel_residual`; see there."""
    counts = [np.shape(values)[-1:] for values in (eigenvalues, projections)]
    if counts[0] != counts[1] or not counts[0]:
        raise InputError(
            f"eigenvalues have shape {np.shape(eigenvalues)} and projections {np.shape(projections)}; both must end in "
            "the same number of eigenvectors K."
        )
    t = jnp.asarray(t)[..., None]
    weight = jnp.square(jnp.asarray(projections))
    log_weight = jnp.where(weight > 0, jnp.log(jnp.where(weight > 0, weight, 1.0)), -jnp.inf)
    return jax.nn.logsumexp(log_weight - 2.0 * jnp.asarray(learning_rate) * jnp.asarray(eigenvalues) * t, axis=-1)


def kernel_residual(t: Array, eigenvalues: Array, projections: Array, learning_rate: Array = 1.0) -> jax.Array:
    """Squared residual of linearised training after t steps, ``F(t) = sum_k exp(-2 eta lam_k t) (u_k . r)^2``.

    Equal to ``|| expm(-eta Theta t) r ||^2`` with the matrix exponential, for Theta = U diag(lam) U^T.

    Parameters
    ----------
    t : float array (...)
        Training steps, >= 0.
    eigenvalues : float array (..., K) or (K,)
        lam_k of the kernel Theta, >= 0.
    projections : float array (..., K) or (K,)
        u_k . r, with r = f_0 - y the residual before fine-tuning; F has the unit of r squared.
        Zeros are padding.
    learning_rate : float
        eta.

    Returns
    -------
    float array (...)
        F(t), between 0 and F(0) = ||r||^2.

    Raises
    ------
    InputError
        If `eigenvalues` and `projections` do not have the same K.

    References
    ----------
    LensLLM (ICML 2025), eq. 8 and 9.
    """
    return jnp.exp(log_kernel_residual(t, eigenvalues, projections, learning_rate))


def phase_transition(F: Array, beta: Array) -> jax.Array:
    """Return the size at which the pre-power phase gives way to the power phase, ``D* = F^(1/beta)``.

    Parameters
    ----------
    F : float array
        F(Theta, t), or D_l of the rectified law; >= 0.
    beta : float array
        Learning difficulty, > 0.

    Returns
    -------
    float array
        Samples.
    """
    F, beta = _floats(F, beta)
    return jnp.exp(jnp.log(F) / beta)


LAWS: dict[str, Callable[[Mapping[str, Array], Array], jax.Array]] = {
    "power": power_law,
    "rectified": rectified_law,
    "lens": lens_law,
}
"""Name of a law -> (params, D) -> log loss."""
