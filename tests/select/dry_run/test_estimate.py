"""A dry run: runs, FLOPs, time, memory and disk of a selection, known without weights."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from lensjax.errors import InputError
from lensjax.finetune import Search
from lensjax.jobs.tangent_measurements import tangent_flops
from lensjax.journal import JOURNAL, Journal
from lensjax.models import Lora
from lensjax.select.budget import Budget
from lensjax.select.dry_run import estimate as module
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.dry_run.forecast import (
    AS_IT_IS,
    CHOICE,
    KERNEL,
    LATER,
    VERIFICATION,
)
from lensjax.select.request import prepare
from support.dry_runs import HERE, PLAN, recorded


def flags(request):
    names = [n for n in ("smallest", "visible", "validation", "test", "max_length") if getattr(request, n) is not None]
    given = [x for n in names for x in (f"--{n.replace('_', '-')}", getattr(request, n))]
    plan = request.plan
    given += ["--max-epochs", plan.max_epochs, "--batch-size", plan.batch_size, "--learning-rate", plan.learning_rate]
    return ["--models", *request.models, "--task", request.task, "--out", request.out, *given]


def test_a_place_where_nothing_can_be_made_is_refused(request_of, tiny_task, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=rf"^--out {tiny_task}/out: {tiny_task} is a file. Name another directory.$"):
        dry_run(request_of(), Path(tiny_task) / "out", machine=HERE)
    # Whoever runs the tests may write everywhere.
    monkeypatch.setattr(os, "access", lambda place, _: place != tmp_path)
    with pytest.raises(InputError, match=rf"^--out {tmp_path}/a/b: {tmp_path} cannot be written. Name another dir"):
        dry_run(request_of(), tmp_path / "a" / "b", machine=HERE)


def listed(forecast, *purposes):
    return [(r.candidate, r.size) for r in forecast.runs if r.purpose in (purposes or (AS_IT_IS, CHOICE, LATER))]


def test_planned_runs_are_the_ones_made_and_are_not_planned_again(request_of, command):
    request = request_of()
    forecast = dry_run(request, request.out, machine=HERE)
    assert not request.out.exists()  # a dry run writes nothing
    status, _ = command(*flags(request), "--in-process", "--quiet")
    assert status == 0
    records = [json.loads(line) for line in (request.out / JOURNAL).read_text().splitlines()]
    assert {(r["candidate"], r["size"]) for r in records} == set(listed(forecast))
    # Two passes are all there are, and none stops before: what is possible at most is what was spent.
    spent = {(r["candidate"], r["size"]): r["flops"] for r in records}
    assert {(r.candidate, r.size): r.flops for r in forecast.runs} == spent
    assert forecast.flops == (sum(spent.values()),) * 2
    assert all(r.seconds > 0 for r in forecast.runs)

    journal = request.out / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"key": "torn')
    before = journal.read_bytes()
    running = Journal(request.out, prepare(request).specification)
    assert running.notices  # which a real run mends
    journal.write_bytes(before)
    again = dry_run(request, request.out, machine=HERE)  # another process has the directory, and is left alone
    assert journal.read_bytes() == before
    running.close()
    assert all(r.done for r in again.runs)
    assert (again.flops, again.seconds) == ((0, 0), (0, 0))
    assert "Every run is done already" in again.render()
    assert forecast.fits
    assert again.fits
    # What is finished needs no memory.
    tight = dataclasses.replace(HERE, memory=100 * 2**20)
    assert dry_run(request, request.out, machine=tight).fits
    assert not dry_run(request, request.out.with_name("other"), machine=tight).fits


def test_without_a_directory_it_is_the_one_that_the_selection_would_make(request_of, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    request = request_of(out=None)
    assert dry_run(request, machine=HERE).directory.startswith("runs/parity-")
    assert not (tmp_path / "runs").exists()


def test_another_selections_directory_is_refused_as_by_the_selection(request_of, command, tmp_path):
    request = request_of()
    recorded(request, (1.0, 1.0))
    other = dataclasses.replace(request, seed=7)
    with pytest.raises(InputError) as real:
        command(*flags(other), "--seed", 7, "--in-process")
    with pytest.raises(InputError) as dry:
        dry_run(other, other.out, machine=HERE)
    assert str(dry.value) == str(real.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").touch()
    with pytest.raises(InputError, match="is not empty and holds no lensjax run"):
        dry_run(request, tmp_path / "full", machine=HERE)
    (request.out / JOURNAL).write_text("no record\n")
    (note,) = (note for note in dry_run(request, request.out, machine=HERE).notes if "line 1: not a run record" in note)
    assert "It is left out" in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"micro_batch": 3}, "micro-batch 3 does not divide the batch size 8"),
    ],
)
def test_impossible_plans_are_refused(dry_run_of, change, message):
    with pytest.raises(InputError, match=message):
        dry_run_of(plan=dataclasses.replace(PLAN, **change))


def test_each_method_plans_the_runs_that_it_needs(dry_run_of):
    sizes = {"smallest": 5, "visible": 40}
    everything = dry_run_of(method="averaged", **sizes)
    assert listed(everything) == [(n, s) for s in (0, 5, 10, 20, 40) for n in ("tiny-8", "tiny-16")]
    assert all(r.sure for r in everything.runs)
    one = dry_run_of(method="subtuning", **sizes)
    assert listed(one, CHOICE) == [("tiny-8", 40), ("tiny-16", 40)]
    untrained = dry_run_of(method="zero_shot", **sizes)
    assert listed(untrained, CHOICE) == []
    said = " ".join(untrained.render().split())
    assert "No candidate is fine-tuned for the choice: method zero_shot" in said
    assert "Each candidate is fine-tuned on" not in said
    assert "Each candidate is fine-tuned on 40 samples," in " ".join(one.render().split())
    lens = dry_run_of(method="lens", **sizes)  # from the largest downwards, three at least
    assert {r.size for r in lens.runs if r.purpose == CHOICE and r.sure} == {10, 20, 40}
    assert [r.size for r in lens.runs if not r.sure] == [5, 5]
    assert lens.flops[0] < lens.flops[1]
    assert "up to 2" in lens.render()


def test_trials_verification_and_kernels_are_counted(request_of):
    plain = request_of()
    searching = dataclasses.replace(
        plain, search=Search(learning_rates=(1e-3, 1e-2), batch_sizes=(4, 8)), verify=True, tangents=5
    )
    once, forecast = (dry_run(r, None, machine=HERE) for r in (plain, searching))
    for size in (10, 20):
        single, four = ([r.flops for r in f.runs if r.size == size] for f in (once, forecast))
        assert four == [4 * flops for flops in single]
    assert {r.trials for r in forecast.runs if r.purpose == CHOICE} == {4}
    prepared = prepare(searching)
    train = next(iter(prepared.tokens.values())).train
    small = prepared.candidates[0]
    (verification,) = [r for r in forecast.runs if r.purpose == VERIFICATION and r.candidate == small.name]
    assert verification.size == 100
    assert verification.flops == 6 * small.parameters * int(train.token_counts.sum()) * 2 * 4
    (kernel,) = [r for r in forecast.runs if r.purpose == KERNEL and r.candidate == small.name]
    assert kernel.flops == tangent_flops(small.parameters, int(train.first(5).token_counts.sum()), 5)
    assert "4 x 2" in forecast.render()
    assert any("--tangents" in note for note in forecast.notes)
    said = "kernel and Hessian trace: 54 for each weight and token, 2 for each weight and pair of samples"
    assert said in forecast.basis["FLOPs"]
    assert "Hessian" not in once.basis["FLOPs"]
    tokens = int(train.first(5).token_counts.sum())
    assert tangent_flops(small.parameters, tokens, 5) == small.parameters * (54 * tokens + 2 * 5 * 5)


def test_adapters_cost_less_and_the_text_says_so(dry_run_of, tiny_models):
    forecast = dry_run_of(str(tiny_models[0]), f"{tiny_models[0]}+lora", lora=Lora(rank=2))
    full, adapted = forecast.needs
    assert 0 < adapted.trainable < full.trainable < adapted.parameters
    (whole,), (low,) = ([r for r in forecast.runs if r.size == 20 and r.candidate == n.name] for n in forecast.needs)
    assert low.flops * (6 * full.parameters) == pytest.approx(
        whole.flops * (6 * adapted.trainable + 4 * (adapted.parameters - adapted.trainable))
    )
    assert "(4 for each frozen one)" in forecast.basis["FLOPs"]
    assert adapted.optimiser < full.optimiser / 4


def test_a_race_trains_everyone_on_small_subsets_and_the_budget_caps_the_rest(dry_run_of):
    plan = dataclasses.replace(PLAN, max_epochs=1)
    options = {"smallest": 2, "visible": None, "target": 100, "plan": plan}
    free = dry_run_of(budget=Budget("share", 0.9), **options)
    # A hundred samples: 2 and 4 for all, 100 / 8 for those that may still win.
    assert {(r.size, r.purpose, r.sure) for r in free.runs} == {
        (2, CHOICE, True),
        (4, CHOICE, True),
        (12, LATER, False),
    }
    assert free.flops[1] == pytest.approx(sum(r.flops for r in free.runs))
    assert free.flops[0] == pytest.approx(sum(r.flops for r in free.runs if r.sure))
    tight = dry_run_of(budget=Budget("share", 0.1), **options)
    weights = {n.name: n.parameters for n in tight.needs}
    left = 0.1 * sum(weights.values()) * 100 - sum(6 * w for w in weights.values())
    dearest = max(r.flops / (weights[r.candidate] * r.size) for r in tight.runs if not r.sure)
    assert tight.flops[0] == free.flops[0]
    assert tight.flops[0] < tight.flops[1] <= tight.flops[0] + left * dearest * (1 + 1e-9) < free.flops[1]
    flops = dry_run_of(budget=Budget("flops", 1.5 * 2 * free.flops[0]), **options)
    assert flops.flops[1] <= 1.5 * 2 * free.flops[0]
    assert "up to 2" in tight.render()
    assert "The choice may cost 0.1 of fine-tuning all on all samples." in " ".join(tight.render().split())
    timed = dry_run_of(budget=Budget("seconds", 30.0), **options)
    assert timed.seconds[1] <= 30


def test_a_budget_leaves_out_the_sizes_that_it_does_not_pay_for(dry_run_of):
    options = {"smallest": 5, "visible": 40, "method": "lens"}
    everything = dry_run_of(**options)
    # As a selection counts it: the retry of a run that diverges is paid for in advance.
    three = 2 * sum(r.flops for r in everything.runs if r.size in (5, 10, 20))
    forecast = dry_run_of(budget=Budget("flops", 1.2 * three), **options)
    assert {r.size for r in forecast.runs if r.purpose == CHOICE} == {5, 10, 20}
    assert any("subsets of 40 samples and more" in note for note in forecast.notes)
    with pytest.raises(InputError, match="alone may cost up to"):
        dry_run_of(budget=Budget("flops", 0.5 * three), **options)


def test_a_full_disk_is_a_problem(dry_run_of, monkeypatch):
    assert dry_run_of().places[0].needed > 0
    monkeypatch.setattr(module, "free_disk", lambda path: (1000, 1))
    forecast = dry_run_of()
    assert not forecast.fits
    assert all(need.fits for need in forecast.needs)
    (problem,) = forecast.problems
    assert problem.startswith("the disk has 1000 B free, and ")
    assert "PROBLEM: the disk" in forecast.render()


def test_the_command_prints_it_and_its_status_tells_whether_everything_fits(request_of, command, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "inspect_machine", lambda _: HERE)
    file = tmp_path / "forecast.json"
    status, text = command(*flags(request_of()), "--dry-run", "--json", file)
    assert status == 0
    assert text.startswith("All 2 candidates fit on this machine.")
    document = json.loads(file.read_text())
    assert document["fits"] is True
    assert document["needs"][0]["memory"] == sum(
        document["needs"][0][part] for part in ("weights", "optimiser", "working", "process")
    )
    assert document["flops"]["sure"] == document["flops"]["at_most"] == sum(r["flops"] for r in document["runs"])
    assert set(document["basis"]) == {"FLOPs", "Time", "Memory"}
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "inspect_machine", lambda _: dataclasses.replace(HERE, memory=1000))
    assert command(*flags(request_of()), "--dry-run")[0] == 1
