"""Kernels within a memory limit: the same numbers, whatever is recomputed or cut into blocks for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lensjax import InputError
from lensjax.models import init_model
from lensjax.tangents import (
    block_for,
    explain,
    gradient_norms,
    ntk,
    ntk_blocks,
    ntk_features,
    ntk_operator,
    ntk_outputs,
    sketch_error,
)
from lensjax.tangents.kernel import blockwise, memory_limit
from lensjax.tangents.kernel.compute import validate
from lensjax.tangents.kernel.memory_limit import Blocks, needed_bytes, operations, trace_program, variants

CONFIG = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "intermediate_size": 96, "max_position_embeddings": 32,
}  # fmt: skip
EXAMPLES = 16


def model_and_batch(dtype=jnp.float32):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (EXAMPLES, 32)))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": jnp.ones_like(ids)}
    return init_model(CONFIG, jax.random.key(0), dtype), batch


def needs(model, batch, rows, columns=None):
    """Bytes of each variant of a model's loss kernel for so many examples, from fast to small."""
    found = {}
    for variant in variants(model, None, "loss"):
        problem = validate(variant.function, variant.params, batch, None, None, False)
        found[variant.what] = needed_bytes(trace_program(problem, variant, batch, None, False, (rows, columns)))
    return found


@pytest.mark.usefixtures("quick_to_compile")
def test_a_model_recomputes_as_much_as_is_necessary():
    with jax.enable_x64(True):
        model, batch = model_and_batch(jnp.float64)
        model.execution = "scan"
        whole = ntk(model, batch)
        needed = needs(model, batch, EXAMPLES)
        fast, *_, small = needed.values()
        assert small < fast / 2
        for bytes_needed in needed.values():
            kernel, report = ntk(model, batch, memory=bytes_needed, return_report=True)
            fastest = next(what for what in needed if needed[what] <= bytes_needed)
            assert report.reason.rpartition(", ")[0].endswith(f"; {fastest}")
            np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-12 * np.abs(whole).max())
        layers = ntk(model, batch, memory=2 * small, by_layer=True)
        np.testing.assert_allclose(sum(layers.values()), whole, rtol=0, atol=1e-12 * np.abs(whole).max())
    assert (model.execution, model.remat) == ("scan", False)


class Deep(nnx.Module):
    """What `variants` needs of a language model, and quick to compile: a stack of layers, the loss a sum of squares."""

    def __init__(self, layers=6, width=16):
        rng = np.random.default_rng(0)
        self.kernel = nnx.Param(jnp.asarray(rng.normal(size=(layers, width, width)) / 4, np.float32))
        self.execution, self.remat = "unroll", False

    def __call__(self, x):
        def layer(x, w):
            for _ in range(3):  # more to keep than the layer's input
                x = jnp.tanh(x @ w)
            return x, None

        if self.remat:
            policy = None if self.remat is True else getattr(jax.checkpoint_policies, self.remat)
            layer = jax.checkpoint(layer, policy=policy)
        if self.execution == "scan":
            return jax.lax.scan(layer, x, self.kernel[...])[0]
        return functools.reduce(lambda x, w: layer(x, w)[0], self.kernel[...], x)

    def loss_sums(self, batch):
        losses = jnp.sum(self(batch["x"]) ** 2, axis=(1, 2))
        return losses, jnp.ones_like(losses)


def deep_and_batch(examples):
    x = np.random.default_rng(1).normal(size=(examples, 16, 16))
    return Deep(), {"x": jnp.asarray(x, np.float32)}


def dense_kernel(model, batch):
    """Return the kernel in float64, from per-example gradients."""
    with jax.enable_x64(True):
        f, params = ntk_outputs(model)
        params, batch = jax.tree.map(lambda a: a.astype(np.float64), (params, batch))
        rows = jax.vmap(jax.grad(f), in_axes=(None, 0))(params, batch)["kernel"][...].reshape(len(batch["x"]), -1)
        return np.asarray(rows @ rows.T)


RECOMPUTED = "layers in a loop, recomputed on the way back"


