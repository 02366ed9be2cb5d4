"""Packed random signs against a bit-by-bit reference, and their statistics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lensjax_kernels import pack_rademacher, rademacher_like, unpack_rademacher


def reference(words, count):
    """Bit by bit: sign i is bit i % 32 of word i // 32."""
    bits = np.unpackbits(np.asarray(words).astype("<u4").view(np.uint8), bitorder="little")
    return np.where(bits[:count] == 1, -1.0, 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (31,), (32,), (33,), (5, 7, 3), (0, 4), (1025, 1031)])
def test_unpacking_against_the_reference(shape, dtype):
    count = int(np.prod(shape))
    words = pack_rademacher(jax.random.key(3), count)
    assert words.shape == (-(-count // 32),)
    assert words.dtype == jnp.uint32
    signs = jax.jit(unpack_rademacher, static_argnums=(1, 2))(words, shape, dtype)
    assert signs.dtype == dtype
    np.testing.assert_array_equal(np.asarray(signs, np.float64), reference(words, count).reshape(shape))


def test_signs_of_several_arrays_are_those_of_one_draw():
    arrays = [jnp.zeros((3, 5)), jnp.zeros(40), jax.ShapeDtypeStruct((2,), jnp.float16)]
    signs = rademacher_like(jax.random.key(0), arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(signs, arrays)
    words = pack_rademacher(jax.random.key(0), 32 * 4)
    for own, first in zip(signs, (0, 1, 3), strict=True):  # each array begins with a new word
        np.testing.assert_array_equal(np.ravel(own), reference(words[first:], own.size))
    with jax.enable_x64(True):
        assert rademacher_like(jax.random.key(0), [jnp.zeros(3)])[0].dtype == jnp.float64


def test_mapped_signs_are_the_single_ones():
    keys = jax.random.split(jax.random.key(1), 3)
    arrays = [jnp.zeros((4, 9))]
    mapped = jax.vmap(lambda k: rademacher_like(k, arrays)[0])(keys)
    looped = jax.lax.map(lambda k: rademacher_like(k, arrays)[0], keys)
    single = jnp.stack([rademacher_like(k, arrays)[0] for k in keys])
    chex.assert_trees_all_equal(mapped, single)
    chex.assert_trees_all_equal(looped, single)
    assert len({np.asarray(s).tobytes() for s in single}) == 3


def test_signs_are_balanced_and_independent_of_their_neighbours():
    count = 2**20
    signs = np.asarray(rademacher_like(jax.random.key(7), [jnp.zeros(count)])[0], np.float64)
    bound = 4 / np.sqrt(count)  # four standard errors
    assert abs(signs.mean()) < bound
    for lag in (1, 7, 31, 32, 33, 64, 1024):
        assert abs((signs[lag:] * signs[:-lag]).mean()) < bound, lag
    # Each place within a word on its own.
    assert np.abs(signs.reshape(-1, 32).mean(0)).max() < 4.5 * np.sqrt(32 / count)


def test_too_few_words():
    with pytest.raises(ValueError, match="1 words hold 32 signs, fewer than 33"):
        unpack_rademacher(jnp.zeros(1, jnp.uint32), (33,))
