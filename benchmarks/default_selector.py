"""What the default selector reaches on the published tables, its constants chosen without the table it is judged on.

For each data set the constants in `GRID` and the stretch of the predictive distribution are chosen on the other two
("left out"); beside it stand the constants that ship ("shipped"), which have seen all three. Nothing ever sees a loss
above the budget.

Run: python benchmarks/default_selector.py        (about 3 minutes)
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

import numpy as np
from environment import write_result
from published_selection import FULL, RATIOS, TABLES

from lensjax.curves import Curves, read_losses
from lensjax.metrics import pear_corr, rel_acc
from lensjax.selectors import CERTAINTY, ats, averaged, best_probability, smallest_set
from lensjax.selectors.ensemble import SETTINGS, Settings, forecast

GRID = {
    "exponent_width": (0.2, 0.3),
    "fade": (0.4, 0.5, 0.6),
    "floor_prior": ((0.35, 0.5), (0.5, 0.5), (0.5, 1.0)),
}
POOLS = 200
MARGIN = (1 - CERTAINTY) / 2


def cells(name: str) -> list[tuple[Curves, np.ndarray]]:
    """Visible curves at each budget, and the truth."""
    curves = read_losses(f"published:{name}")
    return [(curves.visible(FULL / ratio), curves.at(FULL)) for ratio in RATIOS]


def accuracy(predict: Callable[[Curves], np.ndarray], name: str) -> dict[str, float]:
    """PearCorr and RelAcc in percent and log-RMSE, averaged over the budgets."""
    found = []
    for seen, truth in cells(name):
        predicted = predict(seen)
        error = np.log(predicted / truth)
        found.append((100 * pear_corr(predicted, truth), 100 * rel_acc(predicted, truth), np.sqrt(np.mean(error**2))))
    return dict(zip(("PearCorr", "RelAcc", "log_RMSE"), np.mean(found, axis=0).tolist(), strict=True))


def objective(found: dict[str, float]) -> float:
    """Merit by which constants are chosen: the three targets, a percent being worth 0.01 RMSE."""
    return found["PearCorr"] + found["RelAcc"] - 100 * found["log_RMSE"]


def stretch(settings: Settings, names: list[str]) -> tuple[float, float]:
    """Factors that put a share `MARGIN` of the truths of these tables below the interval and as many above."""
    plain = dataclasses.replace(settings, stretch=(1.0, 1.0))
    below, above = [], []
    for name in names:
        for seen, truth in cells(name):
            low, middle, high = np.log(forecast(seen, FULL, plain).quantiles((MARGIN, 0.5, 1 - MARGIN))).T
            below.append((middle - np.log(truth)) / np.maximum(middle - low, 1e-9))
            above.append((np.log(truth) - middle) / np.maximum(high - middle, 1e-9))
    return float(np.quantile(below, 1 - MARGIN)), float(np.quantile(above, 1 - MARGIN))


def certainty(settings: Settings, name: str) -> dict[str, float]:
    """Coverage of the interval, share of cells whose set contains the best, and mean size of that set."""
    covered, contained, size = [], [], []
    for seen, truth in cells(name):
        found = forecast(seen, FULL, settings)
        low, high = found.quantiles((MARGIN, 1 - MARGIN)).T
        covered.append(np.mean((low <= truth) & (truth <= high)))
        likely = smallest_set(best_probability(found.draws()), CERTAINTY)
        contained.append(likely[truth.argmin()])
        size.append(likely.sum())
    return {"coverage": np.mean(covered), "set_contains_best": np.mean(contained), "set_size": float(np.mean(size))}


def pools(settings: dict[str, Settings]) -> dict[str, dict[str, list[float]]]:
    """Mean PearCorr and RelAcc over random pools of half of the candidates, for each table."""
    result: dict[str, dict[str, list[float]]] = {m: {"PearCorr": [], "RelAcc": []} for m in ("averaged", "ats")}
    for name in TABLES:
        rng = np.random.default_rng(0)
        rows = [np.sort(rng.choice(30, 15, replace=False)) for _ in range(POOLS)]
        found: dict[str, list[tuple[float, float]]] = {"averaged": [], "ats": []}
        for seen, truth in cells(name):
            line = ats(seen, FULL).score  # a candidate's line does not depend on the others
            for row in rows:
                scores = {"averaged": forecast(seen.rows(row), FULL, settings[name]).loss(), "ats": line[row]}
                for method, score in scores.items():
                    found[method].append((pear_corr(score, truth[row]), rel_acc(score, truth[row])))
        for method, values in found.items():
            for metric, value in zip(("PearCorr", "RelAcc"), 100 * np.mean(values, axis=0), strict=True):
                result[method][metric].append(float(value))
    return result


def main() -> None:
    choices = [Settings(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]
    table = [{n: accuracy(lambda c, s=s: forecast(c, FULL, s).loss(), n) for n in TABLES} for s in choices]  # type: ignore[misc]
    chosen, left_out, shipped = {}, {}, {}
    for name in TABLES:
        others = [n for n in TABLES if n != name]
        at = int(np.argmax([np.mean([objective(row[n]) for n in others]) for row in table]))
        chosen[name] = dataclasses.replace(choices[at], stretch=stretch(choices[at], others))
        left_out[name] = {**table[at][name], **certainty(chosen[name], name)}
        shipped[name] = {**accuracy(lambda c: averaged(c, FULL).predicted_loss, name), **certainty(SETTINGS, name)}
    at = int(np.argmax([np.mean([objective(row[n]) for n in TABLES]) for row in table]))
    reference = {n: accuracy(lambda c: ats(c, FULL).predicted_loss, n) for n in TABLES}
    work = [seen for name in TABLES for seen, _ in cells(name)]
    for seen in work:
        averaged(seen, FULL)
    started, cpu_started = time.perf_counter(), time.process_time()
    for seen in work:
        averaged(seen, FULL)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    result = {
        "left_out": left_out,
        "left_out_constants": {n: dataclasses.asdict(s) for n, s in chosen.items()},
        "shipped": shipped,
        "shipped_constants": dataclasses.asdict(SETTINGS),
        "rule_on_all_three": {**dataclasses.asdict(choices[at]), "stretch": stretch(choices[at], list(TABLES))},
        "ats": reference,
        "pools_left_out": pools(chosen),
        "pools_shipped": pools(dict.fromkeys(TABLES, SETTINGS)),
        "seconds_for_630_curves_warm": seconds,
        "cpu_seconds_for_630_curves_warm": cpu_seconds,
    }
    for title in ("left_out", "shipped", "ats"):
        for metric in next(iter(result[title].values())):  # type: ignore[union-attr]
            values = [result[title][n][metric] for n in TABLES]  # type: ignore[index]
            print(f"{title:10} {metric:18} {' '.join(f'{v:8.3f}' for v in values)}  mean {np.mean(values):.3f}")
    for title in ("pools_left_out", "pools_shipped"):
        for method, metrics in result[title].items():  # type: ignore[union-attr]
            print(title, method, {m: [round(x, 2) for x in (*v, np.mean(v))] for m, v in metrics.items()})
    print({n: {k: getattr(s, k) for k in (*GRID, "stretch")} for n, s in chosen.items()})
    print(f"{seconds:.2f} s for 630 curves, warm ({cpu_seconds:.2f} s of CPU)")
    write_result("default_selector", result)


if __name__ == "__main__":
    main()
