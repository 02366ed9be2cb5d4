"""What fine-tuning costs: as the paper counts it, and by XLA's cost analysis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lensjax.metrics import training_flops

FROZEN_FLOPS = 4  # per frozen weight and token: its own gradient, 2 of the 6 of a trained one, is left out


def tuning_flops(parameters: int, trainable: int, tokens: int) -> float:
    """Floating-point operations of training some of the weights on so many tokens.

    6 for each trained weight and token (the paper's count), 4 for each frozen one.
    """
    return float(training_flops(trainable, tokens)) + FROZEN_FLOPS * (parameters - trainable) * tokens


def xla_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Count the floating-point operations of one call by XLA's cost analysis; nothing is compiled or run.

    A loop's body is counted once, whatever its number of turns: give functions without loops.

    Parameters
    ----------
    function : callable
        Not jitted.
    *arguments
        Arrays or `jax.ShapeDtypeStruct`s.

    Returns
    -------
    float
        NaN where the backend has no cost analysis.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    found = jax.jit(function).lower(*shapes).cost_analysis()
    return float((found or {}).get("flops", float("nan")))
