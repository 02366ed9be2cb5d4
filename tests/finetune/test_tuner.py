import dataclasses
import gc
import json
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

from lensjax import models
from lensjax.finetune import DivergedError, FineTuner, Plan
from lensjax.models.lora import Frozen, Lora
from lensjax.tasks import batches, bucket_lengths, encode, load_task

PLAN = Plan(learning_rate=1e-2, batch_size=8, max_epochs=4, min_steps_between=1, warmup=2)

COMPILED = {}


def tuner_of(setting, **changes):
    """A fine-tuner of that plan; those that differ only in when to stop share their compiled functions."""
    model, _, buckets = setting
    compiled = frozenset((k, v) for k, v in changes.items() if k in ("learning_rate", "clip"))
    if compiled not in COMPILED:
        COMPILED[compiled] = FineTuner(model, dataclasses.replace(PLAN, **changes), buckets, 0)
    COMPILED[compiled].plan = dataclasses.replace(PLAN, **changes)
    return COMPILED[compiled]


def test_fine_tuning_lowers_the_test_loss_and_keeps_the_initial_weights(setting):
    _, (train, validation, test), _ = setting
    tuner = tuner_of(setting)
    before = [np.array(x) for x in jax.tree.leaves(tuner.initial)]
    zero_shot = tuner.zero_shot(test)
    found = tuner.run(train, validation, test, seed=0)
    assert found.test_loss < zero_shot.test_loss - 1.0
    assert 0 < found.steps <= found.steps_run
    assert found.tokens == train.token_counts.sum() * found.steps_run / 13  # 100 samples: 13 batches of 8 an epoch
    assert found.flops == 6 * tuner.parameters * found.tokens
    assert found.trainable == tuner.parameters
    for was, now in zip(before, jax.tree.leaves(tuner.initial), strict=True):
        np.testing.assert_array_equal(was, now)
    assert tuner.run(train, validation, test, seed=0).test_loss == pytest.approx(found.test_loss, rel=1e-5)


def test_early_stopping_returns_the_weights_with_the_best_validation_loss(setting):
    _, (train, validation, test), _ = setting
    found = tuner_of(setting, learning_rate=0.1, max_epochs=30, patience=1).run(
        train.first(8), validation, test, seed=0
    )
    steps, losses = zip(*found.validation_history, strict=True)
    assert "has not improved for 1 evaluations" in found.reason
    assert found.steps == steps[int(np.argmin(losses))]
    assert found.validation_loss == min(losses)
    assert losses[-1] > min(losses)
    assert found.steps_run == steps[-1]


def test_a_rate_that_helps_nothing_leaves_the_zero_shot_loss(setting):
    _, (train, validation, test), _ = setting
    # A single step: the training loss, taken before it, has not risen.
    tuner = tuner_of(setting, learning_rate=100.0, clip=1e6, max_epochs=1)
    found = tuner.run(train.first(1), validation, test, seed=0)
    assert (found.steps, found.steps_run) == (0, 1)
    assert found.test_loss == pytest.approx(tuner.zero_shot(test).test_loss, rel=1e-6)


def test_one_step_is_adamw_with_decay_clipping_and_warm_up(setting):
    model, (train, *_), buckets = setting
    tuner = tuner_of(setting, max_epochs=1)
    batch = next(batches(train, batch_size=8, buckets=buckets, pad_id=0))
    rate, key = jax.numpy.float32(PLAN.learning_rate), jax.random.key(0)
    state = tuner.compiled.step(tuner.compiled.start(tuner.initial), rate, tuner.frozen, batch, key, 0, 100)
    found = state["params"]

    graph, start, rest = nnx.split(model, nnx.Param, ...)

    def objective(p):
        sums, counts = nnx.merge(graph, p, rest).loss_sums(batch)
        return sums.sum() / counts.sum()

    gradient = jax.grad(objective)(start)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    rate = PLAN.learning_rate / PLAN.warmup  # the first of the warm-up steps
    for got, p, g in zip(*(jax.tree.leaves(x) for x in (found, start, gradient)), strict=True):
        p, g = np.asarray(p, np.float64), np.asarray(g, np.float64) / max(norm, 1.0)
        want = p - rate * (g / (np.abs(g) + 1e-8) + PLAN.weight_decay * p)  # at step 1, m/sqrt(v) is the sign
        np.testing.assert_allclose(got, want, atol=3e-6)
    assert bool(state["finite"])
    np.testing.assert_allclose(state["loss"], objective(start), rtol=1e-6)


def test_divergence_is_an_error_not_a_number(setting):
    _, (train, validation, test), _ = setting
    with pytest.raises(DivergedError, match="not finite in epoch 1") as caught:
        tuner_of(setting, learning_rate=1e30, clip=1e30).run(train, validation, test, seed=0)
    (trial,) = caught.value.trials
    assert trial.status == "diverged"
    assert trial.test_loss is None
    assert 0 < trial.flops == 6 * tuner_of(setting).parameters * trial.tokens


def test_a_selection_compiles_one_step_for_each_length_whatever_the_subset(setting):
    _, (train, validation, test), buckets = setting
    COMPILED.clear()
    tuner = tuner_of(setting, max_epochs=1)
    for size in (100, 50, 25, 12):
        tuner.run(train.first(size), validation, test, seed=0)
    assert tuner.compiled.step._cache_size() <= len(buckets)
    assert tuner.compiled.evaluate._cache_size() <= len(buckets)


def test_progress_is_reported(setting):
    _, (train, validation, test), _ = setting
    seen = []
    tuner_of(setting, max_epochs=2).run(train, validation, test, seed=0, on_progress=seen.append)
    assert [p.epoch for p in seen][-1] == 2
    assert seen[-1].total_steps == seen[-1].step == 26


