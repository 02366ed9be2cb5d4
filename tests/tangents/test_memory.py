"""Kernels within a memory limit: the same numbers, whatever is recomputed or cut into blocks for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import InputError
from lensjax.models import init_model
from lensjax.tangents import ntk
from lensjax.tangents.memory import needed_bytes, ways
from lensjax.tangents.ntk import checked, program
from lensjax.tangents.reducers import Pairs

CONFIG = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "intermediate_size": 96, "max_position_embeddings": 32,
}  # fmt: skip
EXAMPLES = 16


@pytest.fixture
def quick_to_compile():
    """Nearly all of the time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def model_and_batch(dtype=jnp.float32):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (EXAMPLES, 32)))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": jnp.ones_like(ids)}
    return init_model(CONFIG, jax.random.key(0), dtype), batch


def needs(model, batch):
    """Bytes that each way of computing the loss kernel of a model takes, from fast to small."""
    found = {}
    for way in ways(model, None, "loss"):
        problem = checked(way.function, way.params, batch, None, None, False)
        found[way.what] = needed_bytes(program(problem, Pairs(EXAMPLES, None, False)), way.params, batch, None, None)
    return found


@pytest.mark.usefixtures("quick_to_compile")
def test_a_model_recomputes_as_much_as_is_necessary():
    with jax.enable_x64(True):
        model, batch = model_and_batch(jnp.float64)
        whole = ntk(model, batch)
        needed = needs(model, batch)
        fast, *_, small = needed.values()
        assert small < fast / 2
        for what, bytes_needed in needed.items():
            kernel, report = ntk(model, batch, memory=bytes_needed, return_report=True)
            # A way that takes more memory than a faster one is never chosen.
            assert what in report.reason or any(needed[k] <= bytes_needed for k in needed if k in report.reason)
            np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-12 * np.abs(whole).max())
        layers = ntk(model, batch, memory=2 * small, by_layer=True)
        np.testing.assert_allclose(sum(layers.values()), whole, rtol=0, atol=1e-12 * np.abs(whole).max())
    assert (model.execution, model.remat) == ("unroll", False)


def test_any_function_falls_back_on_blocks():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(64, 64)) / 8, np.float32)
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 32, 64)), np.float32) for n in (12, 20))

    def f(p, x):
        for _ in range(4):
            x = jnp.tanh(x @ p)
        return x.sum()

    whole = ntk(f, p, x1, x2)
    kernel, report = ntk(f, p, x1, x2, memory=2**20, return_report=True)
    assert "in blocks" in report.reason
    np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    kernel, report = ntk(f, p, x1, x2, memory=2**30, return_report=True)
    assert "as it is" in report.reason
    np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_errors():
    p, x = jnp.ones((4, 4)), jnp.ones((3, 2, 4))

    def f(p, x):
        return jnp.tanh(x @ p).sum()

    with pytest.raises(InputError, match="bounds method='transform', but here it is 'jacobian'"):
        ntk(f, p, x, memory=2**20, method="jacobian")
    with pytest.raises(InputError, match="blocks of them give the sum over layers only"):
        ntk(f, p, x, memory=10, by_layer=True)
    with pytest.raises(InputError, match="memory=10 bytes is too little: a block of 2 examples takes"):
        ntk(f, p, x, memory=10)
