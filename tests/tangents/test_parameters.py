"""Which parameters are selected, in which layers they are, and what cannot be differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax import InputError
from lensjax.tangents.parameters import (
    FROZEN,
    WithFrozen,
    is_array_or_number,
    is_not_complex,
    is_real_float,
    leaf_names,
    match_parameters,
    refuse_undifferentiable,
    select_layers,
    without_frozen,
)

PARAMS = {"a": {"bias": jnp.zeros(2), "kernel": jnp.ones(3)}, "b": {"kernel": jnp.full(4, 2.0)}}
BOTH = WithFrozen(PARAMS, {"base": jnp.full(5, 9.0)})


def test_frozen_arrays_come_last_and_are_never_selected():
    names = leaf_names(BOTH)
    assert names == ("a.bias", "a.kernel", "b.kernel", FROZEN + "base")
    for parameters in (None, lambda path, leaf: True, ["*"]):
        assert match_parameters(parameters, names, jax.tree.leaves(BOTH)) == [True, True, True, False]
    assert without_frozen(BOTH) is PARAMS
    assert without_frozen(PARAMS) is PARAMS


@pytest.mark.parametrize("tree", [PARAMS, BOTH])
def test_selected_leaves_are_read_and_replaced_with_and_without_frozen_arrays(tree):
    names = leaf_names(BOTH)
    selection = select_layers(names, [False, True, True, False], True)
    assert (selection.layer_names, selection.layers) == (("a", "b"), (None, 0, 1, None))
    assert selection.selected_layers == [0, 1]
    assert [len(leaf) for leaf in selection.selected(tree)] == [3, 4]
    new = selection.replace(tree, [jnp.zeros(3), jnp.zeros(4)])
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    sums = [float(leaf.sum()) for leaf in jax.tree.leaves(new)]
    assert sums == ([0.0, 0.0, 0.0, 45.0] if tree is BOTH else [0.0, 0.0, 0.0])
    ones = selection.replace(tree, selection.selected(tree), jnp.ones_like)
    np.testing.assert_array_equal(without_frozen(ones)["a"]["bias"], 1)
    np.testing.assert_array_equal(without_frozen(ones)["b"]["kernel"], 2)


def test_layers_are_named_for_selected_leaves_only():
    asked = []

    def layer(path):
        asked.append(path)
        return path[0]

    selection = select_layers(leaf_names(BOTH), [True, True, False, False], layer)
    assert (asked, selection.layer_names, selection.layers) == (["a.bias", "a.kernel"], ("a",), (0, 0, None, None))


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (is_array_or_number, ["f (function)"]),
        (is_not_complex, ["z (complex64)", "n (float)", "f (function)"]),
        (is_real_float, ["i (int32)", "z (complex64)", "n (float)", "f (function)"]),
    ],
)
def test_leaves_that_cannot_be_differentiated_are_named(allowed, refused):
    def function():
        pass

    leaves = {"w": jnp.ones(2), "i": jnp.arange(2), "z": jnp.ones(2, jnp.complex64), "n": 1.0, "f": function}
    with pytest.raises(InputError) as error:
        refuse_undifferentiable(leaves.items(), allowed, "; leave them out.")
    assert str(error.value) == f"params: {', '.join(refused)} cannot be differentiated; leave them out."
    refuse_undifferentiable([("w", jnp.ones(2))], allowed, "")
