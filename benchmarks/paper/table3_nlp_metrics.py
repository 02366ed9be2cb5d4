"""NLPmetrics' row of Table 3: tail exponents of the candidates' weights against their published losses.

Run: python benchmarks/paper/table3_nlp_metrics.py MODEL ...        (names as in the published tables; downloads them)
"""

from __future__ import annotations

import sys

import numpy as np
from common import FULL, NOT, REPRODUCED, TABLES, Finding, save, table
from flax import nnx
from table3_selection import PAPER, TOLERANCE

from lensjax.metrics import pear_corr, rel_acc
from lensjax.models import load_model
from lensjax.selectors import nlp_metrics

METRICS = ("pl_alpha", "e_tpl_alpha", "e_tpl_lambda", "log_norm", "log_spectral_norm")


def main(models: list[str]) -> None:
    if len(models) < 3:
        raise SystemExit(__doc__)
    found = {model: nlp_metrics(nnx.state(load_model(model), nnx.Param)) for model in models}
    findings, numbers, rows = [], {}, [["data", "metric", "PearCorr / RelAcc"]]
    for name, title in TABLES.items():
        curves = table(name, paper_models=False)
        truth = curves.rows([curves.names.index(m) for m in models]).at(FULL)
        for metric in METRICS:
            score = np.array([found[m].mean(metric) for m in models])
            ours = (100 * pear_corr(score, truth), 100 * rel_acc(score, truth))
            numbers[f"{title}, {metric}"] = {"score": dict(zip(models, score.tolist(), strict=True)), "found": ours}
            rows.append([title, metric, f"{ours[0]:.1f} / {ours[1]:.1f}"])
            if metric == "pl_alpha":
                paper = PAPER[name]["nlp_metrics"]
                same = all(abs(a - b) <= TOLERANCE for a, b in zip(ours, paper, strict=True))
                findings.append(
                    Finding(
                        f"{title}: NLPmetrics ({metric})",
                        f"{paper[0]} / {paper[1]}",
                        f"{ours[0]:.1f} / {ours[1]:.1f}",
                        REPRODUCED if same else NOT,
                    )
                )
    save("table3_nlp_metrics", "Table 3: NLPmetrics", f"weights of {len(models)} models", findings, numbers, rows=rows)


if __name__ == "__main__":
    main(sys.argv[1:])
