"""Telling values that are known from those that a JAX transformation traces."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def concrete(value: Any) -> np.ndarray | None:
    """Return the value as a NumPy array, or None if it is traced by a JAX transformation."""
    try:
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return None
