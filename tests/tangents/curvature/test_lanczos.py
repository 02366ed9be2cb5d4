"""Quadratic forms of functions of a Hessian, and spectra, against dense eigendecompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import InputError
from lensjax.tangents import curvature_operator, per_example_quadratic_forms, quadratic_form, spectrum


def symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    return (q * np.asarray(eigenvalues)) @ q.T


def operator_of(matrix):
    matrix = jnp.asarray(matrix)
    return curvature_operator(lambda p, b: 0.5 * p["w"] @ matrix @ p["w"], {"w": jnp.zeros(len(matrix))}, jnp.ones(1))


def applied(matrix, v, g):
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return float(np.sum(g(eigenvalues) * (vectors.T @ v) ** 2))


DENSE = {
    "identity": lambda lam: lam,
    "positive_part": lambda lam: np.maximum(lam, 0),
    "pseudo_inverse": lambda lam: np.where(np.abs(lam) > 1e-9, 1 / np.where(np.abs(lam) > 1e-9, lam, 1), 0),
}


@pytest.mark.parametrize("function", list(DENSE))
def test_forms_of_a_small_matrix_are_exact(function):
    with jax.enable_x64(True):
        matrix = symmetric(np.r_[-2.0, -0.5, 0, 0, 0, np.linspace(0.1, 5, 9)])
        v = np.random.default_rng(1).normal(size=14)
        form = quadratic_form(operator_of(matrix), {"w": jnp.asarray(v)}, function, steps=50)
        assert form.value == pytest.approx(applied(matrix, v, DENSE[function]), rel=1e-8)
        assert form.steps <= 13  # the eigenvalue 0 threefold is one direction of v
        assert form.residual < 1e-7
        assert form.weights.sum() == pytest.approx(1)


def test_forms_of_a_larger_matrix_converge_and_say_how_far():
    with jax.enable_x64(True):
        matrix = symmetric(np.r_[np.linspace(-1, 1, 280), np.linspace(2, 30, 20)])
        v = np.random.default_rng(1).normal(size=300)
        operator, want = operator_of(matrix), applied(matrix, v, DENSE["positive_part"])
        forms = [quadratic_form(operator, {"w": jnp.asarray(v)}, steps=k) for k in (3, 12, 40)]
        errors = [abs(f.value / want - 1) for f in forms]
        assert errors[2] < 1e-3
        assert errors[2] < errors[0]
        assert [f.steps for f in forms] == [3, 12, 40]
        assert operator.matvecs == 55
        assert forms[2].change < 1e-3 < forms[0].change
        # v^T H v is exact after one step.
        one = quadratic_form(operator, {"w": jnp.asarray(v)}, "identity", steps=1)
        assert one.value == pytest.approx(v @ matrix @ v, rel=1e-12)
        # A function of one's own.
        squares = quadratic_form(operator, {"w": jnp.asarray(v)}, np.square, steps=2)
        assert squares.value == pytest.approx(np.sum((matrix @ v) ** 2), rel=1e-10)


def test_spectrum():
    with jax.enable_x64(True):
        eigenvalues = np.r_[np.linspace(-1, 1, 60), 8.0, 10.0]
        found = spectrum(operator_of(symmetric(eigenvalues)), key=jax.random.key(0), probes=6, steps=30)
        assert found.largest == pytest.approx(10, rel=1e-8)
        assert found.smallest == pytest.approx(-1, abs=0.02)
        assert found.weights.sum() == pytest.approx(1)
        assert found.weights @ found.eigenvalues == pytest.approx(eigenvalues.mean(), abs=0.15)
        assert found.weights[found.eigenvalues > 5].sum() == pytest.approx(2 / 62, abs=0.03)


def loss(params, batch):
    x, y = batch["x"], batch["y"]
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean(jnp.square(hidden @ params["second"]["kernel"] - y))


def test_forms_of_each_example_and_layer():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)

        def draw(*shape):
            return jnp.asarray(rng.normal(size=shape))

        params = {"first": {"bias": draw(4), "kernel": draw(3, 4)}, "second": {"kernel": draw(4, 2)}}
        v = jax.tree.map(lambda a: draw(*a.shape), params)
        batch = {"x": draw(5, 3), "y": draw(5, 2)}
        found = per_example_quadratic_forms(loss, params, v, batch, steps=20)
        assert {name: a.shape for name, a in found.items()} == {"first": (5,), "second": (5,)}
        vector, unravel = jax.flatten_util.ravel_pytree(params)
        along = jax.flatten_util.ravel_pytree(v)[0]
        hessian = jax.jit(lambda one: jax.hessian(lambda u: loss(unravel(u), one))(vector))
        negative = 0
        for i in range(5):
            matrix = np.asarray(hessian({name: a[i : i + 1] for name, a in batch.items()}))
            for name, own in (("first", slice(0, 16)), ("second", slice(16, 24))):
                want = applied(matrix[own, own], along[own], DENSE["positive_part"])
                assert found[name][i] == pytest.approx(want, rel=1e-8)
                negative += np.linalg.eigvalsh(matrix[own, own])[0] < -1e-6
        # Blocks whose parameters do not stand side by side.
        apart = per_example_quadratic_forms(
            loss, params, v, batch, steps=20, by_layer=lambda path: path.rpartition(".")[2]
        )
        matrix = np.asarray(hessian({name: a[:1] for name, a in batch.items()}))
        for name, own in (("bias", np.arange(4)), ("kernel", np.arange(4, 24))):
            want = applied(matrix[np.ix_(own, own)], along[own], DENSE["positive_part"])
            assert apart[name][0] == pytest.approx(want, rel=1e-8)
        crossed = per_example_quadratic_forms(
            loss, params, v, batch, steps=20, by_layer=lambda path: "odd" if path == "first.kernel" else "even"
        )
        own = np.r_[0:4, 16:24]
        want = applied(matrix[np.ix_(own, own)], along[own], DENSE["positive_part"])
        assert crossed["even"][0] == pytest.approx(want, rel=1e-8)
        assert negative > 0  # the truncation has something to cut
        plain = per_example_quadratic_forms(loss, params, v, batch, steps=20, function="identity")
        assert (plain["first"] < found["first"] + 1e-12).all()


def test_forms_of_half_precision_weights():
    """Products are rounded to eight bits; the basis must not be, or it is no basis after a few steps."""
    eigenvalues = np.r_[-20.0, np.linspace(0, 1, 200), 30.0, 50.0]

    def f(params, batch):
        return 0.5 * jnp.sum(jnp.square(params["w"].astype(jnp.float32)) * jnp.asarray(eigenvalues, jnp.float32))

    params, v = {"w": jnp.zeros(203, jnp.bfloat16)}, {"w": jnp.ones(203, jnp.bfloat16)}
    form = quadratic_form(curvature_operator(f, params, jnp.ones(1)), v, steps=12)
    assert form.steps == 12
    want = np.maximum(eigenvalues, 0).sum()
    assert form.value == pytest.approx(want, rel=0.01)
    np.testing.assert_allclose(
        per_example_quadratic_forms(f, params, v, jnp.ones((2, 1)), steps=12)["w"], [want] * 2, rtol=0.01
    )


@pytest.mark.parametrize("function", list(DENSE))
def test_forms_of_a_large_matrix_in_float32(function):
    """Above 2^20 parameters, with few different eigenvalues, so that Lanczos ends with the exact value."""
    size, rng = 2**20 + 77, np.random.default_rng(2)
    eigenvalues = rng.choice([-3.0, 0.0, 1.0, 7.0, 20.0], size)
    v = rng.normal(size=size).astype(np.float32)

    def f(params, batch):
        return 0.5 * jnp.sum(jnp.square(params["w"]) * batch)

    operator = curvature_operator(f, {"w": jnp.zeros(size)}, jnp.asarray(eigenvalues, jnp.float32))
    form = quadratic_form(operator, {"w": jnp.asarray(v)}, function, steps=5)
    want = np.sum(DENSE[function](eigenvalues) * np.square(v, dtype=np.float64))
    assert form.value == pytest.approx(want, rel=1e-5)


def test_errors():
    operator, v = operator_of(np.eye(3)), {"w": jnp.ones(3)}
    assert quadratic_form(operator, {"w": jnp.zeros(3)}).value == 0
    params, batch = {"w": jnp.ones(3)}, jnp.ones((2, 3))

    def f(params, batch):
        return jnp.mean(jnp.square(batch @ params["w"]))

    cases = [
        (lambda: quadratic_form(operator, v, "root"), "choose one of identity, positive_part, pseudo_inverse"),
        (lambda: quadratic_form(operator, v, steps=0), "steps=0 must be at least 1"),
        (lambda: quadratic_form(operator, {"w": jnp.ones(4)}), "v must have the structure"),
        (lambda: quadratic_form(operator_of(np.full((3, 3), np.nan)), v), "not finite"),
        (lambda: spectrum(operator, key=jax.random.key(0), probes=0), "probes=0 must be at least 1"),
        (lambda: per_example_quadratic_forms(f, params, v, batch, function="root"), "choose one of identity"),
        (lambda: per_example_quadratic_forms(f, params, v, batch, steps=0), "steps=0 must be at least 1"),
        (lambda: per_example_quadratic_forms(f, params, v, batch * jnp.nan), "not finite in w"),
        (
            lambda: per_example_quadratic_forms(f, params, v, (batch, jnp.ones(3))),
            "every leaf needs the examples as its first axis",
        ),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
