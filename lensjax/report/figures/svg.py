"""The little of SVG that the figures need: escaped text, scales with ticks, one document with a title."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Sequence

# What XML 1.0 allows; anything else in a name would make the document malformed.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

PALETTE = """
.fig{--ink:#1c2430;--soft:#596579;--grid:#e3e7ee;--line:#0b62b8;--band:#0b62b8;--paid:#0b62b8;--mark:#b1450c;
--truth:#12703c;--ground:#ffffff}
@media (prefers-color-scheme:dark){.fig{--ink:#e8ecf2;--soft:#a3aec0;--grid:#2c3442;--line:#6db3f8;--band:#6db3f8;
--paid:#6db3f8;--mark:#f59a5d;--truth:#5fd08f;--ground:#171c24}}
.fig{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
.fig text{fill:var(--soft)}.fig .strong{fill:var(--ink);font-weight:600}
.fig .grid{stroke:var(--grid);stroke-width:1;fill:none}.fig .axis{stroke:var(--soft);stroke-width:1;fill:none}
.fig .fit{stroke:var(--line);stroke-width:2;fill:none}
.fig .forecast{stroke:var(--line);stroke-width:2;fill:none;stroke-dasharray:5 4}
.fig .band{fill:var(--band);opacity:.16}.fig .paid{fill:var(--paid);stroke:var(--ground);stroke-width:1}
.fig .spare{fill:var(--ground);stroke:var(--soft);stroke-width:1.5}
.fig .range{stroke:var(--line);stroke-width:2}.fig .guess{fill:var(--ground);stroke:var(--line);stroke-width:2}
.fig .phase{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:2 3}.fig .phase-text{fill:var(--mark)}
.fig .truth{fill:var(--truth);stroke:var(--ground);stroke-width:1}
.fig .bar{fill:var(--line)}.fig .bar.rest{fill:var(--grid)}.fig .bar.mark{fill:var(--mark)}
"""


def escaped(text: object) -> str:
    """Return text that is safe inside of HTML and XML, attributes included."""
    return html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(text)), quote=True)


def shortened(text: str, length: int) -> str:
    """Cut a text in its middle: the ends of model names tell them apart."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def compact(value: float) -> str:
    """Format a number in a few characters: 200, 1.6k, 3M, 2e12."""
    if value == 0:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1000 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A logarithmic scale: values from `low` to `high` lie between pixels `start` and `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value above 0."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def inside(self, value: float) -> bool:
        """Whether a value lies on the scale."""
        return self.low <= value <= self.high

    def ticks(self, most: int) -> list[float]:
        """Return up to `most` round values on the scale, more than one where there is room for them."""
        decades = math.log10(self.high / self.low)
        if decades >= 1.5:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            between = [m * 10.0**e for e in exponents for m in (1, 2, 5) if self.inside(m * 10.0**e)]
            if len(between) <= most:
                return between
            step = max(1, math.ceil(decades / most))
            first = math.ceil(math.log10(self.low) - 1e-9)
            return [10.0**e for e in range(first, math.floor(math.log10(self.high) + 1e-9) + 1, step)][:most]
        best: list[float] = []
        base = math.floor(math.log10(self.high - self.low))
        for step_size in (m * 10.0**e for e in (base - 1, base) for m in (1.0, 2.0, 5.0)):
            first = math.ceil(self.low / step_size - 1e-9)
            found = [round(i * step_size, 12) for i in range(first, math.floor(self.high / step_size + 1e-9) + 1)]
            if len(best) < len(found) <= most:
                best = found
        return best


def spread(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """Return limits of a logarithmic scale that holds all values (above 0), with a margin in shares of its length."""
    low, high = min(values), max(values)
    pad = max((high / low) ** margin, 1.01)
    return low / pad, high * pad


def line(points: Sequence[tuple[float, float]]) -> str:
    """Return a path's description through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def document(
    width: int, height: int, title: str, description: str, body: Sequence[str], *, name: str, alone: bool
) -> str:
    """Put a figure together.

    Parameters
    ----------
    width, height : int
        Of its coordinates; in a page it takes the width it is given.
    title, description : str
        Unescaped; what is read out to those who do not see the figure.
    body : sequence of str
        Elements.
    name : str
        Unique in its page; letters, digits, hyphens.
    alone : bool
        A file of its own, with its colours in it, and a ground.
    """
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fig" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-t {name}-d"'
    )
    head += f' width="{width}" height="{height}">' if alone else ">"
    parts = [
        head,
        f'<title id="{name}-t">{escaped(title)}</title>',
        f'<desc id="{name}-d">{escaped(description)}</desc>',
    ]
    if alone:
        parts += [f"<style>{PALETTE}</style>", f'<rect width="{width}" height="{height}" style="fill:var(--ground)"/>']
    return "\n".join([*parts, *body, "</svg>"])
