"""What the readers have in common: points of curves, names that say model and samples, numbers that are checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lensjax._messages import ungrouped
from lensjax.errors import InputError
from lensjax.losses.curves import Curves

Repeats = Literal["refuse", "mean", "lowest"]
Which = Literal["lowest", "last"]

PATTERNS = ("{model}/{samples}", "{model}-{samples}", "{model}_{samples}")


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes
    ----------
    model : str
    samples : float
        Training samples; 0 is before fine-tuning.
    loss : float
        Nats per token; NaN if the run did not get so far.
    parameters : float
        Number of weights, NaN if unknown.
    where : str
        For messages.
    """

    model: str
    samples: float
    loss: float
    parameters: float
    where: str


def named(runs: Mapping[str, str], pattern: str | None) -> dict[str, tuple[str, float]]:
    """Return model and samples of each run's name -> where it stands, by one pattern for all."""
    tried = PATTERNS if pattern is None else (pattern,)
    for one in tried:
        expression = _expression(one)
        found = {name: expression.fullmatch(name) for name in runs}
        if all(found.values()):
            return {n: (m["model"].strip(), size_of(m["samples"], runs[n])) for n, m in found.items() if m is not None}
    wrong = next(n for n, m in found.items() if m is None)
    raise InputError(
        f"{runs[wrong]}: the name {wrong!r} does not say model and number of samples as {' or '.join(tried)} does. "
        "Rename the run, or say how names are made: pattern='{model}-n{samples}', say."
    )


def _expression(pattern: str) -> re.Pattern[str]:
    if pattern.count("{model}") != 1 or pattern.count("{samples}") != 1:
        raise InputError(f"pattern {pattern!r} must hold {{model}} and {{samples}} once each.")
    text = re.escape(pattern).replace(re.escape("{model}"), "(?P<model>.+)")
    return re.compile(text.replace(re.escape("{samples}"), r"(?P<samples>\d[\d_]*(?:\.\d+)?[kM]?)"))


def size_of(text: str, where: str) -> float:
    """Return a number of training samples: 1600, 1_600, 1.6k."""
    text = text.strip()
    factor = {"k": 1e3, "M": 1e6}.get(text[-1:], 1.0)
    try:
        value = float(ungrouped(text if factor == 1.0 else text[:-1])) * factor
    except ValueError:
        value = np.nan
    if not (np.isfinite(value) and value >= 0 and value == int(value)):
        raise InputError(f"{where}: {text!r} is not a number of training samples (a whole number, 0 or more).")
    return value


def number_of(value: Any, what: str) -> float:
    """Return a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} is {str(value)[:40]!r}, not a number. Mend it or leave the run out.") from None


def loss_of(value: Any, what: str) -> float:
    """Return a loss; one that is not finite is a run that diverged, which counts as not measured."""
    number = number_of(value, what)
    if number <= 0:
        raise InputError(f"{what} is {number:g}; losses are positive (nats per token). Is it the right metric?")
    return number if np.isfinite(number) else float("nan")


def chosen_of(values: Sequence[float], which: Which) -> float:
    """Return the one of a run's losses that counts; NaN if there is none."""
    if which not in ("lowest", "last"):
        raise InputError(f"which={which!r} is not known; choose 'lowest' or 'last'.")
    if which == "last":
        return values[-1]
    finite = [v for v in values if np.isfinite(v)]
    return min(finite) if finite else float("nan")


def curves_of(points: Iterable[Point], source: str, repeats: Repeats) -> Curves:
    """Arrange points as curves, models in the order in which they come."""
    if repeats not in ("refuse", "mean", "lowest"):
        raise InputError(f"repeats={repeats!r} is not known; choose 'refuse', 'mean' or 'lowest'.")
    cells: dict[tuple[str, float], list[Point]] = {}
    weights: dict[str, float] = {}
    for point in points:
        cells.setdefault((point.model, point.samples), []).append(point)
        if not (np.isnan(point.parameters) or (np.isfinite(point.parameters) and point.parameters > 0)):
            raise InputError(f"{point.where}: parameters of {point.model} are {point.parameters:g}; they are above 0.")
        if np.isfinite(point.parameters):
            weights[point.model] = point.parameters
        else:
            weights.setdefault(point.model, np.nan)
    names = tuple(weights)
    if len(names) < 2:
        raise InputError(f"{source}: {len(names)} model(s); choosing needs at least two candidates.")
    sizes = sorted({samples for _, samples in cells})
    losses = np.full((len(names), len(sizes)), np.nan)
    for (model, samples), same in cells.items():
        found = [p for p in same if np.isfinite(p.loss)]
        if len(found) > 1 and repeats == "refuse":
            raise InputError(
                f"{found[1].where}: {model} at {samples:g} samples is also in {found[0].where}. Leave one out, or say "
                "what to do: repeats='mean' or 'lowest'."
            )
        if found:
            together = [p.loss for p in found]
            losses[names.index(model), sizes.index(samples)] = (
                min(together) if repeats == "lowest" else np.mean(together)
            )
    known = np.array([weights[n] for n in names])
    return Curves(names, np.array(sizes), losses, known if np.isfinite(known).any() else None, source=source)


def listed(header: Sequence[str], most: int = 20) -> str:
    """List columns for a message."""
    return ", ".join(header[:most]) + (", ..." if len(header) > most else "")


def short(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
