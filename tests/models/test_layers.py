"""The implementations of attention against a dense float64 one, and which is chosen where."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.models import init_model
from lensjax.models.layers import (
    ATTENTIONS,
    attention,
    attention_implementation,
    causal_mask,
    choose_attention,
    window_mask,
)

REAL = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])  # right and left padding
CASES = {
    "causal": (causal_mask(jnp.ones_like(REAL)), 4, None),
    "padded": (causal_mask(jnp.asarray(REAL)), 4, None),
    "window": (window_mask(jnp.asarray(REAL), 3), 4, None),
    "grouped": (causal_mask(jnp.asarray(REAL)), 2, None),
    "encoder": (jnp.asarray(REAL != 0)[:, None, None, :], 4, None),
    "bias": (causal_mask(jnp.asarray(REAL)), 4, np.random.default_rng(3).normal(size=(1, 4, 7, 7))),
}


def make_inputs(key_heads, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(3, 7, heads, 8)), dtype) for heads in (4, key_heads, key_heads)]


def reference(query, key, value, mask, scale, bias):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    key, value = (np.repeat(array, query.shape[2] // array.shape[2], axis=2) for array in (key, value))
    scores = np.einsum("nthd,nshd->nhts", query, key) * scale + (0 if bias is None else bias)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.asarray(mask)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("nhts,nshd->nthd", weights / np.where(total == 0, 1, total), value)


@pytest.mark.parametrize("kind", ["plain", "xla"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("traced", [False, True])
def test_implementations_agree_with_a_dense_one(kind, case, traced):
    mask, key_heads, bias = CASES[case]
    inputs = make_inputs(key_heads)
    narrow = None if bias is None else jnp.asarray(bias, jnp.float32)
    with attention_implementation(kind):
        scale = jnp.asarray(0.3) if traced else 0.3  # GPT-2's may differ from layer to layer, and is then traced
        found = np.asarray(attention(*inputs, mask, scale=scale, bias=narrow))
    seen = np.asarray(jnp.broadcast_to(mask, (3, 1, 7, 7))).any(-1)[:, 0]
    np.testing.assert_allclose(found[seen], reference(*inputs, mask, 0.3, bias)[seen], rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("case", ["padded", "grouped", "bias"])
def test_gradients_of_the_implementations_agree(case):
    mask, key_heads, bias = CASES[case]
    arguments = [*make_inputs(key_heads), jnp.zeros((1, 4, 7, 7)) if bias is None else jnp.asarray(bias, jnp.float32)]
    weights = jnp.asarray(REAL != 0)[:, :, None, None] * jnp.arange(8.0)

    @partial(jax.jit, static_argnums=0)
    def gradient(kind, arguments):
        def total(*arguments):
            with attention_implementation(kind):
                return jnp.sum(weights * attention(*arguments[:3], mask, scale=0.3, bias=arguments[3]))

        return jax.grad(total, (0, 1, 2, 3))(*arguments)

    for ours, theirs in zip(gradient("plain", arguments), gradient("xla", arguments), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


FITS = {"lengths": (64, 64), "features": 64, "bias": False, "dropout": False}


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "changes", "expected"),
    [
        ("auto", "gpu", "bfloat16", {}, "cudnn"),
        ("auto", "gpu", "float16", {}, "cudnn"),
        ("auto", "gpu", "float32", {}, "plain"),
        ("auto", "cpu", "bfloat16", {}, "plain"),
        ("auto", "tpu", "bfloat16", {}, "plain"),
        ("auto", "gpu", "bfloat16", {"lengths": (63, 64)}, "plain"),
        ("auto", "gpu", "bfloat16", {"lengths": (64, 63)}, "plain"),
        ("auto", "gpu", "bfloat16", {"features": 256}, "plain"),
        ("auto", "gpu", "bfloat16", {"features": 60}, "plain"),
        ("auto", "gpu", "bfloat16", {"bias": True}, "plain"),
        ("auto", "gpu", "bfloat16", {"dropout": True}, "plain"),
        ("plain", "gpu", "bfloat16", {}, "plain"),
        ("xla", "cpu", "float32", {}, "xla"),
        ("cudnn", "gpu", "bfloat16", {"bias": True}, "cudnn"),
        ("cudnn", "gpu", "bfloat16", {"dropout": True}, "plain"),
    ],
)
def test_flash_attention_is_chosen_where_it_can_be(asked, platform, dtype, changes, expected):
    assert choose_attention(asked, platform, dtype, **FITS | changes) == expected


def test_on_a_gpu_jax_is_asked_for_flash_attention(monkeypatch):
    # Lowering it needs cuDNN; that it is asked for, and with what, shows without.
    asked = {}

    def record(query, key, value, **settings):
        asked.update(settings, shapes=(query.shape, key.shape))
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    config = {"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    model = init_model(config, jax.random.key(0), jnp.bfloat16)
    jax.eval_shape(model, np.zeros((3, 4), np.int32))
    assert asked["implementation"] == "cudnn"
    assert asked["shapes"] == ((3, 4, 2, 8), (3, 4, 1, 8))  # key heads are not repeated
    assert asked["mask"].shape == (3, 1, 4, 4)
    assert asked["scale"] == 8**-0.5
    asked.clear()
    model.attention = "plain"
    jax.eval_shape(model, np.zeros((3, 4), np.int32))
    assert not asked


def test_an_implementation_that_is_none_is_refused():
    with pytest.raises(InputError, match="attention 'flash' is not known; choose one of auto, plain, xla, cudnn"):
        attention_implementation("flash").__enter__()
    assert len(ATTENTIONS) == 4
