"""The memory of a dry run: what training then decides is what it counted with; remedies that work."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import pytest

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import Plan, Search, Trial, tune
from lensjax.finetune.memory import Footprint, weight_counts
from lensjax.finetune.sharding import place
from lensjax.models import Lora
from lensjax.select.dry_run import memory as memory_estimates
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.dry_run.forecast import format_bytes
from lensjax.select.dry_run.machine import Machine
from support.dry_runs import GIB, HERE, PLAN

CONFIG = models.load_config({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 512})
TOTAL, _ = weight_counts(CONFIG, None)
RATES = (1e-4, 1e-3, 1e-2)
ROOM = 2 * (4 * TOTAL + 2 * 20 * TOTAL) + 1000  # bytes of which half suffice for two trials
MUCH = 10**12


class Device:
    def __init__(self, memory):
        self.memory = memory

    def memory_stats(self):
        return None if self.memory is None else {"bytes_limit": self.memory}


def decided_by_training(plan, search, platform, devices, memory, monkeypatch):
    """How many devices share a batch, whether they share weights, and the most rates trained at once, by training."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(memory)] * devices)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    total, trainable = weight_counts(CONFIG, plan.lora)
    sizes = [size for size, _ in search.grid(plan)]
    placement = place(
        plan.sharding, plan.computed_at_once(sizes), trainable=trainable, frozen=total - trainable, devices=None
    )
    groups = []

    def trials(*_, rates, batch_size, **__):
        groups.append(len(rates))
        rest = {field.name: 0 for field in dataclasses.fields(Trial)}
        return tuple(
            Trial(**rest | {"learning_rate": r, "status": "finished", "validation_loss": 1.0, "test_loss": 1.0})
            for r in rates
        )

    tuner = SimpleNamespace(plan=plan, parameters=total, trainable=trainable, placement=placement, trials=trials)
    tuner.compiled = SimpleNamespace(batches=lambda *_: [None])
    tuner.outcome = lambda *_: None
    tune(tuner, None, None, None, search=search, seed=0)
    return placement.devices, placement.full, max(groups)


def decided_by_dry_run(plan, search, platform, devices, memory, monkeypatch):
    """The same, by a dry run."""
    asked = []

    def footprint(*_, **options):
        asked.append((options["devices"], options["full"], options["parallel_trials"]))
        return Footprint(0, 0, 0)

    monkeypatch.setattr(memory_estimates, "footprint", footprint)
    total, trainable = weight_counts(CONFIG, plan.lora)
    candidate = SimpleNamespace(
        config=CONFIG, lora=plan.lora, name="one", parameters=total, trainable=trainable, listing=None
    )
    prepared = SimpleNamespace(request=SimpleNamespace(plan=plan, search=search))
    machine = Machine(platform, "", devices, memory, {})
    need = memory_estimates.MemoryEstimate(prepared, candidate, SimpleNamespace(longest=16), machine).need()
    assert need.problem == ""
    return asked[0]


@pytest.mark.parametrize("parallel_trials", [None, 2, 9])
@pytest.mark.parametrize(
    ("platform", "devices", "memory", "sharding", "batch_size", "lora", "expected"),
    [
        ("cpu", 1, None, "auto", 8, None, (1, False, 1)),
        ("gpu", 1, ROOM, "auto", 8, None, (1, False, 2)),
        ("gpu", 1, None, "auto", 8, None, (1, False, 1)),
        ("gpu", 1, ROOM, "auto", 8, Lora(rank=1), (1, False, 3)),
        ("gpu", 4, ROOM, "none", 8, None, (1, False, 2)),
        ("gpu", 4, ROOM, "auto", 7, None, (1, False, 2)),
        ("gpu", 4, MUCH, "auto", 8, None, (4, False, 1)),
        ("gpu", 4, 16 * TOTAL, "auto", 8, None, (4, True, 1)),
        ("gpu", 4, MUCH, "full", 8, None, (4, True, 1)),
        ("gpu", 4, MUCH, "auto", 6, None, (2, False, 1)),
    ],
)
def test_a_dry_run_decides_as_training_does(
    platform, devices, memory, sharding, batch_size, lora, expected, parallel_trials, monkeypatch
):
    plan = Plan(batch_size=batch_size, sharding=sharding, lora=lora)
    search = Search(learning_rates=RATES, parallel_trials=parallel_trials)
    if parallel_trials is not None:
        expected = (*expected[:2], min(parallel_trials, len(RATES)))
    case = plan, search, platform, devices, memory, monkeypatch
    assert decided_by_training(*case) == expected
    assert decided_by_dry_run(*case) == expected


def test_a_batch_that_cannot_be_shared_is_the_same_problem_for_both(monkeypatch):
    plan, search = Plan(batch_size=6, sharding="data"), Search()
    problem = "sharding data: 4 devices do not divide 6 samples evenly"
    with pytest.raises(InputError, match=f"^{problem}; choose a batch size .or micro-batch. that is a multiple of 4.$"):
        decided_by_training(plan, search, "gpu", 4, MUCH, monkeypatch)
    with pytest.raises(AssertionError, match=f"{problem}\\."):
        decided_by_dry_run(plan, search, "gpu", 4, MUCH, monkeypatch)


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
