"""The token-Gram contraction as one fused device kernel: no block of token pairs ever reaches the device's memory.

Written for the Triton backend of Pallas on purpose: it multiplies in full float32, runs on GPUs from Ampere on, and
lowers without a GPU, as the tests show. That backend is deprecated from JAX 0.11 on, and goes with our move
there: Mosaic GPU, its successor, is made for Hopper and later and has no matrix product in full float32. On a GPU it
has not been run yet; nothing calls it unless it is asked for by name.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lensjax_kernels.gram import EXACT, accumulation_dtype, pad_axis

TOKENS = 32
"""Tokens of a tile: two tiles of token pairs stay in registers."""

WIDTH = 32
"""Columns of the factors that are multiplied at once."""


def token_gram_fused(
    left1: jax.Array, right1: jax.Array, left2: jax.Array, right2: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Return `token_gram` of the arguments, by one device kernel with a program for each entry.

    A program loops over tiles of token pairs; for each it sums the products of the left and of the right factors in
    registers, multiplies the two and adds.

    Parameters
    ----------
    left1, left2 : float arrays (N, T, d), (M, S, d)
    right1, right2 : float arrays (N, C, T, e), (M, C', S, e)
    interpret : bool
        Run it as plain JAX, on any device.

    Returns
    -------
    float array (N, C, M, C'), at least float32.
    """
    dtype = accumulation_dtype(left1, right1, left2, right2)
    (examples1, outputs1), (examples2, outputs2) = right1.shape[:2], right2.shape[:2]
    lefts = [_padded(x) for x in (left1, left2)]
    rights = [_padded(x.reshape(-1, *x.shape[2:])) for x in (right1, right2)]
    kernel = pl.pallas_call(
        functools.partial(_entry, dtype=dtype),
        grid=(examples1 * outputs1, examples2 * outputs2),
        in_specs=[
            pl.BlockSpec((1, *lefts[0].shape[1:]), lambda i, j: (i // outputs1, 0, 0)),
            pl.BlockSpec((1, *rights[0].shape[1:]), lambda i, j: (i, 0, 0)),
            pl.BlockSpec((1, *lefts[1].shape[1:]), lambda i, j: (j // outputs2, 0, 0)),
            pl.BlockSpec((1, *rights[1].shape[1:]), lambda i, j: (j, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, 1), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((examples1 * outputs1, examples2 * outputs2), dtype),
        interpret=interpret,
        # The type of the parameters selects the backend.
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )
    found = kernel(lefts[0], rights[0], lefts[1], rights[1])
    return found.reshape(examples1, outputs1, examples2, outputs2)


def _padded(x: jax.Array) -> jax.Array:
    """Pad tokens and width with zeros to whole tiles."""
    return pad_axis(pad_axis(x, 1, -x.shape[1] % TOKENS), 2, -x.shape[2] % WIDTH)


def _entry(left1: Any, right1: Any, left2: Any, right2: Any, out: Any, *, dtype: Any) -> None:
    """Compute one entry of the kernel: the program of one pair of examples and outputs."""
    tiles1, tiles2 = left1.shape[1] // TOKENS, left2.shape[1] // TOKENS

    def products(x1: Any, x2: Any, at1: Any, at2: Any) -> jax.Array:
        def add(chunk: Any, total: jax.Array) -> jax.Array:
            columns = pl.ds(chunk * WIDTH, WIDTH)
            one = x1[0, pl.ds(at1 * TOKENS, TOKENS), columns]
            other = x2[0, pl.ds(at2 * TOKENS, TOKENS), columns]
            return total + jnp.dot(one, other.T, precision=EXACT, preferred_element_type=dtype)

        return jax.lax.fori_loop(0, x1.shape[2] // WIDTH, add, jnp.zeros((TOKENS, TOKENS), dtype))

    def row(at1: Any, total: jax.Array) -> jax.Array:
        def pair(at2: Any, total: jax.Array) -> jax.Array:
            return total + jnp.sum(products(left1, left2, at1, at2) * products(right1, right2, at1, at2))

        return jax.lax.fori_loop(0, tiles2, pair, total)

    out[0, 0] = jax.lax.fori_loop(0, tiles1, row, jnp.zeros((), dtype))
