"""Kernels within a memory limit: what a model recomputes, and where blocks of examples take over."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from lensjax.errors import InputError
from lensjax.tangents.models import is_model, model_function

VARIANTS = (
    ("scan", False, "layers in a loop"),
    ("scan", "dots_with_no_batch_dims_saveable", "layers in a loop, their products kept"),
    ("scan", True, "layers in a loop, recomputed on the way back"),
)
"""How a model of `lensjax.models` can be run: `execution`, `remat` and what that is; from fast to small."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute the same function.

    Attributes
    ----------
    function : callable (params, example)
    params : its parameters
    what : in words, "" for the function as it is
    """

    function: Any
    params: Any
    what: str


def ways(f: Any, params: Any, output: str) -> Iterator[Way]:
    """Yield ways to compute an output of a model, or the one way of any other function, from fast to small."""
    if not is_model(f):
        yield Way(f, params, "")
        return
    if not (hasattr(f, "execution") and hasattr(f, "remat")):
        yield Way(*model_function(f, output), "")
        return
    for execution, remat, what in VARIANTS:
        with _set(f, execution, remat):
            function, own = model_function(f, output)
        yield Way(function, own, what)


@contextlib.contextmanager
def _set(model: Any, execution: str, remat: bool | str) -> Iterator[None]:
    before = model.execution, model.remat
    model.execution, model.remat = execution, remat
    try:
        yield
    finally:
        model.execution, model.remat = before


def needed_bytes(program: Any, *arguments: Any) -> int:
    """Return what a jitted function takes beside its arguments, by the compiled program's own account.

    Raises
    ------
    InputError
        If the device gives none.
    """
    analysis = program.lower(*arguments).compile().memory_analysis()
    if analysis is None:
        raise InputError("This device does not say how much memory a program takes; give `block` instead of `memory`.")
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
