"""The bound's terms by hand, falls with n, phases, and the whole way from a network that was really trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import InputError
from lensjax.bound import compare_phases, corollary_bound, fit_power_law, generalization_bound, layer_distances
from lensjax.tangents import hessian_trace, per_example_quadratic_forms


def test_terms_by_hand():
    bound = generalization_bound(
        2.0,
        400,
        {"a": 0.5, "b": 3.0},
        quadratic_forms={"a": 4.0, "b": 9.0},
        loss_bound=16.0,
        epsilon=0.5,
        test_loss=3.5,
    )
    assert {name: t.value for name, t in bound.layers.items()} == {"a": pytest.approx(0.6), "b": pytest.approx(0.9)}
    assert bound.layers["b"].distance == 3.0
    assert (bound.empirical, bound.complexity, bound.value) == (3.0, pytest.approx(1.5), pytest.approx(4.5))
    assert bound.proposition == pytest.approx(1.5 / 20 * 4 * np.sqrt(2 * 13))
    assert bound.proposition >= bound.complexity
    assert bound.remainder == pytest.approx(400**-0.75)
    assert bound.violated is False
    assert bound.looseness == pytest.approx(4.5 / 3.5)
    assert (
        generalization_bound(2.0, 400, {"a": 1.0}, quadratic_forms={"a": 0.0}, loss_bound=2.0, test_loss=2.3).violated
        is True
    )
    assert generalization_bound(2.0, 400, {"a": 1.0}, quadratic_forms={"a": 0.0}, loss_bound=2.0).violated is None


def test_traces_stand_for_noise_of_one_size():
    bound = generalization_bound(1.0, 100, {"a": 2.0, "b": 1.0}, traces={"a": 3.0, "b": -5.0}, loss_bound=3.0)
    assert bound.form == "isotropic"
    assert bound.layers["a"].form == pytest.approx(12.0)
    assert bound.layers["a"].value == pytest.approx(1.1 * 0.6)
    assert bound.layers["b"].value == 0.0


def test_distances_of_layers():
    initial = {"up": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}, "scale": jnp.ones(3)}
    params = {"up": {"kernel": jnp.ones((2, 2)), "bias": jnp.full(2, 2.0)}, "scale": jnp.ones(3)}
    assert layer_distances(params, initial) == {"scale": 0.0, "up": pytest.approx(np.sqrt(12))}
    with pytest.raises(InputError, match="same structure"):
        layer_distances(params, {"up": initial["up"]})
    with pytest.raises(InputError, match="by_layer='layer' is not known"):
        layer_distances(params, initial, by_layer="layer")


def test_a_leaf_called_value_is_named():
    attention = {"attn": {"query": jnp.ones(2), "value": jnp.ones(3)}}
    moved = jax.tree.map(lambda a: 2 * a, attention)
    assert layer_distances(moved, attention) == {"attn": pytest.approx(np.sqrt(5))}
    assert set(layer_distances(moved, attention, by_layer="parameter")) == {"attn.query", "attn.value"}


def test_fall_of_a_power():
    sizes = np.array([50, 100, 200, 400, 800])
    fall = fit_power_law(sizes, 7.0 * sizes**-0.4)
    assert fall.exponent == pytest.approx(0.4)
    assert fall.prefactor == pytest.approx(7.0)
    assert fall.r_squared == pytest.approx(1.0)
    assert corollary_bound(2.0, 3200, fall) == pytest.approx(2.2 + 7 * 3200**-0.4)
    # The standard error covers as it should.
    rng = np.random.default_rng(0)
    found = [fit_power_law(sizes, sizes**-0.4 * np.exp(0.1 * rng.normal(size=5))) for _ in range(400)]
    inside = np.mean([abs(f.exponent - 0.4) < 3.182 * f.standard_error for f in found])  # 95 % of t with 3 degrees
    assert 0.92 < inside < 0.98
    assert np.isnan(fit_power_law([1, 2], [1.0, 2.0]).standard_error)


def test_phases_by_trace_and_by_loss():
    sizes = 50.0 * 2.0 ** np.arange(9)
    traces = 1e4 / (300**0.8 + sizes**0.8) + 0.1
    losses = 30 / (1500**0.5 + sizes**0.5) + 2.0
    phases = compare_phases(sizes, traces, losses)
    assert phases.transition_by_trace == pytest.approx(300, rel=0.02)
    assert phases.transition_by_loss == pytest.approx(1500, rel=0.02)
    assert phases.by_trace == ("pre-power",) * 3 + ("power",) * 6
    assert phases.by_loss == ("pre-power",) * 5 + ("power",) * 4
    assert phases.status_of_trace.startswith("converged")
    assert phases.fall.exponent > 0
    few = compare_phases(sizes[:3], traces[:3], losses[:3])
    assert few.by_trace == ("unknown",) * 3
    assert few.status_of_trace.startswith("failed")
    rising = compare_phases(sizes, 100 + sizes / 10, losses)
    assert rising.by_trace == ("unknown",) * 9
    assert np.isnan(rising.transition_by_trace)
    assert rising.by_loss == phases.by_loss


def test_from_a_network_that_was_really_trained():
    """The bound from its parts holds on a small regression, and every part comes from the run."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)

        def draw(*shape):
            return jnp.asarray(rng.normal(size=shape))

        initial = {"first": {"kernel": draw(3, 8) / 2}, "second": {"kernel": draw(8, 1) / 3}}

        def loss(params, batch):
            return jnp.mean(
                jnp.square(jnp.tanh(batch["x"] @ params["first"]["kernel"]) @ params["second"]["kernel"] - batch["y"])
            )

        def sample(n):
            x = draw(n, 3)
            return {"x": x, "y": jnp.sin(x.sum(1, keepdims=True)) + 0.3 * draw(n, 1)}

        train, test = sample(60), sample(2000)
        step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(loss)(p, train)))
        params = initial
        for _ in range(150):
            params = step(params)
        distances = layer_distances(params, initial)
        moved = jax.tree.map(jnp.subtract, params, initial)
        forms = {name: a.max() for name, a in per_example_quadratic_forms(loss, params, moved, train, steps=24).items()}
        traces = hessian_trace(loss, params, train, key=jax.random.key(0), probes=16).by_layer
        facts = {"loss_bound": 4.0, "test_loss": float(loss(params, test))}
        bounds = [
            generalization_bound(float(loss(params, train)), 60, distances, **facts, **own)
            for own in ({"quadratic_forms": forms}, {"traces": traces})
        ]
        assert set(bounds[0].layers) == {"first", "second"}
        for bound in bounds:
            assert bound.violated is False
            assert 1 < bound.looseness < 100
            assert bound.value == pytest.approx(bound.empirical + sum(t.value for t in bound.layers.values()))