def test_an_encoder_decoder_model_is_fine_tuned_from_separate_prompt_and_target(tiny_models, tiny_task):
    task = load_task(tiny_task, input_field="input", target_field="target", validation=20, test=20)
    tokenizer = models.load_tokenizer(tiny_models[0])
    config = {
        "model_type": "t5",
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_heads": 2,
        "num_layers": 1,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    model = models.init_model(config, jax.random.key(0))
    sets = [encode(part, tokenizer, 32, separate=True) for part in (task.train, task.validation, task.test)]
    tuner = FineTuner(model, PLAN, bucket_lengths(np.concatenate([s.lengths for s in sets])), 0)
    found = tuner.run(*sets, seed=0)
    assert found.test_loss < tuner.zero_shot(sets[2]).test_loss - 1.0
    assert found.tokens == sets[0].token_counts.sum() * PLAN.max_epochs


@pytest.fixture(scope="module")
def adapted(setting):
    """A model, a fine-tuner of adapters for it, what its run gave, and the model's weights before."""
    model, sets, buckets = setting
    # The head is frozen: with weights as small as at the start of pre-training, its logits would stay small.
    model = models.init_model(json.loads(model.config.raw) | {"initializer_range": 0.5}, jax.random.key(0))
    before = {name: np.array(leaf[...]) for name, leaf in nnx.to_flat_state(nnx.state(model))}
    tuner = FineTuner(model, dataclasses.replace(PLAN, learning_rate=0.03, lora=Lora(rank=4, dropout=0.1)), buckets, 0)
    return model, tuner, tuner.run(*sets, seed=0), before


def test_adapters_learn_and_nothing_else_changes(setting, adapted):
    _, sets, _ = setting
    model, tuner, found, before = adapted
    assert found.test_loss < tuner.zero_shot(sets[2]).test_loss - 0.5
    assert found.validation_loss == min(loss for _, loss in found.validation_history)
    frozen = {name: leaf for name, leaf in nnx.to_flat_state(tuner.frozen) if type(leaf) is Frozen}
    assert len(frozen) == len(before)
    for name, leaf in nnx.to_flat_state(tuner.frozen):
        np.testing.assert_array_equal(leaf[...], before[tuple(part for part in name if part != "base")])
    for name, leaf in nnx.to_flat_state(nnx.state(model)):
        np.testing.assert_array_equal(leaf[...], before[name])


def test_gradients_and_optimiser_state_are_of_the_adapters_alone(setting, adapted):
    _, (train, *_), buckets = setting
    _, tuner, found, before = adapted
    # One layer of width 8: qkv 8 -> 24, out 8 -> 8, perceptron 8 -> 32 -> 8, each with rank 4.
    assert tuner.trainable == found.trainable == 4 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8))
    frozen = sum(value.size for value in before.values())
    assert tuner.parameters == frozen + tuner.trainable
    assert found.flops == (4 * frozen + 6 * tuner.trainable) * found.tokens
    state = tuner.compiled.start(tuner.initial)
    assert sum(leaf.size for leaf in jax.tree.leaves(state["state"])) == 2 * tuner.trainable + 1  # moments and a count
    batch = next(batches(train, batch_size=8, buckets=buckets, pad_id=0))
    # The frozen weights are inputs of the program and not constants in it.
    arguments = (state, jax.numpy.float32(1e-3), tuner.frozen, batch, jax.random.key(0), 0, 10)
    assert 'dense<"0x' not in tuner.compiled.step.lower(*arguments).as_text()


def test_adapters_of_an_early_stop_are_those_of_the_best_evaluation(setting):
    model, (train, validation, test), buckets = setting
    plan = dataclasses.replace(PLAN, learning_rate=0.3, max_epochs=30, patience=1, lora=Lora(rank=2))
    tuner = FineTuner(model, plan, buckets, 0)
    found = tuner.run(train.first(8), validation, test, seed=0)
    losses = [loss for _, loss in found.validation_history]
    assert "has not improved for 1 evaluations" in found.reason
    assert found.validation_loss == min(losses) < losses[-1]
    assert found.steps < found.steps_run
    start = tuner.zero_shot(test).test_loss
    assert (found.test_loss == pytest.approx(start, rel=1e-6)) == (found.steps == 0)


def test_weights_share_the_arrays_of_the_model(setting):
    model, _, buckets = setting
    tuner = FineTuner(model, PLAN, buckets, 0)
    arrays = lambda tree: [leaf[...] for _, leaf in nnx.to_flat_state(tree)]  # noqa: E731
    for other in (tuner.initial, nnx.state(tuner.model(tuner.initial), nnx.Param)):
        for one, same in zip(arrays(nnx.state(model, nnx.Param)), arrays(other), strict=True):
            assert one is same


def test_weights_and_compiled_programs_are_freed_with_the_fine_tuner(setting):
    model, sets, buckets = setting
    # Weights of its own: those of the fixture live on.
    tuner = FineTuner(models.init_model(json.loads(model.config.raw), jax.random.key(1)), PLAN, buckets, 0)
    small = tuple(part.first(8) for part in sets)
    tuner.trials(*small, rates=(1e-2, 1e-3), seed=0, count_flops=True)
    tuner.run(*small, seed=0)
    compiled = tuner.compiled
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(tuner.initial)]
    kept += [weakref.ref(f) for f in (compiled.step, compiled.step_trials, compiled.evaluate, compiled.start)]
    kept += [weakref.ref(tuner), weakref.ref(compiled)]
    assert all(ref() is not None for ref in kept)
    del tuner, compiled
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []
