"""What the default selector reaches on the published tables, its constants chosen without the table it is judged on.

For each data set the weight in the choice of the log loss at the largest measured size (by RelAcc, random pools
included) and the stretch of the predictive distribution are chosen on the other two ("left out"); beside it stand the
constants that ship ("shipped"), which have seen all three. Nothing ever sees a loss above the budget. The other
constants were set while looking at all three.

Run: python benchmarks/default_selector.py        (about 2 minutes)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
from environment import write_result
from published_selection import FULL, RATIOS, TABLES

from lensjax.losses.curves import Curves
from lensjax.losses.table import read_losses
from lensjax.metrics import pear_corr, rel_acc
from lensjax.selectors import CREDIBLE_LEVEL, ats, averaged, smallest_credible_set
from lensjax.selectors.bayesian_average import DEFAULT_SETTINGS, Settings, posterior

LARGEST_SIZE_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4)
POOLS, POOLS_TO_CHOOSE = 200, 20
MARGIN = (1 - CREDIBLE_LEVEL) / 2


def cells(name: str) -> list[tuple[Curves, np.ndarray]]:
    """Visible curves at each budget, and the truth."""
    curves = read_losses(f"published:{name}")
    return [(curves.visible(FULL / ratio), curves.at(FULL)) for ratio in RATIOS]


def half_pools(number: int, seed: int) -> list[np.ndarray]:
    """Positions of random halves of the 30 candidates."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(30, 15, replace=False)) for _ in range(number)]


