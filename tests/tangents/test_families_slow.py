"""Every method and output for every ported family, small in float64 and large in float32; minutes, run by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lensjax_kernels import rademacher_like

from lensjax.models import init_model
from lensjax.tangents import OUTPUTS, gradient_norms, hessian_trace, hvp, ntk, ntk_operator, ntk_outputs
from support.families import FAMILIES, make_batch, make_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def programs_are_let_go():
    """Hundreds of compiled programs in one process are more pieces of memory than Linux lets a process map."""
    yield
    jax.clear_caches()


NAMES = sorted(FAMILIES)
TWO_SIDED = ("t5", "mt5", "bart", "switch_transformers")

LARGE = {
    "vocab_size": 2100, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 2100, "ffn_dim": 2100, "n_embd": 512, "n_head": 8, "d_model": 512, "d_kv": 64, "num_heads": 8,
    "d_ff": 2100, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 2100,
    "decoder_ffn_dim": 2100, "max_position_embeddings": 128, "n_positions": 128, "query_pre_attn_scalar": 64,
    "word_embed_proj_dim": 512, "initializer_range": 0.02, "init_std": 0.02, "expert_capacity": 128,
    "sliding_window": 64,
}  # fmt: skip
"""Sizes under every name that some family has for them."""


def model_and_batch(name, dtype, sizes=None, samples=3, length=6):
    config = make_config(name, 1)
    config |= {key: value for key, value in (sizes or {}).items() if key in config or key.endswith(("scalar", "dim"))}
    batch = make_batch(samples, length)
    if name in TWO_SIDED:
        batch["labels"] = np.random.default_rng(1).integers(6, 53, (samples, length - 1)).astype(np.int32)
        batch["labels"][1, 3:] = -100
    # float64 weights that float32 holds, so that both have the same kernel.
    model = init_model(config, jax.random.key(0), jnp.float32)
    nnx.update(model, jax.tree.map(lambda a: a.astype(dtype), nnx.state(model, nnx.Param)))
    return model, {key: jnp.asarray(value) for key, value in batch.items()}


def dense_jacobians(f, params, batch):
    """Return the Jacobian (N * C, P) of the outputs of all examples."""
    count = len(batch["input_ids"])
    jacobian = jax.jit(jax.vmap(jax.jacrev(f), in_axes=(None, 0)))(params, batch)
    outputs = max(1, np.prod(jax.eval_shape(f, params, {k: v[0] for k, v in batch.items()}).shape, dtype=int))
    return np.concatenate([np.asarray(x).reshape(count * outputs, -1) for x in jax.tree.leaves(jacobian)], axis=1)


def close(got, want, tolerance):
    want = np.asarray(want).reshape(np.shape(got))
    return np.abs(np.asarray(got) - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("output", list(OUTPUTS))
@pytest.mark.parametrize("name", NAMES)
def test_every_method_and_output(name, output):
    with jax.enable_x64(True):
        model, batch = model_and_batch(name, jnp.float64)
        dense = dense_jacobians(*ntk_outputs(model, output), batch)
        kernel = dense @ dense.T
        for method in ("transform", "jacobian", "ntvp"):
            assert close(ntk(model, batch, output=output, method=method), kernel, 1e-10)
        halves = [jax.tree.map(lambda a, part=part: a[part], batch) for part in (slice(2), slice(2, None))]
        outputs = len(dense) // 3
        assert close(ntk(model, *halves, output=output), kernel[: 2 * outputs, 2 * outputs :], 1e-10)
        norms = np.linalg.norm(dense, axis=1)
        assert close(gradient_norms(model, batch, output=output), norms, 1e-10)
        v = np.random.default_rng(0).normal(size=len(dense))
        operator = ntk_operator(model, batch, output=output)
        assert close(operator @ jnp.asarray(v).reshape(operator.shape[: len(operator.shape) // 2]), kernel @ v, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_large_kernels_of_several_outputs(name):
    """Above 2^20 elements of a layer's activations, all outputs together: float32 against dense float64 Jacobians."""
    samples, length = 5, 128
    assert samples * 4 * (length - 1) * LARGE["hidden_size"] > 2**20
    with jax.enable_x64(True):
        model, batch = model_and_batch(name, jnp.float64, LARGE, samples, length)
        dense = dense_jacobians(*ntk_outputs(model, "projections"), batch)
        kernel = dense @ dense.T
    model, batch = model_and_batch(name, jnp.float32, LARGE, samples, length)
    for method in ("transform", "jacobian"):
        found = ntk(model, batch, output="projections", method=method)
        assert found.dtype == jnp.float32
        assert close(found, kernel, 1e-5)
    assert close(gradient_norms(model, batch, output="projections"), np.linalg.norm(dense, axis=1), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_large_curvature(name):
    """Probes by parameter in float32, against products with the Hessian in float64, and the Gauss-Newton matrix's."""
    key, options = jax.random.key(3), {"probes": 1, "by_layer": "parameter"}
    small, batch = model_and_batch(name, jnp.float32, LARGE, 3, 128)
    leaves, structure = jax.tree.flatten(nnx.state(small, nnx.Param))
    signs = rademacher_like(jax.random.split(jax.random.fold_in(key, 0), 1)[0], leaves)
    found = {m: hessian_trace(small, batch, key=key, matrix=m, **options) for m in ("hessian", "gauss_newton")}
    with jax.enable_x64(True):
        model, batch = model_and_batch(name, jnp.float64, LARGE, 3, 128)
        v = jax.tree.unflatten(structure, [s.astype(jnp.float64) for s in signs])
        product = jax.jit(lambda v: hvp(model, v, batch))(v)
        forms = [float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(product), strict=True)]
        wide = hessian_trace(model, batch, key=key, matrix="gauss_newton", **options)
    assert close(found["hessian"].samples, forms, 1e-5)
    assert close(found["gauss_newton"].samples, wide.samples, 1e-5)
