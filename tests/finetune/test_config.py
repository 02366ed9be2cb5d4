"""Schedules, accumulation, dropout, precision, cost: what a plan can ask for beside plain training."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import DivergedError, FineTuner, Plan, Search
from lensjax.finetune.step import rate_factor
from lensjax.tasks import batches

PLAN = Plan(learning_rate=1e-2, batch_size=8, max_epochs=2, min_steps_between=1, warmup=2)


def stepped(setting, steps=3, model=None, **changes):
    """Return the weights after some steps at a plan with these changes, and the sum of the training losses."""
    base, (train, *_), buckets = setting
    tuner = FineTuner(base if model is None else model, dataclasses.replace(PLAN, **changes), buckets, 0)
    state = tuner.compiled.start(tuner.initial)
    found = batches(train, batch_size=8, buckets=buckets, pad_id=0)
    for step, batch in zip(range(steps), found, strict=False):
        state = tuner.compiled.step(state, jnp.float32(1e-2), tuner.frozen, batch, jax.random.key(7), step, 10)
    return state["params"], float(state["loss"])


@pytest.mark.parametrize("micro_batch", [4, 1, 16])
def test_accumulated_gradients_are_those_of_the_large_batch(setting, micro_batch):
    # The counts of target tokens differ between micro-batches: means of means would be wrong.
    whole, loss = stepped(setting)
    pieces, piecewise = stepped(setting, micro_batch=micro_batch)
    # Adam divides by the size of a gradient: where that is rounding noise, so is its quotient.
    chex.assert_trees_all_close(pieces, whole, atol=2e-5)
    assert piecewise == pytest.approx(loss, rel=1e-6)


def test_accumulation_really_computes_in_pieces(setting):
    model, (train, *_), buckets = setting
    batch = next(batches(train, batch_size=8, buckets=buckets, pad_id=0))
    for micro_batch, loops in ((None, 0), (4, 1)):
        tuner = FineTuner(model, dataclasses.replace(PLAN, micro_batch=micro_batch), buckets, 0)
        state = jax.eval_shape(tuner.compiled.start, tuner.initial)
        text = tuner.compiled.step.lower(state, jnp.float32(0), tuner.frozen, batch, jax.random.key(0), 0, 1).as_text()
        assert text.count("stablehlo.while") == loops


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_in_the_warm_up_and_then_follows_its_schedule(schedule):
    warmup, total = 4, 14
    found = [float(rate_factor(schedule, warmup, jnp.array(s), jnp.array(total))) for s in range(total + 1)]
    np.testing.assert_allclose(found[:warmup], [1 / 4, 1 / 4 + 3 / 16, 1 / 4 + 6 / 16, 1 / 4 + 9 / 16], rtol=1e-6)
    done = [i / (total - warmup) for i in range(total - warmup + 1)]
    wanted = {
        "constant": [1.0 for _ in done],
        "linear": [1 - x for x in done],
        "cosine": [0.5 + 0.5 * math.cos(math.pi * x) for x in done],
    }
    np.testing.assert_allclose(found[warmup:], wanted[schedule], atol=1e-6)


def test_the_warm_up_is_never_further_from_trainers_than_its_first_step():
    warmup = 10
    ours = np.array([float(rate_factor("constant", warmup, jnp.array(s), jnp.array(30))) for s in range(30)])
    trainer = np.minimum(np.arange(30) / warmup, 1)  # get_constant_schedule_with_warmup
    assert ours[0] == pytest.approx(1 / warmup)
    assert (ours >= trainer).all()
    assert (ours - trainer).max() == pytest.approx(1 / warmup)
    assert (ours[warmup:] == 1).all()


def test_without_a_warm_up_the_first_step_has_the_peak_rate():
    assert float(rate_factor("linear", 0, jnp.array(0), jnp.array(5))) == 1.0


def test_a_falling_rate_moves_the_weights_less(setting):
    constant, _ = stepped(setting, steps=8, warmup=0)
    linear, _ = stepped(setting, steps=8, warmup=0, schedule="linear")
    start = nnx.state(setting[0], nnx.Param)

    def moved(params):
        return math.sqrt(
            sum(
                float(((a - b) ** 2).sum())
                for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
            )
        )

    assert 0 < moved(linear) < 0.9 * moved(constant)


def test_the_models_dropout_is_on_only_where_asked_for_and_only_in_training(setting):
    base, (*_, test), buckets = setting
    raw = json.loads(base.config.raw)
    model = models.init_model(raw | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}, jax.random.key(0))
    _, off = stepped(setting, model=model)
    _, on = stepped(setting, model=model, dropout=True)
    _, again = stepped(setting, model=model, dropout=True)
    assert on == again
    assert abs(on - off) > 1e-4
    losses = [
        FineTuner(model, dataclasses.replace(PLAN, dropout=dropout), buckets, 0).zero_shot(test).test_loss
        for dropout in (False, True)
    ]
    assert losses[0] == losses[1]


def test_mixed_precision_keeps_weights_in_float32_and_computes_in_bfloat16(setting):
    model, (train, validation, test), buckets = setting
    tuner = FineTuner(model, dataclasses.replace(PLAN, precision="bfloat16"), buckets, 0)
    batch = next(batches(train, batch_size=8, buckets=buckets, pad_id=0))
    state = tuner.compiled.start(tuner.initial)
    arguments = (state, jnp.float32(1e-2), tuner.frozen, batch, jax.random.key(0), 0, 10)
    products = [line for line in tuner.compiled.step.lower(*arguments).as_text().splitlines() if "dot_general" in line]
    # What comes back through the two softmaxes, of attention scores and of logits, stays in float32: two products each.
    wide = [line for line in products if "bf16" not in line]
    assert len(wide) == 4
    assert len(products) > 4 * len(wide)
    found = tuner.run(train, validation, test, seed=0)
    for leaf in jax.tree.leaves(tuner.compiled.step(*arguments)["params"]):
        assert leaf.dtype == jnp.float32
    single = FineTuner(model, dataclasses.replace(PLAN, precision="float32"), buckets, 0).run(
        train, validation, test, seed=0
    )
    assert found.test_loss == pytest.approx(single.test_loss, rel=0.02)
    assert found.test_loss != single.test_loss


def test_cost_by_xla_is_near_six_per_weight_and_padded_token(setting):
    # Against the textbook: 6 for each weight of a matrix product and token; an embedding is looked up, not multiplied.
    base, (train, *_), buckets = setting
    raw = json.loads(base.config.raw) | {"n_embd": 128, "vocab_size": 2048}
    model = models.init_model(raw, jax.random.key(0))
    tuner = FineTuner(model, PLAN, buckets, 0)
    batch = next(batches(train, batch_size=8, buckets=buckets, pad_id=0))
    tokens = batch["labels"].size
    matrices = 12 * 128 * 128
    head = 128 * 2048 * (tokens - 8) / tokens  # the last position predicts nothing
    adam = 20 * tuner.parameters  # some operations for each weight, once a step
    by_hand = 6 * tokens * (matrices + head) + adam
    assert tuner.cost_of_step(batch) == pytest.approx(by_hand, rel=0.1)
    assert tuner.cost_of_evaluation(batch) == pytest.approx(2 * tokens * (matrices + head), rel=0.1)


def test_cost_by_xla_counts_every_chunk_of_the_head_and_every_micro_batch(setting):
    model, (train, *_), buckets = setting
    first = next(batches(train, batch_size=8, buckets=buckets, pad_id=0))
    batch = {name: np.tile(x, (64, 1)) for name, x in first.items()}
    small = {name: x[:8] for name, x in batch.items()}
    costs = {}
    for micro_batch in (None, 8):
        plan = dataclasses.replace(PLAN, batch_size=512, micro_batch=micro_batch)
        tuner = FineTuner(model, plan, buckets, 0)
        costs[micro_batch] = tuner.cost_of_evaluation(batch), tuner.cost_of_step(batch)
        assert tuner.cost_of_evaluation(batch) == pytest.approx(64 * tuner.cost_of_evaluation(small), rel=0.01)
    assert costs[None] == costs[8]


def test_a_run_counts_what_it_trained_on_and_evaluated(setting):
    model, sets, buckets = setting
    tuner = FineTuner(model, PLAN, buckets, 0)
    (trial,) = tuner.trials(*sets, rates=(1e-2,), seed=0, count_flops=True)
    assert trial.samples == 2 * len(sets[0])
    assert trial.step_flops > trial.flops * 0.5
    one = sum(tuner.cost_of_evaluation(b) for b in batches(sets[1], batch_size=8, buckets=buckets, pad_id=0))
    other = sum(tuner.cost_of_evaluation(b) for b in batches(sets[2], batch_size=8, buckets=buckets, pad_id=0))
    assert trial.evaluation_flops == pytest.approx(one * len(trial.validation_history) + other)


def test_a_loss_that_only_rises_is_divergence(setting):
    model, sets, buckets = setting
    for epochs in (1, 4):  # ended by patience, or before it ran out
        plan = dataclasses.replace(PLAN, learning_rate=100.0, clip=1e6, max_epochs=epochs)
        with pytest.raises(DivergedError, match="the loss rises"):
            FineTuner(model, plan, buckets, 0).run(*sets, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "step"}, "schedule is 'step'; choose one of constant, linear, cosine"),
        ({"precision": "float16"}, "precision is 'float16'; choose one of auto, float32, bfloat16"),
        ({"sharding": "pipeline"}, "sharding is 'pipeline'; choose one of"),
        ({"micro_batch": 3}, "micro-batch 3 does not divide the batch size 8"),
        ({"micro_batch": 0}, "micro-batch 0 does not divide"),
        ({"learning_rate": float("inf")}, "the learning rate is inf; it must be positive and finite"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"warmup": -5}, "warmup is -5; it must be at least 0"),
        ({"clip": -1.0}, "the clip is -1; it must be positive"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must be 0 or more"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(setting, change, message):
    model, _, buckets = setting
    with pytest.raises(InputError, match=message):
        FineTuner(model, dataclasses.replace(PLAN, **change), buckets, 0)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (Search(learning_rates=(1e-3, -1.0)), "the learning rate is -1; it must be positive"),
        (Search(learning_rates=(1e-3, 1e-3)), "one is named twice"),
        (Search(parallel_trials=-1), "parallel_trials -1 must be at least 1"),
        (Search(prune_after=0), "prune_after 0 and"),
        (Search(retry=-1.0), "the retry is -1; it must be positive"),
        (Search(batch_sizes=(8, 6)), "micro-batch 4 does not divide the batch size 6"),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(search, message):
    with pytest.raises(InputError, match=message):
        search.check(dataclasses.replace(PLAN, micro_batch=4))
