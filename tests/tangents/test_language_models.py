"""Kernels of models: GPT-2 of lensjax with every output, and models of Flax NNX, Flax Linen, Equinox and plain JAX."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lensjax import InputError
from lensjax.models import init_model
from lensjax.models.lora import add_lora
from lensjax.tangents import explain, ntk, ntk_blocks, ntk_operator, ntk_outputs
from lensjax.tangents.language_models import model_function
from lensjax.tangents.parameters import WithFrozen, leaf_names

CONFIG = {"model_type": "gpt2", "vocab_size": 23, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 9}


def batch(n=4, length=7):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 23, (n, length))
    labels[0, :3] = -100
    mask = np.ones((n, length), np.int32)
    mask[1, :2] = 0  # padding on the left
    mask[2, 5:] = 0
    ids = rng.integers(0, 23, (n, length))
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels), "attention_mask": jnp.asarray(mask)}


def gpt2(dtype=jnp.float64, **changes):
    model = init_model({**CONFIG, **changes}, jax.random.key(0), dtype)
    # Weights of a size that makes every part of the kernel count.
    nnx.update(model, jax.tree.map(lambda a: a * 5 if a.ndim == 2 else a, nnx.state(model, nnx.Param)))
    return model


def dense_kernel(f, params, x):
    jacobian = jax.jit(jax.vmap(jax.jacrev(f), in_axes=(None, 0)))(params, x)
    rows = np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    return rows @ rows.T


def relative(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def loss_of(model):
    """The mean loss of one example, from the logits and by hand."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def f(params, example):
        one = {name: value[None] for name, value in example.items()}
        logits = nnx.merge(graph, params, rest)(one["input_ids"], one["attention_mask"])[0, :-1]
        real = example["attention_mask"] != 0
        labels = jnp.where(real[1:] & real[:-1], example["labels"][1:], -100)
        gold = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        return -jnp.sum(jnp.where(labels == -100, 0, gold)) / jnp.sum(labels != -100)

    return f, params


@functools.cache
def dense_loss_kernel(tied):
    return dense_kernel(*loss_of(gpt2(tie_word_embeddings=tied)), batch())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("execution", "remat", "tied"), [("unroll", False, True), ("scan", True, True),
                                                          ("scan", False, False)])  # fmt: skip
def test_loss_kernel_of_gpt2(execution, remat, tied, fused):
    with jax.enable_x64(True):
        model = gpt2(tie_word_embeddings=tied)
        model.execution, model.remat = execution, remat
        model.head_chunk = None if fused else 4  # chunks of one's own are products like any other
        f, params = ntk_outputs(model)
        kernel, report = ntk(lambda p, e: f(p, e), params, batch(), return_report=True)
        assert relative(kernel, dense_loss_kernel(tied)) < 1e-10
        readers = {op for t in report.treatments for op in t.operations}
        assert ("head_cross_entropy" in readers) == fused
        # Only biases, scales and shifts are materialised.
        assert all(name.endswith(("bias", "scale")) for t in report.materialized for name in t.parameters)


def test_layers_of_gpt2_add_up_and_read_like_the_model():
    with jax.enable_x64(True):
        model = gpt2()
        model.execution = "scan"
        layers = ntk(model, batch(), by_layer=lambda path: ".".join(path.split(".")[:2]))
        names = {"layers.0", "layers.1", "norm.bias", "norm.scale", "positions.embedding", "tokens.embedding"}
        assert set(layers) == names
        assert relative(sum(layers.values()), np.asarray(ntk(model, batch()))) < 1e-12
        model.execution = "unroll"
        unrolled = ntk(model, batch(), by_layer=lambda path: ".".join(path.split(".")[:2]))
        for name in names:
            np.testing.assert_allclose(layers[name], unrolled[name], rtol=0, atol=1e-12 * np.abs(layers[name]).max())


