"""Selection from a table of losses that somebody has measured already."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lensjax import losses
from lensjax.data import TABLES
from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.stores import is_database
from lensjax.metrics import training_flops
from lensjax.selection import Selection
from lensjax.selectors import DEFAULT, GAMMA, METHODS, TAU, Scores, Selector, get_selector
from lensjax.selectors.methods import ALL

DEFAULT_RATIO = 8  # target / largest visible size of the packaged tables, the paper's least demanding budget

PER_BYTE = "test_loss_per_byte"  # of our own runs

RISE = 1.15  # ratio of two losses, three standard errors of their difference, see `spread` of the default selector


def resolve_sizes(curves: Curves, visible: float | None, target: float | None) -> tuple[float, float]:
    """Decide what is visible and for how many samples to choose.

    Parameters
    ----------
    curves : Curves
    visible : float, optional
        Default: every size below the target, which is then above them all or one of the table's sizes, whose losses
        are the truth; for the packaged tables, which hold the truth, a `DEFAULT_RATIO`-th of
        the target.
    target : float, optional
        Default, for the packaged tables only: the largest size.

    Returns
    -------
    visible, target : float

    Raises
    ------
    InputError
        No target for the user's own table; nothing visible; a target that is not above the visible sizes.
    """
    packaged = curves.source.startswith(tuple(f"{kind}:" for kind in TABLES))
    if target is None:
        if not packaged:
            raise InputError(
                f"{curves.source}: say for how many training samples you will fine-tune the chosen model: --target N."
            )
        target = float(curves.sizes[-1])
    if not (np.isfinite(target) and target > 0):
        raise InputError(f"--target is {target:g}; a number of training samples is above 0.")
    if visible is None:
        below = curves.sizes[curves.sizes <= target / DEFAULT_RATIO if packaged else curves.sizes < target]
        if not packaged and target < curves.sizes[-1] and not (curves.sizes == target).any():
            raise InputError(
                f"--target {target:g} lies below sizes that were measured ({_listed(curves.sizes)}). Raise --target, "
                "or hide sizes with --visible N."
            )
        if not len(below):
            raise InputError(
                f"--target {target:g}: no size of {curves.source} is visible below it (sizes: {_listed(curves.sizes)})"
                ". Raise --target or say what is visible: --visible N."
            )
        visible = float(below[-1])
    if not len(curves.visible(visible).sizes):
        raise InputError(f"--visible {visible:g}: {curves.source} has {_listed(curves.sizes)}.")
    largest = float(curves.visible(visible).sizes[-1])
    if target <= largest:
        raise InputError(
            f"--target {target:g} is not above the largest visible size {largest:g}. Raise --target, or hide sizes "
            "with --visible N."
        )
    return largest, target


def check_falling(curves: Curves) -> None:
    """Refuse curves most of which rise with the number of samples, as accuracies do.

    Losses rise too, of models that overfit or runs that diverged, but seldom of most candidates: who has such losses
    says so (``--lower-is-better``).

    Raises
    ------
    InputError
    """
    known = [row[np.isfinite(row)] for row in curves.losses]
    ends = [(row[0], row[-1]) for row in known if len(row) > 1]
    rising = [(first, last) for first, last in ends if last > first]
    if len(ends) > 1 and 2 * len(rising) > len(ends):
        which = f"all {len(ends)} models" if len(rising) == len(ends) else f"{len(rising)} of {len(ends)} models"
        raise InputError(
            f"{curves.source}: the losses of {which} rise with the number of samples (the first from "
            f"{rising[0][0]:g} to {rising[0][1]:g}); are they accuracies? Give test losses: mean cross-entropy, nats "
            "per token. If they are losses, say so: --lower-is-better."
        )


def rises(curves: Curves) -> list[str]:
    """Return a sentence for each candidate of which a loss lies well above one at fewer samples.

    That run may have diverged: losses of two runs that differ by their random numbers only differ by less than
    `RISE`. The loss before training has no part in this.
    """
    found = []
    for name, row in zip(curves.names, curves.losses, strict=True):
        at = np.flatnonzero(np.isfinite(row) & (curves.sizes > 0))
        if not len(at):
            continue
        lowest = np.minimum.accumulate(row[at])
        high = at[np.argmax(row[at] / lowest)]
        low = at[np.argmin(row[at[at <= high]])]
        if row[high] > RISE * row[low]:
            found.append(
                f"the loss of {name} rises from {row[low]:g} at {curves.sizes[low]:g} samples to {row[high]:g} at "
                f"{curves.sizes[high]:g}: if that run diverged, leave it out or make it again"
            )
    return found


def _listed(sizes: np.ndarray) -> str:
    return ", ".join(f"{s:g}" for s in sizes)


def score_all(
    curves: Curves,
    target: float,
    method: str,
    *,
    gamma: int,
    tau: float,
    without: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Score visible curves by one method, or by all of them ("all", the default first).

    Parameters
    ----------
    curves : Curves
    target : float
    method : str
    gamma, tau : int, float
        Stopping rule of Algorithm 1.
    without : mapping of method to mapping of candidate to reason
        Candidates whose score one of all methods goes without.

    Returns
    -------
    scores : dict method -> Scores
    refused : dict method -> reason
        Of "all", the methods that the data do not allow.

    Raises
    ------
    InputError
        If the method is unknown or cannot be used on these curves.
    """
    if method != ALL:
        selector = get_selector(method)
        return {method: selector(curves, target, **METHODS[method].options(gamma=gamma, tau=tau))}, {}
    found: dict[str, Scores] = {}
    refused: dict[str, str] = {}
    for name, known in METHODS.items():
        try:
            reasons = (without or {}).get(name, {})
            found[name] = (
                _without(known.selector, curves, target, reasons)
                if reasons
                else known.selector(curves, target, **known.options(gamma=gamma, tau=tau))
            )
        except InputError as error:
            refused[name] = str(error)
    if not found:
        raise InputError(next(iter(refused.values())))
    return found, refused


