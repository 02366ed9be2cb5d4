"""Shared by all readers: points of curves, model and samples from names, checked numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lensjax._messages import ungrouped
from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.names import PATTERNS, REMEDY, doubt, expression_of, fitting, worded

Repeats = Literal["refuse", "mean", "lowest"]
Which = Literal["lowest", "last"]
SameStep = Literal["refuse", "first", "last"]

SCORES = (
    *(
        "acc",
        "f1",
        "auc",
        "auroc",
        "mcc",
        "matthews",
        "pearson",
        "spearman",
        "meteor",
        "chrf",
        "bertscore",
        "map",
        "ndcg",
    ),
    *("score", "reward", "em", "exact", "wins", "winrate", "r2"),
)
"""Words in the names of metrics of which more is better."""


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


def named(
    runs: Mapping[str, str],
    pattern: str | None,
    *,
    models: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
) -> dict[str, tuple[str, float]]:
    """Return name -> (model, samples) for runs' names, by one pattern for all.

    Parameters
    ----------
    runs : mapping of name to where it stands
    pattern : str, optional
        With ``{model}`` and ``{samples}``, and ``*`` for what is to be left out. Default: a word beside the number must
        say that it is one of samples, or the first of `PATTERNS` that fits all if the numbers are the same growing
        sizes for each model, see `lensjax.losses.names`.
    models : mapping of name to model, optional
        Where models are known from elsewhere.
    notes : list, optional
        Gets a sentence if numbers were taken for samples without a word that says so.

    Raises
    ------
    InputError
        A name that does not fit; numbers that may be something else.
    """
    tried = PATTERNS if pattern is None else (pattern,)
    said = worded(runs) if pattern is None else None
    if said is not None:
        return _read_names(said, runs)
    for one in tried:
        found = fitting(runs, [expression_of(one)])
        if found is not None:
            return _bare(found, runs, models or {}, notes) if pattern is None else _read_names(found, runs)
    last = expression_of(tried[-1])
    wrong = next(name for name in runs if last.fullmatch(name) is None)
    raise InputError(
        f"{runs[wrong]}: the name {wrong!r} does not say model and number of samples as {' or '.join(tried)} does. "
        "Rename the run, or say how names are made: pattern='{model}-n{samples}', say (--pattern; * for what is to be "
        "left out)."
    )


def _bare(
    found: Mapping[str, tuple[str, str]],
    runs: Mapping[str, str],
    models: Mapping[str, str],
    notes: list[str] | None,
) -> dict[str, tuple[str, float]]:
    """Read names that end in a bare number, if it can only be a number of samples."""
    read = _read_names(found, runs)
    reason = doubt(found, [(models.get(name, model), samples) for name, (model, samples) in read.items()])
    if reason:
        name = next(iter(runs))
        raise InputError(
            f"{runs[name]}: the number at the end of {name!r} may count runs, or be a seed, a step or a date "
            f"({reason}). {REMEDY}"
        )
    sizes = sorted({samples for _, samples in read.values()})
    if notes is not None:
        shown = ", ".join(f"{size:g}" for size in sizes)
        notes.append(f"the numbers of samples ({shown}) are those at the ends of the runs' names")
    return read


def _read_names(found: Mapping[str, tuple[str, str]], runs: Mapping[str, str]) -> dict[str, tuple[str, float]]:
    return {name: (model.strip(), size_of(samples, runs[name])) for name, (model, samples) in found.items()}


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
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except OverflowError:
        raise InputError(f"{what} is larger than any number can be. Mend it or leave the run out.") from None
    except (TypeError, ValueError):
        raise InputError(f"{what} is {str(value)[:40]!r}, not a number. Mend it or leave the run out.") from None


def check_metric(metric: str, source: str) -> None:
    """Refuse a metric whose name says that it is not a loss in nats, such as an accuracy.

    Raises
    ------
    InputError
    """
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word]
    if any("loss" in word or word in ("nll", "entropy", "crossentropy") for word in words):
        return
    if any(word.startswith(("perplexit", "ppl")) for word in words):
        raise InputError(
            f"{source}: the metric {metric} is a perplexity by its name; give losses: its logarithm, nats per token."
        )
    if any(word in SCORES or word.startswith(("accura", "rouge", "bleu", "precision", "recall")) for word in words):
        raise InputError(
            f"{source}: the metric {metric} is by its name no loss: higher is better there. Give test losses: mean "
            "cross-entropy, nats per token."
        )


def loss_of(value: Any, what: str) -> float:
    """Return a loss; one that is not finite is a run that diverged, which counts as not measured."""
    number = number_of(value, what)
    if number <= 0:
        raise InputError(f"{what} is {number:g}; losses are positive (nats per token). Is it the right metric?")
    return number if math.isfinite(number) else math.nan


def chosen_of(values: Sequence[float], which: Which) -> float:
    """Return the lowest finite one (NaN if there is none) or the last one of a run's losses, of which there is one."""
    if which not in ("lowest", "last"):
        raise InputError(f"which={which!r} is not known; choose 'lowest' or 'last'.")
    if which == "last":
        return values[-1]
    finite = [v for v in values if math.isfinite(v)]
    return min(finite) if finite else float("nan")


def curves_of(points: Iterable[Point], source: str, repeats: Repeats, notes: Iterable[str] = ()) -> Curves:
    """Arrange points as curves, models in the order in which they come."""
    if repeats not in ("refuse", "mean", "lowest"):
        raise InputError(f"repeats={repeats!r} is not known; choose 'refuse', 'mean' or 'lowest'.")
    cells: dict[tuple[str, float], list[Point]] = {}
    weights: dict[str, float] = {}
    for point in points:
        cells.setdefault((point.model, point.samples), []).append(point)
        if not (math.isnan(point.parameters) or (math.isfinite(point.parameters) and point.parameters > 0)):
            raise InputError(f"{point.where}: parameters of {point.model} are {point.parameters:g}; they are above 0.")
        if math.isfinite(point.parameters):
            weights[point.model] = point.parameters
        else:
            weights.setdefault(point.model, np.nan)
    names = tuple(weights)
    if len(names) < 2:
        raise InputError(f"{source}: {len(names)} model(s); choosing needs at least two candidates.")
    sizes = sorted({samples for _, samples in cells})
    # Looked up, not searched for: a journal may hold very many runs.
    row_of = {name: row for row, name in enumerate(names)}
    column_of = {size: column for column, size in enumerate(sizes)}
    losses = np.full((len(names), len(sizes)), np.nan)
    for (model, samples), same in cells.items():
        found = [p for p in same if math.isfinite(p.loss)]
        if len(found) > 1 and repeats == "refuse":
            raise InputError(
                f"{found[1].where}: {model} at {samples:g} samples is also in {found[0].where}. Leave one out, or say "
                "what to do: repeats='mean' or 'lowest' (--repeats)."
            )
        if found:
            together = [p.loss for p in found]
            losses[row_of[model], column_of[samples]] = (
                min(together) if repeats == "lowest" or len(together) == 1 else np.mean(together)
            )
    known = np.array([weights[n] for n in names])
    weighed = known if np.isfinite(known).any() else None
    return Curves(names, np.array(sizes), losses, weighed, source=source, notes=tuple(notes))


def listed(header: Sequence[str], most: int = 20) -> str:
    """List columns for a message."""
    return ", ".join(header[:most]) + (", ..." if len(header) > most else "")


def short(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
