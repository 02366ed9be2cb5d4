"""Draw the text of a finished selection as a terminal window, for the README.

Run: python benchmarks/demo/picture.py RUN_DIRECTORY benchmarks/results/demo.svg
"""

from __future__ import annotations

import html
import sys
from pathlib import Path

CHARACTER, LINE, MARGIN = 7.25, 18, 16
COMMAND = "$ python -m lensjax.select --verify"


def wrap(line: str, width: int) -> list[str]:
    """Break prose at spaces; lines of the table are never longer than `width`."""
    rows = [""]
    for word in line.split(" "):
        if len(rows[-1]) + len(word) + 1 > width and rows[-1].strip():
            rows.append("")
        rows[-1] += word + " "
    return [r.rstrip() for r in rows]


def draw(text: str) -> str:
    """Return the SVG of a text."""
    lines = text.splitlines()
    width = max(len(line) for line in lines if line.lstrip().startswith("rank"))
    width = max(width, *(len(line) for line in lines if line[:4].strip().isdigit()), len(COMMAND))
    rows = [COMMAND, ""] + [part for line in lines for part in (wrap(line, width) if len(line) > width else [line])]
    w, h = width * CHARACTER + 2 * MARGIN, len(rows) * LINE + 2 * MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w:.0f}" height="{h:.0f}" viewBox="0 0 {w:.0f} {h:.0f}" '
        'role="img" aria-label="Output of a selection">',
        f'<rect width="{w:.0f}" height="{h:.0f}" rx="8" fill="#14181f"/>',
        '<g font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="12" fill="#d7dde6">',
    ]
    for number, row in enumerate(rows, start=1):
        answer = row.startswith("Fine-tune ")
        style = ' fill="#8be28b" font-weight="bold"' if answer else ""
        y = MARGIN + number * LINE - 5
        out.append(f'<text x="{MARGIN}" y="{y}" xml:space="preserve"{style}>{html.escape(row)}</text>')
    return "\n".join([*out, "</g>", "</svg>", ""])


def main() -> None:
    directory, target = map(Path, sys.argv[1:])
    target.write_text(draw((directory / "selection.txt").read_text()))


if __name__ == "__main__":
    main()
