"""Golden values in powerlaw_golden.json are powerlaw 2.0.0's; written by `python tests/selectors/test_spectra.py`."""

import json
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special

from lensjax import data
from lensjax.errors import InputError
from lensjax.selectors import NlpMetrics, nlp_metrics
from lensjax.selectors.spectra import eigenvalues, fit_tails

GOLDEN = Path(__file__).with_name("powerlaw_golden.json")


def real_matrices():
    """Three weight matrices of a packaged model."""
    from safetensors.numpy import load_file

    weights = load_file(Path(data.path("demo", "models", "novels-medium", "model.safetensors")))
    matrices = sorted(name for name, value in weights.items() if value.ndim == 2 and min(value.shape) >= 64)
    return {name: weights[name].astype(np.float64) for name in matrices[:3]}


def spectra():
    """Sets of numbers by formula, so that no generator's version matters, and real spectra."""
    at = (np.arange(160) + 0.5) / 160
    wobble = 1 + 0.05 * np.sin(7 * np.arange(160))
    found = {
        "heavy": 3 * (1 - at) ** (-1 / 1.3) * wobble,
        "light": 0.2 * (1 - at) ** (-1 / 3.5) * wobble,
        "truncated": 0.1 + 2 * (-np.log(1 - at)) ** 1.7 * wobble,
    }
    for name, matrix in real_matrices().items():
        found[name] = np.linalg.svd(matrix, compute_uv=False) ** 2
    return {name: np.sort(values) for name, values in found.items()}


