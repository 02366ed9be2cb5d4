"""Scaling laws, and one differentiable `fit` for all of them."""

from lensjax.laws.fits import Fits
from lensjax.laws.fitting import fit
from lensjax.laws.laws import (
    LAWS,
    kernel_residual,
    lens_law,
    log_kernel_residual,
    phase_transition,
    power_law,
    rectified_law,
)

__all__ = [
    "LAWS",
    "Fits",
    "fit",
    "kernel_residual",
    "lens_law",
    "log_kernel_residual",
    "phase_transition",
    "power_law",
    "rectified_law",
]
