"""The kernel as an operator: in batches of examples, with memory that does not grow, and with arguments checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import InputError
from lensjax.tangents import ntk, ntk_operator


def network(w, x):
    for own in w:
        x = jnp.tanh(x @ own)
    return x.mean(0)


def inputs(n, tokens=3, width=4, dtype=np.float64):
    rng = np.random.default_rng(8)
    w = [jnp.asarray(rng.normal(size=(width, width)) / width**0.5, dtype) for _ in range(3)]
    return w, jnp.asarray(rng.normal(size=(n, tokens, width)), dtype)


@pytest.mark.parametrize("batch", [1, 3, 5, 64])
def test_batches_do_not_change_products(batch):
    with jax.enable_x64(True):
        w, x = inputs(12)
        rng = np.random.default_rng(1)
        v, u = rng.normal(size=(5, 4)), rng.normal(size=(7, 4))
        want = np.asarray(ntk(network, w, x[:7], x[7:], method="jacobian"))
        operator = ntk_operator(network, w, x[:7], x[7:], batch=batch)
        np.testing.assert_allclose(operator @ v, np.einsum("icjk,jk->ic", want, v), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(operator.rmatvec(u), np.einsum("icjk,ic->jk", want, u), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(operator.dense(), want, rtol=1e-12, atol=1e-14)

        def scalar(w, x):
            return network(w, x).sum()

        want = np.asarray(ntk(scalar, w, x, method="jacobian"))
        v = rng.normal(size=12)
        np.testing.assert_allclose(ntk_operator(scalar, w, x, batch=batch) @ v, want @ v, rtol=1e-12, atol=1e-14)


def test_memory_of_a_product_does_not_grow_with_the_examples():
    def temporary(n):
        w, x = inputs(n, 8, 32, np.float32)

        def product(w, x, v):
            return ntk_operator(network, w, x, batch=16) @ v

        return jax.jit(product).lower(w, x, jnp.ones((n, 32))).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(64), temporary(512)
    examples = 448 * 8 * 32 * 4  # of the inputs alone; all activations at once are several times as much
    assert many - few < examples / 2


def test_wrong_arguments_are_named():
    w, x = inputs(3, dtype=np.float32)
    operator = ntk_operator(lambda w, x: network(w, x).sum(), w, x)
    with pytest.raises(InputError, match=r"multiplies arrays of shape \(3,\), not a list; give jnp.asarray"):
        operator @ [1.0, 2.0, 3.0]
    with pytest.raises(InputError, match=r"multiplies arrays of shape \(3,\), not \(4,\); reshape it"):
        operator @ jnp.ones(4)
    with pytest.raises(InputError, match="batch=0 must be at least 1"):
        ntk_operator(network, w, x, batch=0)


def test_many_batches_add_up_in_float32():
    """Vector-Jacobian products of 300 batches of one size each, with weights of eight significant bits."""
    w, x = jnp.ones(2, jnp.bfloat16), jnp.ones((64 * 300, 2), jnp.bfloat16)
    operator = ntk_operator(lambda w, x: jnp.dot(w, x), w, x)
    product = operator @ jnp.ones(len(x), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(product, np.float32), 2.0 * len(x), rtol=2**-7)