def peer(values):
    """Fit with powerlaw, its exponents allowed to be what they are."""
    import powerlaw

    wide = {"alpha": [-60, 60], "Lambda": [0, None]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own renamed properties
        fit = powerlaw.Fit(values, parameter_ranges={"alpha": [1, None]}, verbose=0)
        law = powerlaw.Truncated_Power_Law(xmin=fit.xmin, data=values, parameter_ranges=wide, verbose=0)
    found = (fit.alpha, fit.xmin, fit.D, fit.n_tail, law.alpha, law.Lambda)
    return dict(
        zip(("pl_alpha", "xmin", "distance", "tail", "e_tpl_alpha", "e_tpl_lambda"), map(float, found), strict=True)
    )


def log_likelihood(values, xmin, alpha, rate):
    """Mean log-likelihood of the truncated law, its normaliser by adaptive quadrature over log(x / xmin)."""
    s = values[values >= xmin] / xmin
    if rate == 0:
        return float(-alpha * np.log(s).mean() + math.log(alpha - 1))
    top = max(40 / max(rate * xmin, 1e-12), 1.0)
    peak = max(0.0, (1 - alpha) * math.log(max((1 - alpha) / (rate * xmin), 1.0)) - (1 - alpha)) if alpha < 1 else 0.0
    total, _ = scipy.integrate.quad(
        lambda u: math.exp((1 - alpha) * u - rate * xmin * math.expm1(u) - peak),
        0,
        math.log1p(top + 10 * abs(1 - alpha) / (rate * xmin)),
        limit=500,
        epsabs=0,
        epsrel=1e-11,
    )
    return float(-alpha * np.log(s).mean() - rate * xmin * (s.mean() - 1) - math.log(total) - peak)


def assert_close(values, found, at, want):
    assert found.xmin[at] == pytest.approx(want["xmin"], rel=1e-12)
    assert found.tail[at] == want["tail"]
    assert found.pl_alpha[at] == pytest.approx(want["pl_alpha"], rel=1e-8)
    assert found.distance[at] == pytest.approx(want["distance"], rel=1e-8)
    # powerlaw stops its search some digits early: ours is at least as likely and close.
    ours = log_likelihood(values, want["xmin"], found.e_tpl_alpha[at], found.e_tpl_lambda[at])
    theirs = log_likelihood(values, want["xmin"], want["e_tpl_alpha"], want["e_tpl_lambda"])
    assert ours >= theirs - 1e-10
    assert ours <= theirs + 1e-4
    assert found.e_tpl_alpha[at] == pytest.approx(want["e_tpl_alpha"], rel=2e-2, abs=2e-2)
    assert found.e_tpl_lambda[at] == pytest.approx(want["e_tpl_lambda"], rel=3e-2, abs=1e-6)


def test_laws_are_those_that_powerlaw_finds():
    golden = json.loads(GOLDEN.read_text())["fits"]
    sets = spectra()
    assert list(golden) == list(sets)
    found = fit_tails(list(sets.values()))
    assert len(found.pl_alpha) == len(sets) == 6
    for at, (name, values) in enumerate(sets.items()):
        assert_close(values, found, at, golden[name])


@pytest.mark.peer
def test_laws_are_those_of_the_powerlaw_package():
    rng = np.random.default_rng(0)
    sets = {**spectra(), "drawn": np.sort(rng.pareto(1.5, 200) + 1)}
    for name, scale in (("gaussian", None), ("student", 2.5)):
        w = rng.standard_normal((300, 120)) if scale is None else rng.standard_t(scale, (300, 120))
        sets[name] = np.linalg.eigvalsh(w.T @ w)
    found = fit_tails(list(sets.values()))
    assert len(found.pl_alpha) == len(sets) == 9
    for at, values in enumerate(sets.values()):
        assert_close(values, found, at, peer(values))


def test_truncated_law_is_where_the_likelihood_is_largest():
    for name in ("truncated", "light"):
        values = spectra()[name]
        found = fit_tails([values])
        xmin = float(found.xmin[0])

        def loss(v, values=values, xmin=xmin):
            return -log_likelihood(values, xmin, v[0], math.exp(v[1]))

        start = [found.e_tpl_alpha[0] + 0.3, math.log(found.e_tpl_lambda[0]) + 0.5]
        best = scipy.optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
        assert found.e_tpl_alpha[0] == pytest.approx(best.x[0], rel=1e-4, abs=1e-4)
        assert found.e_tpl_lambda[0] == pytest.approx(math.exp(best.x[1]), rel=1e-4)


def test_truncated_law_of_a_narrow_bump():
    """Its exponent is far below 0, and the law's mass far beyond what a decay at that rate alone would need."""
    values = np.array([1, 1.9, 2.0, 2.05])
    found = fit_tails([values])
    tail = values[1:] / values[1]
    assert (found.xmin[0], found.tail[0]) == (values[1], len(tail))

    def loss(v):
        alpha, c = v[0], math.exp(v[1])
        # The normaliser in closed form: an upper incomplete gamma function.
        shape = 1 - alpha
        total = scipy.special.gammaln(shape) + math.log(scipy.special.gammaincc(shape, c)) - shape * v[1]
        return alpha * np.log(tail).mean() + c * tail.mean() + total

    start = [-300, math.log(350)]
    options = {"xatol": 1e-5, "fatol": 1e-11, "maxiter": 2000}
    best = scipy.optimize.minimize(loss, start, method="Nelder-Mead", options=options)
    assert best.success
    assert best.x[0] < -300
    assert found.e_tpl_alpha[0] == pytest.approx(best.x[0], rel=1e-4)
    assert found.e_tpl_lambda[0] * values[1] == pytest.approx(math.exp(best.x[1]), rel=1e-4)


def test_a_tail_has_three_numbers_at_least():
    """The last two would be nearest to a power law: 0.37 away from theirs, 0.44 the last three, 0.49 all four."""
    values = np.array([5, 9.9, 10, 10.001])
    found = fit_tails([values])
    assert (found.xmin[0], found.tail[0]) == (9.9, 3)
    exponent = 3 / np.log(values[1:] / values[1]).sum()
    assert found.distance[0] == pytest.approx(1 - (10 / 9.9) ** -exponent - 1 / 3, rel=1e-9)


def test_start_of_the_tail_is_that_of_plain_loops():
    values = spectra()["light"]
    best = (math.inf, 0.0, 0.0)
    for start in range(len(values) - 2):
        tail = values[start:]
        alpha = 1 + len(tail) / sum(math.log(x / tail[0]) for x in tail)
        distance = max(abs(1 - (x / tail[0]) ** (1 - alpha) - i / len(tail)) for i, x in enumerate(tail))
        best = min(best, (distance, tail[0], alpha))
    found = fit_tails([values])
    assert (found.distance[0], found.xmin[0], found.pl_alpha[0]) == pytest.approx(best, rel=1e-10)


def test_a_tail_that_is_heavier_than_its_power_law_is_not_truncated():
    at = (np.arange(60) + 0.5) / 60
    values = (1 - at) ** (-1 / 2.5)
    values[-1] *= 60
    found = fit_tails([values])
    assert found.e_tpl_lambda[0] == 0
    assert found.e_tpl_alpha[0] == found.pl_alpha[0]


def test_scale_of_the_numbers_does_not_matter():
    values = spectra()["truncated"]
    found = fit_tails([values, 1e6 * values])
    assert found.pl_alpha[1] == pytest.approx(found.pl_alpha[0], rel=1e-9)
    assert found.e_tpl_alpha[1] == pytest.approx(found.e_tpl_alpha[0], rel=1e-6)
    assert found.e_tpl_lambda[1] == pytest.approx(1e-6 * found.e_tpl_lambda[0], rel=1e-6)


def test_fits_do_not_depend_on_what_is_fitted_with_them():
    sets = spectra()
    together, alone = fit_tails([sets["heavy"], np.tile(sets["light"], 1)[:90]]), fit_tails([sets["light"][:90]])
    assert together.pl_alpha[1] == pytest.approx(alone.pl_alpha[0], rel=1e-12)
    assert together.e_tpl_lambda[1] == pytest.approx(alone.e_tpl_lambda[0], rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((70, 96), np.float32), ((1500, 700), np.float32), ((64, 64), "bfloat16")]
)
def test_eigenvalues_are_squares_of_singular_values(shape, dtype):
    """One of the shapes has more than 2^20 elements."""
    rng = np.random.default_rng(3)
    matrix = jnp.asarray(rng.standard_normal(shape), dtype)
    want = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[::-1] ** 2
    found = eigenvalues(matrix)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-11 * want[-1])


