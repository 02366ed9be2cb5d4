"""What a selection predicted of the model that is being fine-tuned, and whether it came true."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lensjax._files import read_json
from lensjax.errors import InputError
from lensjax.jobs.candidates import Candidate
from lensjax.journal import ENCODING
from lensjax.report.schema import upgrade
from lensjax.tasks.example import ENCODING_VERSION

SELECTION = "selection.json"
CHOSEN_HERE = ("learning_rate", "batch_size", "lora")  # of a plan: searched, or part of the candidate


@dataclasses.dataclass(frozen=True)
class SelectionComparison:
    """What a selection predicted for a candidate.

    Attributes
    ----------
    name : str
        Of the candidate there.
    loss : float or None
        Expected test loss; None if the method predicts none.
    interval : (float, float) or None
    certainty : float or None
        Of the interval.
    per_byte : bool
        Whether losses are per byte of target text instead of per token.
    target : float
        Training samples it is for.
    caveats : tuple of str
        How this fine-tuning differs from the one that was predicted for.
    """

    name: str
    loss: float | None
    interval: tuple[float, float] | None
    certainty: float | None
    per_byte: bool
    target: float
    caveats: tuple[str, ...] = ()

    def compare(self, loss: float) -> str:
        """Say whether a test loss, in the selection's unit, is what was expected."""
        if self.loss is None:
            return "The selection's method predicts no loss to compare with."
        text = f"The selection expected {self.loss:.4f}"
        if self.interval is None:
            text += f": {abs(loss - self.loss):.4f} {'too low' if loss > self.loss else 'too high'}."
        else:
            low, high = self.interval
            sure = "" if self.certainty is None else f"{100 * self.certainty:.0f} % "
            where = "within" if low <= loss <= high else "ABOVE" if loss > high else "BELOW"
            text += f" ({sure}interval {low:.4f} to {high:.4f}): the loss is {where} it."
        return text + (f" But {'; '.join(self.caveats)}." if self.caveats else "")


def read_comparison(
    source: Path, candidate: Candidate, *, task: str, plan: Mapping[str, Any], max_length: int, samples: int
) -> SelectionComparison:
    """Read what a selection predicted.

    Parameters
    ----------
    source : Path
        Run directory of the selection, or its selection.json.
    candidate : Candidate
        What is fine-tuned; found by its files, else by its name.
    task : str
        Fingerprint of the data and their split.
    plan : mapping
        `lensjax.finetune.Plan` as a dictionary.
    max_length, samples : int
        What else must be as it was there for the loss to be expected here too.

    Raises
    ------
    InputError
        If there is no selection, or the candidate is not in its ranking.
    """
    path = source / SELECTION if source.is_dir() else source
    try:
        document = upgrade(read_json(path))
        facts, method = document["facts"], document["methods"][document["method"]]
        ranking = {entry["name"]: _predicted(entry) for entry in method["ranking"]}
        certainty = None if method.get("certainty") is None else float(method["certainty"])
        specification = facts.get("specification") or {}
        known, there = dict(specification.get("candidates") or {}), dict(specification.get("plan") or {})
        target, unit = float(document["target"]), str(document["loss_unit"])
    except InputError as error:
        raise InputError(f"--selection {source}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"--selection {source}: holds no {SELECTION} of a finished selection ({type(error).__name__}); name the "
            "run directory of one, or leave --selection out."
        ) from None
    name = next((n for n, fingerprint in known.items() if fingerprint == candidate.fingerprint), candidate.name)
    if name not in ranking:
        raise InputError(
            f"--selection {source}: ranks no {name} (but {', '.join(ranking)}); name another, or leave it out."
        )
    caveats = []
    if known.get(name, candidate.fingerprint) != candidate.fingerprint:
        caveats.append("the model's files or its adapters' settings have changed since")
    if specification.get("task", task) != task:
        # A task's fingerprint holds the version of the encoding.
        same_encoding = specification.get(ENCODING) == ENCODING_VERSION
        others = "the data, the samples set aside or the seed are others"
        caveats.append(others if same_encoding else "its version of lensjax turned samples into tokens in another way")
    settings = [n for n in plan if n in there and n not in CHOSEN_HERE and there[n] != plan[n]]
    settings += ["max_length"] if specification.get("max_length", max_length) != max_length else []
    if settings:
        caveats.append(f"it was made for another {', '.join(settings)}")
    if target != samples:
        caveats.append(f"it is for {target:g} samples")
    loss, interval = ranking[name]
    return SelectionComparison(
        name=name,
        loss=loss,
        interval=interval,
        certainty=certainty,
        per_byte=unit.endswith("byte"),
        target=target,
        caveats=tuple(caveats),
    )


def _predicted(entry: Mapping[str, Any]) -> tuple[float | None, tuple[float, float] | None]:
    """Return the loss and the interval of an entry of a ranking."""
    loss, interval = entry["predicted_loss"], entry.get("interval")
    low, high = interval or (None, None)
    whole = None if low is None or high is None else (float(low), float(high))
    return None if loss is None else float(loss), whole
