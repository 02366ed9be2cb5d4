"""A dry run: runs, FLOPs, time, memory and disk of a selection, known without weights."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import Plan, Search
from lensjax.jobs.tangent_measurements import tangent_flops
from lensjax.journal import JOURNAL, Journal, Run
from lensjax.models import Lora
from lensjax.select.budget import Budget
from lensjax.select.dry_run import estimate as module
from lensjax.select.dry_run.duration import COMPILE_SECONDS, START_SECONDS, BatchShapes
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.dry_run.forecast import (
    AS_IT_IS,
    CHOICE,
    KERNEL,
    LATER,
    VERIFICATION,
    format_bytes,
    format_weights,
    rough_duration,
)
from lensjax.select.dry_run.machine import Machine, available_memory, free_disk, inspect_machine, matmul_speed
from lensjax.select.records import run_key
from lensjax.select.request import Request, prepare
from lensjax.tasks import Encoded, batches

GIB = 2**30
HERE = Machine("cpu", "a processor", 1, 8 * GIB, {"float32": 1e11})
SMALL = {"smallest": 10, "visible": 20, "validation": 20, "test": 20, "max_length": 24}
PLAN = Plan(max_epochs=2, batch_size=8, learning_rate=0.01)


@pytest.fixture
def request_of(tiny_models, tiny_task, tmp_path):
    def request_of(*candidates, **options):
        chosen = {**SMALL, "task": tiny_task, "plan": PLAN, "out": tmp_path / "out", **options}
        return Request(models=candidates or tuple(map(str, tiny_models)), **chosen)

    return request_of


@pytest.fixture
def dry_run_of(request_of):
    def dry_run_of(*candidates, machine=HERE, **options):
        request = request_of(*candidates, **options)
        return dry_run(request, request.out, machine=machine)

    return dry_run_of


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


def recorded(request, seconds, size=10):
    """Put a run of each candidate into the journal of a selection, without making it."""
    prepared = prepare(request)
    train = next(iter(prepared.tokens.values())).train
    journal = Journal(request.out, prepared.specification)
    for candidate, taken in zip(prepared.candidates, seconds, strict=True):
        tokens = 2 * int(train.first(size).token_counts.sum())
        flops = candidate.flops_per_token * tokens
        journal.append(
            Run(run_key(prepared, candidate, size), candidate.name, size, 3.0, 1, tokens, flops, taken, samples=20)
        )
    journal.close()


def test_the_speed_of_finished_runs_counts_instead_of_the_machines(request_of):
    request = request_of()
    fresh = dry_run(request, request.out, machine=HERE)
    assert "multiplied float32 matrices at 100 GFLOP/s" in fresh.basis["Time"]
    recorded(request, (50.0, 200.0))
    forecast = dry_run(request, request.out, machine=HERE)
    assert "from the 2 finished runs in the run directory" in forecast.basis["Time"]
    assert {(r.candidate, r.size) for r in forecast.runs if r.done} == {("tiny-8", 10), ("tiny-16", 10)}
    assert all(r.seconds == 0 for r in forecast.runs if r.done)
    times = {r.candidate: r.seconds for r in forecast.runs if r.size == 20}
    by_machine = max(r.seconds for r in fresh.runs if r.size == 20)
    assert times["tiny-16"] > 2 * times["tiny-8"] > 4 * by_machine
    # One that has no runs yet is taken to be as fast as the others.
    lines = (request.out / JOURNAL).read_text().splitlines(keepends=True)
    (request.out / JOURNAL).write_text(lines[0])
    other = {r.candidate: r.seconds for r in dry_run(request, request.out, machine=HERE).runs if r.size == 20}
    assert other["tiny-8"] == pytest.approx(times["tiny-8"])
    assert by_machine < other["tiny-16"] < times["tiny-16"]


def test_runs_that_took_as_long_as_estimated_change_nothing(request_of):
    request = request_of(verify=True)
    fresh = dry_run(request, request.out, machine=HERE)
    shapes = BatchShapes(next(iter(prepare(request).tokens.values())))
    start = START_SECONDS + len(shapes.buckets) * (COMPILE_SECONDS[0] + COMPILE_SECONDS[1])  # of one layer
    of = {(r.candidate, r.size): r.seconds for r in fresh.runs}
    for size, more in ((10, start), (20, 0.0)):
        recorded(request, [of[name, size] + more for name in ("tiny-8", "tiny-16")], size)
    forecast = dry_run(request, request.out, machine=HERE)
    assert "from the 4 finished runs" in forecast.basis["Time"]
    for run in forecast.runs:
        assert run.seconds == (0 if run.done else pytest.approx(of[run.candidate, run.size], rel=1e-6))
    assert sum(run.done for run in forecast.runs) == 4


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


def test_batches_are_those_that_training_makes(request_of):
    prepared = prepare(request_of())
    tokens = next(iter(prepared.tokens.values()))
    shapes = BatchShapes(tokens)
    for part, size in ((tokens.train, 20), (tokens.train, 10), (tokens.validation, 20)):
        made = [b["labels"].shape for b in batches(part.first(size), batch_size=8, buckets=tokens.buckets, pad_id=0)]
        assert shapes.batches(part, size, 8) == {length: made.count((8, length)) for _, length in set(made)}
    assert shapes.training_tokens(20) == sum(len(ids) for ids in tokens.train.ids[:20])
    texts = Encoded(tuple(np.ones(n, np.int32) for n in (5, 30, 17, 9)), np.zeros(4, int), 0, packed=16)
    packed = BatchShapes(dataclasses.replace(tokens, train=texts, validation=texts, test=texts))
    made = [b["labels"].shape for b in batches(texts, batch_size=2, buckets=(16,), pad_id=0)]
    assert packed.batches(texts, 4, 2) == {16: len(made)}


# Memory


def typed(remedy):
    """Return what a remedy says to type, as changes of a request."""
    plan = {}
    for flag, convert in (("micro_batch", int), ("precision", str), ("sharding", str), ("batch_size", int)):
        given = re.search(f"--{flag.replace('_', '-')} (\\w+)", remedy)
        if given:
            plan[flag] = convert(given[1])
    length = re.search(r"--max-length (\d+)", remedy)
    return plan, {"max_length": int(length[1])} if length else {}, "+lora in its place" in remedy


def applied(request, forecast, machine):
    """Give the command again, with the remedy of its first candidate."""
    plan, more, adapters = typed(forecast.needs[0].remedy)
    names = (request.models[0] + "+lora" * adapters, *request.models[1:])
    plan = dataclasses.replace(request.plan, **plan)
    again = dry_run(dataclasses.replace(request, models=names, plan=plan, **more), None, machine=machine)
    return again.needs[0]


@pytest.mark.parametrize(
    ("wide", "platform", "devices", "settings", "first"),
    [
        (False, "cpu", 1, {}, "--micro-batch"),
        (False, "gpu", 1, {"precision": "float32"}, "--micro-batch"),
        (True, "cpu", 1, {"batch_size": 2, "micro_batch": 1}, "--models ... wide+lora in its place"),
        (True, "gpu", 2, {"batch_size": 2, "sharding": "data"}, "--models ... wide+lora in its place"),
        # Four devices that share 16 samples by themselves, and 12, and the weights of two samples too.
        (False, "gpu", 4, {}, "--micro-batch 8 ("),
        (False, "gpu", 4, {"batch_size": 12}, "--micro-batch 4 ("),
        (True, "gpu", 2, {"batch_size": 2, "sharding": "full"}, "--models ... wide+lora in its place"),
    ],
)
def test_the_remedy_is_the_first_that_works_and_it_works(
    request_of, wide_model, tiny_models, wide, platform, devices, settings, first
):
    """With little memory missing it is the micro-batch; where weights are most of it, adapters."""
    one = wide_model if wide else tiny_models[0]
    plan = dataclasses.replace(PLAN, **{"batch_size": 16, **settings})
    request = request_of(str(one), str(tiny_models[1]), plan=plan)
    roomy = Machine(platform, "a device", devices, 64 * GIB, {"float32": 1e11})
    need = dry_run(request, None, machine=roomy).needs[0]
    assert need.fits
    # What is missing: a third of the weights, or a part of all else.
    less = need.memory - (need.weights // 3 if wide else need.working // 4)
    tight = dataclasses.replace(roomy, memory=less)
    forecast = dry_run(request, None, machine=tight)
    bad = forecast.needs[0]
    assert not bad.fits
    assert not forecast.fits
    assert bad.problem == f"it needs about {format_bytes(need.memory)} of memory, and {format_bytes(less)} are free."
    # What is to be typed is what was typed.
    assert bad.remedy.startswith(f"Remedy: {first.replace('wide', str(wide_model))}")
    assert applied(request, forecast, tight).fits
    assert "NOT FIT" in forecast.render()


def test_half_precision_is_a_remedy_where_devices_have_it(tiny_models, request_of, wide_model):
    # Adapters already, and nothing to make smaller by micro-batches.
    plan = dataclasses.replace(PLAN, precision="float32", batch_size=1)
    request = request_of(f"{wide_model}+lora", str(tiny_models[0]), plan=plan)
    gpu = Machine("gpu", "a device", 1, 8 * GIB, {"float32": 1e11})
    in_half = dataclasses.replace(request, plan=dataclasses.replace(plan, precision="bfloat16"))
    whole, half = (dry_run(r, None, machine=gpu).needs[0].memory for r in (request, in_half))
    assert half < whole
    forecast = dry_run(request, None, machine=dataclasses.replace(gpu, memory=half))
    assert forecast.needs[0].remedy.startswith("Remedy: --precision bfloat16 (")
    cpu = dry_run(request, None, machine=dataclasses.replace(HERE, memory=600 * 2**20))
    assert "bfloat16" not in cpu.needs[0].remedy


def test_the_mildest_micro_batch_that_works_is_named(request_of, wide_model):
    # Samples have at most 8 tokens: in smaller batches, gradients that are added up take more than activations.
    request = request_of(str(wide_model), f"{wide_model}+lora", plan=dataclasses.replace(PLAN, batch_size=64))
    of = {}
    for micro in (None, 32, 16, 8, 4, 2, 1):
        plan = dataclasses.replace(request.plan, micro_batch=micro)
        of[micro] = dry_run(dataclasses.replace(request, plan=plan), None, machine=HERE).needs[0].memory
    assert of[None] > of[8] > of[4] > of[2]
    forecast = dry_run(request, None, machine=dataclasses.replace(HERE, memory=of[4]))
    assert forecast.needs[0].remedy.startswith("Remedy: --micro-batch 4 (")


def test_changes_are_combined_where_one_is_not_enough(request_of, wide_model, tiny_models):
    request = request_of(str(wide_model), str(tiny_models[0]), plan=dataclasses.replace(PLAN, batch_size=32))
    adapted = dataclasses.replace(request, models=(f"{wide_model}+lora", str(tiny_models[0])))
    plan = dataclasses.replace(request.plan, micro_batch=1)
    least = dry_run(dataclasses.replace(adapted, plan=plan), None, machine=HERE).needs[0].memory
    tight = dataclasses.replace(HERE, memory=least)
    forecast = dry_run(request, None, machine=tight)
    assert forecast.needs[0].remedy.startswith(
        f"Remedy: --micro-batch 1 and --models ... {wide_model}+lora in its place ("
    )
    assert applied(request, forecast, tight).fits


def test_the_text_says_if_no_setting_helps(request_of, wide_model, tiny_models):
    request = request_of(str(wide_model), str(tiny_models[0]))
    forecast = dry_run(request, None, machine=dataclasses.replace(HERE, memory=100 * 2**20))
    assert all(not need.fits for need in forecast.needs)
    assert forecast.needs[0].remedy.startswith("No setting makes it fit: leave this candidate out")
    assert "2 of 2 candidates do NOT FIT" in forecast.render()


def test_devices_share_batches_and_uneven_batches_are_a_problem(request_of):
    gpus = Machine("gpu", "a device", 4, 8 * GIB, {"float32": 1e11})
    one, four = (
        dry_run(request_of(), None, machine=dataclasses.replace(gpus, devices=n)).needs[0].working for n in (1, 4)
    )
    assert four < one
    plan = dataclasses.replace(PLAN, sharding="full")
    full = dry_run(request_of(plan=plan), None, machine=gpus).needs[0]
    assert full.weights == pytest.approx(4 * 4 * full.trainable / 4, abs=1)
    assert full.process == 0
    odd = dataclasses.replace(PLAN, sharding="data", batch_size=6)
    need = dry_run(request_of(plan=odd), None, machine=gpus).needs[0]
    assert need.problem == "sharding data: 4 devices do not divide 6 samples evenly."
    assert "a multiple of their number" in need.remedy


def test_unknown_memory_is_no_problem(dry_run_of):
    forecast = dry_run_of(machine=dataclasses.replace(HERE, memory=None))
    assert forecast.fits
    assert "unknown" in forecast.render()
    # That they fit is not claimed either.
    assert forecast.render().startswith("How much memory this machine has is not known")


@pytest.fixture
def wide_model(tiny_models, tmp_path):
    """A model whose weights take more memory than its activations."""
    raw = json.loads((tiny_models[0] / "config.json").read_text())
    raw |= {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_inner": 1024}
    import jax

    directory = tmp_path / "wide"
    models.save_pretrained(models.init_model(raw, jax.random.key(3)), directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_models[0] / file, directory / file)
    return directory


# The machine


def test_available_memory_is_what_the_system_and_the_control_groups_leave(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n")
    assert available_memory(proc, groups) == 4000 * 1024
    # Version 2: the limits of the groups around it count too; what could be given up is not used.
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    (groups / "a" / "b").mkdir(parents=True)
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    (groups / "a" / "memory.max").write_text("3000000\n")
    (groups / "a" / "memory.current").write_text("1500000\n")
    (groups / "a" / "memory.stat").write_text("anon 5\ninactive_file 500000\nactive_file 7\n")
    assert available_memory(proc, groups) == 2_000_000
    # Version 1, in a container, where the group's own path is not there.
    (proc / "self" / "cgroup").write_text("4:cpu,memory:/elsewhere/x\n1:cpu:/\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    (groups / "memory" / "memory.usage_in_bytes").write_text("400000\n")
    (groups / "memory" / "memory.stat").write_text("total_inactive_file 100000\n")
    assert available_memory(proc, groups) == 700_000
    assert available_memory(tmp_path / "nothing", groups) is None


def test_a_machine_is_described_by_its_own_devices_memory_and_speed():
    machine = inspect_machine("auto")
    assert (machine.platform, machine.devices) == ("cpu", 1)
    assert machine.memory > 0
    assert machine.speed == {"float32": matmul_speed("float32", 1024)}
    assert machine.speed["float32"] > 1e8


def test_disk_is_that_of_the_nearest_directory_that_exists(tmp_path):
    assert free_disk(tmp_path / "not" / "there")[1] == tmp_path.stat().st_dev


def test_a_full_disk_is_a_problem(dry_run_of, monkeypatch):
    assert dry_run_of().places[0].needed > 0
    monkeypatch.setattr(module, "free_disk", lambda path: (1000, 1))
    forecast = dry_run_of()
    assert not forecast.fits
    assert all(need.fits for need in forecast.needs)
    (problem,) = forecast.problems
    assert problem.startswith("the disk has 1000 B free, and ")
    assert "PROBLEM: the disk" in forecast.render()


# What is shown


def test_the_text_can_be_read_in_a_terminal(dry_run_of, wide_model, tiny_models):
    long = wide_model.parent / ("a-model-with-a-name-that-is-much-too-long-for-any-table-of-this-width")
    shutil.copytree(wide_model, long)
    forecast = dry_run_of(str(long), str(tiny_models[0]), verify=True, machine=dataclasses.replace(HERE, memory=2**29))
    text = forecast.render()
    # Paths are as long as they are, and have lines of their own.
    assert max(len(line) for line in text.splitlines() if not line.startswith("    /")) <= 100
    assert text.splitlines()[0].startswith("2 of 2 candidates do NOT FIT on this machine.")
    assert "a-model-with-...-of-this-width" in text  # in the table
    flat = " ".join(text.split())
    assert f"{long.name} does NOT FIT: it needs about" in flat
    assert "nothing was fine-tuned, and no weights were fetched" in flat
    assert "Task parity: 100 samples to train on;" in flat
    assert "to verify the choice" in flat
    assert "at most 2 passes each, and the losses tell which will be best on 100." in flat


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


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_bytes, 0, "0 B"),
        (format_bytes, 5 * 2**20, "5 MiB"),
        (format_bytes, int(5.26 * GIB), "5.3 GiB"),
        (format_bytes, int(37.4 * GIB), "37 GiB"),
        (format_bytes, 1023 * GIB, "1023 GiB"),
        (format_weights, 999, "999"),
        (format_weights, 999_499, "999K"),
        (format_weights, 999_500, "1M"),
        (format_weights, 999_960_000, "1B"),
        (format_weights, 124_439_808, "124M"),
        (format_weights, 6_700_000_000, "6.7B"),
        (rough_duration, 0.2, "1 s"),
        (rough_duration, 61, "61 s"),
        (rough_duration, 91, "2 min"),
        (rough_duration, 5400, "1 h 30 min"),
        (rough_duration, 36001, "10 h"),
        (rough_duration, 5 * 86400, "5.0 days"),
    ],
)
def test_numbers_are_short(function, value, text):
    assert function(value) == text