def test_errors():
    good = {"loss_bound": 1.0}
    cases = [
        (lambda: generalization_bound(1.0, 10, {"a": 1.0}, **good), "give either quadratic_forms"),
        (lambda: generalization_bound(1.0, 10, {"a": 1.0}, quadratic_forms={"b": 1.0}, **good), "use one by_layer"),
        (lambda: generalization_bound(1.0, 0, {"a": 1.0}, quadratic_forms={"a": 1.0}, **good), "n=0"),
        (
            lambda: generalization_bound(1.0, 9, {"a": 1.0}, quadratic_forms={"a": 1.0}, loss_bound=0.0),
            "loss_bound=0.0",
        ),
        (
            lambda: generalization_bound(5.0, 9, {"a": 1.0}, quadratic_forms={"a": 1.0}, loss_bound=0.1),
            "less than train_loss=5.0",
        ),
        (lambda: generalization_bound(np.nan, 9, {"a": 1.0}, quadratic_forms={"a": 1.0}, **good), "must be finite"),
        (
            lambda: generalization_bound(1.0, 9, {"a": 1.0}, quadratic_forms={"a": 1.0}, test_loss=np.nan, **good),
            "must be finite",
        ),
        (
            lambda: generalization_bound(1.0, 9, {"a": 1.0}, quadratic_forms={"a": 1.0}, loss_bound=np.inf),
            "loss_bound=inf",
        ),
        (lambda: corollary_bound(1.0, 0, fit_power_law([1, 2], [2.0, 1.0])), "n=0"),
        (lambda: fit_power_law([1, 2], [1.0, np.inf]), "finite positive values"),
        (lambda: fit_power_law([1, 2], [1.0, 0.0]), "positive values at two different positive sizes"),
        (lambda: fit_power_law([2, 2], [1.0, 1.0]), "two different"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