def test_metrics_of_a_model():
    rng = np.random.default_rng(1)
    params = {
        "norm": jnp.ones(128),
        "head": jnp.asarray(rng.standard_normal((128, 4)), jnp.float32),
        "layers": {"kernel": jnp.asarray(rng.standard_t(3, (2, 100, 80)), jnp.float32)},
        "tokens": jnp.asarray(rng.standard_normal((200, 60)), jnp.float32),
    }
    found = nlp_metrics(params)
    assert isinstance(found, NlpMetrics)
    assert found.names == ("layers.kernel[0]", "layers.kernel[1]", "tokens")
    values = [eigenvalues(params["layers"]["kernel"][i]) for i in range(2)]
    np.testing.assert_array_equal(found.pl_alpha[:2], fit_tails(values).pl_alpha)
    np.testing.assert_allclose(
        found.log_norm[0], np.log10(np.sum(np.asarray(params["layers"]["kernel"][0]) ** 2.0)), rtol=1e-6
    )
    assert found.log_spectral_norm[1] == pytest.approx(np.log10(values[1][-1]))
    assert found.mean() == pytest.approx(found.pl_alpha.mean())
    assert found.mean("e_tpl_lambda") == pytest.approx(found.e_tpl_lambda.mean())
    assert nlp_metrics(params, include=lambda name: name == "tokens").names == ("tokens",)
    assert nlp_metrics(params, min_eigenvalues=70).names == ("layers.kernel[0]", "layers.kernel[1]")


def test_heavier_tails_have_smaller_exponents():
    rng = np.random.default_rng(2)
    heavy, light = (
        nlp_metrics({str(i): jnp.asarray(rng.standard_t(freedom, (300, 150)), jnp.float32) for i in range(3)})
        for freedom in (2, 30)
    )
    assert heavy.pl_alpha.max() < light.pl_alpha.min()


def test_ours_are_the_loaded_weights():
    """A Flax model's state is a pytree like any other."""
    from flax import nnx

    from lensjax.models import load_model

    model = load_model(data.path("demo", "models", "bible-tiny"))
    found = nlp_metrics(nnx.state(model, nnx.Param), min_eigenvalues=32)
    assert any("tokens" in name for name in found.names)
    assert np.all(found.pl_alpha > 1)
    assert len(found.names) == sum(
        value.ndim == 2 and min(value.shape) >= 32 for value in jax.tree.leaves(nnx.state(model, nnx.Param))
    )


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(InputError, match="no weight matrix has at least 50 rows and columns"):
        nlp_metrics({"w": jnp.ones((40, 400))})
    with pytest.raises(InputError, match="b: this weight matrix is not finite"):
        nlp_metrics({"b": jnp.full((60, 60), jnp.nan)})
    with pytest.raises(InputError, match="b: this weight matrix is 0 everywhere"):
        nlp_metrics({"b": jnp.zeros((60, 60))})
    with pytest.raises(InputError, match="spectrum 0 has 1 different positive eigenvalue"):
        fit_tails([np.array([0.0, 0, 3, 3])])
    with pytest.raises(InputError, match="metric 'alpha' is unknown"):
        nlp_metrics({"w": jnp.asarray(np.random.default_rng(0).standard_normal((60, 60)))}).mean("alpha")


if __name__ == "__main__":
    from importlib.metadata import version

    fits = {name: peer(values) for name, values in spectra().items()}
    GOLDEN.write_text(json.dumps({"powerlaw": version("powerlaw"), "fits": fits}, indent=1) + "\n")
