"""Programs with convolutions, as `programs.py` has others: f(params, example (5, 4)), shapes, and what is expected."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from support.programs import FACTORS, MATERIALIZED, SINGLE, total

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
PROGRAMS = {}

convolve = jax.lax.conv_general_dilated


def program(params, **expected):
    def add(f):
        PROGRAMS[f.__name__] = (f, params, expected)
        return f

    return add


def image(x):
    """Return (1, 5, 4, 2), with channels that differ."""
    return jnp.stack([x, jnp.sin(3 * x)], -1)[None]


@program({"w": (3, 2, 2, 3), "b": (3,)}, w=SINGLE, b=MATERIALIZED)
def plain(p, x):
    return total(jnp.tanh(convolve(image(x), p["w"], (1, 1), "SAME", dimension_numbers=NHWC) + p["b"]))


@program({"w": (3, 2, 2, 2), "v": (2, 3, 3, 2)}, w=SINGLE, v=SINGLE)
def strides_dilation_and_padding(p, x):
    x = jnp.moveaxis(image(x), 3, 1)
    x = convolve(x, p["w"], (2, 1), [(2, 1), (0, 3)], lhs_dilation=(1, 2), rhs_dilation=(2, 1), dimension_numbers=NCHW)
    out = convolve(jnp.tanh(x), p["v"], (1, 2), [(-1, 2), (1, -2)], dimension_numbers=("NCHW", "OIWH", "HCNW"))
    return total(out)


@program({"w": (2, 2, 1, 6), "v": (2, 1, 2, 4)}, w=SINGLE, v=SINGLE)
def grouped(p, x):
    x = convolve(image(x), p["w"], (1, 1), "VALID", dimension_numbers=NHWC, feature_group_count=2)
    x = jnp.tanh(x[..., :4])
    return total(convolve(x, p["v"], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2))


@program({"w": (3, 3, 2, 2)}, w=FACTORS)
def applied_twice(p, x):
    layer = partial(convolve, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC)
    return total(layer(jnp.tanh(layer(image(x), p["w"])), p["w"]))


@program({"w": (3, 3, 2, 2)}, w=FACTORS)
def applied_in_a_loop(p, x):
    layer = partial(convolve, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC)
    return total(jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(layer(h, p["w"])), image(x)))


@program({"w": (3, 3, 3, 2, 2)}, w=SINGLE)
def layers_in_a_loop(p, x):
    layer = partial(convolve, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC)
    return total(jax.lax.scan(lambda h, w: (jnp.tanh(layer(h, w)), None), image(x), p["w"])[0])


@program({"w": (2, 3, 3, 2)}, w=SINGLE)
def axes_in_another_order_and_several_images(p, x):
    x = jnp.concatenate([image(x), jnp.cos(image(x))])
    return total(convolve(x, jnp.transpose(p["w"], (1, 2, 0, 3)), (1, 1), "SAME", dimension_numbers=NHWC))


@program({"w": (1, 4, 4)}, w=FACTORS)
def a_product_and_a_convolution_of_length_one(p, x):
    y = convolve(x[None], p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))[0]
    return total(jax.lax.dot_general(jnp.tanh(y)[:, None], p["w"], (((1, 2), (0, 1)), ((), ()))))


@program({"w": (40, 4, 2)}, w=SINGLE)
def a_long_kernel(p, x):
    return total(convolve(x[None], p["w"], (1,), [(37, 20)], dimension_numbers=("NHC", "HIO", "NHC")))


@program({"w": (3, 2, 2, 4)}, w=MATERIALIZED)
def groups_of_batches(p, x):
    x = jnp.concatenate([image(x), jnp.cos(image(x))])
    return total(convolve(x, p["w"], (1, 1), "SAME", dimension_numbers=NHWC, batch_group_count=2))


@program({"w": (2, 5, 4)}, w=MATERIALIZED)
def the_parameter_is_convolved(p, x):
    return total(convolve(p["w"][..., None], x[:3, :2, None, None], (1, 1), "SAME", dimension_numbers=NHWC))
