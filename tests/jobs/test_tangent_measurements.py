"""The kernel and the Hessian trace that a candidate is described by."""

import jax
import numpy as np
import pytest

from lensjax import models, tangents
from lensjax.jobs.tangent_measurements import measure, tangent_flops
from lensjax.journal import Run
from lensjax.select import extra_measurements
from lensjax.tasks import batches, encode, load_task


def residual(found, rate, steps):
    """F(Theta, t) of eq. 9 as a selection reports it."""
    run = Run("", "one", 10, 1.0, steps=steps, facts={"learning_rate": rate})
    return extra_measurements.with_residuals({"one": found}, [run])["one"]["kernel_residual"]["10"]


def test_tangents_are_the_kernel_and_the_trace_of_the_samples(tiny_models, tiny_task):
    task = load_task(tiny_task, input_field="input", target_field="target", validation=20, test=20)
    model, tokenizer = models.from_pretrained(tiny_models[0])
    samples = encode(task.train[:6], tokenizer, 24)
    before = model.attention
    found = measure(model, samples, 0)
    assert model.attention == before
    (batch,) = batches(samples, batch_size=6, buckets=(24,), pad_id=0)
    function, params = tangents.ntk_outputs(model, "loss")
    gradients = jax.vmap(jax.grad(function), in_axes=(None, 0))(params, batch)
    rows = np.concatenate([np.asarray(g, np.float64).reshape(6, -1) for g in jax.tree.leaves(gradients)], 1)
    values = np.linalg.eigvalsh(rows @ rows.T)[::-1]
    np.testing.assert_allclose(found["kernel_spectrum"], values, rtol=1e-4, atol=1e-5 * values[0])
    losses = np.asarray(jax.vmap(function, in_axes=(None, 0))(params, batch), np.float64)
    # Eq. 9 written out, and its two ends.
    for rate, steps in ((1e-2, 3), (1e-3, 50)):
        values, vectors = np.linalg.eigh(rows @ rows.T)
        left = vectors @ (np.exp(-rate * steps * values) * (vectors.T @ losses))
        assert residual(found, rate, steps) == pytest.approx(left @ left, rel=1e-3)
    assert residual(found, 0.1, 0) == pytest.approx(losses @ losses, rel=1e-5)
    assert residual(found, 1e9, 10**9) < 1e-3 * (losses @ losses)
    assert found["trace"] == pytest.approx(sum(found["trace_by_layer"].values()), rel=1e-5)
    assert tangent_flops(1, 10, 2) == (6 + 4 * 12) * 10 + 2 * 4
