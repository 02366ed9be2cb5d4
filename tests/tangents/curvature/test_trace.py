"""Hessian and Gauss-Newton products, traces and quadratic forms against dense float64 matrices."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lensjax_kernels import rademacher_like

from lensjax import InputError
from lensjax.models import init_model
from lensjax.tangents import (
    Composed,
    curvature_operator,
    gauss_newton_product,
    hessian_trace,
    hvp,
    model_loss,
    per_example_quadratic_forms,
)
from lensjax.tangents.curvature.losses import head_gauss_newton

MODELS = {
    "gpt2": {"vocab_size": 11, "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 8},
}


def relative(got, want):
    want = np.asarray(want)
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def mlp(rng=0, sizes=(3, 4, 2)):
    rng = np.random.default_rng(rng)
    layers = {}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers[f"layer{i}"] = {"kernel": jnp.asarray(rng.normal(size=(a, b))), "bias": jnp.asarray(rng.normal(size=b))}
    return layers


def outputs(params, batch):
    x = batch["x"]
    for i, layer in enumerate(params.values()):
        x = (jnp.tanh(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def cross_entropy(logits, batch):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1).mean()


NETWORK = Composed(outputs, cross_entropy)


def examples(n=5, seed=1, features=3, classes=2):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=(n, features))), "y": jnp.asarray(rng.integers(0, classes, n))}


def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


@functools.cache
def hessian_of(f):
    def whole(params, batch):
        vector, unravel = jax.flatten_util.ravel_pytree(params)
        return jax.hessian(lambda v: f(unravel(v), batch))(vector)

    return jax.jit(whole)


def dense(f, params, batch):
    """The Hessian over all parameters, flat, by jax.hessian."""
    return np.asarray(hessian_of(f)(params, batch))


def dense_gauss_newton(outputs, loss, params, batch):
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    z = outputs(params, batch)
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda v: outputs(unravel(v), batch)))(vector)).reshape(z.size, -1)
    middle = np.asarray(jax.hessian(lambda y: loss(y.reshape(z.shape), batch))(z.ravel()))
    return jacobian.T @ middle @ jacobian


def direction(params, seed=4):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), params)


def model_batch(n=3, length=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 11, (n, length))
    labels[0, :2] = -100
    mask = np.ones((n, length), np.int32)
    if n > 1:
        mask[1, 4:] = 0
        labels[1, 4:] = -100
    ids = rng.integers(1, 11, (n, length))
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels), "attention_mask": jnp.asarray(mask)}


@functools.cache
def model(kind):
    instance = init_model({"model_type": kind, **MODELS[kind]}, jax.random.key(0), jnp.float64)
    # Weights of a size that makes every part of the Hessian count.
    rng = np.random.default_rng(5)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.5), nnx.state(instance, nnx.Param))
    nnx.update(instance, state)
    return instance


def plain_loss(instance):
    """The loss of the first of several batches from the logits, by hand."""
    graph, _ = nnx.split(instance, nnx.Param)

    def logits(params, batch):
        own = nnx.merge(graph, params)
        if hasattr(own, "shift_right"):
            return own(batch["input_ids"], batch["attention_mask"], own.shift_right(batch["labels"]))
        return own(batch["input_ids"], batch["attention_mask"])[:, :-1]

    def loss(logits, batch):
        labels = batch["labels"]
        if not hasattr(instance, "shift_right"):
            real = batch["attention_mask"] != 0
            labels = jnp.where(real[:, 1:] & real[:, :-1], labels[:, 1:], -100)
        gold = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(labels == -100, 0, gold)) / jnp.sum(labels != -100)

    return Composed(logits, loss)


@functools.cache
def dense_of_model(kind, matrix):
    f, params = plain_loss(model(kind)), nnx.state(model(kind), nnx.Param)
    if matrix == "hessian":
        return dense(f, params, model_batch())
    return dense_gauss_newton(f.outputs, f.loss, params, model_batch())


def test_products_of_a_network():
    with jax.enable_x64(True):
        params, batch, v = mlp(), examples(), direction(mlp())
        assert relative(flat(hvp(NETWORK, params, v, batch)), dense(NETWORK, params, batch) @ flat(v)) < 1e-12
        want = dense_gauss_newton(outputs, cross_entropy, params, batch)
        got = flat(gauss_newton_product(outputs, cross_entropy, params, v, batch))
        assert relative(got, want @ flat(v)) < 1e-12
        assert np.abs(want - dense(NETWORK, params, batch)).max() > 0.1  # the two matrices differ
        operator = curvature_operator(NETWORK, params, batch, matrix="gauss_newton")
        assert relative(flat(operator @ v), want @ flat(v)) < 1e-12
        assert np.linalg.eigvalsh(want).min() > -1e-12
        assert all(sum(operator.quadratic(direction(params, s)).values()) > 0 for s in range(5))


@pytest.mark.usefixtures("quick_to_compile")
def test_products_of_a_model():
    with jax.enable_x64(True):
        instance, batch = model("gpt2"), model_batch()
        v = direction(nnx.state(instance, nnx.Param))
        want = dense_of_model("gpt2", "hessian") @ flat(v)
        assert relative(flat(jax.jit(lambda v: hvp(instance, v, batch))(v)), want) < 1e-10


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_every_probe_of_a_model_is_that_of_the_dense_matrix(kind, matrix):
    with jax.enable_x64(True):
        instance, batch, key = model(kind), model_batch(), jax.random.key(2)
        estimate = hessian_trace(instance, batch, key=key, probes=4, matrix=matrix, by_layer="parameter", chunk=2)
        if matrix == "gauss_newton":
            assert np.linalg.eigvalsh(dense_of_model(kind, matrix)).min() > -1e-10
        leaves = jax.tree.leaves(nnx.state(instance, nnx.Param))
        bounds = np.cumsum([a.size for a in leaves])[:-1]
        matrix_of = dense_of_model(kind, matrix)
        for row, own in zip(estimate.samples, jax.random.split(jax.random.fold_in(key, 0), 4), strict=True):
            v = flat(rademacher_like(own, leaves))
            want = [p.sum() for p in np.split(v * (matrix_of @ v), bounds)]
            assert relative(row, want) < 1e-10
        assert estimate.trace == pytest.approx(sum(estimate.by_layer.values()), rel=1e-12)
        assert estimate.weight == int(np.sum(model_loss(instance)[0].tokens(batch)))


@pytest.mark.parametrize("bias", [False, True])
def test_gauss_newton_of_the_head_in_chunks(bias):
    with jax.enable_x64(True):
        rng = np.random.default_rng(6)
        shapes = ((7, 3), (5, 3), (5,))[: 2 + bias]
        inputs, tangents = (tuple(jnp.asarray(rng.normal(size=s)) for s in shapes) for _ in range(2))
        labels = jnp.array([0, -100, 4, 2, 2, -100, 1])

        def logits(inputs, batch):
            return inputs[0] @ inputs[1].T + (inputs[2] if bias else 0)

        def loss(logits, batch):
            gold = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[:, None], 1)[:, 0]
            return -jnp.sum(jnp.where(labels == -100, 0, gold))

        want = dense_gauss_newton(logits, loss, inputs, None) @ flat(tangents)
        for chunk in (None, 1, 3):  # the last leaves a piece that is not full
            assert relative(flat(head_gauss_newton(inputs, tangents, labels, chunk=chunk)), want) < 1e-12


def test_the_mean_over_balanced_signs_is_exactly_the_trace_of_each_block():
    with jax.enable_x64(True):
        params, batch = mlp(sizes=(2, 2, 2)), examples(features=2)
        operator = curvature_operator(NETWORK, params, batch)
        _, unravel = jax.flatten_util.ravel_pytree(params)
        # Rows of a Hadamard matrix: the mean of v v^T is the identity, as for random signs in expectation.
        signs = functools.reduce(np.kron, [np.array([[1.0, 1], [1, -1]])] * 4)[:, :12]
        forms = [operator.quadratic(unravel(jnp.asarray(v))) for v in signs]
        diagonal = np.diag(dense(NETWORK, params, batch))
        assert operator.blocks == ("layer0", "layer1")
        for name, want in zip(operator.blocks, (diagonal[:6].sum(), diagonal[6:].sum()), strict=True):
            assert np.mean([form[name] for form in forms]) == pytest.approx(want, rel=1e-12)


def quadratic_function(matrix):
    matrix = jnp.asarray(matrix)
    return lambda params, batch: 0.5 * params["w"] @ matrix @ params["w"] * jnp.mean(batch)


def random_symmetric(size, seed=0, spectrum=None):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (q * (rng.normal(size=size) if spectrum is None else spectrum)) @ q.T


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_standard_errors_are_honest(method):
    with jax.enable_x64(True):
        matrix = random_symmetric(24, spectrum=np.r_[40.0, 25.0, np.linspace(-1, 2, 22)])
        f, params = quadratic_function(matrix), {"w": jnp.ones(24)}
        estimates = [
            hessian_trace(f, params, jnp.ones(1), key=jax.random.key(s), probes=30, method=method) for s in range(100)
        ]
        errors = np.array([(e.trace - np.trace(matrix)) / e.standard_error for e in estimates])
        assert 0.87 < np.mean(np.abs(errors) < 2) < 0.99  # 95 % of a t-distribution
        assert abs(errors.mean()) < 4 / np.sqrt(100)
        spread = np.std([e.trace for e in estimates])
        assert np.mean([e.standard_error for e in estimates]) == pytest.approx(spread, rel=0.2)
        assert {e.matvecs for e in estimates} == {30}
        if method == "hutchinson":  # the error that theory gives
            off = matrix - np.diag(np.diag(matrix))
            assert spread == pytest.approx(np.sqrt(2 * np.sum(off**2) / 30), rel=0.2)
        else:  # two large eigenvalues are found and taken exactly
            assert spread < 0.25 * np.sqrt(2 * np.sum((matrix - np.diag(np.diag(matrix))) ** 2) / 30)


def test_hutch_plus_plus_is_exact_by_block_where_the_rank_is_small():
    with jax.enable_x64(True):
        factors = np.random.default_rng(2).normal(size=(30, 3))
        matrix = jnp.asarray(factors @ factors.T)

        def f(params, batch):
            w = jnp.concatenate([params["a"], params["b"].ravel()])
            return 0.5 * w @ matrix @ w

        params = {"a": jnp.zeros(10), "b": jnp.zeros((4, 5))}
        estimate = hessian_trace(
            f, params, jnp.ones(2), key=jax.random.key(0), probes=12, method="hutch++", by_layer="parameter"
        )
        diagonal = np.sum(factors**2, axis=1)
        want = {"a": diagonal[:10].sum(), "b": diagonal[10:].sum()}
        chex.assert_trees_all_close(estimate.by_layer, want, rtol=1e-10)
        assert estimate.standard_error < 1e-8


def test_hutch_plus_plus_of_half_precision_weights():
    eigenvalues = jnp.asarray(np.r_[100.0, 50.0, 30.0, np.random.default_rng(0).random(200)], jnp.float32)

    def f(params, batch):
        return 0.5 * jnp.sum(jnp.square(params["w"].astype(jnp.float32)) * eigenvalues)

    params = {"w": jnp.ones(203, jnp.bfloat16)}
    estimate = hessian_trace(f, params, jnp.ones(1), key=jax.random.key(0), probes=24, method="hutch++")
    assert estimate.trace == pytest.approx(float(eigenvalues.sum()), rel=0.01)


def test_many_batches_are_averaged_by_weight_and_read_once():
    with jax.enable_x64(True):
        params, key = mlp(), jax.random.key(1)
        parts = [examples(4, 1), examples(2, 2), examples(4, 3)]
        matrices = [dense(NETWORK, params, b) for b in parts]
        v = direction(params)
        got = flat(curvature_operator(NETWORK, params, parts) @ v)
        assert relative(got, (0.4 * matrices[0] + 0.2 * matrices[1] + 0.4 * matrices[2]) @ flat(v)) < 1e-12
        by_hand = curvature_operator(NETWORK, params, parts, weight=lambda b: jnp.where(len(b["y"]) == 2, 1.0, 0.0))
        assert relative(flat(by_hand @ v), matrices[1] @ flat(v)) < 1e-12
        streamed = hessian_trace(NETWORK, params, iter(parts), key=key, probes=3)
        assert (streamed.weight, streamed.matvecs) == (10, 9)
        want = np.zeros(3)
        for number, (batch, matrix) in enumerate(zip(parts, matrices, strict=True)):  # each has signs of its own
            keys = jax.random.split(jax.random.fold_in(key, number), 3)
            signs = [flat(rademacher_like(k, jax.tree.leaves(params))) for k in keys]
            want += [len(batch["y"]) / 10 * v @ matrix @ v for v in signs]
        np.testing.assert_allclose(streamed.samples.sum(1), want, rtol=1e-10)
        one_at_a_time = hessian_trace(NETWORK, params, parts, key=key, probes=3, chunk=1)
        np.testing.assert_allclose(one_at_a_time.samples, streamed.samples, rtol=1e-10)


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_batches_of_a_model_weigh_their_tokens(matrix):
    with jax.enable_x64(True):
        instance, parts = model("gpt2"), [model_batch(2, seed=s) for s in (1, 2)]
        parts[1]["labels"] = parts[1]["labels"].at[0, :4].set(-100)
        # The last of the three batches has no labelled token, and no weight.
        parts.append({**parts[0], "labels": jnp.full_like(parts[0]["labels"], -100)})
        v = direction(nnx.state(instance, nnx.Param))
        products = [flat(curvature_operator(instance, b, matrix=matrix) @ v) for b in parts[:2]]
        tokens = [int(model_loss(instance)[0].tokens(b)) for b in parts]
        assert tokens == [7, 5, 0]
        want = (7 * products[0] + 5 * products[1]) / 12
        assert relative(flat(curvature_operator(instance, parts, matrix=matrix) @ v), want) < 1e-10


def test_chosen_parameters_and_the_rest():
    with jax.enable_x64(True):
        params, batch = mlp(), examples()
        params["steps"] = jnp.arange(3)
        f = Composed(lambda p, b: outputs({k: p[k] for k in ("layer0", "layer1")}, b), cross_entropy)
        operator = curvature_operator(f, params, batch, parameters="layer1.*", by_layer="parameter")
        assert operator.blocks == ("layer1.bias", "layer1.kernel")
        assert operator.size == 10
        v = {**direction(mlp()), "steps": jnp.arange(3)}
        got = operator @ v
        matrix = dense(f, {k: params[k] for k in ("layer0", "layer1")}, batch)
        assert relative(flat(got["layer1"]), matrix[16:, 16:] @ flat(v["layer1"])) < 1e-12
        assert not flat(got["layer0"]).any()
        # Blocks of a name of one's own.
        named = curvature_operator(f, params, batch, parameters="layer*", by_layer=lambda p: p.rpartition(".")[2])
        assert named.blocks == ("bias", "kernel")
        assert curvature_operator(f, params, batch, parameters="layer*", by_layer=False).blocks == ("",)


def test_large_products_in_float32():
    """A loss with more than 2^20 parameters and activations, float32 against float64."""
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(512, 1100)) / 22, "down": rng.normal(size=(1100, 512)) / 33}
    x = rng.normal(size=(1024, 512))

    def f(params, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["up"]) @ params["down"]))

    v = {name: rng.normal(size=a.shape) for name, a in params.items()}
    results = {}
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            own, along = ({n: jnp.asarray(a, dtype) for n, a in tree.items()} for tree in (params, v))
            operator = curvature_operator(f, own, jnp.asarray(x, dtype), by_layer="parameter")
            results[dtype] = operator @ along, operator.quadratic(along)
    for name in params:
        assert relative(results[np.float32][0][name], results[np.float64][0][name]) < 1e-5
        size = np.linalg.norm(v[name]) * np.linalg.norm(results[np.float64][0][name])
        assert abs(results[np.float32][1][name] - results[np.float64][1][name]) < 1e-6 * size


def test_hutch_plus_plus_of_a_large_matrix_in_float32():
    """Above 2^20 parameters, where sums that run in order would lose digits; exact, for the rank is small."""
    shapes = {"a": (700, 1100), "b": (2**19,)}
    rng = np.random.default_rng(3)
    factors = {name: rng.normal(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    assert sum(a.size for a in params.values()) > 2**20

    def f(params, batch):
        along = sum(jnp.sum(batch[name] * params[name], axis=tuple(range(1, 1 + params[name].ndim))) for name in params)
        return 0.5 * jnp.sum(jnp.square(along))

    estimate = hessian_trace(
        f, params, factors, key=jax.random.key(0), probes=12, method="hutch++", by_layer="parameter"
    )
    for name, factor in factors.items():
        assert estimate.by_layer[name] == pytest.approx(np.sum(np.square(factor, dtype=np.float64)), rel=1e-5)


def test_errors():
    params, batch, key = {"w": jnp.ones(3)}, jnp.ones((2, 3)), jax.random.key(0)
    instance = init_model({"model_type": "gpt2", **MODELS["gpt2"]}, key)
    own = nnx.state(instance, nnx.Param)

    def f(params, batch):
        return jnp.mean(jnp.square(batch @ params["w"]))

    cases = [
        (lambda: hvp(f, {}, {}, batch), "params holds no array"),
        (lambda: hessian_trace(f, {}, batch, key=key), "params holds no array"),
        (lambda: hvp(f, params, {"w": jnp.ones(4)}, batch), "v must have the structure, shapes and dtypes of params"),
        (lambda: hvp(lambda p, b: b @ p["w"], params, params, batch), r"one real number, not \['float32\[2\]'\]"),
        (lambda: hessian_trace(lambda p, b: b @ p["w"], params, batch, key=key), "f must return one real number"),
        (lambda: hessian_trace(f, {"w": jnp.arange(3)}, batch, key=key), r"w \(int32\) cannot be differentiated"),
        (lambda: hvp(f, {"w": 1.0}, {"w": 1.0}, batch), r"w \(float\) cannot be differentiated"),
        (lambda: hessian_trace(f, params, batch, key=key, probes=0), "probes=0 must be at least 1"),
        (lambda: hessian_trace(f, params, batch, key=key, probes=2, method="hutch++"), "probes=2 must be at least 3"),
        (lambda: hessian_trace(f, params, batch, key=key, method="exact"), "choose one of hutchinson, hutch"),
        (lambda: hessian_trace(f, params, [], key=key), "batches is empty"),
        (lambda: hessian_trace(f, params, iter([batch]), key=key, method="hutch++"), "give a list"),
        (lambda: curvature_operator(f, params, iter([batch])), "give a list"),
        (lambda: hessian_trace(f, params, batch * jnp.nan, key=key), "batch 0: the curvature is not finite in w"),
        (lambda: hessian_trace(f, params, batch, key=key, weight=lambda b: 0.0), "weigh 0.0 in all"),
        (lambda: hessian_trace(f, params, batch, key=key, matrix="gauss_newton"), "give Composed"),
        (lambda: hessian_trace(f, params, batch, key=key, matrix="fisher"), "choose 'hessian' or 'gauss_newton'"),
        (lambda: hessian_trace(f, params, batch, key=key, parameters="b*"), "selects none of the 1 parameters"),
        (lambda: hessian_trace(None, params, batch, key=key), "not NoneType"),
        (lambda: hvp(instance, own), "mapping with input_ids and labels, not NoneType"),
        (lambda: hessian_trace(instance, {"input_ids": batch}, key=key), r"and labels, not \['input_ids'\]"),
        (lambda: hvp(instance, own, own, model_batch()), "brings its own parameters, so of the 3 arguments"),
        (
            lambda: hessian_trace(instance, own, model_batch(), key=key),
            "brings its own parameters, so of the 2 arguments",
        ),
        (lambda: curvature_operator(instance, own, model_batch()), "leave the parameters out"),
        (lambda: per_example_quadratic_forms(instance, own, own, model_batch()), "leave the parameters out"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    # One probe is a number without an error.
    assert np.isnan(hessian_trace(f, params, batch, key=key, probes=1).standard_error)
