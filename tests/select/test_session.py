"""The state of a selection: curves in the unit asked for, runs taken over from the journal."""

import io
import json

import numpy as np
import pytest

from lensjax.jobs import job, runner
from lensjax.journal import JOURNAL
from lensjax.progress.console import Console
from lensjax.select import records
from lensjax.select.driver import select
from lensjax.select.request import Request, prepare
from lensjax.select.session import Session


def test_curves_have_the_unit_that_was_asked_for(settings, trained, tmp_path):
    found = {}
    for unit in ("token", "byte"):
        prepared = prepare(Request(**settings, loss_unit=unit))
        session = Session(prepared, tmp_path / unit, Console(io.StringIO(), quiet=True), isolate=False)
        first = prepared.candidates[0]
        assert session.loss(first, 10, "for the test") == 3.0 / 11**0.1  # nats per token in any case
        found[unit] = session.curves(prepared.candidates, (10, 20)).losses
        factor = prepared.tokens[first.tokenizer].test.tokens_per_byte
        session.close()
    assert np.isnan(found["token"][0, 1])
    assert np.isnan(found["token"][1]).all()
    np.testing.assert_allclose(found["byte"][0, 0], factor * found["token"][0, 0])


def test_a_finished_run_is_taken_over_and_not_repeated(settings, trained, tmp_path):
    prepared = prepare(Request(**settings))
    for expected in (None, 3.0 / 21**0.1):
        session = Session(prepared, tmp_path / "out", Console(io.StringIO(), quiet=True), isolate=False)
        assert session.load(prepared.candidates[0], 20) == expected
        assert session.loss(prepared.candidates[0], 20, "for the test") == 3.0 / 21**0.1
        session.close()
    assert len(trained) == 1


def test_runs_of_other_versions_are_pointed_out(settings, trained, tmp_path, monkeypatch):
    prepared = prepare(Request(**settings))
    said = {}
    for jax in ("0.4.1", "0.9.0", "0.9.0"):
        monkeypatch.setattr(records, "versions", lambda jax=jax: {"python": "3.11", "lensjax": "1", "jax": jax})
        progress = io.StringIO()
        select(Session(prepared, tmp_path / "out", Console(progress), isolate=False))
        said[jax] = [line for line in progress.getvalue().splitlines() if "of the journal" in line]
        if jax == "0.4.1":
            assert said[jax] == []
            path = tmp_path / "out" / JOURNAL
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:3]))
    (note,) = said["0.9.0"]
    assert "note: 3 records of the journal were made with jax 0.4.1; installed now: jax 0.9.0." in note


def test_records_without_some_facts_still_give_an_answer(settings, trained, tmp_path):
    prepared = prepare(Request(**settings))
    first = select(Session(prepared, tmp_path / "out", Console(io.StringIO()), isolate=False))
    path = tmp_path / "out" / JOURNAL
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**record, "facts": {}}) + "\n" for record in stored))
    made = len(trained)
    again = select(Session(prepared, tmp_path / "out", Console(io.StringIO()), isolate=False))
    assert len(trained) == made
    np.testing.assert_array_equal(again.curves.losses, first.curves.losses)
    assert "--learning-rate" in again.facts["tune_command"]


def test_a_long_name_has_a_log(settings, tmp_path):
    prepared = prepare(Request(**settings))
    session = Session(prepared, tmp_path / "out", Console(io.StringIO(), quiet=True))
    object.__setattr__(prepared.candidates[0], "name", "x" * 300)
    config = session.runner_for(prepared.candidates[0]).config
    assert len(config.log.name) < 255
    session.close()


def test_a_run_that_failed_is_a_point_that_was_not_measured(settings, tmp_path, monkeypatch):
    def failing(own, work, callbacks, deadline=None):
        raise job.RunFailedError("MemoryError: no room")

    monkeypatch.setattr(runner.CandidateRunner, "run", failing)
    prepared = prepare(Request(**settings))
    session = Session(prepared, tmp_path / "out", Console(io.StringIO(), quiet=True), isolate=False)
    with pytest.raises(job.RunFailedError):
        session.loss(prepared.candidates[1], 10, "for the test")
    assert session.known(prepared.candidates[1], 10) is None
    assert np.isnan(session.curves(prepared.candidates, (0, 10)).losses).all()
    assert [line.reason for line in session.journal.lines] == ["MemoryError: no room"]
    session.close()
