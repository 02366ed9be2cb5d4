"""Rademacher variables (random signs) of one bit each: drawn and stored in words, and converted to floats in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

BITS = 32
"""Signs in a word."""


def words_for(count: int) -> int:
    """Return how many words hold `count` signs."""
    return -(-count // BITS)


def pack_rademacher(key: jax.Array, count: int) -> jax.Array:
    """Draw `count` independent signs, each +1 or -1 with probability 1/2.

    Parameters
    ----------
    key : PRNG key
    count : int
        At least 0.

    Returns
    -------
    uint32 array (ceil(count / 32),)
        Sign i is bit i % 32 of word i // 32; a set bit means -1. The bits after the last sign are random too.
    """
    # Without the barrier XLA fuses the drawing into the unpacking, and draws each word again for its 32 signs.
    return jax.lax.optimization_barrier(jax.random.bits(key, (words_for(count),), jnp.uint32))


def unpack_rademacher(words: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Return the first signs of `words` as numbers.

    Parameters
    ----------
    words : uint32 array (W,)
        From `pack_rademacher`.
    shape : sequence of int
        Of the result; at most 32 W elements, in row-major order.
    dtype : dtype
        Floating-point.

    Returns
    -------
    array of `shape` and `dtype`, each +1 or -1.

    Raises
    ------
    ValueError
        If there are too few words.
    """
    count = math.prod(shape)
    if words_for(count) > words.shape[0]:
        raise ValueError(f"{words.shape[0]} words hold {BITS * words.shape[0]} signs, fewer than {count}.")
    words = words[: words_for(count)]
    shifted = words[:, None] << (BITS - 1 - jnp.arange(BITS, dtype=jnp.uint32))
    if jnp.dtype(dtype) == jnp.float32:
        # The bit becomes the sign bit of 1.0: two integer operations and no comparison.
        one = jnp.uint32(0x3F800000)
        signs = jax.lax.bitcast_convert_type((shifted & jnp.uint32(0x80000000)) | one, jnp.float32)
    else:
        signs = jnp.where(shifted >> (BITS - 1) == 1, jnp.array(-1, dtype), jnp.array(1, dtype))
    return signs.reshape(-1)[:count].reshape(shape)


def rademacher_like(key: jax.Array, arrays: Sequence[Any]) -> list[jax.Array]:
    """Draw one sign for each element of several arrays.

    Parameters
    ----------
    key : PRNG key
    arrays : sequence of arrays, or of anything with a shape and a floating-point dtype

    Returns
    -------
    list of arrays of +1 and -1, like `arrays`.

    Notes
    -----
    One draw of packed bits for all of them. On CPU this takes about a seventh of the time of
    `jax.random.rademacher`, which draws 32 random bits for each sign.
    """
    counts = [words_for(math.prod(a.shape)) for a in arrays]
    words = pack_rademacher(key, BITS * sum(counts))
    signs, start = [], 0
    for array, count in zip(arrays, counts, strict=True):
        own = jax.lax.slice(words, (start,), (start + count,))
        signs.append(unpack_rademacher(own, array.shape, array.dtype))
        start += count
    return signs