def test_the_callers_model_is_never_changed(monkeypatch):
    """Neither while its variants are made nor where one fails; and all variants have the model's own arrays."""
    model, batch = deep_and_batch(2)
    found = [memory_limit.model_function, []]

    def observed(variant, output):
        found[1].append((model.execution, model.remat, variant.execution, variant.remat))
        assert variant.kernel[...] is model.kernel[...]
        return found[0](variant, output)

    monkeypatch.setattr(memory_limit, "model_function", observed)
    made = list(variants(model, None, "loss"))
    assert len(made) == 3
    assert [one[:2] for one in found[1]] == [("unroll", False)] * 3
    assert [one[2:] for one in found[1]] == [execution[:2] for execution in memory_limit.EXECUTIONS]

    def failing(variant, output):
        raise RuntimeError

    monkeypatch.setattr(memory_limit, "model_function", failing)
    with pytest.raises(RuntimeError):
        ntk(model, batch, memory=10**6)
    assert (model.execution, model.remat) == ("unroll", False)


@pytest.mark.usefixtures("quick_to_compile")
def test_blocks_recompute_where_that_makes_them_so_much_larger():
    model, batch = deep_and_batch(40)
    dense = dense_kernel(model, batch)
    fast, *_, small = needs(model, batch, 2, 2).values()
    # The fastest pass has room for two examples on a side, recomputing for many more.
    kernel, report = ntk_blocks(model, batch, memory=fast, return_report=True)
    assert small < fast
    assert RECOMPUTED in report.reason
    block = int(report.reason.split("in blocks of ")[1].split()[0])
    assert 2 < block <= 20
    assert needs(model, batch, block, block)[RECOMPUTED] <= fast
    np.testing.assert_allclose(kernel, dense, rtol=0, atol=1e-5 * np.abs(dense).max())
    # `ntk` decides alike.
    same, own = ntk(model, batch, memory=fast, return_report=True)
    assert own.reason == report.reason
    np.testing.assert_array_equal(same, kernel)
    assert (own.examples, model.execution, model.remat) == (40, "unroll", False)
    # With room for all at once there is one block, and nothing is recomputed.
    kernel, report = ntk_blocks(model, batch, memory=10**9, return_report=True)
    assert "layers in a loop, " in report.reason
    assert "recomputed" not in report.reason
    assert "blocks" not in report.reason
    np.testing.assert_allclose(kernel, dense, rtol=0, atol=1e-5 * np.abs(dense).max())
    with pytest.raises(InputError, match="memory=1000 bytes is too little: a block of 2 examples takes"):
        ntk_blocks(model, batch, memory=1000)