@pytest.mark.parametrize("output", ["gold_probability", "gold_logit", "projections"])
def test_other_outputs_of_gpt2(output):
    with jax.enable_x64(True):
        model, x = gpt2(), batch(3)
        model.execution = "scan"
        f, params = ntk_outputs(model, output)
        values = jax.vmap(f, (None, 0))(params, x)
        kernel = ntk(model, x, output=output)
        if output == "projections":
            assert kernel.shape == (3, 4, 3, 4)
            kernel = kernel[:, 1, :, 1]
            assert relative(kernel, dense_kernel(lambda p, e: f(p, e)[1], params, x)) < 1e-10
        else:
            assert relative(kernel, dense_kernel(f, params, x)) < 1e-10
        logits = model(x["input_ids"], x["attention_mask"])[0, 2:-1]  # example 0: labels from position 3 on
        gold = x["labels"][0, 3:, None]
        if output == "gold_logit":
            np.testing.assert_allclose(values[0], jnp.take_along_axis(logits, gold, 1).mean(), rtol=1e-12)
        if output == "gold_probability":
            chances = jax.nn.softmax(logits)
            np.testing.assert_allclose(values[0], jnp.take_along_axis(chances, gold, 1).mean(), rtol=1e-12)


def test_between_two_batches_in_float32():
    model = gpt2(jnp.float32)
    model.execution = "scan"
    x = batch()
    first, second = ({k: v[s] for k, v in x.items()} for s in (slice(0, 1), slice(1, None)))
    whole = np.asarray(ntk(model, x))
    assert relative(ntk(model, first, second), whole[:1, 1:]) < 1e-5


def test_functions_of_models_are_kept_between_calls():
    assert ntk_outputs(gpt2(jnp.float32), "loss")[0] is ntk_outputs(gpt2(jnp.float32), "loss")[0]
    with pytest.raises(InputError, match="output='accuracy' is not known; choose one of loss, loss_sum"):
        ntk_outputs(gpt2(jnp.float32), "accuracy")


def sentence(n=4):
    return jnp.asarray(np.random.default_rng(5).integers(0, 11, (n, 6)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        kinds = {"param_dtype": float, "rngs": rngs}
        self.embed = nnx.Embed(11, 8, **kinds)
        self.norm = nnx.LayerNorm(8, **kinds)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, **kinds)
        self.mlp = nnx.Linear(8, 8, **kinds)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(self.norm(x))
        return self.embed.attend(jnp.tanh(self.mlp(self.mlp(x))))


# Flax's attention rounds its scores to float32: alike in both programs only where both are compiled as for users.
@pytest.mark.usefixtures("fully_optimised")
def test_flax_nnx_with_tied_embedding_and_shared_layer():
    with jax.enable_x64(True):
        graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)

        def f(params, ids):
            return jax.nn.logsumexp(nnx.merge(graph, params, rest)(ids)).sum()

        assert relative(ntk(f, params, sentence(), method="transform"), dense_kernel(f, params, sentence())) < 1e-10
        how = {p: t.how for t in explain(f, params, sentence()).treatments for p in t.parameters}
        assert (how["embed.embedding"], how["mlp.kernel"]) == ("factors", "factors")
        assert how["attention.query.kernel"] == "contribution"


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(11, 8, param_dtype=float)(ids)
        x = linen.LayerNorm(param_dtype=float)(x)
        x = x + linen.MultiHeadDotProductAttention(2, param_dtype=float)(x, x)
        return linen.Dense(5, param_dtype=float)(linen.gelu(x))


def test_flax_linen():
    with jax.enable_x64(True):
        model = LinenModel()
        params = model.init(jax.random.key(0), sentence()[0])

        def f(params, ids):
            return jnp.sum(jnp.sin(model.apply(params, ids)))

        assert relative(ntk(f, params, sentence(), method="transform"), dense_kernel(f, params, sentence())) < 1e-10
        how = {p: t.how for t in explain(f, params, sentence()).treatments for p in t.parameters}
        assert how["params.Dense_0.kernel"] == how["params.Embed_0.embedding"] == "contribution"


