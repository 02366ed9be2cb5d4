"""A finished selection as data: the candidate chosen, the loss to expect, the cost of finding out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lensjax._display import escaped, flops, isolated, number, percent, samples, table
from lensjax.losses.curves import Curves
from lensjax.metrics import pear_corr, rel_acc, rmse
from lensjax.selectors import CREDIBLE_LEVEL, Scores

SCHEMA = 2
CERTAINTY_PERCENT = percent(CREDIBLE_LEVEL, 0)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a choice cost, beside what it chose among; floating-point operations, NaN where unknown.

    Attributes
    ----------
    used : float
        Of the measurements that the method asked for used.
    failed : float
        Spent on candidates that failed.
    best : float
        Of fine-tuning the chosen candidate on the target.
    full : float
        Of fine-tuning every candidate on the target.
    """

    used: float
    failed: float
    best: float
    full: float

    @property
    def choice(self) -> float:
        """What the choice took, failures included."""
        return self.used + self.failed

    @property
    def known(self) -> bool:
        """Whether none of them is unknown."""
        return bool(np.isfinite([self.choice, self.full, self.best]).all())

    @property
    def share(self) -> float:
        """The choice as a share of fine-tuning every candidate; NaN if that is unknown or nothing."""
        known = np.isfinite([self.choice, self.full]).all() and self.full > 0
        return self.choice / self.full if known else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The result of a selection.

    Attributes
    ----------
    source : str
        Where the losses come from: a table or a task.
    curves : Curves
        Visible losses of the M candidates, and their parameter counts.
    target : float
        Training samples that the choice is made for.
    scores : mapping of method to Scores
        The method asked for first.
    flops : float64 array (M, S)
        Cost of each measurement in floating-point operations, NaN where unknown.
    full_flops : float64 array (M,)
        Cost of fine-tuning each candidate on `target` samples, NaN where unknown.
    cost_note : str
        How both were counted.
    truth : float64 array (M,) or None
        Measured losses at `target`, where they are known.
    refused : mapping of method to reason
        Methods asked for that the losses do not allow.
    failed_flops : float
        Spent on candidates that failed.
    failures : mapping of candidate to reason
        Candidates that could not be ranked.
    unverified : mapping of candidate to reason
        Ranked candidates whose loss at `target` should have been measured and could not be.
    facts : mapping
        Run directory, wall time, versions and the like; `lensjax.report.html.render_html` says which are shown.
    loss_unit : {"token", "byte"}
        What the losses are a mean over.
    score_flops : mapping of method to float
        What scores cost that need no fine-tuning.
    """

    source: str
    curves: Curves
    target: float
    scores: Mapping[str, Scores]
    flops: np.ndarray
    full_flops: np.ndarray
    cost_note: str
    truth: np.ndarray | None = None
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    failed_flops: float = 0.0
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unverified: Mapping[str, str] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss_unit: str = "token"
    score_flops: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def main(self) -> Scores:
        """The scores of the method asked for."""
        return next(iter(self.scores.values()))

    @property
    def best(self) -> str:
        """Name of the candidate to fine-tune."""
        return self.main.best

    @property
    def unscored(self) -> dict[str, str]:
        """Why another method than the one asked for has no score for a candidate: "candidate, method" -> reason."""
        others = [scores for scores in self.scores.values() if scores is not self.main]
        return {
            f"{name}, {scores.method}": scores.status[row]
            for scores in others
            for row, name in enumerate(self.curves.names)
            if not np.isfinite(scores.score[row])
        }

    @property
    def truly_best(self) -> int | None:
        """Position of the candidate with the lowest loss at the target; None where those were not measured."""
        return None if self.truth is None else int(np.nanargmin(self.truth))

    def spent(self, scores: Scores) -> float:
        """FLOPs of the measurements a method used; NaN if any of them is unknown."""
        return float(np.where(scores.used, self.flops, 0.0).sum()) + self.score_flops.get(scores.method, 0.0)

    def spent_on(self, scores: Scores, row: int) -> float:
        """FLOPs of the measurements of one candidate that a method used; NaN if any of them is unknown."""
        return float(np.where(scores.used[row], self.flops[row], 0.0).sum())

    def runs_used(self, scores: Scores, row: int) -> int:
        """Return how many runs of one candidate a method used; its loss before fine-tuning takes none."""
        return int((scores.used[row] & (self.curves.sizes > 0)).sum())

    def costs(self) -> Costs:
        """Return what the choice cost, beside what it chose among."""
        best = float(self.full_flops[self.main.order[0]])
        return Costs(self.spent(self.main), self.failed_flops, best, float(self.full_flops.sum()))

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Pearson correlation, relative accuracy and RMSE against the truth; empty without one."""
        if self.truth is None:
            return {}
        return {
            "PearCorr": pear_corr(scores.score, self.truth),
            "RelAcc": rel_acc(scores.score, self.truth),
            "RMSE": rmse(scores.predicted_loss, self.truth),
        }

    def credible_set(self, scores: Scores) -> list[str]:
        """Names of the smallest set that contains the best with probability `CREDIBLE_LEVEL`, likeliest first."""
        if scores.credible_set is None or scores.best_probability is None:
            return []
        order = np.argsort(-scores.best_probability, kind="stable")
        return [self.curves.names[row] for row in order if scores.credible_set[row]]

    def phase(self, scores: Scores, row: int) -> str:
        """Phase of a candidate at its largest measured size: "power", "pre-power", or "" if the method knows none."""
        transition = transition_of(scores, row)
        measured = np.flatnonzero(np.isfinite(self.curves.losses[row]))
        if np.isnan(transition) or not len(measured):
            return ""
        return "power" if self.curves.sizes[measured[-1]] >= transition else "pre-power"

    def ranking_columns(self, scores: Scores) -> dict[str, list[str]]:
        """Return the columns that every ranking shows, formatted, best candidate first.

        Returns
        -------
        dict of list of M str
            "predicted_loss", or "score" if the method predicts no loss; "interval" and "best_probability" if it knows
            them; "true_loss" if the losses at the target were measured. In this order.
        """
        predicts = bool(np.isfinite(scores.predicted_loss).any())
        main = scores.predicted_loss if predicts else scores.score
        columns = {"predicted_loss" if predicts else "score": [number(float(main[row]), 4) for row in scores.order]}
        if scores.interval is not None:
            columns["interval"] = [format_interval(scores, int(row)) for row in scores.order]
        if scores.best_probability is not None:
            chances = scores.best_probability[scores.order]
            columns["best_probability"] = [f"{percent(float(chance), 0)} %" for chance in chances]
        if self.truth is not None:
            columns["true_loss"] = [number(float(loss), 4) for loss in self.truth[scores.order]]
        return columns

    def expectation(self) -> str:
        """Say what to expect of the best candidate, how sure that is, and what finding out cost.

        The text goes on after "Fine-tune NAME: ".
        """
        scores, row = self.main, int(self.main.order[0])
        if np.isfinite(scores.predicted_loss[row]):
            text = (
                f"on {samples(self.target)} samples its test loss should be about "
                f"{number(float(scores.predicted_loss[row]), 3)} nats per {self.loss_unit}"
            )
            if scores.interval is not None:
                low, high = (number(float(v), 3) for v in scores.interval[row])
                text += f" ({CERTAINTY_PERCENT} % sure: between {low} and {high})"
            else:
                text += f" (method {scores.method} does not say how sure that is)"
        else:
            text = f"it ranks first for {samples(self.target)} samples, though method {scores.method} "
            text += "predicts no loss and knows no certainty"
        if scores.best_probability is not None:
            chance = percent(float(scores.best_probability[row]), 0)
            text += f"; it is the best of the {len(self.curves)} candidates with probability {chance} %"
        share = self.costs().share
        if np.isfinite(share):
            text += f", and finding out cost {percent(share)} % of fine-tuning them all"
        else:
            text += "; what finding out cost is not known"
        return text + "."

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-serialisable data, as `lensjax.report.schema` describes it.

        A number that could not be computed is null.
        """
        return {
            "schema": SCHEMA,
            "source": self.source,
            "target": self.target,
            "loss_unit": f"nats per {self.loss_unit}",
            "method": self.main.method,
            "best": self.best,
            "cost_note": self.cost_note,
            "full_flops": _json_number(self.full_flops.sum()),
            "failed_flops": _json_number(self.failed_flops),
            "sizes": _json_number(self.curves.sizes),
            "methods": {name: self._method(scores) for name, scores in self.scores.items()},
            "refused_methods": dict(self.refused),
            "candidates": [
                {
                    "name": name,
                    "parameters": None if self.curves.parameters is None else _json_number(self.curves.parameters[row]),
                    "losses": _json_number(self.curves.losses[row]),
                    "flops": _json_number(self.flops[row]),
                    "full_flops": _json_number(self.full_flops[row]),
                    "true_loss": None if self.truth is None else _json_number(self.truth[row]),
                }
                for row, name in enumerate(self.curves.names)
            ],
            "failures": dict(self.failures),
            "unverified": dict(self.unverified),
            "facts": _facts(self.facts),
        }

    def _repr_html_(self) -> str:
        """Show the answer and the ranking in a notebook."""
        scores = self.main
        titles = {
            "predicted_loss": "expected loss",
            "score": "score",
            "interval": f"{CERTAINTY_PERCENT} % interval",
            "best_probability": "P(best)",
            "true_loss": "measured",
        }
        columns = self.ranking_columns(scores)
        columns["runs"] = [str(self.runs_used(scores, int(row))) for row in scores.order]
        columns["FLOPs spent"] = [flops(self.spent_on(scores, int(row))) for row in scores.order]
        names = [self.curves.names[row] for row in scores.order]
        caption = f"Best first, for fine-tuning on {samples(self.target)} samples; a lower loss is better."
        ranking = table(
            caption,
            ["candidate", *(titles.get(name, name) for name in columns)],
            zip(names, *columns.values(), strict=True),
        )
        return f"<p>Fine-tune <strong>{isolated(self.best)}</strong>: {escaped(self.expectation())}</p>{ranking}"

    def _method(self, scores: Scores) -> dict[str, Any]:
        return {
            "best": scores.best if np.isfinite(scores.score).any() else None,
            "flops": _json_number(self.spent(scores)),
            "metrics": {name: _json_number(value) for name, value in self.metrics(scores).items()},
            **(
                {}
                if scores.credible_set is None
                else {"certainty": CREDIBLE_LEVEL, "credible_set": self.credible_set(scores)}
            ),
            "ranking": [
                {
                    "rank": rank,
                    "name": self.curves.names[row],
                    "score": _json_number(scores.score[row]),
                    "predicted_loss": _json_number(scores.predicted_loss[row]),
                    **_certainty(scores, row),
                    "phase": self.phase(scores, row) or None,
                    "status": scores.status[row],
                    "sizes_used": _json_number(self.curves.sizes[scores.used[row]]),
                    **{name: _json_number(values[row]) for name, values in scores.details.items()},
                }
                for rank, row in enumerate(scores.order, start=1)
            ],
        }


def _certainty(scores: Scores, row: int) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if scores.interval is not None:
        entries["interval"] = _json_number(scores.interval[row])
    if scores.best_probability is not None:
        entries["best_probability"] = _json_number(scores.best_probability[row])
    return entries


def format_interval(scores: Scores, row: int) -> str:
    """Format the interval of a candidate's predicted loss, for a method that knows it."""
    assert scores.interval is not None
    return " to ".join(number(float(bound), 4) for bound in scores.interval[row])