@pytest.mark.usefixtures("quick_to_compile")
def test_blocks_recompute_nothing_where_that_makes_them_no_larger(monkeypatch):
    monkeypatch.setattr(memory_limit, "LARGEST_BLOCK", 4)
    model, batch = deep_and_batch(40)
    dense = dense_kernel(model, batch)
    least = min(needs(model, batch, 40).values())
    enough = needs(model, batch, 4, 4)["layers in a loop"]
    assert enough < least
    kernel, report = ntk_blocks(model, batch, memory=enough, return_report=True)
    assert "in blocks of 4 examples, layers in a loop, " in report.reason
    assert "recomputed" not in report.reason
    np.testing.assert_allclose(kernel, dense, rtol=0, atol=1e-5 * np.abs(dense).max())


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    "takes",
    [
        lambda block: 1000 + 100 * block,
        lambda block: 1000 + 3 * block**2,
        lambda block: 1000 * (2 + block // 5),
        lambda block: 100 * block + (10**5 if block > 12 else 0),
    ],
)
def test_the_largest_block_that_fits(monkeypatch, takes):
    asked = []
    monkeypatch.setattr(Blocks, "program_bytes", lambda self, block: asked.append(block) or takes(block))
    p, x = jnp.ones(3), jnp.ones((2000, 3))
    problem = validate(jnp.dot, p, x, None, None, False)
    for rows, even in ((2000, False), (2000, True), (17, True), (2, True), (1, False)):
        own = dataclasses.replace(problem, rows=rows)
        blocks = Blocks(own, memory_limit.Variant(jnp.dot, p, ""), x, None, "full", even=even)
        sizes = [n for n in range(1, min(1024, rows) + 1) if not even or (n < rows and n == -(-rows // -(-rows // n)))]
        assert (blocks.least, blocks.most) == (min(2, sizes[-1]), sizes[-1])
        for limit in (*(takes(n) for n in range(2, 20)), *(takes(n) - 1 for n in (5, 17, 900)), takes(700), 10**9):
            asked.clear()
            block, needed = blocks.largest(limit)
            assert len(asked) == len(set(asked)) <= 14
            fitting = [n for n in sizes if n >= blocks.least and takes(n) <= limit]
            assert needed == takes(block or blocks.least)
            assert (block == 0) == (not fitting)
            if fitting:
                assert block in fitting
                assert fitting[-1] - block <= block // 16


def test_blocks_of_two_sets_of_different_lengths():
    model, batch = deep_and_batch(40)
    first, second = {"x": batch["x"][:3]}, {"x": batch["x"][3:]}
    limit = needs(model, batch, 2, 2)["layers in a loop"]
    kernel, report = ntk_blocks(model, first, second, memory=limit, return_report=True)
    assert "in blocks of" in report.reason
    dense = dense_kernel(model, batch)[:3, 3:]
    np.testing.assert_allclose(kernel, dense, rtol=0, atol=1e-5 * np.abs(dense).max())


def test_operations_are_counted_in_loops_and_when_recomputed():
    x, w = jnp.ones((30, 40)), jnp.ones((5, 40, 40))

    def layers(w, keep):
        return jax.lax.scan(lambda x, w: (keep(lambda x, w: jnp.sin(x @ w))(x, w), None), x, w)[0].sum()

    product = 2 * 30 * 40 * 40
    forwards = operations(jax.make_jaxpr(lambda w: layers(w, lambda f: f))(w))
    assert forwards == 5 * (product + 30 * 40) + 1
    plain, again = (
        operations(jax.make_jaxpr(jax.grad(lambda w, keep=keep: layers(w, keep)))(w))
        for keep in (lambda f: f, jax.checkpoint)
    )
    assert 3 * 5 * product <= plain < 3.5 * 5 * product
    assert 4 * 5 * product <= again < 4.5 * 5 * product
    added = jax.make_jaxpr(lambda w, i: w.at[i].add(1.0))(w, jnp.array([1]))
    assert w.size <= operations(added) < 2 * w.size
    image, kernel = jnp.ones((2, 4, 9, 9)), jnp.ones((6, 2, 3, 3))
    convolved = jax.make_jaxpr(lambda a, k: jax.lax.conv_general_dilated(a, k, (1, 1), "SAME", feature_group_count=2))
    assert operations(convolved(image, kernel)) == 2 * (2 * 6 * 9 * 9) * (2 * 3 * 3)
    loop = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x @ w[0], x))(x)
    assert product <= operations(loop) < 1.1 * product
    branches = jax.make_jaxpr(lambda i: jax.lax.switch(i, [lambda: x @ w[0], lambda: x @ w[0] @ w[1]]))(1)
    assert 2 * product <= operations(branches) < 3 * product


@pytest.mark.usefixtures("quick_to_compile")
def test_columns_of_a_model_may_be_given_by_name():
    model, batch = deep_and_batch(5)
    rows, columns = {"x": batch["x"][:3]}, {"x": batch["x"][3:]}
    want = np.asarray(ntk(model, rows, columns))
    assert want.shape == (3, 2)
    np.testing.assert_array_equal(ntk(model, rows, x2=columns), want)
    np.testing.assert_allclose(ntk_blocks(model, rows, x2=columns, block=3), want, rtol=1e-5)
    np.testing.assert_allclose(ntk_operator(model, rows, x2=columns) @ jnp.ones(2), want.sum(1), rtol=1e-5)
    key = jax.random.key(0)
    features = ntk_features(model, batch, width=16, key=key)
    given = [sketch_error(model, batch, features, key=key), sketch_error(model, batch, features=features, key=key)]
    assert given[0] == given[1]
    params = ntk_outputs(model)[1]
    for function in (ntk, ntk_blocks, ntk_operator, explain):
        with pytest.raises(InputError, match="brings its own parameters"):
            function(model, params, rows, columns)
    with pytest.raises(InputError, match="brings its own parameters"):
        gradient_norms(model, params, rows)


def test_the_kernel_counts_where_it_is_computed_at_once():
    p, x = jnp.ones(2), jnp.ones((64, 2))
    problem = validate(jnp.dot, p, x, None, None, False)
    takes = needed_bytes(trace_program(problem, memory_limit.Variant(jnp.dot, p, ""), x, None, False, (64, None)))
    assert takes >= 4 * 64**2
    reasons = [ntk(jnp.dot, p, x, memory=limit, return_report=True)[1].reason for limit in (takes, takes - 1)]
    assert ["in blocks" in reason for reason in reasons] == [False, True]


def test_bytes_are_written_in_digits():
    assert [memory_limit.format_mib(n * 2**20) for n in (1500, 10, 9.876, 0.01234)] == [
        "1500 MiB",
        "10 MiB",
        "9.88 MiB",
        "0.0123 MiB",
    ]


def test_any_function_falls_back_on_blocks():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(64, 64)) / 8, np.float32)
    x1, x2 = (jnp.asarray(rng.normal(size=(n, 32, 64)), np.float32) for n in (12, 20))

    def f(p, x):
        for _ in range(4):
            x = jnp.tanh(x @ p)
        return x.sum()

    whole = ntk(f, p, x1, x2)
    kernel, report = ntk(f, p, x1, x2, memory=2**20, return_report=True)
    assert "in blocks" in report.reason
    np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    kernel, report = ntk(f, p, x1, x2, memory=2**30, return_report=True)
    assert "as it is" in report.reason
    np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.usefixtures("quick_to_compile")
