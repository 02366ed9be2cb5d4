"""Linearised training under a fixed kernel: the residual F(Theta, t) of eq. 9, losses and predictions over time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lensjax._tracing import concrete
from lensjax.errors import InputError

Time = Any
"""A number or an array of any shape (...)."""


@dataclasses.dataclass(frozen=True)
class Negative:
    """Eigenvalues of a kernel below zero, which an exact kernel of gradients does not have.

    Attributes
    ----------
    count : int
    smallest : float
        The most negative eigenvalue, 0 if there is none.
    relative : float
        Its size over the largest absolute eigenvalue; if that is near the rounding error of the kernel's dtype, it is
        rounding.
    share : float
        Fraction of the initial squared residual in their directions, 0 to 1.
    clipped : bool
        Whether they were set to 0.
    """

    count: int
    smallest: float
    relative: float
    share: float
    clipped: bool


@dataclasses.dataclass(frozen=True, eq=False)
class KernelDynamics:
    """Gradient descent on ``1/2 sum (f(x_i) - y_i)^2`` of a model that is linear in its parameters.

    The residual r = f - y of the training examples follows ``r_t = expm(-eta Theta t) r_0`` (gradient flow, eta t is
    the time), or ``r_t = (1 - eta Theta)^t r_0`` with `discrete` steps. Everything can be differentiated with
    respect to the time t and the learning rate eta (t in discrete steps excepted, which are whole).

    Attributes
    ----------
    eigenvalues : float array (K,), ascending
        Of the kernel, after clipping; 0 where they are not `resolved`.
    vectors : float array (K, K)
        Their eigenvectors, in columns.
    projections : float array (K,)
        u_k . r_0.
    shape : tuple of int
        Of the outputs, (N,) or (N, C); K = N C.
    negative : Negative
    resolved : bool array (K,)
        Whether an eigenvalue is larger than the rounding of the kernel's entries, see `kernel_dynamics`.

    Notes
    -----
    For the mean over n outputs instead of the sum, divide eta by n; for squares without the half, double it.

    References
    ----------
    LensLLM (ICML 2025), eq. 8 and 9; Jacot et al. 2018, arXiv:1806.07572; Lee et al. 2019, arXiv:1902.06720.
    """

    eigenvalues: jax.Array
    vectors: jax.Array
    projections: jax.Array
    shape: tuple[int, ...]
    negative: Negative
    resolved: jax.Array

    def __repr__(self) -> str:
        known = concrete(self.eigenvalues)
        if known is None or known.ndim != 1:
            return f"KernelDynamics(outputs {self.shape})"
        words = f"outputs {self.shape}, eigenvalues {known[0]:.3g} to {known[-1]:.3g}"
        return f"KernelDynamics({words}, {self.negative.count} negative)"

    def residual_norm(self, t: Time, learning_rate: Any = 1.0, *, discrete: bool = False) -> jax.Array:
        """Return F(Theta, t) = |r_t|^2, eq. 9.

        Parameters
        ----------
        t : float array (...), >= 0
            Steps; whole numbers if `discrete`.
        learning_rate : float
            eta.
        discrete : bool
            Steps of gradient descent instead of gradient flow.

        Returns
        -------
        float array (...), in units of the outputs squared.
        """
        return jnp.sum(jnp.square(self._decay(t, learning_rate, discrete) * self.projections), axis=-1)

    def loss(self, t: Time, learning_rate: Any = 1.0, *, discrete: bool = False) -> jax.Array:
        """Return the training loss ``1/2 sum_i r_i^2``; arguments as in `residual_norm`."""
        return 0.5 * self.residual_norm(t, learning_rate, discrete=discrete)

    def residual(self, t: Time, learning_rate: Any = 1.0, *, discrete: bool = False) -> jax.Array:
        """Return r_t of the training examples, (..., *shape); arguments as in `residual_norm`."""
        rows = (self._decay(t, learning_rate, discrete) * self.projections) @ self.vectors.T
        return rows.reshape(*rows.shape[:-1], *self.shape)

    def change(self, t: Time, cross_kernel: Any, learning_rate: Any = 1.0, *, discrete: bool = False) -> jax.Array:
        """Return how far the outputs on other examples have moved: ``-Theta(x', X) Theta^-1 (1 - expm(..)) r_0``.

        Parameters
        ----------
        t, learning_rate, discrete : as in `residual_norm`
        cross_kernel : float array (M, N), or (M, C, N, C)
            Kernel between the other examples and the training examples. No inverse is computed. Directions whose
            eigenvalue is not resolved are left out: gradients that cancel on the training examples have inner products
            of 0 with any other gradient, and the cross kernel's entries there are rounding, which eta t multiplies.

        Returns
        -------
        float array (..., M) or (..., M, C), to be added to the outputs before training.

        Raises
        ------
        InputError
            If the cross kernel does not fit the training examples, or is not zero where their kernel is.
        """
        cross = jnp.asarray(cross_kernel)
        half = cross.ndim // 2
        if cross.ndim != 2 * len(self.shape) or cross.shape[half:] != self.shape:
            raise InputError(
                f"cross_kernel has shape {cross.shape}, but must be (M, ..., {', '.join(map(str, self.shape))}): other "
                "examples first, training examples last."
            )
        known, resolved = concrete(cross), concrete(self.resolved)
        if known is not None and resolved is not None and known.any() and not resolved.any():
            raise InputError(
                "cross_kernel is not zero, but the training examples' kernel is: such gradients have no inner product "
                "with any other; give both kernels of the same function and parameters."
            )
        rows = cross.reshape(-1, len(self.eigenvalues)) @ self.vectors
        moved = -(self._gain(t, learning_rate, discrete) * self.projections) @ rows.T
        return moved.reshape(*moved.shape[:-1], *cross.shape[:half])

    def predict(
        self, t: Time, cross_kernel: Any, outputs: Any, learning_rate: Any = 1.0, *, discrete: bool = False
    ) -> jax.Array:
        """Return the outputs on other examples after t steps.

        Parameters
        ----------
        t, cross_kernel, learning_rate, discrete : as in `change`
        outputs : float array (M,) or (M, C)
            Before training.

        Returns
        -------
        float array (..., M) or (..., M, C), in units of the outputs.

        Raises
        ------
        InputError
            If the cross kernel does not fit the training examples, or `outputs` the cross kernel.
        """
        start, moved = jnp.asarray(outputs), self.change(t, cross_kernel, learning_rate, discrete=discrete)
        own = moved.shape[moved.ndim - len(self.shape) :]
        if start.shape != own:
            raise InputError(f"outputs have shape {start.shape}, but the cross kernel is of outputs of shape {own}.")
        return start + moved

    def largest_stable_rate(self) -> float:
        """Return the learning rate above which discrete steps diverge, 2 / lam_max; infinite for a zero kernel."""
        largest = float(self.eigenvalues[-1])
        return 2 / largest if largest > 0 else float("inf")

    def _decay(self, t: Time, rate: Any, discrete: bool) -> jax.Array:
        """exp(-eta lam t), or (1 - eta lam)^t."""
        t, lam = jnp.asarray(t)[..., None], jnp.asarray(rate) * self.eigenvalues
        t = jnp.where(lam == 0, 0, t)  # not 0 times infinity
        if not discrete:
            return jnp.exp(-lam * t)
        size, sign = _whole_power(lam, t)
        return sign * jnp.exp(size)

    def _gain(self, t: Time, rate: Any, discrete: bool) -> jax.Array:
        """(1 - decay) / lam, 0 where lam is not resolved."""
        t, rate = jnp.where(self.resolved, jnp.asarray(t)[..., None], 0), jnp.asarray(rate)
        lam = self.eigenvalues
        # Where lam is tiny, 1 - decay is rounding and its quotient noise: two terms of the series are exact there.
        small = jnp.abs(rate * lam * t) < jnp.sqrt(jnp.finfo(lam.dtype).eps)
        safe = jnp.where(lam == 0, 1.0, lam)
        if discrete:
            size, sign = _whole_power(rate * lam, t)
            far = jnp.where(sign > 0, -jnp.expm1(size), 1 + jnp.exp(size)) / safe
            near = rate * t * (1 - rate * lam * (t - 1) / 2)
        else:
            far = -jnp.expm1(-rate * lam * t) / safe
            near = rate * t * (1 - rate * lam * t / 2)
        return jnp.where(small, near, far)


def _whole_power(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return log |1 - x|^t and the sign of (1 - x)^t for whole t >= 0."""
    below, above = x < 1, x > 1
    # log1p: in float32 1 - x has lost most of a small x, and t multiplies the loss.
    log_below, log_above = jnp.log1p(-jnp.where(below, x, 0.0)), jnp.log(jnp.where(above, x, 2.0) - 1)
    size = jnp.where(below | above, t * jnp.where(below, log_below, log_above), jnp.where(t == 0, 0.0, -jnp.inf))
    return size, jnp.where(above & (jnp.mod(t, 2) == 1), -1.0, 1.0)


def kernel_dynamics(
    kernel: Any, outputs: Any, targets: Any = 0.0, *, negative: Literal["clip", "keep", "refuse"] = "clip"
) -> KernelDynamics:
    """Decompose a kernel once, for linearised training over any time and learning rate.

    Parameters
    ----------
    kernel : float array (N, N) or (N, C, N, C)
        From `ntk`. Its symmetric part is taken. For eq. 9 with a model's loss as its output, targets are 0; with the
        gold tokens' probability they are 1.
    outputs : float array (N,) or (N, C)
        f_0, before training.
    targets : float array like `outputs`, or number
        y.
    negative : {"clip", "keep", "refuse"}
        What to do with negative eigenvalues: set them to 0 (their residuals then stay), let their residuals grow, or
        raise. The result's `negative` describes them in any case.

    Returns
    -------
    KernelDynamics

    Raises
    ------
    InputError
        If the kernel is a dict of layers or traced, shapes do not fit, something is not finite, the kernel is not
        symmetric, or is indefinite with "refuse".

    Notes
    -----
    The decomposition is made in float64 whatever the caller's precision; the result has the default float dtype.

    An eigenvalue is treated as 0 where its size is at most ``2 sqrt(K) eps max |Theta|``, the effect of independent
    rounding errors of the kernel's entries (eps is that of the kernel's dtype: pass it as it was computed, not cast),
    or ``K eps lam_max`` of float64, the error of the decomposition itself. Repeated examples have such directions.
    Their residuals stay, and predictions do not move along them.

    Examples
    --------
    >>> dynamics = kernel_dynamics(np.diag([1.0, 4.0]), outputs=np.array([1.0, 1.0]))
    >>> f"{dynamics.residual_norm(0.0):.4f}, {dynamics.residual_norm(10.0, learning_rate=0.05):.4f}"
    '2.0000, 0.3862'
    >>> bool(jax.grad(dynamics.loss)(10.0, 0.05) < 0)  # longer training lowers the loss
    True
    """
    if negative not in ("clip", "keep", "refuse"):
        raise InputError(f"negative={negative!r} is not known; choose 'clip', 'keep' or 'refuse'.")
    if isinstance(kernel, Mapping):
        raise InputError(
            f"kernel is a dict of {len(kernel)} layers, as from ntk(by_layer=...): add them up, "
            "sum(kernel.values()), or choose one."
        )
    if any(concrete(a) is None for a in (kernel, outputs, targets)):
        raise InputError(
            "kernel_dynamics decomposes numbers, and cannot be compiled or differentiated itself; call it outside of "
            "jax.jit and jax.grad (what it returns can be differentiated by time and learning rate)."
        )
    theta, start = np.asarray(kernel, np.float64), np.asarray(outputs, np.float64)
    shape = theta.shape[: theta.ndim // 2]
    if theta.ndim not in (2, 4) or theta.shape != (*shape, *shape) or theta.size == 0:
        raise InputError(f"kernel has shape {theta.shape}; it must be (N, N) or (N, C, N, C).")
    if start.shape != shape:
        raise InputError(f"outputs have shape {start.shape}, but the kernel is of outputs of shape {shape}.")
    try:
        residual = start - np.broadcast_to(np.asarray(targets, np.float64), shape)
    except ValueError:
        raise InputError(f"targets have shape {np.shape(targets)}, but outputs {shape}.") from None
    if not (np.isfinite(theta).all() and np.isfinite(residual).all()):
        raise InputError("kernel, outputs and targets must be finite; found NaN or infinity.")
    size = residual.size
    theta = theta.reshape(size, size)
    asymmetry, scale = np.abs(theta - theta.T).max(), np.abs(theta).max()
    if asymmetry > 1e-3 * scale:
        raise InputError(
            f"kernel differs from its transpose by {asymmetry:.3g} (largest entry {scale:.3g}); a kernel between two "
            "different input sets goes to `predict`."
        )
    eigenvalues, vectors = np.linalg.eigh((theta + theta.T) / 2)
    given = jnp.result_type(kernel)
    eps = float(jnp.finfo(given).eps) if jnp.issubdtype(given, jnp.floating) else 0.0
    exact = float(np.finfo(np.float64).eps)
    resolution = max(2 * np.sqrt(size) * eps * scale, size * exact * np.abs(eigenvalues).max())
    resolved = np.abs(eigenvalues) > resolution
    projections = vectors.T @ residual.ravel()
    below = eigenvalues < 0
    largest, square = np.abs(eigenvalues).max(), np.sum(projections**2)
    found = Negative(
        int(below.sum()),
        float(min(eigenvalues[0], 0.0)),
        float(-min(eigenvalues[0], 0.0) / largest) if largest > 0 else 0.0,
        float(np.sum(projections[below] ** 2) / square) if square > 0 else 0.0,
        negative == "clip",
    )
    if negative == "refuse" and found.count:
        raise InputError(
            f"kernel has {found.count} negative eigenvalues, down to {found.smallest:.3g} ({found.relative:.2g} of the "
            "largest); clip or keep them, or compute the kernel in float64."
        )
    if negative == "clip":
        resolved &= eigenvalues > 0
    eigenvalues = np.where(resolved, eigenvalues, 0.0)
    values, columns, parts = (jnp.asarray(a, jnp.result_type(float)) for a in (eigenvalues, vectors, projections))
    return KernelDynamics(values, columns, parts, shape, found, jnp.asarray(resolved))
