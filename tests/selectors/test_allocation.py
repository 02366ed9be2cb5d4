import dataclasses

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.losses.table import read_losses
from lensjax.metrics import rel_acc
from lensjax.selectors import Race, averaged, full_cost, propose

FULL = 1_638_400


def race(table, budget, **options):
    """Replay: (losses bought, runs in order)."""
    known = dataclasses.replace(table, losses=np.full(table.losses.shape, np.nan))
    runs = []
    while stage := propose(known, FULL, budget * full_cost(table, FULL), **options):
        for run in stage:
            row, column = table.names.index(run.name), int(np.flatnonzero(table.sizes == run.size)[0])
            assert np.isnan(known.losses[row, column])
            assert run.cost == table.parameters[row] * run.size
            known.losses[row, column] = table.losses[row, column]
            runs.append(run)
    return known, runs


@pytest.mark.parametrize(("name", "accuracy"), [("flan", 0.98), ("wmt19", 0.98), ("gigaword", 0.98)])
def test_a_fortieth_of_full_tuning_finds_the_best_of_the_published_tables(name, accuracy):
    table = read_losses(f"published:{name}")
    known, runs = race(table, 0.025)
    assert sum(run.cost for run in runs) <= 0.025 * full_cost(table, FULL)
    assert rel_acc(averaged(known, FULL).score, table.at(FULL)) >= accuracy


def test_the_race_has_its_stages_and_drops_candidates():
    table = read_losses("published:gigaword")
    _, runs = race(table, 0.025)
    everyone = runs[:90]
    assert [run.size for run in everyone[:3]] == [6400, 1600, 400]
    assert [run.name for run in everyone[::3]] == list(table.names)
    later = runs[90:]
    assert {run.size for run in later} == {25_600, 204_800}
    assert [run.size for run in later] == sorted(run.size for run in later)
    assert 3 <= len({run.name for run in later}) < 30
    assert later[0].reason.startswith("stage 1 of 2: number 1 of 30 with a predicted loss of ")
    spent = {size: sum(run.cost for run in runs if run.size == size) for size in {run.size for run in runs}}
    left = 0.025 * full_cost(table, FULL) - spent[400] - spent[1600] - spent[6400]
    assert spent[25_600] <= 0.5 * left


def test_what_a_race_does_not_buy_it_does_not_know():
    table = read_losses("published:flan")
    _, runs = race(table, 0.025)
    bought = {(run.name, run.size) for run in runs}
    hidden = np.array([[(n, s) not in bought for s in table.sizes] for n in table.names])
    changed = dataclasses.replace(table, losses=np.where(hidden, 0.5 * table.losses, table.losses))
    assert race(changed, 0.025)[1] == runs


def test_an_interrupted_race_goes_on_where_it_was():
    table = read_losses("published:wmt19").rows(np.arange(0, 30, 3))
    _, runs = race(table, 0.04)
    half = dataclasses.replace(table, losses=np.full(table.losses.shape, np.nan))
    for run in runs[:-3]:
        row, column = table.names.index(run.name), int(np.flatnonzero(table.sizes == run.size)[0])
        half.losses[row, column] = table.losses[row, column]
    rest = propose(half, FULL, 0.04 * full_cost(table, FULL))
    assert rest == tuple(runs[-3:])[: len(rest)]
    assert rest


def test_sizes_are_kept_within_limits():
    assert Race().sizes(1_638_400) == ((400, 1600, 6400), ((25_600, 0.5), (204_800, 1.0)))
    assert Race().sizes(1_638_400, 1000, 100_000) == ((1000, 1600, 6400), ((25_600, 0.5),))
    assert Race().sizes(800, 10) == ((10, 20), ((100, 1.0),))


def test_what_cannot_be_paid_for_is_refused():
    table = Curves(("a", "b"), np.array([400.0, 1600]), np.full((2, 2), np.nan), np.array([1e6, 2e6]))
    with pytest.raises(InputError, match=r"--budget 0.005: training every candidate on 400, 1600, 6400 samples alone"):
        propose(table, FULL, 0.005 * full_cost(table, FULL))
    with pytest.raises(InputError, match="the number of parameters of a is not known"):
        propose(dataclasses.replace(table, parameters=None), FULL, 1.0)
