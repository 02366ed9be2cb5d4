"""The factors of a convolution's per-example gradient: patches of the input, and cotangents.

A convolution is a product of the kernel with patches of its input, one for each position of the output. With these
patches the kernel's gradient is that of the weight of any product. XLA's own methods, a convolution with a kernel for
each example or one grouped by examples, take 10 to 100 times as long on CPU.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_SLICES = 32
"""For kernels up to this length patches are stacked from slices, for longer ones they are looked up."""


def kernel_axes(params: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Return the kernel axes that a product contracts, input channels and positions, and that of output channels."""
    out, into, *places = params["dimension_numbers"].rhs_spec
    return (into, *places), out


def tokens(params: dict[str, Any], out: tuple[int, ...]) -> int:
    """Return the number of positions of one example's output."""
    return math.prod(out) // out[params["dimension_numbers"].out_spec[1]]


def patches(params: dict[str, Any], x: jax.Array, kernel: tuple[int, ...], out: tuple[int, ...]) -> jax.Array:
    """Return the patches (B, G, T, channels / G, *kernel positions) of inputs (B, ...).

    Parameters
    ----------
    params : of the equation, without groups of batches
    x : float array (B, *input of one example)
    kernel, out : shapes of the kernel and of one example's output
    """
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x = jnp.transpose(x, (0, *(1 + axis for axis in numbers.lhs_spec)))
    padding = [(low, high, dilation - 1) for (low, high), dilation in zip(
        params["padding"], params["lhs_dilation"], strict=True)]  # fmt: skip
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 3 + padding)
    for i, axis in enumerate(numbers.rhs_spec[2:]):
        length, places, at = kernel[axis], out[numbers.out_spec[2 + i]], 3 + 2 * i
        stride, dilation = params["window_strides"][i], params["rhs_dilation"][i]
        if length > MOST_SLICES:
            x = jnp.take(x, np.arange(places)[:, None] * stride + np.arange(length) * dilation, axis=at, mode="clip")
            continue
        starts = [k * dilation for k in range(length)]
        pieces = [jax.lax.slice_in_dim(x, s, s + (places - 1) * stride + 1, stride, axis=at) for s in starts]
        x = jnp.stack(pieces, at + 1)
    # (B, n, channels, places, of the kernel, places, of the kernel, ...)
    spatial = range(3, x.ndim, 2)
    x = jnp.transpose(x, (0, 2, 1, *spatial, *(axis + 1 for axis in spatial)))
    sizes = x.shape[3 + len(spatial) :]
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1, *sizes)
    return jnp.swapaxes(x, 2, 3)


def flatten_positions(params: dict[str, Any], ct: jax.Array) -> jax.Array:
    """Return cotangents (B, G, T, channels / G) of outputs (B, ...), positions in the order of `patches`."""
    batch, channel, *places = params["dimension_numbers"].out_spec
    groups = params["feature_group_count"]
    ct = jnp.transpose(ct, (0, 1 + channel, 1 + batch, *(1 + axis for axis in places)))
    ct = ct.reshape(ct.shape[0], groups, ct.shape[1] // groups, -1)
    return jnp.swapaxes(ct, 2, 3)