def _without(selector: Selector, curves: Curves, target: float, reasons: Mapping[str, str]) -> Scores:
    """Score some of the candidates; the others have no score, and the reason as their status.

    Raises
    ------
    InputError
        As the selector; if all but one have no score.
    """
    rows = [row for row, name in enumerate(curves.names) if name not in reasons]
    if len(rows) < 2:
        raise InputError("; ".join(f"{name}: {reasons[name]}" for name in curves.names if name in reasons))
    some = selector(curves.rows(rows), target)

    def spread(values: np.ndarray) -> np.ndarray:
        whole = np.full((len(curves), *values.shape[1:]), np.nan)
        whole[rows] = values
        return whole

    status = {**reasons, **dict(zip(some.names, some.status, strict=True))}
    return dataclasses.replace(
        some,
        names=curves.names,
        score=spread(some.score),
        predicted_loss=spread(some.predicted_loss),
        status=tuple(status[name] for name in curves.names),
        used=spread(some.used) == 1,
        details={name: spread(values) for name, values in some.details.items()},
    )


def read_metric(source: str, metric: str | None, **options: Any) -> Curves:
    """Read one metric of runs as their losses, or runs with other options.

    Parameters
    ----------
    source : str
        A directory or journal, see `lensjax.losses.read`; or a CSV file with a row for each run, or a chart.
    metric : str, optional
        Its name there.
    **options
        Of the reader that this comes to: `pattern`, `model`, `samples`, `repeats`, `same_step`.

    Raises
    ------
    InputError
        If no run has it; if the source is a table of losses, which has no others; an option that does not apply.
    """
    path = Path(source)
    of_runs = metric is not None or any(name in options for name in ("pattern", "model", "samples"))
    options |= {} if metric is None else {"metric": metric}
    if of_runs and path.suffix == ".csv" and path.is_file():
        # What reads the runs of Weights & Biases reads any table with a row for each.
        curves = losses.read_wandb(source, **options)
    elif metric is not None and not (path.is_dir() or path.suffix == ".jsonl" or is_database(path)):
        losses.read(source)
        raise InputError(f"--metric {metric}: {source} is a table of losses and nothing else; remove --metric.")
    else:
        curves = losses.read(source, **options)
    if metric is not None and not np.isfinite(curves.losses).any():
        raise InputError(f"--metric {metric}: no run in {source} has it. Name one that is recorded there.")
    return curves


def select_from_losses(
    source: str | os.PathLike[str] | Curves,
    target: float | None = None,
    *,
    visible: float | None = None,
    method: str = DEFAULT,
    gamma: int = GAMMA,
    tau: float = TAU,
    metric: str | None = None,
    tokens_per_sample: float = 1.0,
    lower_is_better: bool = False,
    reading: Mapping[str, Any] | None = None,
) -> Selection:
    """Rank candidates from losses that are measured already.

    Parameters
    ----------
    source : str, path or Curves
        Losses, or where to read them: see `lensjax.losses.read`.
    target, visible : float, optional
        Training samples to choose for, and the largest size that the choice may be based on; see `resolve_sizes`.
    method : str
        A key of `lensjax.selectors.SELECTORS`, or "all".
    gamma, tau : int, float
        Stopping rule of Algorithm 1.
    metric : str, optional
        Which metric of the runs is the loss; default: see the readers in `lensjax.losses`.
    tokens_per_sample : float
        Tokens trained on per sample, epochs and trials included; 1 gives the paper's 6 N D.
    lower_is_better : bool
        The numbers are losses, even if most of them rise with the number of samples.
    reading : mapping, optional
        Options of the readers in `lensjax.losses`: `pattern`, `model`, `samples`, `repeats`, `same_step`.

    Raises
    ------
    InputError
        See `lensjax.losses.read`, `read_metric`, `resolve_sizes` and the selectors.

    Examples
    --------
    >>> selection = select_from_losses("published:wmt19", visible=51_200)
    >>> selection.best in selection.curves.names, len(selection.curves)
    (True, 30)
    """
    if isinstance(source, Curves):
        if metric is not None or reading:
            raise InputError("metric and reading say how runs are read, but these losses are curves; leave them out.")
        curves = source
    else:
        curves = read_metric(os.fspath(source), metric, **(reading or {}))
    if not (np.isfinite(tokens_per_sample) and tokens_per_sample > 0):
        raise InputError(f"--tokens-per-sample is {tokens_per_sample:g}; it must be positive.")
    largest, target = resolve_sizes(curves, visible, target)
    if not lower_is_better:
        check_falling(curves)
    seen = curves.visible(largest)
    notes = [*curves.notes, *rises(seen)]
    truth = curves.at(target)
    scores, refused = score_all(seen, target, method, gamma=gamma, tau=tau)
    parameters = np.full(len(curves), np.nan) if curves.parameters is None else curves.parameters
    return Selection(
        source=curves.source if isinstance(source, Curves) else os.fspath(source),
        curves=seen,
        target=target,
        scores=scores,
        refused=refused,
        flops=training_flops(parameters[:, None], tokens_per_sample * seen.sizes),
        full_flops=training_flops(parameters, tokens_per_sample * target),
        cost_note=f"6 N D with {tokens_per_sample:g} token(s) per sample",
        truth=truth if np.isfinite(truth).any() else None,
        facts=({} if metric is None else {"metric": metric}) | ({"notes": notes} if notes else {}),
        loss_unit="byte" if metric == PER_BYTE else "token",
    )
