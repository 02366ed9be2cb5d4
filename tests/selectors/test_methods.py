"""The table of methods: what each says of itself agrees with what its function does."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

from lensjax import Curves, InputError, read_losses
from lensjax.selectors import DEFAULT, METHODS, SELECTORS, get_selector, method
from lensjax.selectors.methods import ALL, NAMES, PRETRAINED_SCORES

VISIBLE = (10, 20, 40, 80)


def curves(sizes, zero_shot=True):
    sizes = [0, *sizes] if zero_shot else list(sizes)
    losses = [[scale * (1 + size) ** -0.2 for size in sizes] for scale in (3.0, 3.3, 3.5)]
    facts = {"pl_alpha": np.array([2.0, 3.0, 4.0]), "log_me": np.array([-1.0, -2.0, -3.0])}
    return Curves(("a", "b", "c"), sizes, losses, parameters=[3.0, 2.0, 1.0], facts=facts)


def test_the_default_comes_first_and_all_stands_for_every_method():
    assert next(iter(METHODS)) == DEFAULT == NAMES[0]
    assert (*METHODS, ALL) == NAMES
    assert method(ALL).pretrained_scores == PRETRAINED_SCORES
    assert method(ALL).sizes_needed(4) == 4
    with pytest.raises(InputError, match="method 'all' is unknown"):
        get_selector(ALL)
    with pytest.raises(InputError, match=r"method 'avraged' is unknown; .* and all\. Did you mean"):
        method("avraged")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_works_with_what_it_says_it_needs(name):
    known = METHODS[name]
    assert SELECTORS[name] is known.selector is get_selector(name)
    sizes = known.sizes(VISIBLE)[: known.sizes_needed(3)]
    scores = known.selector(curves(sizes), 1000, **known.options(gamma=3, tau=5.0))
    assert scores.method == name
    assert scores.best == "a"
    assert np.isfinite(scores.predicted_loss).all() == (known.curve != "none")
    # What it does not need is not used.
    assert not scores.used[:, [size not in (0, *sizes) for size in (0, *sizes)]].any()


@pytest.mark.parametrize("name", [name for name, known in METHODS.items() if known.sizes_to_rank(3) > 0])
def test_a_method_refuses_less_than_it_needs(name):
    known = METHODS[name]
    sizes = VISIBLE[: known.sizes_to_rank(3) - 1]
    with pytest.raises(InputError):
        known.selector(curves(sizes, zero_shot=False), 1000, **known.options(gamma=3, tau=5.0))


@pytest.mark.parametrize("name", METHODS)
def test_options_are_arguments_of_the_function(name):
    known = METHODS[name]
    assert set(known.stopping_options.values()) <= set(inspect.signature(known.selector).parameters)
    assert bool(known.stopping_options) == known.stops_early


def test_which_sizes_are_trained():
    assert method("averaged").sizes(VISIBLE) == VISIBLE
    assert method("subtuning").sizes(VISIBLE) == (80,)
    assert method("zero_shot").sizes(VISIBLE) == ()
    assert [name for name, known in METHODS.items() if known.races] == ["averaged"]


def test_the_table_is_light():
    code = "import sys, lensjax.selectors.methods; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jaxopt", "optax", "flax", "lensjax.laws", "lensjax.selectors.baselines"} & set(done.stdout.split())


def test_real_tables_are_scored_by_each():
    table = read_losses("published:wmt19").visible(51200)
    assert SELECTORS["ats"](table, 1_638_400).best in table.names
    assert len(SELECTORS) == len(METHODS)
