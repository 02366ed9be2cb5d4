"""Derivatives of kernels, norms and features with respect to parameters and examples, against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lensjax_kernels import head_cross_entropy

from lensjax import InputError
from lensjax.tangents import gradient_norms, kernel_dynamics, ntk, ntk_blocks, ntk_features, ntk_operator
from support import convolution_programs, programs

PROGRAMS = {
    **{name: (f, shapes, kind) for name, (f, shapes, kind, _) in programs.PROGRAMS.items()},
    **{name: (f, shapes, "vector") for name, (f, shapes, _) in convolution_programs.PROGRAMS.items()},
}
CHOSEN = ("dense_layer", "used_both_ways", "tied_embedding", "tied_fused_head", "untied_fused_head", "two_lookups",
          "recurrent_network", "frozen_layer_in_the_stack", "normalised_weight", "scalar_parameter",
          "policy_of_checkpoint", "inner_loop_on_a_scanned_layer", "looked_up_and_multiplied", "experts_by_lookup",
          "custom_backward_rule", "through_complex_numbers", "penalty_on_the_weights", "plain", "grouped",
          "applied_in_a_loop", "groups_of_batches")  # fmt: skip
FORWARDS = ("dense_layer", "tied_fused_head", "two_lookups", "frozen_layer_in_the_stack", "policy_of_checkpoint",
            "plain")  # fmt: skip


def inputs(name):
    """Return f, parameters and examples in float64."""
    f, shapes, kind = PROGRAMS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    params = {key: jnp.asarray(rng.normal(size=shape) * 0.6) for key, shape in shapes.items()}
    return f, params, jnp.asarray(rng.integers(0, 7, (3, 6)) if kind == "tokens" else rng.normal(size=(3, 5, 4)))


def dense(f, params, x, by_parameter=False):
    """Return the kernel (N, C, N, C), or that of each parameter, from Jacobians made by JAX alone."""
    jacobians = jax.vmap(jax.jacrev(f), in_axes=(None, 0))(params, x)
    kernels = jax.tree.map(lambda j: jnp.einsum("ic...,jk...->icjk", j, j), jacobians)
    return kernels if by_parameter else sum(jax.tree.leaves(kernels))


def closes(got, want):
    """Compare two trees, relative to the largest number in the second."""
    scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(want))
    assert scale > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale), got, want)


def losses(name):
    """Return two equal functions of the parameters, of our kernel and of the dense one, and the parameters."""
    f, params, x = inputs(name)
    weights = np.random.default_rng(0).normal(size=(3, 2, 3, 2))
    own = jax.jit(lambda p: jnp.sum(weights * ntk(f, p, x, method="transform")))
    return own, jax.jit(lambda p: jnp.sum(weights * dense(f, p, x))), params


@pytest.mark.parametrize("name", CHOSEN)
def test_gradient_of_the_kernel(name, quick_to_compile):
    with jax.enable_x64(True):
        own, reference, params = losses(name)
        closes(jax.grad(own)(params), jax.grad(reference)(params))


@pytest.mark.parametrize("name", FORWARDS)
def test_directional_derivative_of_the_kernel(name, quick_to_compile):
    with jax.enable_x64(True):
        own, reference, params = losses(name)
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
        closes(jax.jvp(own, (params,), (direction,)), jax.jvp(reference, (params,), (direction,)))


def every_way(p, x):
    """Two numbers from a tied fused head, a loop over a stack, lookups, a convolution, biases, a norm's scale."""
    ids = jnp.arange(5) * 2 % 9
    h = p["e"][ids] * x.mean() + x + p["b"]
    h = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h, jnp.stack([p["u"], 2 * p["v"]]))[0]
    h = jax.lax.conv_general_dilated(h[None], p["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))[0]
    h = h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 0.1) * p["s"]
    return jnp.stack([jax.jit(head_cross_entropy)(h, p["e"], ids[::-1]).sum(), jnp.sin(h).sum()])


def mixed():
    rng = np.random.default_rng(3)
    shapes = {"e": (9, 4), "b": (4,), "u": (4, 4), "v": (4, 4), "k": (3, 4, 4), "s": (4,)}
    params = {key: jnp.asarray(rng.normal(size=shape) * 0.7) for key, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(4, 5, 4)))


