"""SVG primitives: the colours of all figures, paths, a document with a title and a description."""

from __future__ import annotations

from collections.abc import Sequence

from lensjax._display import escaped

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
