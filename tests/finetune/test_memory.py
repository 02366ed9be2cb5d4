"""The memory that fine-tuning takes, counted from shapes, against real arrays and XLA's own account."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lensjax import models
from lensjax.finetune import FineTuner, Plan
from lensjax.finetune.memory import MARGIN, footprint, live_bytes, weight_counts
from lensjax.models import Lora

GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 512,
    "d_model": 128,
    "d_ff": 512,
    "num_layers": 1,
    "num_heads": 4,
    "d_kv": 32,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "num_hidden_layers": 6, "sliding_window": 32}
ROWS, LENGTH = 16, 64


def counted(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return live_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)


def of(config, plan, **more):
    given = {"batch_size": ROWS, "length": LENGTH, "platform": "cpu", **more}
    return footprint(models.load_config(config), plan, **given)


def test_results_live_until_their_last_use():
    # Two results of 400 bytes at once: an exponential and its sine; the sums take 4 each.
    assert counted(lambda x: jnp.sin(jnp.exp(x)).sum(), (100,)) == 800
    assert counted(lambda x: jnp.tanh(jnp.sin(jnp.exp(x))).sum(), (100,)) == 800
    # The exponential is needed at the end.
    assert counted(lambda x: (lambda e: jnp.tanh(jnp.sin(e)) @ e)(jnp.exp(x)), (100,)) == 1200


def test_cheap_elementwise_results_never_exist_but_keep_what_they_are_made_of():
    assert counted(lambda x: jnp.exp((x + 1) * 2 - x), (100,)) == 400
    # The product is taken only after the sine: both of its factors live until then.
    assert counted(lambda x: (lambda e, p: jnp.sin(e) @ p)(jnp.exp(x), jnp.exp(x) * 2), (100,)) == 1200


def test_what_a_loop_gives_is_there_while_its_body_runs():
    def loop(x):
        return jax.lax.scan(lambda carry, _: (jnp.sin(jnp.exp(carry)), None), x, None, length=5)[0]

    assert counted(loop, (100,)) == 400 + 800
    # A function that is only called makes its result itself.
    assert counted(jax.jit(lambda x: jnp.sin(jnp.exp(x))), (100,)) == 800


def test_what_the_backward_pass_keeps_is_counted():
    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]))

    found = counted(jax.grad(loss), (2, 64, 64), (256, 64))
    activations, weights = 256 * 64 * 4, 2 * 64 * 64 * 4
    # Both hyperbolic tangents are kept; the way back adds gradients of activations and of weights.
    assert 2 * activations + weights / 2 <= found <= 4 * activations + 2 * weights


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_weights_and_moments_are_those_that_training_holds(lora):
    plan = Plan(batch_size=ROWS, lora=lora)
    model = models.init_model(GPT2, jax.random.key(0))
    tuner = FineTuner(model, plan, (LENGTH,), 0)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim)  # noqa: E731
    state = tuner.compiled.start(tuner.initial)
    found = of(GPT2, plan)
    # Untouched, present, best, and a new best one beside the old.
    assert found.weights == 4 * bytes_of(state["params"]) + bytes_of(tuner.frozen)
    assert found.optimiser == bytes_of(state["state"])
    assert found.total == found.weights + found.optimiser + found.working
    assert weight_counts(models.load_config(GPT2), lora) == (tuner.parameters, tuner.trainable)


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (GPT2, Plan()),
        (LLAMA, Plan()),
        (T5, Plan()),
        (GPT2, Plan(lora=Lora(rank=4))),
        (GPT2, Plan(micro_batch=4)),
        (GPT2, Plan(precision="bfloat16")),
    ],
    ids=["gpt2", "llama", "t5", "adapters", "micro-batches", "bfloat16"],
)
def test_what_a_step_makes_is_what_xla_says(config, plan):
    plan = dataclasses.replace(plan, batch_size=ROWS)
    tuner = FineTuner(models.init_model(config, jax.random.key(0)), plan, (LENGTH,), 0)
    ids = np.ones((ROWS, LENGTH), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    state = jax.eval_shape(tuner.compiled.start, tuner.initial)
    given = (state, jnp.float32(0), tuner.frozen, batch, jax.random.key(0), 0, 1)
    by_xla = tuner.compiled.step.lower(*given).compile().memory_analysis().temp_size_in_bytes
    # Some 10 MB: each of the larger activations has 2^17 elements, all together more than 2^20.
    assert by_xla > 4 * 2**20
    assert 0.95 <= of(config, plan).working / by_xla <= 1.6


def test_micro_batches_devices_and_lengths_take_less():
    whole = of(GPT2, Plan(batch_size=ROWS))
    assert of(GPT2, Plan(batch_size=ROWS, micro_batch=2)).working < 0.6 * whole.working
    assert of(GPT2, Plan(batch_size=ROWS), length=32).working < 0.6 * whole.working
    shared = of(GPT2, Plan(batch_size=ROWS), devices=4)
    assert shared.working < 0.5 * whole.working
    assert shared.weights == whole.weights
    full = of(GPT2, Plan(batch_size=ROWS), devices=4, full=True)
    assert (full.weights, full.optimiser) == (whole.weights // 4, whole.optimiser // 4)
    # An evaluation takes the batch whole.
    smallest = of(GPT2, Plan(batch_size=512, micro_batch=1), batch_size=512)
    forward = footprint(
        models.load_config(GPT2), Plan(batch_size=512, micro_batch=1), batch_size=1, length=LENGTH, platform="cpu"
    )
    assert smallest.working > 5 * forward.working


def test_half_precision_halves_activations_where_devices_have_it():
    single, half = (
        of(GPT2, Plan(batch_size=ROWS, precision=p), platform="gpu").working for p in ("float32", "bfloat16")
    )
    assert half < 0.8 * single
    assert of(GPT2, Plan(batch_size=ROWS), platform="gpu").working == half
    # XLA widens it on CPUs: it takes the copies besides.
    total = weight_counts(models.load_config(GPT2), None)[0]
    cpu = [of(GPT2, Plan(batch_size=ROWS, precision=p)).working for p in ("float32", "bfloat16")]
    assert cpu[1] == cpu[0] + 4 * total


def test_nothing_is_traced_where_the_weights_alone_do_not_fit(monkeypatch):
    monkeypatch.setattr("lensjax.finetune.memory._working", lambda *_, **__: pytest.fail("traced"))
    found = of(GPT2, Plan(batch_size=ROWS), limit=1000)
    assert found.working == 0
    assert found.total > 1000


@pytest.mark.parametrize(
    ("config", "plan"),
    [(MISTRAL, Plan()), (GPT2 | {"n_layer": 7}, Plan(micro_batch=4, lora=Lora(rank=4))), (T5, Plan())],
)
def test_layers_that_are_alike_need_not_all_be_traced(config, plan, monkeypatch):
    config = config | ({"num_layers": 6, "num_decoder_layers": 6} if config["model_type"] == "t5" else {})
    few = of(config, plan).working
    monkeypatch.setattr("lensjax.finetune.memory.TRACED", (99, 100))
    assert few == pytest.approx(of(config, plan).working, rel=0.02)


def test_several_trials_at_once_are_several_runs():
    one, three = of(GPT2, Plan(batch_size=ROWS)), of(GPT2, Plan(batch_size=ROWS), parallel_trials=3)
    assert three == type(one)(3 * one.weights, 3 * one.optimiser, 3 * one.working)
    assert MARGIN > 1


def test_the_config_of_a_large_model_takes_no_memory():
    # 6.7e9 weights: real ones would take 27 GB.
    large = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 4096, "n_layer": 32, "n_head": 32}
    total, trained = weight_counts(models.load_config(large), None)
    assert total == trained > 6e9
    assert nnx.Param is not None
    found = footprint(models.load_config(large), Plan(), batch_size=32, length=128, platform="gpu", limit=80e9)
    assert found.weights == 16 * total
