"""Write benchmarks/RESULTS.md from results/paper/*.json.

Run: python benchmarks/paper/page.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from common import RESULTS

ORDER = (
    "figure2_phases",
    "figure3_curves",
    "table2_rmse",
    "table3_selection",
    "table3_nlp_metrics",
    "table4_cost",
    "ablation_gamma_tau",
    "sensitivity",
)
PAGE = Path(__file__).parents[1] / "RESULTS.md"


def cells(values: list[str]) -> str:
    return "| " + " | ".join(str(v).replace("|", "\\|") for v in values) + " |"


def section(found: dict[str, Any]) -> list[str]:
    environment = found["environment"]
    lines = [
        f"## {found['title']}",
        "",
        f"`{found['command']}` on {found['data']} ({environment['date'][:10]}, jax {environment['packages']['jax']}, "
        f"{environment['cpu']}).",
        "",
        cells(["what", "the paper", "ours", "verdict"]),
        cells(["---"] * 4),
    ]
    lines += [cells([f["claim"], f["paper"], f["ours"], f"**{f['verdict']}**"]) for f in found["findings"]]
    reasons = dict.fromkeys(f["reason"] for f in found["findings"] if f["reason"])
    for reason in reasons:
        lines += ["", reason]
    lines += [part for name in found["figures"] for part in ("", f"![{found['title']}](results/paper/{name})")]
    if found["rows"]:
        header, *rows = found["rows"]
        lines += ["", "<details><summary>All numbers</summary>", "", cells(header), cells(["---"] * len(header))]
        lines += [*(cells(row) for row in rows), "", "</details>"]
    return [*lines, ""]


def main() -> None:
    paths = [RESULTS / "paper" / f"{name}.json" for name in ORDER]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    verdicts = Counter(f["verdict"] for part in found for f in part["findings"])
    lines = [
        "# The paper's tables and figures, and what we get",
        "",
        "Made by `python benchmarks/paper/page.py` from `benchmarks/results/paper/`; do not edit. The paper is LensLLM "
        "(ICML 2025, PMLR 267). Losses are those that the ICML 2024 paper on the rectified law published (30 models, "
        "FLAN, WMT19 and Gigaword, 0 to 1,638,400 samples); the paper speaks of Wikitext where these have WMT19. "
        "F(Theta, t) is a free number of each curve, for only losses are known. A percentage counts as reproduced "
        "within one point, with the paper's 14 models or with all 30.",
        "",
        f"Of {sum(verdicts.values())} statements: " + ", ".join(f"{n} {v}" for v, n in verdicts.most_common()) + ".",
        "",
    ]
    for part in found:
        lines += section(part)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
