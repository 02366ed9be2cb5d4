"""Kernels in blocks: the same numbers, bounded memory, and going on where it stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import InputError
from lensjax.tangents import block_for, ntk, ntk_blocks
from lensjax.tangents.kernel import blockwise


def f(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.stack([h.sum(), (h**2).sum()])


def one(p, x):
    return f(p, x)[0]


def inputs(n, seed=0):
    rng = np.random.default_rng(seed)
    p = {"w": jnp.asarray(rng.normal(size=(4, 3)), np.float32), "b": jnp.asarray(rng.normal(size=3), np.float32)}
    return p, jnp.asarray(rng.normal(size=(n, 5, 4)), np.float32)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_blocks_are_the_kernel(outputs):
    p, x = inputs(7)
    got = ntk_blocks(f, p, x, block=3, outputs=outputs)
    np.testing.assert_allclose(got, ntk(f, p, x, outputs=outputs), rtol=1e-5, atol=1e-4)
    got = ntk_blocks(f, p, x[:4], x[4:], block=3, outputs=outputs)
    np.testing.assert_allclose(got, ntk(f, p, x[:4], x[4:], outputs=outputs), rtol=1e-5, atol=1e-4)


def test_each_pair_of_blocks_is_computed_once(monkeypatch):
    sizes, layer_kernels = [], blockwise.layer_kernels

    def counting(problem, method, params, x1, x2, outputs):
        sizes.append(2 if x2 is not None else 1)
        return layer_kernels(problem, method, params, x1, x2, outputs)

    monkeypatch.setattr(blockwise, "layer_kernels", counting)
    p, x = inputs(8)
    np.testing.assert_allclose(ntk_blocks(one, p, x, block=2), ntk(one, p, x), rtol=1e-5, atol=1e-5)
    assert sorted(sizes) == [1] * 4 + [2] * 6  # 4 blocks on the diagonal, 6 above it


def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
    p, x = inputs(7)
    file = tmp_path / "kernel.npy"
    want = np.asarray(ntk(f, p, x))
    done, layer_kernels = [], blockwise.layer_kernels

    def failing(*args):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return layer_kernels(*args)

    monkeypatch.setattr(blockwise, "layer_kernels", failing)
    with pytest.raises(KeyboardInterrupt):
        ntk_blocks(f, p, x, block=3, file=file)
    assert len(json.loads((tmp_path / "kernel.npy.json").read_text())["done"]) == 4
    done.clear()
    got = ntk_blocks(f, p, x, block=3, file=file)
    assert len(done) == 2  # of 6 pairs of blocks
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    done.clear()
    np.testing.assert_allclose(np.load(file), ntk_blocks(f, p, x, block=3, file=file), rtol=0)
    assert done == []


def test_another_computation_does_not_continue_the_file(tmp_path):
    p, x = inputs(4)
    file = tmp_path / "kernel.npy"
    ntk_blocks(one, p, x, block=2, file=file)
    others = [
        (one, {**p, "b": p["b"] + 1e-6}, x, 2),
        (one, p, x.at[3, 0, 0].add(1e-3), 2),
        (lambda p, x: 2 * one(p, x), p, x, 2),
        (one, p, x, 4),
    ]
    for function, params, examples, block in others:
        with pytest.raises(InputError, match="holds blocks of another function, parameters, examples or block size"):
            ntk_blocks(function, params, examples, block=block, file=file)
    file.unlink()
    with pytest.raises(InputError, match="belong together, but one is missing"):
        ntk_blocks(one, p, x, block=2, file=file)


def test_a_damaged_file_is_not_returned_as_the_kernel(tmp_path):
    p, x = inputs(4)
    file, record = tmp_path / "kernel.npy", tmp_path / "kernel.npy.json"
    ntk_blocks(one, p, x, block=2, file=file)
    kernel, kept = np.load(file), record.read_text()
    arrays = (kernel[:3], kernel[None], kernel.astype(np.float16), kernel.astype(complex), np.zeros(0, kernel.dtype))
    for array in arrays:
        np.save(file, array)
        with pytest.raises(InputError, match=r"kernel\.npy holds .* but the kernel is float32 \(4, 4\); remove it and"):
            ntk_blocks(one, p, x, block=2, file=file)
    for content in (b"", b"\x93NUMPY", b"rubbish"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"kernel\.npy: cannot be continued \(.*\); remove it and"):
            ntk_blocks(one, p, x, block=2, file=file)
    np.save(file, kernel)
    fingerprint = json.loads(kept)["fingerprint"]
    for done in (None, 5, [1], [["a", "b"]], [[1, 2, 3]]):
        record.write_text(json.dumps({"fingerprint": fingerprint, "done": done}))
        with pytest.raises(InputError, match=r"kernel\.npy: cannot be continued \("):
            ntk_blocks(one, p, x, block=2, file=file)
    for content in ("[" * 100000, "{", '{"done": ' + "9" * 5000 + "}"):
        record.write_text(content)
        with pytest.raises(InputError, match=r"kernel\.npy\.json: is not valid JSON \(.*; remove it and"):
            ntk_blocks(one, p, x, block=2, file=file)
    record.write_text(kept)
    np.testing.assert_array_equal(ntk_blocks(one, p, x, block=2, file=file), kernel)


def with_a_constant(scale):
    """A function whose array belongs to a program that it calls."""
    factors = jnp.full(4, scale)
    return lambda p, x: jax.jit(lambda row: jnp.tanh(row * factors) @ p["w"])(x).sum()


def with_a_rule(scale):
    """A function whose derivative is another one than its program's."""

    @jax.custom_vjp
    def layer(w, x):
        return jnp.tanh(x @ w)

    layer.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda saved, ct: (scale * saved[1].T @ ct, ct @ saved[0].T))
    return lambda p, x: layer(p["w"], x).sum()


