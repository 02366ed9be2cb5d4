"""The JSON Schema (draft 2020-12) of `Selection.as_dict` and of the file ``selection.json``, versioned.

The number under "schema" changes when a key is removed or changes its meaning; keys may be added under the same number.
A number that could not be computed is null throughout. `upgrade` reads documents of earlier versions:

1
    ``failed_flops`` was ``lost_flops``, ``credible_set`` of a method ``may_be_best``, the facts ``tune_command`` and
    ``tune_note`` ``next_command`` and ``next_note``.
2
    This one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lensjax.errors import InputError
from lensjax.selection import SCHEMA

_NUMBER: dict[str, Any] = {"type": ["number", "null"]}
_TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(description: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _text(description: str, *, null: bool = False) -> dict[str, Any]:
    return {"type": ["string", "null"] if null else "string", "description": description}


def _number(description: str, **more: Any) -> dict[str, Any]:
    return {**_NUMBER, "description": description, **more}


def _numbers(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": _NUMBER, "description": description, **more}


_RANKED = {
    **_object(
        "One candidate. Other numbers of the method (B, E, beta, F, D_l, alpha, transition, objective, pl_alpha, "
        "log_me, ... as in the papers) are further keys.",
        {
            "rank": {"type": "integer", "minimum": 1, "description": "1 is the choice."},
            "name": _text("Candidate."),
            "score": _number("What the method ranks by; lower is better."),
            "predicted_loss": _number("Test loss expected at the target."),
            "phase": _text("power or pre-power at the largest measured size.", null=True),
            "status": _text("How the method came to its score, or why there is none."),
            "sizes_used": _numbers("Training samples of the measurements that the score rests on."),
        },
        {
            "interval": _numbers("Lower and upper end of the loss at the target, with the method's certainty.")
            | {"minItems": 2, "maxItems": 2},
            "best_probability": _number("Probability of the lowest loss of all at the target.", minimum=0, maximum=1),
        },
    ),
    "additionalProperties": _NUMBER,
}

_METHOD = _object(
    "The scores of one method.",
    {
        "best": _text("Its choice; null if it could score no candidate.", null=True),
        "flops": _number("Cost of the measurements it used, floating-point operations."),
        "metrics": {
            "type": "object",
            "additionalProperties": _NUMBER,
            "description": "PearCorr, RelAcc and RMSE against the losses measured at the target; empty without those.",
        },
        "ranking": {"type": "array", "items": _RANKED, "description": "All candidates, best first."},
    },
    {
        "certainty": _number("Probability that goes with the intervals and with credible_set.", minimum=0, maximum=1),
        "credible_set": {
            "type": "array",
            "items": {"type": "string"},
            "description": "The smallest set that contains the best candidate with that certainty, likeliest first.",
        },
    },
)

_CANDIDATE = _object(
    "The measurements of one candidate; arrays have an entry for each of the sizes.",
    {
        "name": _text("Unique."),
        "parameters": _number("Number of weights."),
        "losses": _numbers("Test losses; null where none was measured."),
        "flops": _numbers("Cost of each measurement, floating-point operations."),
        "full_flops": _number("Cost of fine-tuning it on target samples."),
        "true_loss": _number("Measured at the target; null if it was not."),
    },
)

DOCUMENT: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "lensjax selection",
    **_object(
        "Which language model to fine-tune, and why.",
        {
            "schema": {"const": SCHEMA, "description": "Version of this description."},
            "source": _text("Where the losses come from: a table or a task."),
            "target": _number("Training samples that the choice is made for.", exclusiveMinimum=0),
            "loss_unit": {"enum": ["nats per token", "nats per byte"], "description": "Of all losses."},
            "method": _text("The method asked for; a key of methods."),
            "best": _text("The candidate to fine-tune."),
            "cost_note": _text("How floating-point operations were counted."),
            "full_flops": _number("Cost of fine-tuning every candidate on target samples."),
            "failed_flops": _number("Spent on candidates that failed."),
            "sizes": _numbers("Training samples of the measurements, ascending; 0 is before fine-tuning."),
            "methods": {"type": "object", "additionalProperties": _METHOD, "description": "Method -> its scores."},
            "refused_methods": {**_TEXTS, "description": "Method -> why these losses do not allow it."},
            "candidates": {"type": "array", "items": _CANDIDATE, "description": "In the order they were given."},
            "failures": {**_TEXTS, "description": "Candidate that is not ranked -> why."},
            "unverified": {**_TEXTS, "description": "Candidate whose loss at the target is missing -> why."},
            "facts": {
                "type": "object",
                "description": "Everything else, all of it optional: directory, seconds, task (fingerprint of the "
                "data), metric (which metric of the runs the losses are), seed, notes, specification, versions, "
                "command, tune_command (fine-tunes the best candidate) and tune_note (what to know before), tangents, "
                "nlp_metrics, log_me, ...",
            },
        },
    ),
}
"""JSON Schema of the document."""

_RENAMED_IN_2 = {"lost_flops": "failed_flops"}
_RENAMED_METHOD_KEYS_IN_2 = {"may_be_best": "credible_set"}
_RENAMED_FACTS_IN_2 = {"next_command": "tune_command", "next_note": "tune_note"}


def upgrade(document: Any) -> dict[str, Any]:
    """Return a document of any version as one of the present version.

    Parameters
    ----------
    document : JSON data
        As from `json.loads`; it is not changed.

    Returns
    -------
    dict
        The document itself if it is of the present version. Of an earlier one only what was renamed differs; whether
        it is as described is for `problems` to say.

    Raises
    ------
    InputError
        If it is no document of a selection, or of a version that is not known here.

    Examples
    --------
    >>> upgrade({"schema": 1, "lost_flops": 0, "methods": {}, "facts": {}})
    {'schema': 2, 'failed_flops': 0, 'methods': {}, 'facts': {}}
    """
    version = document.get("schema") if isinstance(document, dict) else None
    if isinstance(version, bool) or version not in (1, SCHEMA):
        held = "none" if version is None else f"{version!r}"
        raise InputError(
            f"the selection's schema version is {held}; this program reads 1 to {SCHEMA}. Read it with the version of "
            "lensjax that wrote it, or make the selection again."
        )
    if version == SCHEMA:
        return document
    renamed = _renamed(document, _RENAMED_IN_2) | {"schema": SCHEMA}
    methods, facts = renamed.get("methods"), renamed.get("facts")
    if isinstance(methods, Mapping):
        renamed["methods"] = {
            name: _renamed(method, _RENAMED_METHOD_KEYS_IN_2) if isinstance(method, Mapping) else method
            for name, method in methods.items()
        }
    if isinstance(facts, Mapping):
        renamed["facts"] = _renamed(facts, _RENAMED_FACTS_IN_2)
    return renamed


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}


def problems(document: Any, schema: dict[str, Any] = DOCUMENT, at: str = "$") -> list[str]:
    """Return how a document differs from the schema, one sentence for each difference.

    Parameters
    ----------
    document : JSON data
        As from `json.loads`.
    schema : dict
        Only the keywords of JSON Schema that `DOCUMENT` uses are understood.
    at : str
        Where the document is in a larger one.

    Examples
    --------
    >>> problems({"certainty": 0.9, "best": 3}, {"properties": {"best": {"type": "string"}}})
    ['$.best is int, not string']
    """
    if "const" in schema and document != schema["const"]:
        return [f"{at} is {document!r}, not {schema['const']!r}"]
    if "enum" in schema and document not in schema["enum"]:
        return [f"{at} is {document!r}, not one of {schema['enum']}"]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    # Python's True is an int, but true is no number in JSON.
    if kinds and (isinstance(document, bool) or not any(isinstance(document, _TYPES[kind]) for kind in kinds)):
        return [f"{at} is {type(document).__name__}, not {' or '.join(kinds)}"]
    differences = []
    if isinstance(document, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        differences += [f"{at} has no {name!r}" for name in schema.get("required", ()) if name not in document]
        for name, value in document.items():
            if name in known or isinstance(others, dict):
                differences += problems(value, known.get(name, others), f"{at}.{name}")
            elif not others:
                differences.append(f"{at} has {name!r}, which the schema does not know")
    elif isinstance(document, list):
        for number, value in enumerate(document):
            differences += problems(value, schema.get("items", {}), f"{at}[{number}]")
        if not schema.get("minItems", 0) <= len(document) <= schema.get("maxItems", len(document)):
            differences.append(f"{at} has {len(document)} items")
    elif isinstance(document, (int, float)):
        low, high = schema.get("minimum", document), schema.get("maximum", document)
        if not low <= document <= high or ("exclusiveMinimum" in schema and document <= schema["exclusiveMinimum"]):
            differences.append(f"{at} is {document}, out of its range")
    return differences
