"""The race of `lensjax.selectors.allocation` replayed on the published tables, its stages chosen without the table.

For each data set the race in `CHOICES` that does best on the other two, pools included, is used ("left out"); beside
it stand the default race, and what the selector reaches when the same budget buys one doubling sequence of sizes for
every candidate.

Run: python benchmarks/allocation.py        (about 5 minutes)
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from environment import write_result
from published_selection import FULL, TABLES

from lensjax.losses.curves import Curves
from lensjax.losses.table import read_losses
from lensjax.metrics import rel_acc
from lensjax.selectors import averaged
from lensjax.selectors.allocation import DEFAULT_RACE, Race, full_cost, propose

BUDGET = 0.025
EVERYONE = ((8192, 2048), (8192, 2048, 512), (4096, 1024, 256))
STAGES = (
    ((64, 0.5), (8, 1.0)),
    ((128, 0.4), (16, 1.0)),
    ((32, 0.7), (8, 1.0)),
    ((128, 0.3), (32, 0.5), (8, 1.0)),
)
CHOICES = [Race(e, s) for e, s in itertools.product(EVERYONE, STAGES)]
POOLS_TO_CHOOSE, POOLS = 50, 200


def replay(table: Curves, race: Race, budget: float = BUDGET) -> tuple[float, float, int]:
    """RelAcc, share of full tuning spent, and number of runs of one race."""
    known = dataclasses.replace(table, losses=np.full(table.losses.shape, np.nan))
    whole = full_cost(table, FULL)
    spent, runs = 0.0, 0
    while stage := propose(known, FULL, budget * whole, race=race):
        for run in stage:
            row, column = table.names.index(run.name), int(np.flatnonzero(table.sizes == run.size)[0])
            known.losses[row, column] = table.losses[row, column]
            spent, runs = spent + run.cost, runs + 1
    return rel_acc(averaged(known, FULL).score, table.at(FULL)), spent / whole, runs


def pools(table: Curves, number: int, seed: int) -> list[Curves]:
    """Random halves of the candidates."""
    rng = np.random.default_rng(seed)
    return [table.rows(np.sort(rng.choice(len(table), len(table) // 2, replace=False))) for _ in range(number)]


def uniform(table: Curves, budget: float = BUDGET) -> tuple[float, float]:
    """RelAcc and cost when every candidate gets all sizes up to the largest that the budget pays for."""
    shares = np.cumsum(table.sizes) / FULL
    largest = table.sizes[shares <= budget][-1]
    return rel_acc(averaged(table.visible(largest), FULL).score, table.at(FULL)), float(shares[shares <= budget][-1])


def main() -> None:
    tables = {name: read_losses(f"published:{name}") for name in TABLES}
    merit = []
    for race in CHOICES:
        merit.append([])
        for table in tables.values():
            found = [replay(t, race)[0] for t in (table, *pools(table, POOLS_TO_CHOOSE, 1))]
            merit[-1].append(100 * (0.5 * found[0] + 0.5 * float(np.mean(found[1:]))))
        print(race, np.round(merit[-1], 2))
    result: dict[str, dict[str, object]] = {}
    for index, (name, table) in enumerate(tables.items()):
        others = [i for i in range(len(tables)) if i != index]
        chosen = CHOICES[int(np.argmax(np.array(merit)[:, others].mean(axis=1)))]
        result[name] = {"left_out_race": dataclasses.asdict(chosen)}
        for title, race in (("left_out", chosen), ("default", DEFAULT_RACE)):
            accuracy, cost, runs = replay(table, race)
            halves = [100 * replay(pool, race)[0] for pool in pools(table, POOLS, 0)]
            result[name][title] = {
                "RelAcc": 100 * accuracy,
                "share_of_full_tuning": cost,
                "runs": runs,
                "RelAcc_pools": float(np.mean(halves)),
                "RelAcc_pools_quartile": float(np.quantile(halves, 0.25)),
            }
        accuracy, cost = uniform(table)
        halves = [100 * uniform(pool)[0] for pool in pools(table, POOLS, 0)]
        result[name]["uniform"] = {
            "RelAcc": 100 * accuracy,
            "share_of_full_tuning": cost,
            "RelAcc_pools": float(np.mean(halves)),
        }
        print(name, result[name])
    for title in ("left_out", "default", "uniform"):
        for metric in ("RelAcc", "RelAcc_pools", "share_of_full_tuning"):
            values = [result[n][title][metric] for n in TABLES]  # type: ignore[index]
            print(f"{title:9} {metric:22} {' '.join(f'{v:8.3f}' for v in values)}  mean {np.mean(values):.3f}")
    write_result(
        "allocation",
        {"budget": BUDGET, "merit": {str(r): m for r, m in zip(CHOICES, merit, strict=True)}, "tables": result},
    )


if __name__ == "__main__":
    main()