def test_numbers_that_do_not_count_are_part_of_the_computation(tmp_path):
    x, file = jnp.ones((4, 2)), tmp_path / "kernel.npy"

    def scaled(p, x):
        return p["scale"] * jnp.dot(p["w"], x)

    kernel = ntk_blocks(scaled, {"w": jnp.ones(2), "scale": 2.0}, x, parameters="w", block=2, file=file)
    np.testing.assert_allclose(kernel, 8.0)
    with pytest.raises(InputError, match="holds blocks of another function"):
        ntk_blocks(scaled, {"w": jnp.ones(2), "scale": 3.0}, x, parameters="w", block=2, file=file)


@pytest.mark.parametrize("make", [with_a_constant, with_a_rule])
def test_neither_does_a_function_with_other_arrays_or_rules(tmp_path, make):
    rng = np.random.default_rng(0)
    p, x = {"w": jnp.asarray(rng.normal(size=(4, 3)))}, jnp.asarray(rng.normal(size=(4, 5, 4)))
    file = tmp_path / "kernel.npy"
    first = np.array(ntk_blocks(make(1.0), p, x, block=2, file=file))
    np.testing.assert_array_equal(ntk_blocks(make(1.0), p, x, block=2, file=file), first)  # made anew, but the same
    with pytest.raises(InputError, match="holds blocks of another function"):
        ntk_blocks(make(3.0), p, x, block=2, file=file)


def test_memory_bounds_the_block():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(64, 64)), np.float32)
    x = jnp.asarray(rng.normal(size=(256, 32, 64)), np.float32)

    def deep(p, x):
        for _ in range(4):
            x = jnp.tanh(x @ p)
        return x.sum()

    def needed(block):
        part = jax.ShapeDtypeStruct((block, 32, 64), np.float32)
        compiled = jax.jit(lambda p, a, b: ntk(deep, p, a, b, method="transform")).lower(p, part, part).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = block_for(deep, p, x, 4 * 2**20), block_for(deep, p, x, 16 * 2**20)
    assert 2 <= few < many <= 256
    assert needed(few) <= 4 * 2**20 < needed(3 * few)
    with pytest.raises(InputError, match="is too little: a block of 2 examples takes"):
        block_for(deep, p, x, 1000)
    got = ntk_blocks(deep, p, x[:20], memory=4 * 2**20)
    np.testing.assert_allclose(got, ntk(deep, p, x[:20]), rtol=1e-4, atol=1e-3)


def test_block_and_memory_exclude_each_other():
    p, x = inputs(4)
    with pytest.raises(InputError, match="two ways to say the same"):
        ntk_blocks(one, p, x, block=2, memory=10**9)
    with pytest.raises(InputError, match="block=0 must be at least 1"):
        ntk_blocks(one, p, x, block=0)
