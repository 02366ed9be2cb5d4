"""Frozen weights under adapters are arguments of every program, never its constants; and what a user compiles."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lensjax.models import init_model
from lensjax.models.lora import add_lora
from lensjax.tangents import (
    Composed,
    curvature_operator,
    frozen_model,
    gradient_norms,
    hessian_trace,
    hvp,
    model_loss,
    ntk,
    ntk_blocks,
    ntk_features,
    ntk_operator,
    ntk_outputs,
    per_example_quadratic_forms,
)
from lensjax.tangents.kernel import memory_limit
from lensjax.tangents.kernel.compute import validate
from lensjax.tangents.parameters import FROZEN

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = {"model_type": "gpt2", "vocab_size": 23, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 6}


def adapted(seed, rank=3):
    """An adapted model with random weights; the rank is this file's own, so that no program of another is found."""
    model = add_lora(init_model(CONFIG, jax.random.key(seed)), rank=rank, alpha=4, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    # The second factor of an adapter begins as zeros, and the first would have no gradient.
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), state))
    return model


def batch():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 23, (3, 5)))
    return {"input_ids": ids, "labels": ids, "attention_mask": jnp.ones_like(ids)}


def constants(text):
    """Numbers in the constants of a lowered program; one number repeated is none."""
    shapes = re.findall(r'stablehlo\.constant dense<(?:\[|").*?> : tensor<([0-9x]+)x[a-z]', text)
    return sum(math.prod(map(int, shape.split("x"))) for shape in shapes)


@pytest.fixture
def programs(monkeypatch):
    """Texts of the programs that are run, as lowered."""
    texts, jit = [], jax.jit

    def recording(function, **options):
        compiled = jit(function, **options)

        def call(*args, **named):
            texts.append(compiled.lower(*args, **named).as_text())
            return compiled(*args, **named)

        return call

    monkeypatch.setattr(jax, "jit", recording)
    return texts


FEW = 64
"""Fewer numbers than the smallest matrix of the model has; positions and masks are constants."""


def test_kernels(programs):
    models = [adapted(seed) for seed in (1, 2)]
    f, params = ntk_outputs(models[0])
    each = jax.jit(lambda f, params, x: jax.vmap(jax.grad(f), in_axes=(None, 0))(params, x))
    gradients = each(f, params, batch())
    rows = np.concatenate([np.asarray(a, np.float64).reshape(3, -1) for a in jax.tree.leaves(gradients)], axis=1)
    dense = rows @ rows.T
    programs.clear()

    def close(got, want=dense):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())

    close(ntk(f, params, batch()))
    close(ntk_blocks(f, params, batch(), block=3))
    close(gradient_norms(f, params, batch()), np.sqrt(np.diag(dense)))
    close(ntk_operator(f, params, batch()) @ jnp.ones(3), dense.sum(1))
    features = ntk_features(f, params, batch(), width=16, key=jax.random.key(0))
    assert features.shape == (3, 16)
    assert len(programs) == 5
    assert max(map(constants, programs)) < FEW
    # Another model of this structure needs no other program, and has its own weights.
    count = len(programs)
    other = np.asarray(ntk(*ntk_outputs(models[1]), batch()))
    assert np.abs(other - dense).max() > 0.1 * np.abs(dense).max()
    assert programs[count:] == [programs[0]]
    np.testing.assert_array_equal(ntk(models[1], batch()), other)


def test_curvature(programs):
    models = [adapted(seed) for seed in (1, 2)]
    (f, params), key = model_loss(models[0]), jax.random.key(3)
    v = jax.tree.map(lambda a: jnp.full_like(a, 0.1), params)
    product = jax.jit(hvp)(f, params, v, batch())
    form = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(product), strict=True))
    programs.clear()
    operator = curvature_operator(f, params, batch())
    assert jax.tree.structure(operator @ v) == jax.tree.structure(params)
    assert sum(operator.quadratic(v).values()) == pytest.approx(float(form), rel=1e-4)
    traces = [hessian_trace(*model_loss(model), batch(), key=key, probes=1, chunk=1) for model in models]
    assert traces[0].trace != pytest.approx(traces[1].trace, rel=0.01)
    assert hessian_trace(models[0], batch(), key=key, probes=1, chunk=1).trace == traces[0].trace
    forms = per_example_quadratic_forms(f, params, v, batch(), function="identity", steps=1, by_layer=False)
    assert np.isfinite(forms[""]).all()
    assert len(programs) == 6
    assert max(map(constants, programs)) < FEW


def test_an_operator_keeps_its_function():
    """Programs that are kept hold it weakly."""
    params, v = {"w": jnp.ones(3)}, {"w": jnp.arange(3.0)}
    inline = [
        lambda params, batch: jnp.sum(batch * params["w"] ** 2),
        Composed(lambda params, batch: params["w"], lambda outputs, batch: jnp.sum(batch * outputs**2)),
    ]
    while inline:
        operator = curvature_operator(inline.pop(), params, jnp.ones((1, 3)))
        np.testing.assert_array_equal((operator @ v)["w"], [0, 2, 4])
    loss, params = model_loss(adapted(1))
    v = jax.tree.map(jnp.ones_like, params)
    operator = curvature_operator(loss, params, batch())
    frozen_model.empty_model.cache_clear()
    product = np.concatenate([np.ravel(a) for a in jax.tree.leaves(operator @ v)])
    assert 0 < np.abs(product).max() < np.inf


def test_kernels_within_a_memory_limit(monkeypatch):
    monkeypatch.setattr(memory_limit, "EXECUTIONS", memory_limit.EXECUTIONS[-1:])
    model, x = adapted(1), {name: jnp.concatenate([a] * 3)[:8] for name, a in batch().items()}
    x["input_ids"] = x["labels"] = (x["input_ids"] + jnp.arange(8)[:, None]) % 23
    whole = ntk(model, x)
    (variant,) = memory_limit.variants(model, None, "loss")
    problem = validate(variant.function, variant.params, x, None, None, False)
    limit = memory_limit.needed_bytes(memory_limit.trace_program(problem, variant, x, None, False, (2, 2)))
    kernel, report = ntk(model, x, memory=limit, return_report=True)
    assert "in blocks of 2 examples, layers in a loop, recomputed" in report.reason
    assert all(FROZEN not in name for treatment in report.treatments for name in treatment.parameters)
    np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_a_users_program_takes_the_function_as_an_argument():
    f, params = ntk_outputs(adapted(1))
    x = batch()
    closed = jax.jit(lambda params, x: jax.vmap(f, in_axes=(None, 0))(params, x)).lower(params, x).as_text()
    given = jax.jit(lambda f, params, x: jax.vmap(f, in_axes=(None, 0))(params, x))
    weights = sum(leaf.size for leaf in jax.tree.leaves(f))
    assert weights > 1000
    # Nearly all: biases are zero, one number repeated.
    assert constants(closed) > 0.8 * weights > FEW > constants(given.lower(f, params, x).as_text())
    one = {name: value[1] for name, value in x.items()}
    np.testing.assert_allclose(given(f, params, x)[1], f(params, one), rtol=1e-5)
    loss, params = model_loss(adapted(1))
    v = jax.tree.map(jnp.ones_like, params)
    assert constants(jax.jit(hvp).lower(loss, params, v, x).as_text()) < FEW
