"""What the scripts of this folder share: the paper's models and tables, result files, and plain SVG figures.

Each script computes one table or figure of LensLLM (ICML 2025) from the published loss tables, and writes
results/paper/NAME.json: what the paper reports, what we get, on which data, and a verdict. `page.py` makes
RESULTS.md of them.
"""

from __future__ import annotations

import dataclasses
import html
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts are run by path

from environment import RESULTS, write_result

from lensjax.losses.curves import Curves
from lensjax.losses.table import read_losses

FULL = 1_638_400
RATIOS = (8, 16, 32, 64, 128, 256, 512)
# The paper says Wikitext; the published losses are WMT19's, whose ModelSize and ZeroShot figures the paper's look like.
TABLES = {"flan": "FLAN", "wmt19": "Wikitext (WMT19 here)", "gigaword": "Gigaword"}
MODELS = {
    "OPT-350M": "facebook/opt-350m",
    "OPT-1.3B": "facebook/opt-1.3b",
    "OPT-6.7B": "facebook/opt-6.7b",
    "T5-Small": "t5-small",
    "T5-Base": "t5-base",
    "Cerebras-256M": "cerebras/Cerebras-GPT-256M",
    "Cerebras-1.3B": "cerebras/Cerebras-GPT-1.3B",
    "mT5-Base": "google/mt5-base",
    "mT5-Large": "google/mt5-large",
    "BART-Base": "facebook/bart-base",
    "BART-Large": "facebook/bart-large",
    "GPT-2": "gpt2",
    "LaMini-124M": "MBZUAI/LaMini-GPT-124M",
    "LaMini-774M": "MBZUAI/LaMini-GPT-774M",
}
REPRODUCED, NOT, GPU = "reproduced", "not reproduced", "needs a GPU"


def table(name: str, *, paper_models: bool = True) -> Curves:
    """Return the published losses of the paper's 14 models, in its order, or of all 30."""
    curves = read_losses(f"published:{name}")
    return curves.rows([curves.names.index(n) for n in MODELS.values()]) if paper_models else curves


@dataclasses.dataclass(frozen=True)
class Finding:
    """One statement of the paper, and what came of it.

    Attributes
    ----------
    claim, paper, ours : str
        What is stated, the paper's numbers, and ours.
    verdict : str
        `REPRODUCED`, `NOT` or `GPU`.
    reason : str
        For `GPU`, the exact command.
    """

    claim: str
    paper: str
    ours: str
    verdict: str
    reason: str = ""


def save(
    name: str,
    title: str,
    data: str,
    findings: Sequence[Finding],
    numbers: Mapping[str, Any],
    *,
    rows: Sequence[Sequence[str]] = (),
    figures: Sequence[str] = (),
) -> None:
    """Write results/paper/NAME.json; the first of `rows` is the header of the table that the page shows."""
    (RESULTS / "paper").mkdir(parents=True, exist_ok=True)
    for finding in findings:
        print(f"{finding.verdict:15} {finding.claim}: paper {finding.paper}; ours {finding.ours}. {finding.reason}")
    write_result(
        f"paper/{name}",
        {
            "title": title,
            "command": f"python benchmarks/paper/{name}.py",
            "data": data,
            "findings": [dataclasses.asdict(f) for f in findings],
            "rows": [list(row) for row in rows],
            "figures": list(figures),
            "numbers": numbers,
        },
    )


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one panel: label, x and y, drawn as dots or a line."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    line: bool = True


def write_svg(name: str, panels: Mapping[str, Sequence[Series]], *, x: str, y: str, columns: int = 3) -> str:
    """Draw panels with logarithmic x axes into results/paper/NAME.svg and return the file's name."""
    width, height, left, top = 300, 220, 46, 26
    rows = -(-len(panels) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {rows * height + 24}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{columns * width}" height="{rows * height + 24}" fill="white"/>',
    ]
    labels: dict[str, Series] = {}
    for at, (title, series) in enumerate(panels.items()):
        x0, y0 = (at % columns) * width + left, (at // columns) * height + top
        w, h = width - left - 12, height - top - 34
        xs, ys = (np.concatenate([getattr(s, axis) for s in series]) for axis in ("x", "y"))
        low_x, high_x = np.log10(xs.min()), np.log10(xs.max())
        low_y, high_y = float(ys.min()), float(ys.max())
        low_y, high_y = low_y - 0.05 * (high_y - low_y + 1e-9), high_y + 0.05 * (high_y - low_y + 1e-9)
        parts.append(f'<text x="{x0}" y="{y0 - 8}" font-size="12">{html.escape(title)}</text>')
        parts.append(f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="none" stroke="#999"/>')
        for power in range(int(np.ceil(low_x)), int(np.floor(high_x)) + 1):
            px = x0 + w * (power - low_x) / (high_x - low_x)
            parts.append(f'<text x="{px:.1f}" y="{y0 + h + 13}" text-anchor="middle">1e{power}</text>')
        for value in np.linspace(low_y, high_y, 4):
            py = y0 + h * (high_y - value) / (high_y - low_y)
            parts.append(f'<text x="{x0 - 4}" y="{py + 3:.1f}" text-anchor="end">{value:.3g}</text>')
        parts.append(f'<text x="{x0 + w / 2}" y="{y0 + h + 26}" text-anchor="middle">{html.escape(x)}</text>')
        parts.append(
            f'<text x="{x0 - 36}" y="{y0 + h / 2}" text-anchor="middle" '
            f'transform="rotate(-90 {x0 - 36} {y0 + h / 2})">{html.escape(y)}</text>'
        )
        for s in series:
            labels.setdefault(s.label, s)
            px = x0 + w * (np.log10(s.x) - low_x) / (high_x - low_x)
            py = y0 + h * (high_y - s.y) / (high_y - low_y)
            if s.line:
                points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
                parts.append(f'<polyline points="{points}" fill="none" stroke="{s.colour}" stroke-width="1.5"/>')
            else:
                parts += [
                    f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{s.colour}"/>'
                    for a, b in zip(px, py, strict=True)
                ]
    for at, s in enumerate(labels.values()):
        px, py = 20 + 180 * at, rows * height + 14
        parts.append(f'<rect x="{px}" y="{py - 8}" width="10" height="10" fill="{s.colour}"/>')
        parts.append(f'<text x="{px + 14}" y="{py}">{html.escape(s.label)}</text>')
    (RESULTS / "paper").mkdir(parents=True, exist_ok=True)
    (RESULTS / "paper" / f"{name}.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")
    return f"{name}.svg"
