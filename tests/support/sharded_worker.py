"""Fine-tune on 1, 2, 4 and 8 forced host devices and print the losses as JSON; run by test_sharding.py."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from lensjax import models
from lensjax.finetune import FineTuner, Plan
from lensjax.models import Lora
from lensjax.tasks import Encoded


def samples(count: int, seed: int) -> Encoded:
    """Rows of 4 to 14 tokens in which each token follows from the one before."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 15, count)
    ids = tuple(((rng.integers(64) + np.arange(n) * 3) % 64).astype(np.int32) for n in lengths)
    return Encoded(ids, np.full(count, 2), 0)


def main(kind: str) -> None:
    """Print {"sharding devices": what a run gave and where its weights were}."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model = models.init_model(config | dropout, jax.random.key(0))
    every = [("none", 1), ("data", 2), ("data", 4), ("data", 8), ("full", 2), ("full", 4), ("full", 8)]
    options, placements = {
        "plain": ({}, every),
        "adapters": (
            {"lora": Lora(rank=4), "learning_rate": 0.002, "micro_batch": 8, "dropout": True},
            [every[0], every[3], every[5], every[6]],
        ),
    }[kind]
    parts = samples(60, 0), samples(24, 1), samples(24, 2)
    found = {}
    for sharding, count in placements:
        settings = {"learning_rate": 0.005, "batch_size": 16, "max_epochs": 3, "min_steps_between": 1, "warmup": 2}
        plan = Plan(**settings | options | {"sharding": sharding})
        tuner = FineTuner(model, plan, (16,), 0, devices=jax.devices()[:count])
        outcome = tuner.run(*parts, seed=0)
        compiled = tuner.compiled
        batch = compiled.placement.put_batch(next(compiled.batches(parts[0], 16)))
        state = compiled.start(compiled.initial)
        step = compiled.step(state, np.float32(0.01), compiled.frozen, batch, jax.random.key(0), 0, 12)
        bytes_on_first = 0
        for leaf in jax.tree.leaves((step["params"], step["state"], tuner.frozen)):
            for shard in leaf.addressable_shards:
                bytes_on_first += shard.data.nbytes * (shard.device == jax.devices()[0])
        found[f"{sharding} {count}"] = {
            "losses": [outcome.test_loss, *(loss for _, loss in outcome.validation_history)],
            "steps": outcome.steps,
            "devices": tuner.placement.devices,
            "bytes": bytes_on_first,
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
