"""What the studies share: finite differences to check gradients against, and where results go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks/environment.py

from environment import write_result


def central(function: Callable[[np.ndarray], Any], at: Any, direction: Any, step: float) -> np.ndarray:
    """Return the derivative along a direction by central differences of two steps, extrapolated (error of order 4)."""
    at, direction = np.asarray(at, np.float64), np.asarray(direction, np.float64)

    def slope(size: float) -> np.ndarray:
        ahead, behind = (np.asarray(function(at + s * size * direction), np.float64) for s in (1, -1))
        return np.asarray((ahead - behind) / (2 * size))

    return np.asarray((4 * slope(step / 2) - slope(step)) / 3)


def agreement(gradient: Any, difference: Any) -> dict[str, float]:
    """Compare derivatives with finite differences.

    Returns
    -------
    dict
        `largest`: the largest difference over the largest derivative; `median`: of the relative differences;
        `compared`: how many derivatives.
    """
    gradient, difference = np.ravel(np.asarray(gradient, np.float64)), np.ravel(np.asarray(difference, np.float64))
    away, size = np.abs(gradient - difference), np.abs(difference)
    return {
        "compared": len(gradient),
        "largest": float(away.max() / size.max()),
        "median": float(np.median(away / np.maximum(size, 1e-12 * size.max()))),
    }


def require(found: Mapping[str, float], tolerance: float, what: str) -> None:
    """End the study if derivatives and finite differences disagree."""
    print(f"{what}: {found['compared']:.0f} derivatives, largest difference {found['largest']:.1e} of the largest one")
    if not found["largest"] <= tolerance:
        raise SystemExit(f"{what}: derivative and finite difference disagree ({found['largest']:.1e} > {tolerance:g})")


def finish(name: str, result: Mapping[str, Any]) -> None:
    """Write benchmarks/results/studies/NAME.json."""
    write_result(f"studies/{name}", result)
