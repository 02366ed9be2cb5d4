"""What every selector reaches on the published tables, for each budget, beside what the papers report.

Run: python benchmarks/published_selection.py
"""

from __future__ import annotations

import functools

import numpy as np
from environment import write_result

from lensjax.losses.table import read_losses
from lensjax.metrics import pear_corr, rel_acc
from lensjax.selectors import SELECTORS, lens
from lensjax.selectors.methods import PRETRAINED_SCORES

FULL = 1_638_400
RATIOS = (8, 16, 32, 64, 128, 256, 512)
TABLES = ("flan", "wmt19", "gigaword")


def log_rmse(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    error = np.log(predicted) - np.log(truth)
    return None if np.isnan(error).any() else float(np.sqrt(np.mean(error**2)))


def main() -> None:
    # The tables hold losses, and nothing of weights and features.
    tables = {name: selector for name, selector in SELECTORS.items() if name not in PRETRAINED_SCORES}
    methods = {**tables, "lens without priors": functools.partial(lens, regularised=False)}
    result: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for method, selector in methods.items():
        for name in TABLES:
            curves = read_losses(f"published:{name}")
            truth = curves.at(FULL)
            cells: dict[str, list[float | None]] = {"PearCorr": [], "RelAcc": [], "log_RMSE": []}
            for ratio in RATIOS:
                scores = selector(curves.visible(FULL / ratio), FULL)
                cells["PearCorr"].append(pear_corr(scores.score, truth))
                cells["RelAcc"].append(rel_acc(scores.score, truth))
                cells["log_RMSE"].append(log_rmse(scores.predicted_loss, truth))
            result.setdefault(method, {})[name] = cells
    for method, tables in result.items():
        means = [[100 * np.mean(t[m]) for t in tables.values()] for m in ("PearCorr", "RelAcc")]
        text = "   ".join("/".join(f"{v:.1f}" for v in m) + f" mean {np.mean(m):.1f}" for m in means)
        print(f"{method:20} PearCorr, RelAcc ({'/'.join(TABLES)}): {text}")
    write_result("published_selection", {"ratios": RATIOS, "target": FULL, "methods": result})


if __name__ == "__main__":
    main()
