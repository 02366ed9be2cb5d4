"""The fused token-Gram kernel: exact in interpret mode, and lowered for CUDA without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lensjax_kernels.gram_pallas import token_gram_fused


def factors(n, c, t, d, e, seed, dtype):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, t, d)), dtype), jnp.asarray(rng.normal(size=(n, c, t, e)), dtype)


def dense(left1, right1, left2, right2):
    one, other = (
        np.einsum("ntd,ncte->ncde", *(np.asarray(x, np.float64) for x in pair))
        for pair in ((left1, right1), (left2, right2))
    )
    return np.einsum("ncde,mkde->ncmk", one, other)


@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [
        ((2, 1, 32, 32, 32), (3, 1, 32, 32, 32)),
        ((3, 2, 7, 5, 9), (2, 3, 40, 5, 9)),
        ((1, 1, 70, 33, 65),) * 2,
        ((2, 1, 260, 33, 2100), (1, 1, 40, 33, 2100)),
    ],
    ids=["whole tiles", "several outputs", "several tiles", "over a million cotangents"],
)
def test_interpreted_kernel_against_dense_gradients(shape1, shape2):
    with jax.enable_x64(True):
        one, other = factors(*shape1, 0, jnp.float64), factors(*shape2, 1, jnp.float64)
        found = token_gram_fused(*one, *other, interpret=True)
        np.testing.assert_allclose(found, dense(*one, *other), rtol=1e-11, atol=1e-9)
    single = [x.astype(jnp.float32) for x in (*one, *other)]
    found = token_gram_fused(*single, interpret=True)
    assert found.dtype == jnp.float32
    want = dense(*single)
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_lowers_for_cuda_without_a_gpu(dtype):
    one, other = factors(2, 2, 20, 40, 24, 0, dtype), factors(3, 1, 33, 40, 24, 1, dtype)
    triton = "__gpu$xla.gpu.triton"
    exported = jax.export.export(
        jax.jit(token_gram_fused),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(triton)],
    )(*one, *other)
    text = exported.mlir_module()
    assert text.count(f"custom_call @{triton}(") == 1
    assert "grid_x = 4" in text
    assert "grid_y = 3" in text
    assert exported.out_avals[0].shape == (2, 2, 3, 1)
    assert exported.out_avals[0].dtype == jnp.float32
    # Nothing but padding and reshaping around it: no block of token pairs leaves the kernel.
    assert "stablehlo.dot_general" not in text
