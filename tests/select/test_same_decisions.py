"""What a dry run takes for granted of training is what training then decides: devices, sharding, trials at once."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import Plan, Search, Trial, tune
from lensjax.finetune.memory import Footprint, weight_counts
from lensjax.finetune.sharding import place
from lensjax.models import Lora
from lensjax.select.dry_run import memory as dry_run
from lensjax.select.dry_run.machine import Machine

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


def trained(plan, search, platform, devices, memory, monkeypatch):
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


def forecast(plan, search, platform, devices, memory, monkeypatch):
    """The same, by a dry run."""
    asked = []

    def footprint(*_, **options):
        asked.append((options["devices"], options["full"], options["parallel_trials"]))
        return Footprint(0, 0, 0)

    monkeypatch.setattr(dry_run, "footprint", footprint)
    total, trainable = weight_counts(CONFIG, plan.lora)
    candidate = SimpleNamespace(
        config=CONFIG, lora=plan.lora, name="one", parameters=total, trainable=trainable, listing=None
    )
    prepared = SimpleNamespace(request=SimpleNamespace(plan=plan, search=search))
    machine = Machine(platform, "", devices, memory, {})
    need = dry_run.MemoryEstimate(prepared, candidate, SimpleNamespace(longest=16), machine).need()
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
    assert trained(*case) == expected
    assert forecast(*case) == expected


def test_a_batch_that_cannot_be_shared_is_the_same_problem_for_both(monkeypatch):
    plan, search = Plan(batch_size=6, sharding="data"), Search()
    problem = "sharding data: 4 devices do not divide 6 samples evenly"
    with pytest.raises(InputError, match=f"^{problem}; choose a batch size .or micro-batch. that is a multiple of 4.$"):
        trained(plan, search, "gpu", 4, MUCH, monkeypatch)
    with pytest.raises(AssertionError, match=f"{problem}\\."):
        forecast(plan, search, "gpu", 4, MUCH, monkeypatch)