def transition_of(scores: Scores, row: int) -> float:
    """Return the number of samples at which a candidate's power phase begins; NaN if the method knows none."""
    values = scores.details.get("transition")
    return float("nan") if values is None else float(values[row])


def losses_fingerprint(curves: Curves) -> str:
    """Return a hash of what a choice from losses depends on: candidates, parameters, facts, sizes and losses."""
    digest = hashlib.sha256("\0".join(curves.names).encode(errors="surrogatepass"))
    for numbers in (curves.parameters, curves.sizes, curves.losses):
        digest.update(b"" if numbers is None else np.ascontiguousarray(numbers, "<f8").tobytes())
    for name, numbers in curves.facts.items():
        digest.update(name.encode() + np.ascontiguousarray(numbers, "<f8").tobytes())
    return digest.hexdigest()[:16]


def _facts(value: Any) -> Any:
    """Return facts as JSON-serialisable data; objects of other types become text."""
    if isinstance(value, Mapping):
        return {str(key): _facts(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float, np.number)) or (
        hasattr(value, "dtype") and np.issubdtype(value.dtype, np.number)
    ):
        return _json_number(value)
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        return [_facts(item) for item in value]
    return str(value)


def _json_number(value: Any) -> Any:
    """Return numbers as Python numbers or lists, with None for what is not finite (JSON has no NaN)."""
    if np.ndim(value):
        return [_json_number(v) for v in value]
    number = float(value)
    if not np.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
