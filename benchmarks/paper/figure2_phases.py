"""Figure 2: the pre-power and the power phase in the published curves.

The slope of log loss over log D between neighbouring sizes is flat at first (pre-power phase) and steeper later. A
curve has a pre-power phase if its mean slope over the first three steps is less than half of its steepest mean slope
over three neighbouring steps.

Run: python benchmarks/paper/figure2_phases.py        (seconds)
"""

from __future__ import annotations

import numpy as np
from common import NOT, REPRODUCED, TABLES, Finding, Series, save, table, write_svg


def main() -> None:
    found, panels = {}, {}
    for name, title in TABLES.items():
        curves = table(name, paper_models=False).visible(1_638_400)
        tuned = curves.sizes > 0
        sizes, losses = curves.sizes[tuned], curves.losses[:, tuned]
        slopes = -np.diff(np.log(losses), axis=1) / np.diff(np.log(sizes))
        smooth = np.stack([slopes[:, i : i + 3].mean(axis=1) for i in range(slopes.shape[1] - 2)], axis=1)
        share = smooth[:, 0] / smooth.max(axis=1)
        found[title] = {
            "curves_with_pre_power_phase": int((share < 0.5).sum()),
            "of": len(share),
            "first_over_steepest_slope_median": float(np.median(share)),
        }
        rows = [curves.names.index(n) for n in ("facebook/opt-1.3b", "gpt2", "t5-base")]
        colours = ("#1f5fbf", "#c0392b", "#2e8b57")
        panels[title] = [
            Series(curves.names[r].split("/")[-1], sizes, np.log(losses[r]), c)
            for r, c in zip(rows, colours, strict=True)
        ]
    figure = write_svg("figure2_phases", panels, x="training samples", y="log test loss")
    findings = []
    for title, values in found.items():
        count, of = values["curves_with_pre_power_phase"], values["of"]
        findings.append(
            Finding(
                f"{title}: curves start with a flat pre-power phase",
                "shown for two models, without numbers",
                f"{count} of {of} curves; first slope over steepest {values['first_over_steepest_slope_median']:.2f} "
                "(median)",
                REPRODUCED if count >= of / 2 else NOT,
                "" if count >= of / 2 else f"{title}: losses fall at nearly the final rate from 200 samples on.",
            )
        )
    save(
        "figure2_phases",
        "Figure 2: two phases of fine-tuning",
        "published losses of 30 models, sizes 200 to 1,638,400",
        findings,
        found,
        figures=[figure],
    )


if __name__ == "__main__":
    main()
