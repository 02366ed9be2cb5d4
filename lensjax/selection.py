"""A finished selection as data: who was chosen, what to expect, what it cost."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lensjax.losses.curves import Curves
from lensjax.metrics import pear_corr, rel_acc, rmse
from lensjax.selectors import CREDIBLE_LEVEL, Scores

SCHEMA = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Everything one selection found.

    Attributes
    ----------
    source : str
        Where the losses come from: a table or a task.
    curves : Curves
        Visible losses of the M candidates, and their parameter counts.
    target : float
        Training samples the choice is made for.
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
        Methods asked for that the data do not allow.
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
        """The verdict of the method asked for."""
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

    def spent(self, scores: Scores) -> float:
        """FLOPs of the measurements a method used; NaN if any of them is unknown."""
        return float(np.where(scores.used, self.flops, 0.0).sum()) + self.score_flops.get(scores.method, 0.0)

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
        transition = scores.details.get("transition")
        measured = np.flatnonzero(np.isfinite(self.curves.losses[row]))
        if transition is None or np.isnan(transition[row]) or not len(measured):
            return ""
        return "power" if self.curves.sizes[measured[-1]] >= transition[row] else "pre-power"

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
            "full_flops": _plain(self.full_flops.sum()),
            "failed_flops": _plain(self.failed_flops),
            "sizes": _plain(self.curves.sizes),
            "methods": {name: self._method(scores) for name, scores in self.scores.items()},
            "refused_methods": dict(self.refused),
            "candidates": [
                {
                    "name": name,
                    "parameters": None if self.curves.parameters is None else _plain(self.curves.parameters[row]),
                    "losses": _plain(self.curves.losses[row]),
                    "flops": _plain(self.flops[row]),
                    "full_flops": _plain(self.full_flops[row]),
                    "true_loss": None if self.truth is None else _plain(self.truth[row]),
                }
                for row, name in enumerate(self.curves.names)
            ],
            "failures": dict(self.failures),
            "unverified": dict(self.unverified),
            "facts": _facts(self.facts),
        }

    def _repr_html_(self) -> str:
        """Show the answer and the ranking in a notebook."""
        from lensjax.report.html import notebook

        return notebook(self)

    def _method(self, scores: Scores) -> dict[str, Any]:
        return {
            "best": scores.best if np.isfinite(scores.score).any() else None,
            "flops": _plain(self.spent(scores)),
            "metrics": {name: _plain(value) for name, value in self.metrics(scores).items()},
            **(
                {}
                if scores.credible_set is None
                else {"certainty": CREDIBLE_LEVEL, "credible_set": self.credible_set(scores)}
            ),
            "ranking": [
                {
                    "rank": rank,
                    "name": self.curves.names[row],
                    "score": _plain(scores.score[row]),
                    "predicted_loss": _plain(scores.predicted_loss[row]),
                    **_certainty(scores, row),
                    "phase": self.phase(scores, row) or None,
                    "status": scores.status[row],
                    "sizes_used": _plain(self.curves.sizes[scores.used[row]]),
                    **{name: _plain(values[row]) for name, values in scores.details.items()},
                }
                for rank, row in enumerate(scores.order, start=1)
            ],
        }


def _certainty(scores: Scores, row: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if scores.interval is not None:
        found["interval"] = _plain(scores.interval[row])
    if scores.best_probability is not None:
        found["best_probability"] = _plain(scores.best_probability[row])
    return found


def losses_fingerprint(curves: Curves) -> str:
    """Return a short name for what a choice from losses depends on: candidates, parameters, facts, sizes and losses."""
    digest = hashlib.sha256("\0".join(curves.names).encode(errors="surrogatepass"))
    for numbers in (curves.parameters, curves.sizes, curves.losses):
        digest.update(b"" if numbers is None else np.ascontiguousarray(numbers, "<f8").tobytes())
    for name, numbers in curves.facts.items():
        digest.update(name.encode() + np.ascontiguousarray(numbers, "<f8").tobytes())
    return digest.hexdigest()[:16]


def _facts(value: Any) -> Any:
    """Return facts as JSON-serialisable data; what JSON has no word for becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _facts(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float, np.number)) or (
        hasattr(value, "dtype") and np.issubdtype(value.dtype, np.number)
    ):
        return _plain(value)
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        return [_facts(item) for item in value]
    return str(value)


def _plain(value: Any) -> Any:
    """Return numbers as Python numbers or lists, with None for what is not finite (JSON knows no NaN)."""
    if np.ndim(value):
        return [_plain(v) for v in value]
    number = float(value)
    if not np.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
