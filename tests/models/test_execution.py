"""Layers unrolled, scanned, stacked and recomputed: the same numbers, programs that do not grow, memory that falls."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lensjax.errors import InputError
from lensjax.models import init_model, layers, save_pretrained
from lensjax.models.checkpoints.saving import export_tensors
from lensjax.models.execution import POLICIES, Run, is_stacked, repeating_runs, stack_layers, unstack_layers
from support.families import FAMILIES, compiled, flat, make_batch, make_config, pure


def value_and_gradient(model, key=None):
    """Return the loss and its gradient under the parameters' usual names."""
    loss, params = pure(model, make_batch(), key)
    value, gradient = compiled(jax.value_and_grad(loss))(params)
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    return value, flat(nnx.state(unstack_layers(nnx.merge(graph, gradient, rest)), nnx.Param))


def check_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(
            found[1][name], value, rtol=1e-4, atol=2e-5 * np.abs(value).max() + 1e-5, err_msg=name
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_stacked_layers_give_the_losses_and_gradients_of_layers_one_by_one(name):
    # Four layers: Gemma's local and global ones and Switch's dense and sparse ones alternate twice.
    model = init_model(make_config(name, 4 if name in ("gemma3_text", "switch_transformers") else 2), jax.random.key(0))
    expected = value_and_gradient(model)
    check_equal(value_and_gradient(stack_layers(model)), expected)
    assert model.execution == "unroll"


def test_a_pattern_with_a_rest_is_scanned_with_every_layers_own_dropout_key():
    # Dense, sparse, dense, sparse, dense: two periods and a rest.
    model = init_model(make_config("switch_transformers", 5) | {"num_decoder_layers": 1}, jax.random.key(0))
    key = jax.random.key(1, impl="rbg")
    expected = value_and_gradient(model, key)
    model.execution = "scan"
    check_equal(value_and_gradient(model, key), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_program_of_24_layers_is_that_of_4(name, monkeypatch):
    # What the weights are is of no matter here, and random ones take long to trace.
    monkeypatch.setattr(layers, "normal", lambda std: jax.nn.initializers.zeros)

    def size(layers):
        model = nnx.eval_shape(lambda: stack_layers(init_model(make_config(name, layers), jax.random.key(0))))
        loss, params = pure(model, make_batch())
        return len(jax.jit(jax.value_and_grad(loss)).lower(params).as_text())

    assert size(24) < 1.05 * size(4)


def test_stacking_is_undone_without_a_trace():
    model = init_model(make_config("switch_transformers", 5), jax.random.key(0))
    stacked = stack_layers(model)
    assert is_stacked(stacked)
    assert not is_stacked(model)
    assert len(stacked.encoder.layers) == 5
    shapes = {name: value.shape for name, value in flat(nnx.state(stacked)).items()}
    assert shapes["encoder.layers.segments.0.period.1.mlp.inner"] == (2, 3, 16, 20)  # two sparse layers of 3 experts
    assert shapes["encoder.layers.segments.1.period.0.mlp.inner.kernel"] == (16, 20)  # the fifth stands alone
    again = unstack_layers(stacked)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    expected = export_tensors(model)
    for name, value in export_tensors(again).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", [Run(0, 1, 4)]),
        ("abababa", [Run(0, 2, 3), Run(6, 1, 1)]),
        ("aabaab", [Run(0, 3, 2)]),
        ("baaac", [Run(0, 1, 1), Run(1, 1, 3), Run(4, 1, 1)]),
        ("aaabbb", [Run(0, 1, 3), Run(3, 1, 3)]),
        ("ab", [Run(0, 1, 1), Run(1, 1, 1)]),
        ("", []),
    ],
)
def test_runs_that_repeat_are_found(kinds, expected):
    assert repeating_runs(kinds) == expected


def test_policies_keep_the_gradients_and_lower_the_memory():
    model = stack_layers(init_model(make_config("gpt2", 6) | {"n_positions": 64}, jax.random.key(0)))
    batch = make_batch(4, 64)
    found = {}
    for model.remat in (False, "dots_with_no_batch_dims_saveable", "nothing_saveable"):
        loss, params = pure(model, batch)
        program = compiled(jax.grad(loss)).lower(params).compile()
        found[model.remat] = flat(program(params)), program.memory_analysis().temp_size_in_bytes
    expected, most = found[False]
    for gradient, _ in found.values():
        for name, value in expected.items():
            np.testing.assert_allclose(gradient[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    memory = {name: size / most for name, (_, size) in found.items()}
    assert memory["dots_with_no_batch_dims_saveable"] < 0.7
    assert memory["nothing_saveable"] < 0.9 * memory["dots_with_no_batch_dims_saveable"]


def test_a_policy_that_is_none_is_refused_with_the_list():
    model = init_model(make_config("gpt2", 1), jax.random.key(0))
    model.remat = "dots"
    with pytest.raises(InputError, match=r"remat 'dots' is not known; choose False, True or one of checkpoint_dots, "):
        model(make_batch()["input_ids"])
    assert all(callable(getattr(jax.checkpoint_policies, name)) for name in POLICIES)


def test_stacked_layers_are_saved_one_by_one(tmp_path):
    model = init_model(make_config("gpt2", 2), jax.random.key(0))
    save_pretrained(model, tmp_path / "plain")
    save_pretrained(stack_layers(model), tmp_path / "stacked")
    plain, stacked = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "stacked"))
    assert plain.keys() == stacked.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(array, stacked[name])