def summed(kernel):
    return jnp.sum(kernel * jnp.cos(jnp.arange(kernel.size)).reshape(kernel.shape))


COMPUTATIONS = {
    "transform": lambda p, x: ntk(every_way, p, x, method="transform"),
    "jacobian": lambda p, x: ntk(every_way, p, x, method="jacobian"),
    "ntvp": lambda p, x: ntk(every_way, p, x, method="ntvp"),
    "two sets": lambda p, x: ntk(every_way, p, x[:2], x[2:]),
    "trace": lambda p, x: ntk(every_way, p, x, outputs="trace"),
    "diagonal": lambda p, x: ntk(every_way, p, x, outputs="diagonal"),
    "memory": lambda p, x: ntk(every_way, p, x, memory=10**9),
    "some parameters": lambda p, x: ntk(every_way, p, x, parameters=("b", "k")),
    "by layer": lambda p, x: ntk(every_way, p, x, by_layer="parameter")["b"],
    "norms": lambda p, x: gradient_norms(every_way, p, x) ** 2,
    "operator": lambda p, x: ntk_operator(every_way, p, x, batch=3) @ jnp.ones((4, 2)),
}
WANTED = {
    "two sets": lambda k: sum(k.values())[:2, :, 2:],
    "trace": lambda k: jnp.einsum("icjc->ij", sum(k.values())),
    "diagonal": lambda k: jnp.einsum("icjc->ijc", sum(k.values())),
    "some parameters": lambda k: k["b"] + k["k"],
    "by layer": lambda k: k["b"],
    "norms": lambda k: jnp.einsum("icic->ic", sum(k.values())),
    "operator": lambda k: sum(k.values()).sum((2, 3)),
}


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_every_computation_with_respect_to_parameters_and_examples(computation, quick_to_compile):
    with jax.enable_x64(True):
        params, x = mixed()
        want = WANTED.get(computation, lambda k: sum(k.values()))
        own = jax.grad(lambda p, x: summed(COMPUTATIONS[computation](p, x)), (0, 1))(params, x)
        reference = jax.jit(jax.grad(lambda p, x: summed(want(dense(every_way, p, x, by_parameter=True))), (0, 1)))
        closes(own, reference(params, x))


def test_features(quick_to_compile):
    """They are linear in the gradients, by a projection that one gradient after the other shows."""
    with jax.enable_x64(True):
        params, x = mixed()

        def value(p):
            return summed(ntk_features(every_way, p, x, width=16, key=jax.random.key(0)))

        got = jax.grad(value)(params)
        value = jax.jit(value)
        for key in params:
            direction = {**jax.tree.map(jnp.zeros_like, params), key: jnp.cos(jnp.arange(params[key].size) * 1.0)}
            direction[key] = direction[key].reshape(params[key].shape)
            ahead, behind = (value(jax.tree.map(lambda a, d, h=h: a + h * d, params, direction)) for h in (1e-5, -1e-5))
            want = (ahead - behind) / 2e-5
            assert abs(float(jnp.vdot(got[key], direction[key]) - want)) < 1e-6 * (1 + abs(float(want)))
            assert abs(float(want)) > 1e-3


def test_what_cannot_be_differentiated_says_so():
    f, x = (lambda p, x: jnp.sum(jnp.tanh(x * p))), jnp.ones((4, 3))
    with pytest.raises(InputError, match=r"ntk_blocks collects its blocks in NumPy.*call ntk"):
        jax.grad(lambda p: ntk_blocks(f, p, x, block=2).sum())(jnp.ones(3))
    with pytest.raises(InputError, match="kernel_dynamics decomposes numbers"):
        jax.grad(lambda p: kernel_dynamics(ntk(f, p, x), jnp.ones(4)).loss(1.0))(jnp.ones(3))

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g * 2,))
    with pytest.raises(InputError, match=r"backward rule of its own .*differentiate the kernel by jax.grad"):
        jax.jvp(lambda p: ntk(lambda p, x: jnp.sum(rounded(x * p) ** 2), p, x), (jnp.ones(3),), (jnp.ones(3),))
