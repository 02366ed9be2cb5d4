"""Small programs, each with something in it that an NTK by program transformation can get wrong.

Each entry: name -> (f(params, example), shapes of the parameters, kind of example, how each parameter is expected to be
treated). Kinds of examples: "vector" (T=5, d=4) floats, "tokens" (T=6) ints below 7.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from lensjax_kernels import head_cross_entropy

SINGLE, FACTORS, MATERIALIZED, UNUSED = "contribution", "factors", "materialized", "unused"
PROGRAMS = {}


def program(params, example="vector", **expected):
    def add(f):
        PROGRAMS[f.__name__] = (f, params, example, expected)
        return f

    return add


def total(x):
    """Return two numbers that depend on all entries."""
    weights = jnp.arange(1, x.size + 1).reshape(x.shape) / x.size
    return jnp.stack([jnp.sum(jnp.sin(x) * weights), jnp.sum(jnp.tanh(x) * weights[::-1])])


@program({"w": (4, 3), "b": (3,), "s": (4,)}, w=SINGLE, b=MATERIALIZED, s=MATERIALIZED)
def dense_layer(p, x):
    return total(jnp.tanh((x * p["s"]) @ p["w"] + p["b"]))


@program({"w": (3, 4)}, w=SINGLE)
def transposed(p, x):
    return total(x @ p["w"].T)


@program({"w": (3, 4)}, w=SINGLE)
def left_operand(p, x):
    return total(jnp.tanh(p["w"] @ x.T))


@program({"w": (4, 2, 3), "o": (2, 3, 5)}, w=SINGLE, o=SINGLE)
def heads_of_attention(p, x):
    h = jnp.einsum("td,dhk->thk", x, p["w"])
    scores = jax.nn.softmax(jnp.einsum("thk,shk->hts", h, h))
    return total(jnp.einsum("hts,shk,hko->to", scores, h, p["o"]))


@program({"w": (2, 2, 3)}, w=SINGLE)
def block_diagonal(p, x):
    return total(jnp.einsum("thk,hko->tho", x.reshape(5, 2, 2), p["w"]))


@program({"w": (4, 4)}, w=FACTORS)
def shared_layer(p, x):
    for _ in range(3):
        x = jnp.tanh(x @ p["w"])
    return total(x)


@program({"w": (4, 4)}, w=FACTORS)
def used_both_ways(p, x):
    return total(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T))


@program({"e": (7, 4), "w": (4, 4)}, "tokens", e=FACTORS, w=SINGLE)
def tied_embedding(p, ids):
    return total(jax.nn.log_softmax(jnp.tanh(p["e"][ids] @ p["w"]) @ p["e"].T))


@program({"e": (400, 4), "w": (4, 4)}, "tokens", e=FACTORS, w=SINGLE)
def tied_embedding_with_a_tall_table(p, ids):
    return total(jax.nn.log_softmax(jnp.tanh(p["e"][ids] @ p["w"]) @ p["e"].T)[:, :9])


@program({"e": (4000, 4), "w": (4, 4)}, "tokens", e=FACTORS, w=SINGLE)
def tied_fused_head_with_a_tall_table(p, ids):
    hidden = jnp.tanh(p["e"][ids] @ p["w"] + p["e"][ids[::-1]])[:-1]
    labels = jnp.where(ids[1:] == 3, -100, ids[1:])
    return total(jax.jit(head_cross_entropy)(hidden, p["e"], labels))


@program({"e": (7, 4), "p": (9, 4)}, "tokens", e=FACTORS, p=SINGLE)
def two_lookups(p, ids):
    positions = p["p"][jnp.arange(6)]
    return total(jnp.tanh(p["e"][ids] + positions) * p["e"][ids[::-1]])


@program({"e": (7, 4)}, "tokens", e=SINGLE)
def lookup_outside_the_table(p, ids):
    # Rows 7 and 8 do not exist: filled with a constant, so nothing flows back from there.
    return total(jnp.take(p["e"], ids * 2 - 3, axis=0, mode="fill", fill_value=0.0))


@program({"e": (7, 4)}, "tokens", e=FACTORS)
def lookup_filled_with_a_number(p, ids):
    found = jnp.take(p["e"], ids * 2 - 3, axis=0, mode="fill", fill_value=1.5)
    masked = jnp.where((ids < 3)[:, None], jnp.take(p["e"], ids * 3, axis=0), 0.0)  # not a number where it is masked
    return total(found**2 + masked[::-1] ** 2)


@program({"e": (7, 4)}, "tokens", e=SINGLE)
def clipped_lookup(p, ids):
    return total(jnp.take(p["e"], ids * 3 - 4, axis=0, mode="clip"))


@program({"e": (7, 4), "w": (4, 4)}, "tokens", e=FACTORS, w=SINGLE)
def tied_fused_head(p, ids):
    hidden = jnp.tanh(p["e"][ids] @ p["w"])[:-1]
    labels = jnp.where(ids[1:] == 3, -100, ids[1:])
    return total(jax.jit(head_cross_entropy)(hidden, p["e"], labels))


@program({"e": (7, 4)}, "tokens", e=FACTORS)
def head_in_chunks(p, ids):
    return total(head_cross_entropy(jnp.tanh(p["e"][ids]), p["e"], ids[::-1], chunk=4))


@program({"h": (7, 4)}, h=FACTORS)
def fused_head_in_a_scan(p, x):
    def step(total, row):
        ids = jnp.argmax(jnp.abs(row), keepdims=True)
        return total + jax.jit(head_cross_entropy)(jnp.tanh(row[None]), p["h"], ids).sum(), None

    return total(jax.lax.scan(step, 0.0, x)[0][None])


@program({"h": (7, 4), "w": (4, 4)}, h=MATERIALIZED, w=SINGLE)
def head_of_normalised_rows(p, x):
    rows = p["h"] / jnp.linalg.norm(p["h"], axis=1, keepdims=True)
    return total(jax.jit(head_cross_entropy)(x @ p["w"], rows, jnp.arange(5)))


@program({"e": (7, 4), "h": (7, 4)}, "tokens", e=SINGLE, h=SINGLE)
def untied_fused_head(p, ids):
    return total(jax.jit(head_cross_entropy)(jnp.tanh(p["e"][ids]), p["h"], ids))


@program({"e": (7, 4), "h": (7, 4), "b": (7,)}, "tokens", e=SINGLE, h=SINGLE, b=MATERIALIZED)
def head_with_bias(p, ids):
    return total(jax.jit(head_cross_entropy)(jnp.tanh(p["e"][ids]), p["h"], ids, bias=p["b"]))


def head_cross_entropy_of_another(hidden, weight, labels):
    return jnp.sum(jnp.square(hidden @ weight.T), axis=1) * labels


head_cross_entropy_of_another.__name__ = "head_cross_entropy"


@program({"e": (7, 4), "h": (7, 4)}, "tokens", e=SINGLE, h=SINGLE)
def a_head_of_the_same_name(p, ids):
    return total(jax.jit(head_cross_entropy_of_another)(jnp.tanh(p["e"][ids]), p["h"], ids))


@program({"w": (3, 4, 4), "b": (3, 4)}, w=SINGLE, b=MATERIALIZED)
def scanned_stack(p, x):
    def layer(c, own):
        return jnp.tanh(c @ own["w"] + own["b"]), None

    return total(jax.lax.scan(layer, x, p)[0])


@program({"a": (4, 4), "b": (4, 4), "c": (4, 4)}, a=SINGLE, b=SINGLE, c=SINGLE)
def stacked_then_scanned(p, x):
    stacked = jnp.stack([p["a"], p["b"] * 2.0, p["c"]])
    return total(jax.lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w.T), None)), x, stacked)[0])


@program({"a": (4, 4), "b": (4, 4)}, a=SINGLE, b=SINGLE)
def frozen_layer_in_the_stack(p, x):
    stacked = jnp.concatenate([p["a"][None], jnp.full((1, 4, 4), 0.3), p["b"][None]])
    return total(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, stacked)[0])


@program({"w": (2, 4, 4)}, w=FACTORS)
def shared_within_a_scanned_layer(p, x):
    def layer(c, w):
        return jnp.tanh(jnp.tanh(c @ w) @ w.T), None

    return total(jax.lax.scan(layer, x, p["w"])[0])


@program({"a": (4, 4), "b": (4, 4)}, a=FACTORS, b=FACTORS)
def stacked_and_shared_within(p, x):
    def layer(c, w):
        return jnp.tanh(jnp.tanh(c @ w) @ w), None

    return total(jax.lax.scan(layer, x, jnp.stack([p["a"], p["b"]]))[0])


@program({"w": (4, 4), "r": (4, 4), "b": (4,)}, w=FACTORS, r=FACTORS, b=MATERIALIZED)
def recurrent_network(p, x):
    def step(h, xt):
        h = jnp.tanh(xt @ p["w"] + h @ p["r"] + p["b"])
        return h, h

    return total(jax.lax.scan(step, jnp.zeros(4), x)[1])


@program({"w": (2, 4, 4), "s": (4, 4)}, w=SINGLE, s=FACTORS)
def scan_in_a_scan(p, x):
    def outer(c, w):
        inner = jax.lax.scan(lambda d, _: (jnp.sin(d @ p["s"]), None), jnp.tanh(c @ w), None, length=2)[0]
        return inner, inner.sum()

    c, sums = jax.lax.scan(outer, x, p["w"])
    return total(c) + sums @ jnp.arange(2.0)


@program({"h": (4,), "w": (4, 4)}, h=MATERIALIZED, w=FACTORS)
def parameter_as_first_carry(p, x):
    return total(jax.lax.scan(lambda h, xt: (jnp.tanh(h @ p["w"] + xt), None), p["h"], x)[0])


@program({"w": (4, 4)}, w=MATERIALIZED)
def loop_on_parameters_alone(p, x):
    power = jax.lax.fori_loop(0, 3, lambda i, m: m @ p["w"] / 2, p["w"])
    return total(x @ power)


@program({"w": (4, 4)}, w=FACTORS)
def counted_loop(p, x):
    return total(jax.lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ p["w"] + i), x))


@program({"w": (4, 4), "v": (4, 4)}, w=MATERIALIZED, v=MATERIALIZED)
def branches(p, x):
    return total(jax.lax.cond(x.sum() > 0, lambda h: jnp.tanh(h @ p["w"]), lambda h: h @ p["v"] * h, x))


@program({"w": (4, 4)}, w=SINGLE)
def loop_without_a_gradient(p, x):
    steps = jax.lax.while_loop(lambda n: n < x[0, 0] * 5, lambda n: n + 1.0, 0.0)
    return total(x @ p["w"]) * jax.lax.stop_gradient(steps)


@program({"w": (4, 4)}, w=SINGLE)
def stopped_use(p, x):
    return total(x @ p["w"] + jax.lax.stop_gradient(jnp.tanh(x @ p["w"]) * p["w"].sum()))


@jax.custom_vjp
def straight_through(x, w):
    return jnp.round(x @ w)


straight_through.defvjp(lambda x, w: (straight_through(x, w), (x, w)), lambda r, g: (g @ r[1].T * 3, r[0].T @ g * 2))


@program({"w": (4, 4)}, w=MATERIALIZED)
def custom_backward_rule(p, x):
    return total(straight_through(x, p["w"]) + x)


@jax.custom_jvp
def twice_as_steep(x):
    return jnp.sin(x)


twice_as_steep.defjvp(lambda x, t: (twice_as_steep(*x), 2 * jnp.cos(x[0]) * t[0]))


@program({"w": (4, 4), "v": (4, 4)}, w=SINGLE, v=MATERIALIZED)
def custom_forward_rule(p, x):
    return total(twice_as_steep(x @ p["w"]) @ twice_as_steep(p["v"]))


@program({"w": (4, 4), "a": (4, 2), "b": (2, 4)}, w=MATERIALIZED, a=MATERIALIZED, b=MATERIALIZED)
def low_rank_product(p, x):
    return total(jnp.tanh(x @ (p["w"] + 0.5 * p["a"] @ p["b"])))


@program({"w": (4, 4), "a": (4, 2), "b": (2, 4)}, w=SINGLE, a=SINGLE, b=SINGLE)
def low_rank_path(p, x):
    return total(jnp.tanh(x @ p["w"] + x @ p["a"] @ p["b"] * 0.5))


@program({"v": (4, 4), "w": (4, 4)}, v=SINGLE, w=SINGLE)
def sum_of_two(p, x):
    return total(x @ (p["v"] - 3.0 * p["w"]))


@program({"v": (4, 4)}, v=MATERIALIZED)
def sum_with_itself(p, x):
    return total(x @ (p["v"] + p["v"].T))


@program({"q": (4, 3), "k": (4, 3)}, q=SINGLE, k=SINGLE)
def fused_projections(p, x):
    q, k = jnp.split(x @ jnp.concatenate([p["q"], p["k"]], axis=1), 2, axis=1)
    return total(jax.nn.softmax(q @ k.T))


@program({"w": (4, 6), "p": (9, 4)}, w=SINGLE, p=MATERIALIZED)
def disjoint_slices(p, x):
    a, b = jnp.split(p["w"], 2, axis=1)
    return total(jnp.tanh(x @ a) * ((x + p["p"][2:7]) @ b))


@program({"w": (4, 6)}, w=MATERIALIZED)
def overlapping_slices(p, x):
    return total(jnp.tanh(x @ p["w"][:, :4]) * (x @ p["w"][:, 2:]))


@program({"w": (3, 4, 4)}, w=SINGLE)
def unrolled_stack(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return total(x)


@program({"w": (4, 4), "n": (4,)}, w=MATERIALIZED, n=MATERIALIZED)
def normalised_weight(p, x):
    return total(x @ (p["n"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)))


@program({"w": (4, 4)}, w=SINGLE)
def cast_and_scaled(p, x):
    w = (p["w"].astype(x.dtype) / 2.0 * -3.0 + 1.0).T
    return total(x @ w[::-1].reshape(2, 2, 4).reshape(4, 4))


@program({"table": (5, 2), "w": (4, 2, 4)}, table=SINGLE, w=SINGLE)
def relative_position_bias(p, x):
    h = jnp.einsum("td,dhk->htk", x, p["w"])
    distance = jnp.clip(jnp.arange(5)[:, None] - jnp.arange(5), -2, 2) + 2
    scores = jnp.einsum("htk,hsk->hts", h, h) + p["table"][distance].transpose(2, 0, 1)
    return total(jnp.einsum("hts,sd->htd", jax.nn.softmax(scores), x))


@program({"table": (5, 2)}, table=FACTORS)
def bias_shared_by_layers(p, x):
    distance = jnp.clip(jnp.arange(5)[:, None] - jnp.arange(5), -2, 2) + 2
    for _ in range(2):
        x = jnp.einsum("hts,sd->td", jax.nn.softmax(x @ x.T + p["table"][distance].transpose(2, 0, 1)), x)
    return total(x)


@program({"r": (4, 3), "w": (3, 4, 4)}, r=SINGLE, w=SINGLE)
def experts_by_one_hot(p, x):
    gates = jax.nn.softmax(x @ p["r"])
    best = jax.nn.one_hot(jnp.argmax(gates, -1), 3)
    into = jnp.einsum("te,td->etd", best, x)
    out = jnp.einsum("etd,edf->etf", into, p["w"])
    return total(jnp.einsum("etf,te->tf", jnp.tanh(out), best * gates))


@program({"r": (4, 3), "w": (3, 4, 4)}, r=SINGLE, w=SINGLE)
def experts_by_lookup(p, x):
    gates = jax.nn.softmax(x @ p["r"])
    best = jnp.argmax(gates, -1)
    out = jnp.einsum("td,tdf->tf", x, p["w"][best])
    return total(out * gates.max(-1, keepdims=True))


@program({"w": (3, 4, 2)}, w=SINGLE)
def convolution(p, x):
    out = jax.lax.conv_general_dilated(x[None], p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return total(jnp.tanh(out))


@program({"w": (4, 4), "idle": (3, 3)}, w=SINGLE, idle=UNUSED)
def parameter_without_effect(p, x):
    jnp.tanh(p["idle"])
    return total(x @ p["w"])


@program({"w": (4, 4), "t": ()}, w=SINGLE, t=MATERIALIZED)
def scalar_parameter(p, x):
    return total(x @ p["w"]) * p["t"]


@program({"w": (4, 4)}, w=MATERIALIZED)
def penalty_on_the_weights(p, x):
    return total(x @ p["w"]) + jnp.sum(p["w"] ** 2)


@program({"w": (4, 3)}, w=SINGLE)
def one_token(p, x):
    return total(jnp.tanh(x[0] @ p["w"]))


@program({"w": (4, 4)}, w=FACTORS)
def nested_calls(p, x):
    layer = jax.jit(lambda w, h: jnp.tanh(h @ w))
    return total(jax.checkpoint(lambda w, h: layer(w, layer(w, h)))(p["w"], x))


@program({"w": (4, 4)}, w=SINGLE)
def mapped_inside(p, x):
    return total(jax.vmap(lambda row: jnp.tanh(row @ p["w"]))(x))


@program({"w": (4, 4)}, w=FACTORS)
def looked_up_and_multiplied(p, x):
    ids = (x[:, 0] > 0).astype(jnp.int32) + 2 * (x[:, 1] > 0)
    return total(jnp.tanh(p["w"][ids] + x @ p["w"]) @ p["w"].T)


@program({"v": (4, 4), "w": (4, 4)}, v=SINGLE, w=MATERIALIZED)
def parameter_times_parameter(p, x):
    return total(x @ p["v"] @ jnp.exp(p["w"]))


@program({"w": (4, 4)}, w=SINGLE)
def policy_of_checkpoint(p, x):
    layer = partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)(lambda w, h: jnp.tanh(h @ w))
    return total(layer(p["w"], x))


@program({"w": (4, 4)}, w=MATERIALIZED)
def used_with_both_signs(p, x):
    return total(jnp.tanh(x @ p["w"]) @ -p["w"])


@program({"w": (4, 4), "f": (4,)}, w=MATERIALIZED, f=MATERIALIZED)
def through_complex_numbers(p, x):
    turned = (x + 1j * x[:, ::-1]) @ p["w"].astype(complex)
    return total(jnp.abs(turned) + jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["f"]), 4))


@program({"w": (4, 4)}, w=SINGLE)
def taken_apart_and_joined(p, x):
    return total(x @ jnp.concatenate([p["w"][2:], p["w"][:2]]))


@program({"w": (2, 4, 4)}, w=SINGLE)
def scanned_backwards(p, x):
    return total(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, p["w"], reverse=True)[0])


@program({"e": (7, 4)}, "tokens", e=SINGLE)
def one_row_at_a_time(p, ids):
    return total(jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(p["e"], i * 2 - 2))(ids))


@program({"w": (2, 4, 4)}, w=FACTORS)
def inner_loop_on_a_scanned_layer(p, x):
    def outer(c, w):
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ w + i), c), None

    return total(jax.lax.scan(outer, x, p["w"])[0])


@program({"e": (400, 4)}, "tokens", e=SINGLE)
def lookup_outside_a_tall_table(p, ids):
    return total(jnp.take(p["e"], ids * 100 - 150, axis=0, mode="fill", fill_value=0.0))


@program({"w": (2, 2, 4)}, w=FACTORS)
def shared_with_axes_in_another_order(p, x):
    x = jax.lax.dot_general(x.reshape(5, 2, 2), p["w"], (((2, 1), (1, 0)), ((), ())))
    return total(jnp.einsum("thk,hko->to", jnp.tanh(x).reshape(5, 2, 2), p["w"]))


@program({"a": (4, 4), "b": (4, 4), "u": (4, 4), "w": (2, 4, 4)}, a=SINGLE, b=SINGLE, u=SINGLE, w=SINGLE)
def stack_beside_stacked(p, x):
    """Which parameter it is differs by iteration for one of the two that are added, not for the other."""
    both = (jnp.stack([p["a"], 2 * p["b"]]), p["w"])
    return total(jax.lax.scan(lambda c, w: (jnp.tanh(c @ (w[0] + w[1])), None), jnp.tanh(x @ p["u"]), both)[0])


@program({"a": (4, 4), "b": (4, 4), "c": (4, 4), "d": (4, 4)}, a=SINGLE, b=SINGLE, c=SINGLE, d=SINGLE)
def two_stacks_added(p, x):
    both = (jnp.stack([p["a"], p["b"]]), jnp.stack([p["c"], 3 * p["d"]]))
    return total(jax.lax.scan(lambda c, w: (jnp.tanh(c @ (w[0] + w[1])), None), x, both)[0])


@program({"w": (4, 4), "s": (2, 4, 4)}, w=MATERIALIZED, s=SINGLE)
def rounded_on_the_side(p, x):
    """What is cast to integers or truth values moves in steps, which have no derivative."""
    rounded = (p["w"] * 3).astype(jnp.int32).astype(x.dtype) / 3
    kept = p["w"] * (p["w"] > 0.2).astype(bool).astype(x.dtype)
    return total(x @ p["w"] + x @ rounded + x @ kept + jnp.tanh(x @ p["s"][0]))


@program({"w": (4, 4)}, w=FACTORS)
def region_told_apart_by_input(p, x):
    layer = jax.checkpoint(lambda w, h: jnp.tanh(h @ w), prevent_cse=(True, False))
    return total(layer(p["w"], layer(p["w"], x)))
