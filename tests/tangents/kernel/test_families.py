"""Kernels of every ported family against dense float64 Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lensjax.models import init_model
from lensjax.tangents import ntk, ntk_outputs
from support.families import FAMILIES, compiled, make_batch, make_config

pytestmark = pytest.mark.usefixtures("quick_to_compile")


MIXED = ("gemma3_text", "switch_transformers", "llama")
"""Families whose layers differ, and one that is given two layers all the same."""


def model_and_batch(name, dtype):
    config = make_config(name, 2 if name in MIXED else 1)
    batch = make_batch(3, 6)
    if name in ("t5", "mt5", "bart", "switch_transformers"):
        batch["labels"] = np.random.default_rng(1).integers(6, 53, (3, 5)).astype(np.int32)
        batch["labels"][1, 3:] = -100
    # float64 weights that float32 holds, so that both have the same kernel.
    model = init_model(config, jax.random.key(0), jnp.float32)
    nnx.update(model, jax.tree.map(lambda a: a.astype(dtype), nnx.state(model, nnx.Param)))
    return model, {name: jnp.asarray(value) for name, value in batch.items()}


def dense_kernel(f, params, batch):
    jacobian = compiled(jax.vmap(jax.jacrev(f), in_axes=(None, 0)))(params, batch)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jacobian)]
    outputs = leaves[0].shape[: 1 + np.ndim(jax.eval_shape(f, params, {k: v[0] for k, v in batch.items()}))]
    rows = np.concatenate([leaf.reshape(int(np.prod(outputs)), -1) for leaf in leaves], axis=1)
    return (rows @ rows.T).reshape(*outputs, *outputs)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_kernel_of_a_family(name):
    with jax.enable_x64(True):
        model, batch = model_and_batch(name, jnp.float64)
        dense = dense_kernel(*ntk_outputs(model), batch)
        assert np.abs(ntk(model, batch, method="transform") - dense).max() < 1e-10 * np.abs(dense).max()
    # The same weights in float32: as good as that allows.
    kernel = ntk(model_and_batch(name, jnp.float32)[0], batch, method="transform")
    assert kernel.dtype == jnp.float32
    assert np.abs(kernel - dense).max() < 1e-5 * np.abs(dense).max()


@pytest.mark.parametrize("output", ["gold_probability", "gold_logit", "projections"])
def test_outputs_of_an_encoder_decoder(output):
    with jax.enable_x64(True):
        model, batch = model_and_batch("t5", jnp.float64)
        f, params = ntk_outputs(model, output)
        values = jax.vmap(f, in_axes=(None, 0))(params, batch)
        logits = model(batch["input_ids"], batch["attention_mask"], model.shift_right(batch["labels"]))[1, :3]
        scores = jax.nn.softmax(logits) if output == "gold_probability" else logits
        if output != "projections":
            gold = jnp.take_along_axis(scores, batch["labels"][1, :3, None], axis=1)
            np.testing.assert_allclose(values[1], gold.mean(), rtol=1e-12)
        dense = dense_kernel(f, params, batch)
        kernel = ntk(model, batch, output=output, method="transform")
        assert np.abs(kernel - dense).max() < 1e-10 * np.abs(dense).max()
