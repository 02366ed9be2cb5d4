"""The fused head against a dense float64 reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lensjax_kernels import head_cross_entropy

from support.comparing import relative


def make_case(rows, width, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((rows, width)).astype(np.float32)
    weight = (rng.standard_normal((vocabulary, width)) / np.sqrt(width)).astype(np.float32)
    bias = rng.standard_normal(vocabulary).astype(np.float32)
    labels = rng.integers(0, vocabulary, rows).astype(np.int32)
    labels[rng.random(rows) < 0.2] = -100
    return hidden, weight, bias, labels


def reference(hidden, weight, bias, labels):
    """Losses and, for their sum weighted by 1, 2, 3, ..., the gradients; NumPy, float64, all logits at once."""
    hidden, weight, bias = (np.asarray(x, np.float64) for x in (hidden, weight, bias))
    logits = hidden @ weight.T + bias
    top = logits.max(1, keepdims=True)
    unnormalised = np.exp(logits - top)
    total = unnormalised.sum(1, keepdims=True)
    kept = labels != -100
    rows = np.arange(len(labels))
    gold = np.where(kept, labels, 0)
    losses = np.where(kept, (np.log(total) + top)[:, 0] - logits[rows, gold], 0)
    error = unnormalised / total
    error[rows, gold] -= 1
    error *= (kept * weights_of(len(labels)))[:, None]
    return losses, (error @ weight, error.T @ hidden, error.sum(0))


def weights_of(rows):
    return np.arange(1, rows + 1) / rows


def weighted(labels, chunk):
    def total(hidden, weight, bias):
        losses = head_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk)
        return jnp.sum(losses * weights_of(len(labels)))

    return total


# 12 rows: one piece, pieces that divide the rows, pieces that do not, one row at a time, more than there are.
@pytest.mark.parametrize("chunk", [None, 12, 6, 5, 1, 100])
def test_losses_and_gradients_equal_the_reference(chunk):
    hidden, weight, bias, labels = make_case(12, 8, 23)
    losses, gradients = reference(hidden, weight, bias, labels)
    ours = head_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk)
    assert ours.shape == (12,)
    np.testing.assert_allclose(ours, losses, rtol=1e-6)
    for got, expected in zip(
        jax.grad(weighted(labels, chunk), (0, 1, 2))(hidden, weight, bias), gradients, strict=True
    ):
        assert relative(got, expected) < 1e-6


def test_losses_and_gradients_equal_the_reference_above_a_million_logits():
    hidden, weight, bias, labels = make_case(1100, 32, 1009)  # 1.1e6 logits in three uneven pieces
    losses, gradients = reference(hidden, weight, bias, labels)
    np.testing.assert_allclose(head_cross_entropy(hidden, weight, labels, bias=bias), losses, rtol=3e-6)
    ours = jax.jit(jax.grad(weighted(labels, None), (0, 1, 2)))(hidden, weight, bias)
    for got, expected in zip(ours, gradients, strict=True):
        assert relative(got, expected) < 3e-6


@pytest.mark.parametrize(("rows", "width", "vocabulary", "chunk"), [(12, 8, 23, 5), (1100, 32, 1009, None)])
def test_forward_mode_and_forward_over_reverse_equal_the_reference(rows, width, vocabulary, chunk):
    with jax.enable_x64(True):
        *arguments, labels = make_case(rows, width, vocabulary)
        arguments = [np.asarray(x, np.float64) for x in arguments]
        rng = np.random.default_rng(1)
        direction = [rng.standard_normal(x.shape) for x in arguments]
        total = weighted(labels, chunk)

        slope = jax.jit(lambda p, v: jax.jvp(total, p, v)[1])(tuple(arguments), tuple(direction))
        _, gradients = reference(*arguments, labels)
        expected = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
        np.testing.assert_allclose(slope, expected, rtol=1e-11)

        gradient = jax.grad(total, (0, 1, 2))
        hvp = jax.jit(lambda p, v: jax.jvp(gradient, p, v)[1])(tuple(arguments), tuple(direction))
        step = 1e-5
        ahead = reference(*(p + step * v for p, v in zip(arguments, direction, strict=True)), labels)[1]
        behind = reference(*(p - step * v for p, v in zip(arguments, direction, strict=True)), labels)[1]
        for got, a, b in zip(hvp, ahead, behind, strict=True):
            assert relative(got, (a - b) / (2 * step)) < 1e-7  # of the differences, not of the product


def test_per_example_gradients():
    hidden, weight, bias, labels = make_case(12, 8, 23)
    one = jax.grad(lambda w, h, y: head_cross_entropy(h, w, y, bias=bias, chunk=2).sum())
    each = jax.vmap(one, (None, 0, 0))(weight, hidden.reshape(3, 4, 8), labels.reshape(3, 4))
    whole = one(weight, hidden, labels)
    chex.assert_shape(each, (3, 23, 8))
    np.testing.assert_allclose(each.sum(0), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 3])
def test_ignored_rows_have_no_loss_and_no_gradient(chunk):
    hidden, weight, _, _ = make_case(8, 8, 23)
    labels = np.full(8, -100, np.int32)
    np.testing.assert_array_equal(head_cross_entropy(hidden, weight, labels, chunk=chunk), np.zeros(8))
    gradient = jax.grad(lambda h: head_cross_entropy(h, weight, labels, chunk=chunk).sum())(hidden)
    np.testing.assert_array_equal(gradient, np.zeros_like(hidden))


def test_large_logits_do_not_overflow():
    hidden, weight, bias, labels = make_case(12, 8, 23)
    losses, _ = reference(1e4 * hidden, weight, bias, labels)
    np.testing.assert_allclose(head_cross_entropy(1e4 * hidden, weight, labels, bias=bias, chunk=5), losses, rtol=1e-5)


def test_bfloat16_inputs_accumulate_in_float32():
    # Every product is 1: a sum in bfloat16 would stop at 256.
    hidden = jnp.ones((2, 1024), jnp.bfloat16)
    weight = jnp.stack([jnp.ones(1024), jnp.zeros(1024)]).astype(jnp.bfloat16)
    losses = head_cross_entropy(hidden, weight, jnp.array([0, 1]), bias=jnp.array([-1020.0, 0.0]))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, [np.log1p(np.exp(-4)), 4 + np.log1p(np.exp(-4))], rtol=1e-5)


def test_bfloat16_gradient_of_the_weight_keeps_small_rows():
    # 4096 rows that each add 0.5: adding them up piece by piece in bfloat16 would stop long before 2048.
    hidden = jnp.ones((4096, 1), jnp.bfloat16)
    weight = jnp.zeros((2, 1), jnp.bfloat16)
    gradient = jax.grad(lambda w: head_cross_entropy(hidden, w, jnp.zeros(4096, jnp.int32), chunk=4).sum())(weight)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.float32)[:, 0], [-2048, 2048], rtol=4e-3)


def test_all_logits_never_exist_at_once():
    hidden, weight, _, labels = make_case(4096, 4, 512)
    step = jax.jit(jax.grad(lambda h, w: head_cross_entropy(h, w, labels, chunk=128).sum(), (0, 1)))
    temporary = step.lower(hidden, weight).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4096 * 512 * 4 / 4


def test_a_vocabulary_of_50k_needs_a_fraction_of_the_memory_of_all_logits():
    def naive(hidden, weight, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ weight.T), labels[:, None], 1).sum()

    def fused(hidden, weight, labels):
        return head_cross_entropy(hidden, weight, labels).sum()

    # 4096 tokens, 823 MB of logits: compiled, never run.
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, 16), (50257, 16))]
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    logits = 4096 * 50257 * 4

    def temporary(loss):
        program = jax.jit(jax.grad(loss, (0, 1)), compiler_options={"xla_backend_optimization_level": 0})
        return program.lower(*shapes, labels).compile().memory_analysis().temp_size_in_bytes

    assert temporary(naive) >= logits
    assert temporary(fused) < logits / 3


def test_a_chunk_without_rows_is_refused():
    hidden, weight, _, labels = make_case(4, 4, 5)
    with pytest.raises(ValueError, match="chunk must be at least 1 row, got 0"):
        head_cross_entropy(hidden, weight, labels, chunk=0)
