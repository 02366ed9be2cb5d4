import dataclasses
import json

import numpy as np
import pytest

from lensjax._display import number, samples
from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.report.text import render
from lensjax.selection import Selection
from lensjax.selectors import Scores


def selection(truth=None, score=(2.0, np.nan, 1.0), **changes):
    names = ("alpha", "beta", "gamma")
    sizes = np.array([0.0, 200.0, 400.0])
    curves = Curves(names, sizes, np.array([[3, 2.5, 2.2], [3, 2.6, np.nan], [4, 2, 1.5]]), np.array([10.0, 20, 30]))
    used = np.array([[True, True, True], [True, True, False], [False, True, True]])
    details = {"B": np.ones(3), "transition": np.array([100.0, np.nan, 1e9])}
    score = np.array(score)
    scores = Scores("lens", names, score, score, ("fine", "failed: too few points", "fine"), used, details)
    values = {
        "source": "table",
        "curves": curves,
        "target": 1000.0,
        "scores": {"lens": scores},
        "flops": np.array([[0.0, 1, 2], [0, 4, 8], [0, 16, 32]]),
        "full_flops": np.array([10.0, 20.0, 30.0]),
        "cost_note": "counted",
        "truth": truth,
    }
    return Selection(**{**values, **changes})


def test_the_candidate_with_the_lowest_score_is_chosen_and_unscored_ones_come_last():
    found = selection()
    assert found.best == "gamma"
    assert [r["name"] for r in found.as_dict()["methods"]["lens"]["ranking"]] == ["gamma", "alpha", "beta"]
    assert render(found).splitlines()[0] == (
        "Fine-tune gamma: expected test loss 1.0000 nats per token at 1,000 samples; next alpha (2.0000)."
    )


def test_a_method_pays_for_what_it_used_only():
    found = selection()
    assert found.spent(found.main) == 0 + 1 + 2 + 0 + 4 + 16 + 32
    assert "5.50e+01 FLOPs, 91.7 % of fine-tuning all 3 candidates on 1,000 samples (6.00e+01); counted." in render(
        found
    )
    unknown = selection(flops=np.full((3, 3), np.nan))
    assert "Cost: unknown" in render(unknown)


def test_phases_compare_the_transition_with_the_largest_measured_size():
    found = selection()
    assert [found.phase(found.main, row) for row in range(3)] == ["power", "", "pre-power"]


def test_truth_is_shown_and_judged():
    text = render(selection(truth=np.array([1.0, 2.0, 1.5])))
    assert "RelAcc 50.0 %, PearCorr -100.0 %, RMSE 0.7906; the best candidate was alpha." in text


def test_the_document_is_json_without_nan():
    document = json.dumps(selection(failures={"delta": "MemoryError: no room"}).as_dict(), allow_nan=False)
    back = json.loads(document)
    assert back["methods"]["lens"]["ranking"][2]["score"] is None
    assert back["failures"] == {"delta": "MemoryError: no room"}
    assert back["schema"] == 2


def test_failures_are_listed():
    assert "Not ranked:\n  delta: MemoryError: no room" in render(selection(failures={"delta": "MemoryError: no room"}))


def test_without_any_score_there_is_an_error_that_says_why():
    with pytest.raises(InputError, match="lens: no candidate could be scored: failed: too few points; fine"):
        _ = selection(score=(np.nan,) * 3).best


def test_numbers_are_short():
    assert [number(v) for v in (np.nan, 0, 0.25, 99.5, 12345, 1e7, 1e-9)] == [
        *("-", "0.000", "0.250", "99.500", "12,345", "1.0e+07", "1.0e-09")
    ]
    assert [samples(v) for v in (np.nan, 0.001, 1500, 3e12)] == ["-", "0.001", "1,500", "3.0e+12"]


def test_certainty_is_shown_where_a_method_has_it():
    plain = selection(score=(2.0, 1.5, 1.0))
    assert "interval" not in render(plain)
    assert "credible_set" not in plain.as_dict()["methods"]["lens"]
    scores = dataclasses.replace(
        plain.main,
        interval=np.array([[1.5, 2.5], [1.2, 1.8], [0.9, 1.25]]),
        best_probability=np.array([0.05, 0.25, 0.7]),
        credible_set=np.array([False, True, True]),
    )
    found = dataclasses.replace(plain, scores={"lens": scores})
    lines = render(found).splitlines()
    assert lines[1] == (
        "90 % interval 0.9000 to 1.2500; gamma is the best of all with probability 70 %. The best is, with at least "
        "90 %, one of 2: gamma, beta."
    )
    assert any("gamma" in line and "0.9000 to 1.2500" in line and "70 %" in line for line in lines[3:])
    method = found.as_dict()["methods"]["lens"]
    assert method["credible_set"] == ["gamma", "beta"]
    assert method["certainty"] == 0.9
    assert method["ranking"][0]["interval"] == [0.9, 1.25]
    assert method["ranking"][0]["best_probability"] == 0.7
