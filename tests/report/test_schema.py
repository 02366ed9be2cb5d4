import copy
import json
import pathlib

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.report.schema import DOCUMENT, problems, upgrade

VERSION_1 = pathlib.Path(__file__).with_name("selection_schema_1.json")


def document(selection):
    return json.loads(json.dumps(selection.as_dict(), allow_nan=False))


@pytest.mark.parametrize(
    "methods",
    [("averaged",), ("lens",), ("rectified",), ("ats",), ("zero_shot",), ("averaged", "lens", "ats", "model_size")],
)
def test_every_document_is_as_described(make, methods):
    found = document(make(*methods, truth=np.array([1.2, np.nan, 1.0]), failures={"broken": "MemoryError: no room"}))
    assert problems(found) == []
    assert found["schema"] == 2


def test_what_cannot_be_computed_is_null_and_described(make):
    found = document(make(flops=np.full((3, 5), np.nan), full_flops=np.full(3, np.nan), refused={"x": "why"}))
    assert problems(found) == []
    assert found["full_flops"] is None


def test_facts_of_any_kind_become_json(make):
    facts = {
        "seconds": np.float64(3.5),
        "tangents": {"alpha": {"kernel_spectrum": np.array([1.0, np.nan]), "trace_by_layer": {1: np.float32(2)}}},
        "done": True,
        "where": ("a", None),
        "kind": object,
        "bad": float("inf"),
    }
    found = document(make(facts=facts))
    assert problems(found) == []
    assert found["facts"]["tangents"] == {"alpha": {"kernel_spectrum": [1, None], "trace_by_layer": {"1": 2}}}
    assert found["facts"]["done"] is True
    assert found["facts"]["where"] == ["a", None]
    assert found["facts"]["bad"] is None
    assert found["facts"]["kind"] == "<class 'object'>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=3), "$.schema is 3, not 2"),
        (lambda d: d.pop("best"), "$ has no 'best'"),
        (lambda d: d.update(extra=1), "$ has 'extra', which the schema does not know"),
        (lambda d: d.update(target="many"), "$.target is str, not number or null"),
        (lambda d: d.update(target=0), "$.target is 0, out of its range"),
        (lambda d: d.update(target=True), "$.target is bool, not number or null"),
        (lambda d: d.update(loss_unit="bits"), "$.loss_unit is 'bits', not one of ['nats per token', 'nats per byte']"),
        (lambda d: d["candidates"][1].pop("losses"), "$.candidates[1] has no 'losses'"),
        (lambda d: d["candidates"][1]["losses"].append("x"), "$.candidates[1].losses[5] is str, not number or null"),
        (
            lambda d: d["methods"]["averaged"]["ranking"][0].update(best_probability=1.5),
            "$.methods.averaged.ranking[0].best_probability is 1.5, out of its range",
        ),
        (
            lambda d: d["methods"]["averaged"]["ranking"][0]["interval"].pop(),
            "$.methods.averaged.ranking[0].interval has 1 items",
        ),
        (
            lambda d: d["methods"]["averaged"]["ranking"][0]["interval"].append(1),
            "$.methods.averaged.ranking[0].interval has 3 items",
        ),
        (
            lambda d: d["methods"]["averaged"]["ranking"][0].update(B="x"),
            "$.methods.averaged.ranking[0].B is str, not number or null",
        ),
        (lambda d: d["failures"].update(one=1), "$.failures.one is int, not string"),
    ],
)
def test_what_departs_from_the_schema_is_found(make, change, message):
    changed = copy.deepcopy(document(make()))
    change(changed)
    assert problems(changed) == [message]


def test_everything_in_the_schema_is_described():
    def undescribed(schema, at):
        missing = [] if "description" in schema or at.endswith(("[]", ".*")) else [at]
        for name, inner in schema.get("properties", {}).items():
            missing += undescribed(inner, f"{at}.{name}")
        for key, mark in (("items", "[]"), ("additionalProperties", ".*")):
            if isinstance(schema.get(key), dict):
                missing += undescribed(schema[key], at + mark)
        return missing

    assert undescribed(DOCUMENT, "$") == []
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_a_document_of_version_1_becomes_one_of_version_2():
    """The document was written by the last code of that version; only what was renamed changes."""
    old = json.loads(VERSION_1.read_text())
    before = copy.deepcopy(old)
    found = upgrade(old)
    assert old == before
    assert problems(found) == []
    assert list(found) == [{"lost_flops": "failed_flops"}.get(key, key) for key in old]
    assert found["schema"] == 2
    assert found["failed_flops"] == old["lost_flops"] == 1e9
    assert found["methods"]["averaged"]["credible_set"] == old["methods"]["averaged"]["may_be_best"]
    assert found["facts"]["tune_command"] == old["facts"]["next_command"]
    assert found["facts"]["tune_note"] == old["facts"]["next_note"]
    text = json.dumps(found)
    for new, name in (
        *(('"schema": 2', '"schema": 1'), ("failed_flops", "lost_flops"), ("credible_set", "may_be_best")),
        *(("tune_command", "next_command"), ("tune_note", "next_note")),
    ):
        assert text.count(new) == 1
        text = text.replace(new, name)
    assert json.loads(text) == old


def test_a_document_of_this_version_stays_as_it_is(make):
    found = document(make())
    before = copy.deepcopy(found)
    assert upgrade(found) == before
    # A fact may have any name, an earlier one too.
    found["facts"]["next_command"] = "x"
    assert upgrade(found)["facts"]["next_command"] == "x"


@pytest.mark.parametrize(
    ("found", "held"),
    [
        *(({"schema": 3}, "3"), ({"schema": 0}, "0"), ({"schema": True}, "True"), ({"schema": "2"}, "'2'")),
        *(({}, "none"), ([1], "none"), (None, "none")),
    ],
)
def test_documents_of_unknown_versions_are_refused(found, held):
    with pytest.raises(InputError, match=f"^the selection's schema version is {held}; this program reads 1 to 2. "):
        upgrade(found)


def test_damaged_documents_of_version_1_are_left_to_the_schema():
    for damaged in ({"schema": 1}, {"schema": 1, "methods": [], "facts": 3}, {"schema": 1, "methods": {"m": 1}}):
        assert problems(upgrade(damaged))
