"""Indices beyond a table: kernels, norms and curvature follow the gradient rule that JAX has for each mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.tangents import gradient_norms, ntk
from lensjax.tangents.curvature.quadratic_forms import hessian_quadratic_forms

LOOKUPS = {
    "index": lambda table, ids: table[ids],
    "clip": lambda table, ids: table.at[ids].get(mode="clip"),
    "drop": lambda table, ids: table.at[ids].get(mode="drop", fill_value=0.5),
    "take": lambda table, ids: jnp.nan_to_num(jnp.take(table, ids, axis=0)),
    "take, wrapped": lambda table, ids: jnp.take(table, ids, axis=0, mode="wrap"),
    "slices": lambda table, ids: jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(table, i, keepdims=False))(ids),
    "tied": lambda table, ids: table[ids] @ table.T @ table,
    "small integers, tall table": lambda table, ids: jax.lax.gather(
        jnp.concatenate([table, jnp.ones((300, 4))]), ids[:, None].astype(jnp.int8),
        jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)), (1, 4),
        mode="promise_in_bounds",
    ),
    "two indices": lambda table, ids: jax.lax.gather(
        table, jnp.stack([ids, ids // 6], 1),
        jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)), (1, 4),
        mode="fill", fill_value=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKUPS)
def test_indices_beyond_the_table_count_as_in_jaxs_gradient(name, quick_to_compile):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        table = jnp.asarray(rng.normal(size=(7, 4)))
        x = jnp.asarray([[0, 9, 1, 3], [2, 6, -9, 8], [1, 2, 3, -2], [-7, -8, 6, 7]])

        def f(table, ids):
            rows = LOOKUPS[name](table, ids)
            return jnp.sum(jnp.tanh(rows @ jnp.arange(12.0).reshape(4, 3) / 10)) + jnp.sum(rows**2)

        gradients = np.asarray(jax.vmap(jax.grad(f), (None, 0))(table, x)).reshape(4, -1)
        kernel = gradients @ gradients.T
        for method in ("transform", "jacobian"):
            np.testing.assert_allclose(ntk(f, table, x, method=method), kernel, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient_norms(f, table, x) ** 2, np.diag(kernel), rtol=1e-12)

        def loss(leaves):
            return jnp.sum(jax.vmap(f, (None, 0))(leaves[0], x))

        v = jnp.asarray(rng.normal(size=(7, 4)))
        product = jax.jvp(jax.grad(loss), ([table],), ([v],))[1][0]
        np.testing.assert_allclose(hessian_quadratic_forms(loss, [table], [v])[0], jnp.vdot(v, product), rtol=1e-12)