def summary(score: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """PearCorr and RelAcc in percent and log-RMSE of one cell."""
    error = np.log(predicted / truth)
    return 100 * pear_corr(score, truth), 100 * rel_acc(score, truth), float(np.sqrt(np.mean(error**2)))


def averages(cells_found: list[tuple[float, float, float]]) -> dict[str, float]:
    return dict(zip(("PearCorr", "RelAcc", "log_RMSE"), np.mean(cells_found, axis=0).tolist(), strict=True))


def accuracy(predict: Callable[[Curves], tuple[np.ndarray, np.ndarray]], name: str) -> dict[str, float]:
    """PearCorr, RelAcc and log-RMSE of score and prediction, averaged over the budgets."""
    return averages([summary(*predict(seen), truth) for seen, truth in cells(name)])


def accuracies_by_weight(name: str, settings: Settings) -> list[float]:
    """RelAcc of each of `LARGEST_SIZE_WEIGHTS`, half with all candidates and half in pools."""
    found: list[list[float]] = [[] for _ in LARGEST_SIZE_WEIGHTS]
    for seen, truth in cells(name):
        whole = posterior(seen, FULL, settings)
        rows = half_pools(POOLS_TO_CHOOSE, 1)
        parts = [whole.rows(row) for row in rows]
        for at, weight in enumerate(LARGEST_SIZE_WEIGHTS):
            rule = dataclasses.replace(settings, largest_size_weight=weight)
            score = dataclasses.replace(whole, settings=rule).score()
            halves = [
                rel_acc(dataclasses.replace(part, settings=rule).score(), truth[row])
                for part, row in zip(parts, rows, strict=True)
            ]
            found[at].append(50 * rel_acc(score, truth) + 50 * float(np.mean(halves)))
    return [float(np.mean(values)) for values in found]


def choose(names: list[str]) -> Settings:
    """Constants chosen on these tables."""
    largest_size_weight = LARGEST_SIZE_WEIGHTS[
        int(np.argmax(np.mean([accuracies_by_weight(n, DEFAULT_SETTINGS) for n in names], axis=0)))
    ]
    chosen = dataclasses.replace(DEFAULT_SETTINGS, largest_size_weight=largest_size_weight)
    return dataclasses.replace(chosen, stretch=stretch(chosen, names))


def stretch(settings: Settings, names: list[str]) -> tuple[float, float]:
    """Factors by which a share `MARGIN` of new truths lie below the interval and as many above.

    Of n curves that are like a new one, the new truth stays within the (n + 1) / n (1 - MARGIN) quantile with
    probability 1 - MARGIN (split conformal prediction). n counts candidates: the budgets of one are not independent.
    """
    plain = dataclasses.replace(settings, stretch=(1.0, 1.0))
    below, above, number = [], [], 0
    for name in names:
        for seen, truth in cells(name):
            low, middle, high = np.log(posterior(seen, FULL, plain).quantiles((MARGIN, 0.5, 1 - MARGIN))).T
            below.append((middle - np.log(truth)) / np.maximum(middle - low, 1e-9))
            above.append((np.log(truth) - middle) / np.maximum(high - middle, 1e-9))
        number += len(truth)
    level = min((number + 1) / number * (1 - MARGIN), 1.0)
    return float(np.quantile(below, level)), float(np.quantile(above, level))


def certainty(settings: Settings, name: str) -> dict[str, float]:
    """Coverage of the interval, share of cells whose set contains the best, and mean size of that set."""
    covered, contained, size = [], [], []
    for seen, truth in cells(name):
        found = posterior(seen, FULL, settings)
        low, high = found.quantiles((MARGIN, 1 - MARGIN)).T
        covered.append(np.mean((low <= truth) & (truth <= high)))
        likely = smallest_credible_set(found.best_probability(), CREDIBLE_LEVEL)
        contained.append(likely[truth.argmin()])
        size.append(likely.sum())
    return {"coverage": np.mean(covered), "set_contains_best": np.mean(contained), "set_size": float(np.mean(size))}


def pools(settings: dict[str, Settings]) -> dict[str, dict[str, list[float]]]:
    """Mean PearCorr and RelAcc over random pools of half of the candidates, for each table."""
    result: dict[str, dict[str, list[float]]] = {m: {"PearCorr": [], "RelAcc": []} for m in ("averaged", "ats")}
    for name in TABLES:
        found: dict[str, list[tuple[float, float]]] = {"averaged": [], "ats": []}
        for seen, truth in cells(name):
            line = ats(seen, FULL).score  # a candidate's line does not depend on the others
            whole = posterior(seen, FULL, settings[name])
            for row in half_pools(POOLS, 0):
                scores = {"averaged": whole.rows(row).score(), "ats": line[row]}
                for method, score in scores.items():
                    found[method].append((pear_corr(score, truth[row]), rel_acc(score, truth[row])))
        for method, values in found.items():
            for metric, value in zip(("PearCorr", "RelAcc"), 100 * np.mean(values, axis=0), strict=True):
                result[method][metric].append(float(value))
    return result


def main() -> None:
    def pair(settings: Settings) -> Callable[[Curves], tuple[np.ndarray, np.ndarray]]:
        def predict(curves: Curves) -> tuple[np.ndarray, np.ndarray]:
            found = posterior(curves, FULL, settings)
            return found.score(), found.loss()

        return predict

    chosen = {n: choose([other for other in TABLES if other != n]) for n in TABLES}
    left_out = {n: {**accuracy(pair(s), n), **certainty(s, n)} for n, s in chosen.items()}
    shipped = {n: {**accuracy(pair(DEFAULT_SETTINGS), n), **certainty(DEFAULT_SETTINGS, n)} for n in TABLES}
    reference = {n: accuracy(lambda c: (ats(c, FULL).score,) * 2, n) for n in TABLES}
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
        "shipped_constants": dataclasses.asdict(DEFAULT_SETTINGS),
        "rule_on_all_three": dataclasses.asdict(choose(list(TABLES))),
        "ats": reference,
        "pools_left_out": pools(chosen),
        "pools_shipped": pools(dict.fromkeys(TABLES, DEFAULT_SETTINGS)),
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
    print({n: {k: getattr(s, k) for k in ("largest_size_weight", "stretch")} for n, s in chosen.items()})
    print(f"{seconds:.2f} s for 630 curves, warm ({cpu_seconds:.2f} s of CPU)")
    write_result("default_selector", result)


if __name__ == "__main__":
    main()