def test_equinox():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        model = [eqx.nn.Embedding(11, 8, key=keys[0]), eqx.nn.LayerNorm(8), eqx.nn.MLP(8, 3, 16, 2, key=keys[1])]
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def f(params, ids):
            embed, norm, mlp = eqx.combine(params, static)
            return jnp.sum(jnp.cos(jax.vmap(lambda one: mlp(norm(embed(one))))(ids)))

        assert relative(ntk(f, params, sentence(), method="transform"), dense_kernel(f, params, sentence())) < 1e-10
        treatments = explain(f, params, sentence()).treatments
        # Equinox multiplies from the left and looks one row up at a time.
        assert sum(t.how == "contribution" for t in treatments) == 4


def test_plain_jax():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = [
            (jnp.asarray(rng.normal(size=(11, 8))), 0.0 * jnp.ones(8)),
            (jnp.asarray(rng.normal(size=(8, 3))), 0.1),
        ]

        def f(params, ids):
            (embedding, shift), (kernel, offset) = params
            return jnp.sum(jax.nn.log_softmax((embedding[ids] + shift) @ kernel + offset)[:, 0])

        params = jax.tree.map(jnp.asarray, params)
        assert relative(ntk(f, params, sentence(), method="transform"), dense_kernel(f, params, sentence())) < 1e-10


class Named(eqx.Module):
    value: jax.Array


def test_names_of_leaves_called_value():
    class Attention(nnx.Module):
        def __init__(self):
            self.query, self.value = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)), nnx.Param(jnp.ones(2))

    state = nnx.split(Attention(), nnx.Param, ...)[1]
    assert leaf_names(state) == leaf_names(nnx.to_pure_dict(state)) == ("query.kernel", "value")
    both = WithFrozen({"value": jnp.ones(2)}, {"m": Named(jnp.ones(2)), "s": state})
    assert leaf_names(both) == ("value", "(frozen) m.value", "(frozen) s.query.kernel", "(frozen) s.value")
    linen_params = linen.MultiHeadDotProductAttention(1, use_bias=False).init(jax.random.key(0), jnp.ones((2, 2)))
    assert "params.value.kernel" in leaf_names(linen_params)
    assert leaf_names({"m": Named(jnp.ones(2)), "v": nnx.Param({"value": jnp.ones(2)})}) == ("m.value", "v.value")
    plain = {"attn": {name: jnp.ones(2) for name in ("query", "key", "value")}}

    def f(p, e):
        return sum(jnp.vdot(a, e) for a in jax.tree.leaves(p))

    x = jnp.ones((2, 2))
    assert set(ntk(f, plain, x, by_layer=True)) == {"attn"}
    np.testing.assert_allclose(ntk(f, plain, x, parameters="attn.value"), 2.0)


def test_an_output_is_of_models_only():
    for call in (ntk, ntk_blocks, explain, ntk_operator):
        with pytest.raises(InputError, match="output='gold_logit' is one of language models, but f is a function"):
            call(lambda w, x: w @ x, jnp.ones(2), jnp.ones((3, 2)), output="gold_logit")


def test_frozen_weights_under_adapters_are_arguments():
    with jax.enable_x64(True):
        models = [add_lora(gpt2(), rank=2, alpha=4, key=jax.random.key(seed)) for seed in (1, 2)]
        # The second factor of an adapter begins as zeros, and the first would have no gradient.
        rng = np.random.default_rng(0)
        for model in models:
            state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), nnx.state(model, nnx.Param))
            nnx.update(model, state)
        functions = [model_function(model, "loss") for model in models]
        assert functions[0][0] is functions[1][0]
        x = batch()
        closed = jax.make_jaxpr(functions[0][0])(functions[0][1], {name: a[0] for name, a in x.items()})
        assert sum(np.size(c) for c in closed.consts) < 100
        for model in models:
            f, params = loss_of(model)
            want = dense_kernel(f, params, x)
            kernel, report = ntk(model, x, return_report=True)
            assert relative(kernel, want) < 1e-10
            named = {name for t in report.treatments for name in t.parameters}
            assert named == {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
            assert relative(ntk_blocks(model, x, block=3), want) < 1e-10
            assert relative(ntk_operator(model, x).dense(), want) < 1e-10
