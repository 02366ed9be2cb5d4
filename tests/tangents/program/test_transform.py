"""The kernel of every program in the table, against dense Jacobians in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.tangents import explain, gradient_norms, ntk, ntk_features
from support import programs

WITH_SUBSETS = ("dense_layer", "tied_embedding", "frozen_layer_in_the_stack", "recurrent_network",
                "stacked_then_scanned", "low_rank_product", "sum_of_two", "fused_projections",
                "disjoint_slices", "stack_beside_stacked", "two_stacks_added")  # fmt: skip
WITH_NORMS = ("dense_layer", "used_both_ways", "tied_embedding", "tied_fused_head", "untied_fused_head", "two_lookups",
              "stacked_and_shared_within", "recurrent_network", "frozen_layer_in_the_stack",
              "relative_position_bias", "experts_by_one_hot", "stack_beside_stacked", "two_stacks_added")  # fmt: skip


def first(f):
    """Return the function of the first output alone."""
    return lambda p, example: f(p, example)[0]


@functools.cache
def reference(name):
    """Return f, parameters and examples in float64, and the dense Jacobians (N, 2, P) of each parameter."""
    f, shapes, kind, _ = programs.PROGRAMS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    with jax.enable_x64(True):
        params = {key: jnp.asarray(rng.normal(size=shape) * 0.6) for key, shape in shapes.items()}
        x = jnp.asarray(rng.integers(0, 7, (5, 6)) if kind == "tokens" else rng.normal(size=(5, 5, 4)))
        jacobians = jax.jit(jax.vmap(jax.jacrev(f), in_axes=(None, 0)))(params, x)
        return f, params, x, {key: np.asarray(j).reshape(5, 2, -1) for key, j in jacobians.items()}


def gram(jacobian):
    return np.einsum("ip,jp->ij", jacobian[:, 0], jacobian[:, 0])


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_each_parameters_kernel_is_that_of_dense_jacobians(name):
    with jax.enable_x64(True):
        f, params, x, jacobians = reference(name)
        kernels = ntk(first(f), params, x, method="transform", by_layer="parameter")
        report = explain(first(f), params, x, method="transform")
        whole = np.abs(sum(gram(j) for j in jacobians.values())).max()
        assert set(kernels) == set(params)
        for key, jacobian in jacobians.items():
            np.testing.assert_allclose(kernels[key], gram(jacobian), rtol=0, atol=1e-12 * whole)
        assert {p: t.how for t in report.treatments for p in t.parameters} == programs.PROGRAMS[name][3]


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_kernel_of_several_outputs_between_two_sets_of_examples(name):
    with jax.enable_x64(True):
        f, params, x, jacobians = reference(name)
        whole = sum(np.einsum("icp,jkp->icjk", j[:3], j[3:]) for j in jacobians.values())
        kernel = ntk(f, params, x[:3], x[3:], method="transform")
        assert kernel.shape == (3, 2, 2, 2)
        np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-12 * np.abs(whole).max())


@pytest.mark.parametrize("name", WITH_SUBSETS)
def test_parameters_that_are_not_chosen_are_constants(name):
    with jax.enable_x64(True):
        f, params, x, jacobians = reference(name)
        key = sorted(params)[0]
        want = gram(jacobians[key])
        kernel = ntk(first(f), params, x, method="transform", parameters=key)
        np.testing.assert_allclose(kernel, want, rtol=0, atol=1e-12 * np.abs(want).max())


@pytest.mark.parametrize("name", WITH_NORMS)
def test_gradient_norms_are_the_diagonal(name):
    with jax.enable_x64(True):
        f, params, x, jacobians = reference(name)
        want = np.sqrt(sum(np.sum(j**2, axis=2) for j in jacobians.values()))
        np.testing.assert_allclose(gradient_norms(f, params, x), want, rtol=1e-12)


@pytest.mark.parametrize("chosen", [("a", "c"), ("a", "b", "c", "d"), ("b",)])
def test_features_of_layers_that_a_loop_tells_apart(chosen):
    """One iteration's contribution is that of two parameters: twice the kernel, not twice the features."""
    with jax.enable_x64(True):
        f, params, x, jacobians = reference("two_stacks_added")
        want = sum(np.trace(gram(jacobians[key])) for key in chosen)
        found = [
            np.sum(np.square(ntk_features(first(f), params, x, width=64, key=jax.random.key(seed), parameters=chosen)))
            for seed in range(40)
        ]
        assert abs(np.mean(found) / want - 1) < 4 * np.std(found) / want / np.sqrt(40) < 0.3


def test_the_table_covers_every_treatment():
    found = {how for _, _, _, expected in programs.PROGRAMS.values() for how in expected.values()}
    assert found == {"contribution", "factors", "materialized", "unused"}


def test_report_names_what_is_materialised_and_how_much():
    f, _, _, _ = programs.PROGRAMS["dense_layer"]
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3), "s": jnp.ones(4)}
    report = explain(first(f), params, jnp.ones((6, 5, 4)))
    assert [(t.parameters, t.bytes) for t in report.materialized] == [(("s",), 6 * 4 * 4), (("b",), 6 * 3 * 4)]
    assert "b: used by add" in str(report)
    assert "s: used by mul" in str(report)