def test_fewer_parameters_than_outputs():
    """Without a limit "auto" chooses another method than the one whose memory is bounded."""
    rng = np.random.default_rng(0)
    p, x = jnp.asarray(rng.normal(size=3), np.float32), jnp.asarray(rng.normal(size=(12, 8, 3)), np.float32)

    def f(p, x):
        return jnp.tanh(x @ p)

    assert ntk(f, p, x, return_report=True)[1].method == "jacobian"
    whole = ntk(f, p, x)
    limit = 2**15
    assert whole.nbytes > limit
    for kernel, report in (
        ntk(f, p, x, memory=limit, method="transform", return_report=True),
        ntk(f, p, x, memory=limit, return_report=True),
        ntk_blocks(f, p, x, memory=limit, return_report=True),
    ):
        assert report.method == "transform"
        assert "in blocks of" in report.reason
        assert {t.how for t in report.treatments} == {"contribution"}
        np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    assert 2 <= block_for(f, p, x, limit) < 12
    assert ntk_blocks(f, p, x, block=5, return_report=True)[1].method == "jacobian"


def test_all_blocks_are_computed_as_asked_for(monkeypatch):
    methods, layer_kernels = [], blockwise.layer_kernels

    def recording(problem, method, *args):
        methods.append(method)
        return layer_kernels(problem, method, *args)

    monkeypatch.setattr(blockwise, "layer_kernels", recording)
    p, x = jnp.ones(3), jnp.ones((64, 48, 3))
    kernel = ntk(lambda p, x: x @ p, p, x, memory=2**21, method="transform")
    assert kernel.shape == (64, 48, 64, 48)
    assert (kernel == 3).all()
    assert methods
    assert set(methods) == {"transform"}


def test_errors():
    p, x = jnp.ones((4, 4)), jnp.ones((3, 2, 4))

    def f(p, x):
        return jnp.tanh(x @ p).sum()

    with pytest.raises(InputError, match="bounds method='transform', but here it is 'jacobian'"):
        ntk(f, p, x, memory=2**20, method="jacobian")

    def looping(p, x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p)), (0, x))[1].sum()

    with pytest.raises(InputError, match=r"but here it is 'jacobian' \(a while_loop .*\); leave `memory` out"):
        ntk(looping, p, x, memory=2**20)
    for call in (ntk_blocks, block_for):
        with pytest.raises(InputError, match=r"\(a while_loop .*\); give `ntk_blocks` a `block` instead of `memory`"):
            call(looping, p, x, memory=2**20)
    with pytest.raises(InputError, match="blocks of them give the sum over layers only"):
        ntk(f, p, x, memory=10, by_layer=True)
    with pytest.raises(InputError, match="memory=10 bytes is too little: a block of 2 examples takes"):
        ntk(f, p, x, memory=10)
