"""Which of a run's losses counts: one rule for every source.

A source says whether each run ended well and which losses it had at which steps. The run's loss is decided here, and
nowhere else:

- A run that did not finish (failed, crashed, killed, still running) counts as not measured.
- A loss at step 0 is the one before fine-tuning. A run of which no value has a step has no such loss.
- A loss that is null or not finite is left out; of the others the lowest counts, or the last.
- Several different losses at one step come from several data sets or several runs, and it is not known which one is the
  test loss; the lowest would be the one on the training data. They are refused unless the user says whether the first
  or the last of a step counts. Where the last step's further losses equal an earlier step's, the best weights were
  evaluated once more (``load_best_model_at_end``), which is the same loss again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.points import Point, Repeats, SameStep, Which, chosen_of, curves_of, loss_of, number_of

FINISHED = ("finished", "")
"""States of a run that has ended well; "" where the source has no state."""
SAME = 1e-3
"""Relative difference of losses that are one loss evaluated again."""
DIVERGED = 1.5
"""Ratio of a run's last loss to its lowest from which the run is said to have diverged."""


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """The losses of one run.

    Attributes
    ----------
    model : str
    samples : float
        Training samples; 0: the model was only evaluated.
    losses : sequence of (step, loss)
        In the order in which they were logged; NaN is a loss that is not finite. Without logged steps all are 0.
    where : str
        For messages.
    state : str
        In lower case, one of `FINISHED` if the run ended well.
    stepped : bool
        Whether a step of 0 is known to be before training.
    parameters : float
        Number of weights, NaN if unknown.
    """

    model: str
    samples: float
    losses: Sequence[tuple[float, float]]
    where: str
    state: str = ""
    stepped: bool = True
    parameters: float = math.nan


def evaluation(step: Any, loss: Any, where: str, metric: str) -> tuple[float, float]:
    """Return step and loss as numbers; a null loss is NaN.

    Raises
    ------
    InputError
        A step or loss that is no number; a loss of 0 or less.
    """
    at = number_of(step, f"{where}: step")
    if not math.isfinite(at):
        raise InputError(f"{where}: step is {at:g}; steps are numbers. Mend it or leave the run out.")
    return at, math.nan if loss is None else loss_of(loss, f"{where}: {metric}")


def curves_of_runs(
    runs: Iterable[Evaluations],
    source: str,
    *,
    which: Which = "lowest",
    repeats: Repeats = "refuse",
    same_step: SameStep = "refuse",
    notes: Iterable[str] = (),
) -> Curves:
    """Arrange runs as curves.

    Parameters
    ----------
    runs : iterable of Evaluations
    source : str
        For messages.
    which : {"lowest", "last"}
        Of a run's losses after step 0.
    repeats : {"refuse", "mean", "lowest"}
        What to do with several runs of one model on equally many samples.
    same_step : {"refuse", "first", "last"}
        What to do with losses that differ at one step.
    notes : iterable of str
        What is known already; notes on runs come after.

    Raises
    ------
    InputError
        See `lensjax.losses.points.curves_of`; losses that differ at one step.
    """
    if same_step not in get_args(SameStep):
        raise InputError(f"same_step={same_step!r} is not known; choose 'refuse', 'first' or 'last'.")
    said = list(notes)
    points: list[Point] = []
    order: dict[str, int] = {}
    before: dict[str, list[Point]] = {}
    for run in runs:
        order.setdefault(run.model, len(order))
        zero, after = measured(run, which, same_step, said)
        if run.samples == 0:
            zero = after if math.isnan(zero) else zero
        else:
            points.append(Point(run.model, run.samples, after, run.parameters, run.where))
        if run.samples == 0 or not math.isnan(zero):
            before.setdefault(run.model, []).append(Point(run.model, 0.0, zero, run.parameters, run.where))
    for model, same in before.items():
        # Every run of a model starts from the same weights: its losses before training are one.
        known = [p for p in same if not math.isnan(p.loss)] or same
        points.append(known[0])
        differs = next((p for p in known if not _same(p.loss, known[0].loss)), None)
        if differs is not None:
            said.append(
                f"the loss of {model} before training is {known[0].loss:g} in {known[0].where}, which counts, and "
                f"{differs.loss:g} in {differs.where}"
            )
    points.sort(key=lambda point: order[point.model])
    return curves_of(points, source, repeats, said)


def measured(run: Evaluations, which: Which, same_step: SameStep, notes: list[str]) -> tuple[float, float]:
    """Return a run's loss before training and its loss after, NaN where there is none.

    Parameters
    ----------
    run : Evaluations
    which, same_step
        See `curves_of_runs`.
    notes : list of str
        Gets what a reader should know of the run.

    Raises
    ------
    InputError
        Losses that differ at one step.
    """
    if run.state not in FINISHED:
        notes.append(f"{run.where}: {run.model} at {run.samples:g} samples is not counted: {run.state}")
        return math.nan, math.nan
    stepped = run.stepped or any(step for step, _ in run.losses)
    by_step: dict[float, list[float]] = {}
    for step, loss in run.losses:
        by_step.setdefault(step, []).append(loss)
    end = max(by_step, default=0.0)
    earlier = [loss for step, own in by_step.items() if step != end for loss in own]
    single = {
        step: _single(run, step, _once(by_step[step], earlier if step == end else ()), same_step)
        for step in sorted(by_step)
    }
    zero = single.pop(0.0, math.nan) if stepped else math.nan
    after = list(single.values())
    loss = chosen_of(after, which) if after else math.nan
    finite = [value for value in after if math.isfinite(value)]
    name = f"{run.model} at {run.samples:g} samples"
    if after and not finite:
        notes.append(f"{run.where}: {name} is not counted: its loss is not finite")
    elif finite and (math.isnan(after[-1]) or finite[-1] > DIVERGED * min(finite)):
        high = "what is not finite" if math.isnan(after[-1]) else f"{finite[-1]:g}"
        counted = "none of it counts" if math.isnan(loss) else f"{loss:g} counts"
        notes.append(f"{run.where}: the loss of {name} rises from {min(finite):g} to {high}: it diverged; {counted}")
    if finite and zero < min(finite):
        notes.append(
            f"{run.where}: the loss of {name} at step 0, which is before training, is {zero:g}, and the lowest after "
            f"it is {min(finite):g}"
        )
    return zero, loss


def _once(losses: Sequence[float], earlier: Sequence[float]) -> list[float]:
    """Return the different losses of a step; after the first step, without those that repeat an earlier step's loss."""
    finite = [loss for loss in losses if math.isfinite(loss)] or losses[:1]
    found = list(finite[:1])
    for loss in finite[1:]:
        if not any(_same(loss, known) for known in (found[0], found[-1], *earlier)):
            found.append(loss)
    return found


def _single(run: Evaluations, step: float, losses: list[float], same_step: SameStep) -> float:
    if len(losses) > 1 and same_step == "refuse":
        raise InputError(
            f"{run.where}: {len(losses)} different losses at step {step:g}, {losses[0]:g} and {losses[1]:g}: of other "
            "data, or of another run? Name the metric of the test set, remove the others, or say which counts: "
            "same_step='first' or 'last' (--same-step)."
        )
    return losses[0] if same_step != "last" else losses[-1]


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME)
