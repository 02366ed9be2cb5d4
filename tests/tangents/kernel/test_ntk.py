"""The public functions: methods against each other and against dense references, shapes, reports, refusals."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import InputError, UnsupportedBackendError, environment
from lensjax.tangents import explain, gradient_norms, ntk, ntk_blocks, ntk_operator


def network(params, example):
    """Pytrees on both sides: two numbers named "a" and three named "b", from a residual layer with a norm."""
    x = example["x"] * example["scale"]
    mean = x.mean(-1, keepdims=True)
    normal = (x - mean) / jnp.sqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + 1e-5)
    first, second = params["layers"]
    h = jax.nn.gelu((normal * params["norm"]) @ first["kernel"] + first["bias"])
    x = x + h @ second["kernel"] + second["bias"]
    return {"a": x[-1, :2], "b": jnp.tanh(x[:, :3]).sum(0)}


def inputs(n, tokens=6, width=4, hidden=8, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape, size=0.5):
        return jnp.asarray(rng.normal(size=shape) * size, dtype)

    params = {
        "norm": 1 + draw(width),
        "layers": [
            {"kernel": draw(width, hidden, size=width**-0.5), "bias": draw(hidden)},
            {"kernel": draw(hidden, width, size=hidden**-0.5), "bias": draw(width)},
        ],
    }
    return params, {"x": draw(n, tokens, width, size=1.0), "scale": 1 + draw(n)}


def flat(params, example):
    return jnp.concatenate(jax.tree.leaves(network(params, example)))


def dense_kernel(params, x1, x2):
    """Float64 kernel (N, C, M, C) from one gradient at a time."""

    def jacobian(x):
        gradient = jax.jit(jax.grad(lambda p, e, c: flat(p, e)[c]))
        rows = []
        for i in range(len(x["scale"])):
            example = jax.tree.map(lambda a, i=i: a[i], x)
            for c in range(5):
                leaves = jax.tree.leaves(gradient(params, example, c))
                rows.append(np.concatenate([np.asarray(leaf).ravel() for leaf in leaves]))
        return np.stack(rows)

    left, right = jacobian(x1), jacobian(x2)
    return (left @ right.T).reshape(len(left) // 5, 5, len(right) // 5, 5)


def worst(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def split(x, n):
    return jax.tree.map(lambda a: a[:n], x), jax.tree.map(lambda a: a[n:], x)


@pytest.mark.parametrize("method", ["transform", "jacobian", "ntvp"])
def test_methods_are_exact_for_all_outputs(method):
    with jax.enable_x64(True):
        params, x = inputs(7)
        x1, x2 = split(x, 4)
        want = dense_kernel(params, x1, x2)
        assert worst(ntk(network, params, x1, x2, method=method), want) < 1e-12
        trace = ntk(network, params, x1, x2, method=method, outputs="trace")
        diagonal = ntk(network, params, x1, x2, method=method, outputs="diagonal")
        np.testing.assert_allclose(trace, np.einsum("icjc->ij", want), rtol=1e-12)
        np.testing.assert_allclose(diagonal, np.einsum("icjc->ijc", want), rtol=0, atol=1e-12 * np.abs(want).max())
        layers = ntk(network, params, x1, x2, method=method, by_layer=True)
        assert set(layers) == {"norm", "layers.0", "layers.1"}
        assert worst(sum(layers.values()), want) < 1e-12


@functools.cache
def large():
    params, x = inputs(9, tokens=128, width=128, hidden=1024)
    x1, x2 = split(x, 5)
    return params, x1, x2, dense_kernel(params, x1, x2), np.einsum("icic->ic", dense_kernel(params, x1, x1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_exact_above_two_to_the_twenty_elements(dtype, tolerance):
    with jax.enable_x64(True):
        params, x1, x2, want, own = large()
        assert 9 * 128 * 1024 > 2**20  # hidden activations
        cast = jax.tree.map(lambda a: a.astype(dtype), (params, x1, x2))
        for method in ("transform", "jacobian"):
            kernel = ntk(network, *cast, method=method)
            assert kernel.dtype == dtype
            assert worst(kernel, want) < tolerance
        norms = gradient_norms(network, *jax.tree.map(lambda a: a.astype(dtype), (params, x1)))
        assert worst(norms**2, own) < tolerance


def test_operator_multiplies_with_the_kernel_and_its_transpose():
    with jax.enable_x64(True):
        params, x = inputs(7)
        x1, x2 = split(x, 4)
        want = dense_kernel(params, x1, x2)
        operator = ntk_operator(network, params, x1, x2)
        rng = np.random.default_rng(1)
        v, u = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
        assert operator.shape == want.shape
        np.testing.assert_allclose(operator @ v, np.einsum("icjk,jk->ic", want, v), rtol=1e-11)
        np.testing.assert_allclose(operator.rmatvec(u), np.einsum("icjk,ic->jk", want, u), rtol=1e-11)
        with pytest.raises(InputError, match=r"multiplies arrays of shape \(3, 5\), not \(4, 5\)"):
            operator @ u


def test_chosen_parameters_by_pattern_and_predicate():
    with jax.enable_x64(True):
        params, x = inputs(4)
        kernels = ntk(network, params, x, parameters="layers.*.kernel")
        same = ntk(network, params, x, parameters=lambda path, leaf: leaf.ndim == 2)
        frozen = ntk(network, params, x, parameters=["norm", "*.bias"])
        np.testing.assert_allclose(kernels, same, rtol=1e-12)
        assert worst(kernels + frozen, dense_kernel(params, x, x)) < 1e-12


def test_auto_says_why_it_materialises():
    def wide(p, e):
        return p["a"] * jnp.sin(e) + p["b"]

    params = {"a": jnp.float32(2.0), "b": jnp.float32(1.0)}
    kernel, report = ntk(wide, params, jnp.arange(6.0).reshape(2, 3), return_report=True)
    s = np.sin(np.arange(6.0))
    np.testing.assert_allclose(kernel.reshape(6, 6), np.outer(s, s) + 1, rtol=1e-5)
    assert (report.method, report.reason) == ("jacobian", "2 parameters are fewer than 3 outputs of an example")


def test_a_while_loop_is_differentiated_forwards():
    def newton(p, e):
        return jax.lax.while_loop(lambda y: jnp.abs(y * y - p * e) > 1e-12, lambda y: (y + p * e / y) / 2, 1.0 + 0 * p)

    with jax.enable_x64(True):
        x = jnp.asarray([2.0, 3.0])
        kernel, report = ntk(newton, jnp.asarray(1.5), x, return_report=True)
        half = np.sqrt(np.asarray(x) / 1.5) / 2
        np.testing.assert_allclose(kernel, np.outer(half, half), rtol=1e-9)
        assert report.method == "jacobian"
        assert "while_loop" in report.reason


def test_a_while_loop_is_refused_where_it_has_to_go_backwards():
    def f(p, e):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 9.0, lambda y: y + p * e, p).sum()

    given = f, jnp.ones(2), jnp.ones((3, 2))
    for method in ("transform", "ntvp"):
        with pytest.raises(InputError, match=f"backwards as method='{method}' needs it; choose method='auto'"):
            ntk(*given, method=method)
    with pytest.raises(InputError, match="backwards as memory=99999 needs it"):
        ntk(*given, method="transform", memory=99999)
    with pytest.raises(InputError, match=r"backwards as gradient_norms needs it; .*method='jacobian'"):
        gradient_norms(*given)


def test_blocks_for_memory_are_refused_under_jit():
    w, x = jnp.ones(256), jnp.ones((64, 256))
    with pytest.raises(InputError, match=r"blocks of \d+ examples only, and blocks cannot be computed under jax.jit"):
        jax.jit(lambda w, x: ntk(jnp.dot, w, x, memory=4 * 64 * 32))(w, x)


def test_report_says_what_is_kept_and_what_is_freed():
    params, x = inputs(4, dtype=np.float32)
    report = explain(network, params, x)
    how = {p: t.how for t in report.treatments for p in t.parameters}
    assert how == {
        "layers.0.bias": "materialized",
        "layers.0.kernel": "contribution",
        "layers.1.bias": "materialized",
        "layers.1.kernel": "contribution",
        "norm": "materialized",
    }
    assert str(report).splitlines()[0] == "NTK by transform (exact in one backward pass): 4 examples, 5 outputs each"
    assert {t.bytes for t in report.materialized} == {4 * 5 * 8 * 4, 4 * 5 * 4 * 4}
    read_by = {p: t.operations for t in report.treatments for p in t.parameters}
    assert read_by["layers.0.kernel"] == ("dot_general",)
    assert (read_by["layers.0.bias"], read_by["norm"]) == (("add",), ("mul",))


def test_report_names_the_readers_in_loops_and_recomputed_regions():
    @jax.checkpoint
    def layer(x, shift, both):
        return jnp.sin(x + shift) * both

    def f(p, e):
        out, _ = jax.lax.scan(lambda x, shift: (layer(x, shift, p["both"]), None), e, p["shifts"])
        return jnp.sum(out - p["both"])

    report = explain(f, {"both": jnp.ones(4), "shifts": jnp.ones((3, 4))}, jnp.ones((2, 4)), method="transform")
    assert {p: t.operations for t in report.treatments for p in t.parameters} == {
        "both": ("mul", "sub"),
        "shifts": ("add",),
    }


def test_the_same_function_is_traced_once():
    traces = []

    def f(p, e):
        traces.append(1)
        return jnp.sum(jnp.tanh(e @ p))

    p, x = jnp.ones((3, 2)), jnp.ones((4, 5, 3))
    first = ntk(f, p, x)
    count = len(traces)
    second = ntk(f, 2 * p, x)
    assert len(traces) == count
    assert not np.allclose(first, second)


class Scaled:
    """Counts how often its method is traced."""

    def __init__(self, scale):
        self.scale, self.traces = scale, 0

    def apply(self, p, e):
        self.traces += 1
        return self.scale * jnp.sum(jnp.tanh(e @ p))

    def other(self, p, e):
        return -jnp.sum(e @ p)


def test_a_bound_method_is_traced_once_and_keeps_nothing_alive():
    p, x = jnp.ones((3, 2)), jnp.ones((4, 5, 3))
    one, two = Scaled(1.0), Scaled(2.0)
    first = ntk(one.apply, p, x)
    count = one.traces
    for _ in range(3):
        np.testing.assert_array_equal(ntk(one.apply, p, x), first)
    assert one.traces == count + 3  # the check of its output, and nothing else
    np.testing.assert_allclose(ntk(two.apply, p, x), 4 * first, rtol=1e-6)
    np.testing.assert_allclose(ntk(one.other, p, x), np.full((4, 4), 2 * 75.0))
    freed = weakref.ref(one)
    del one
    gc.collect()
    assert freed() is None


@dataclasses.dataclass
class Unhashable:
    scale: float
    traces: int = 0

    def __call__(self, p, e):
        self.traces += 1
        return self.scale * jnp.sum(e @ p)


def test_what_cannot_be_hashed_is_compiled_once_in_each_call_and_may_change_between_them():
    p, x = jnp.ones(3), jnp.ones((12, 3))
    f, g = Unhashable(2.0), Scaled(2.0)
    np.testing.assert_allclose(ntk_blocks(f, p, x, block=2), 12.0)
    ntk_blocks(g.apply, p, x, block=2)
    assert f.traces == g.traces  # not once for each of the 21 pairs of blocks
    f.scale = 3.0
    np.testing.assert_allclose(ntk_blocks(f, p, x, block=2), 27.0)
    with pytest.raises(TypeError, match="unhashable"):
        hash(f)


def test_works_inside_jit_and_is_symmetric():
    params, x = inputs(5, dtype=np.float32)
    kernel = jax.jit(lambda p, x: ntk(network, p, x))(params, x)
    matrix = np.asarray(kernel).reshape(25, 25)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-5, atol=1e-6)
    assert np.linalg.eigvalsh(matrix.astype(np.float64)).min() > -1e-4 * np.abs(matrix).max()


def test_a_parameter_that_is_read_by_nothing_has_a_kernel_of_zeros():
    layers = ntk(lambda p, e: jnp.sum(e @ p["w"]), {"idle": jnp.ones(2), "w": jnp.ones(3)}, jnp.ones((2, 4, 3)),
                 by_layer="parameter")  # fmt: skip
    np.testing.assert_array_equal(layers["idle"], np.zeros((2, 2)))
    np.testing.assert_allclose(layers["w"], np.full((2, 2), 48.0))


def test_integers_among_parameters_and_examples_are_constants():
    def f(p, e):
        return jnp.sum(p["w"][e["ids"]] * p["count"])

    p = {"w": jnp.asarray([1.0, 2.0, 3.0]), "count": jnp.int32(2)}
    kernel = ntk(f, p, {"ids": jnp.asarray([[0, 1], [1, 1]])})
    np.testing.assert_allclose(kernel, [[8.0, 8.0], [8.0, 16.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "method='magic' is not known; choose one of auto, transform, jacobian, ntvp"),
        ({"outputs": "some"}, "outputs='some' is not known; choose one of full, trace, diagonal"),
        ({"parameters": "head.*"}, "selects none of the 5 parameters"),
        ({"parameters": lambda path, leaf: False}, "selects none of the 5 parameters"),
        ({"parameters": ["norm", "typo"]}, "parameters: 'typo' selects none of the 5 parameters .layers.0.bias,"),
        ({"parameters": (p for p in ["norm"])}, "parameters=<generator .* or a list of patterns"),
        ({"parameters": 3}, "parameters=3 must be a predicate"),
        ({"by_layer": "paramter"}, "by_layer='paramter' is not known; choose True, 'parameter' or a function"),
        ({"x1": {"x": np.ones((2, 6, 4), np.float32), "scale": np.ones(3, np.float32)}}, "x1: every leaf needs"),
        ({"x2": {"x": np.ones((2, 6, 3), np.float32), "scale": np.ones(2, np.float32)}}, "x1 and x2 must agree"),
        ({"f": 3}, "f must be a function"),
        ({"f": lambda p, e: jnp.argmax(e["x"])}, "must return real floating-point arrays"),
    ],
)
def test_bad_input_is_named(change, message):
    params, x = inputs(2, dtype=np.float32)
    arguments = {"f": network, "x1": x, "x2": None} | change
    f, x1, x2 = (arguments.pop(name) for name in ("f", "x1", "x2"))
    with pytest.raises(InputError, match=message):
        ntk(f, params, x1, x2, **arguments)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (2.0, r"params: b \(float\) cannot be differentiated"),
        (jnp.tanh, r"params: b \(.*\) cannot be differentiated. .* keep functions outside"),
        (jnp.ones(2, jnp.complex64), r"params: b \(complex64\) cannot be differentiated. .* as two real ones"),
    ],
)
def test_parameters_that_are_no_real_arrays_are_named(leaf, message):
    def f(p, e):
        return jnp.real(p["a"] @ e)

    params, x = {"a": jnp.ones(2), "b": leaf}, jnp.ones((3, 2))
    for call in (ntk, gradient_norms, explain, ntk_operator):
        with pytest.raises(InputError, match=message):
            call(f, params, x)
    if not callable(leaf):
        np.testing.assert_allclose(ntk(f, params, x, parameters="a"), 2.0)
    with pytest.raises(InputError, match=r"params: the whole \(complex64\) cannot be"):
        ntk(lambda p, e: jnp.real(p @ e), jnp.ones(2, jnp.complex64), x)


def test_refuses_the_jaxlib_that_is_wrong(monkeypatch):
    import jaxlib

    monkeypatch.setattr(environment, "WRONG_ON_CPU", frozenset({jaxlib.__version__}))
    params, x = inputs(2, dtype=np.float32)
    for refused in (ntk, gradient_norms, ntk_operator):
        with pytest.raises(UnsupportedBackendError, match="computes wrong LayerNorm Jacobians"):
            refused(network, params, x)


def test_another_number_of_parameters_is_another_choice():
    def f(p, x):
        return jnp.outer(p, x).sum(0)

    x = jnp.ones((2, 5))
    assert [explain(f, jnp.ones(n), x).method for n in (3, 300)] == ["jacobian", "transform"]
    assert [explain(f, jnp.ones(4), jnp.ones((2, n))).method for n in (3, 5)] == ["transform", "jacobian"]


def test_objects_that_compare_equal_share_no_program_of_one_that_is_gone():
    class Scaled:
        """As modules do that hash and compare by their fields."""

        def __init__(self, scale):
            self.scale = scale

        def __eq__(self, other):
            return self.scale == other.scale

        def __hash__(self):
            return hash(self.scale)

        def apply(self, w, x):
            return self.scale * jnp.dot(w, x)

    kept, w, x = Scaled(2.0), jnp.ones(3), jnp.eye(3)
    ntk(kept.apply, w, x)
    np.testing.assert_allclose(gradient_norms(Scaled(2.0).apply, w, x), 2.0)
    np.testing.assert_allclose(gradient_norms(kept.apply, jnp.ones(5), jnp.ones((3, 5))), 2.0 * np.sqrt(5), rtol=1e-6)
