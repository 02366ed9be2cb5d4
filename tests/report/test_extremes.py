"""Losses as small and as large as float64 holds, and a thousand candidates: there is a report all the same."""

import dataclasses
import html.parser
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lensjax.losses.curves import Curves
from lensjax.report import html as report
from lensjax.report import tables
from lensjax.report.figures import data, png_figures, svg_figures
from lensjax.report.figures.export import write_figures
from lensjax.report.html import render_html
from lensjax.report.predicted_curves import predicted_curves
from lensjax.report.text import render
from lensjax.selectors import Scores

SVG = "{http://www.w3.org/2000/svg}"
SIZES = np.array([0.0, 200.0, 400.0, 800.0, 1600.0])
TABLES = {
    "1e-300": np.full(3, 1e-300),
    "5e-324": np.full(3, 0.0),
    "1e-12": np.full(3, 1e-12),
    "1e300": np.full(3, 1e300),
    "one tiny": np.array([1e-300, 1.0, 1.0]),
    "one huge": np.array([1.0, 1e300, 1.0]),
    "both": np.array([1e-300, 1e300, 1.0]),
}


def extreme(make, factors, **changes):
    """A selection of three candidates whose losses have these factors; the scores are made up."""
    losses = np.array([[b / (300 + s**0.6) + e for s in SIZES] for b, e in ((90, 1.0), (70, 1.5), (150, 0.8))])
    losses = np.maximum(losses * factors[:, None], 5e-324)
    curves = Curves(("alpha", "beta", "gamma"), SIZES, losses, np.array([1e6, 2e6, 3e6]))
    last = losses[:, -1].copy()
    ends = np.maximum(np.stack([last * 0.5, last * 1.1], axis=1), 5e-324)
    details = {"transition": np.full(3, 1000.0)}
    scores = Scores("averaged", curves.names, last, last, ("fine",) * 3, np.tile(SIZES > 0, (3, 1)), details, (), ends)
    values = {"curves": curves, "scores": {"averaged": scores}, "flops": np.ones((3, 5)), "truth": last.copy()}
    return make(**{**values, **changes})


@pytest.fixture(params=TABLES)
def selection(request, make, monkeypatch):
    found = extreme(make, TABLES[request.param])
    # Curves go through all losses; what a selector makes of such losses is not the point here.
    sizes = [*SIZES[1:], found.target]
    losses = np.concatenate([found.curves.losses[:, 1:], found.main.predicted_loss[:, None]], axis=1)
    curves = predicted_curves(make(), make().main)
    drawn = type(curves)(np.array(sizes), losses, np.stack([losses * 0.5, np.maximum(losses, 5e-324)], axis=2), "")
    for module in (report, svg_figures, png_figures):
        monkeypatch.setattr(module, "predicted_curves", lambda *_: drawn)
    return found


def numbers(text):
    return [float(n) for n in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?|nan|inf", text)]


def test_extreme_losses_have_a_report(selection):
    page = render_html(selection)
    html.parser.HTMLParser().feed(page)
    assert page.count('role="img" aria-labelledby="curve-') == 3
    for coordinates in re.findall(r' (?:cx|cy|x|y|d)="([^"]*)"', page):
        assert np.isfinite(numbers(coordinates)).all()
    assert selection._repr_html_().count("<tr>") == 4


def test_extreme_losses_have_figures_with_points_where_they_are(selection, tmp_path):
    files = write_figures(selection, tmp_path, ("svg", "png"))
    assert len(files) == 2 * (2 + 3)
    axes = data.shared_axes(selection, svg_figures.predicted_curves())
    low, high = np.log(axes.losses.low), np.log(axes.losses.high)
    for row in range(3):
        (file,) = [f for f in files if f.name.startswith(f"curve-{row + 1:02}") and f.suffix == ".svg"]
        circles = [c for c in ET.parse(file).getroot().iter(f"{SVG}circle") if c.get("class") in ("paid", "spare")]
        heights = np.array([float(c.get("cy")) for c in circles])
        share = (np.log(selection.curves.losses[row]) - low) / (high - low)
        bottom, top = svg_figures.HEIGHT - svg_figures.BOTTOM, svg_figures.TOP
        np.testing.assert_allclose(heights, bottom + share * (top - bottom), atol=0.051)
        assert ((heights <= bottom) & (heights >= top)).all()


def test_extreme_losses_are_not_printed_as_0(make):
    first = render(extreme(make, TABLES["1e-300"], truth=None)).split("\n")[0]
    assert re.fullmatch(r"Fine-tune gamma: expected test loss \d\.\de-300 nats .*; next alpha \(\d\.\de-300\)\.", first)


def test_a_loss_of_0_is_not_drawn(make):
    """A prediction may be smaller than any number above 0; a logarithmic axis has no place for it."""
    found = extreme(make, np.ones(3))
    found.main.predicted_loss[0] = 0.0
    found.main.interval[0, 0] = 0.0
    axes = data.shared_axes(found, predicted_curves(found, found.main))
    drawn = svg_figures.curve(found, 0, predicted_curves(found, found.main), axes, name="x", alone=True)
    assert 'class="guess"' not in drawn
    assert "alpha" not in svg_figures.ranking(found, name="x").partition("</desc>")[2]
    assert png_figures.render_all(found)


@pytest.fixture(scope="module")
def thousand():
    rng = np.random.default_rng(0)
    sizes = 100.0 * 2 ** np.arange(6)
    e, b = rng.uniform(1, 3, (1000, 1)), rng.uniform(5, 9, (1000, 1))
    losses = e + b * (sizes + 200) ** -0.25
    return Curves(tuple(f"org/model-{i}" for i in range(1000)), sizes, losses, 1e6 * np.arange(1, 1001))


def of_many(make, curves):
    """A selection by a ranking that is cheap to make."""
    used = np.ones(curves.losses.shape, bool)
    last = curves.losses[:, -1]
    remarks = ["a remark" if row % 2 else "" for row in range(len(curves))]
    scores = Scores("averaged", curves.names, last, last, ("fine",) * len(curves), used, {}, tuple(remarks))
    flops = 6.0 * curves.parameters[:, None] * curves.sizes
    return make(curves=curves, scores={"averaged": scores}, flops=flops, full_flops=6.0 * curves.parameters * 12800)


def test_the_best_hundred_are_shown_in_full_and_the_others_folded(make, thousand, monkeypatch):
    asked = []
    whole = report.predicted_curves

    def counted(selection, scores, rows):
        asked.append(rows)
        return whole(selection, scores, rows)

    monkeypatch.setattr(report, "predicted_curves", counted)
    selection = of_many(make, thousand)
    page = render_html(selection)
    order = selection.main.order
    assert len(asked) == 1
    np.testing.assert_array_equal(asked[0], order[: tables.SHOWN])
    assert page.count('role="img" aria-labelledby="curve-') == tables.SHOWN == 100
    assert page.count('class="fig mini"') == 100
    assert "900 candidate(s) that rank lower have no figure here." in page
    full, _, rest = page.partition("<details><summary>The other 900 candidates</summary>")
    folded = rest.partition("</details>")[0]
    for rank, row in enumerate(order, start=1):
        name = f"<bdi>{thousand.names[row]}</bdi></th>"
        assert (name in full) == (rank <= 100)
        assert (name in folded) == (rank > 100)
    last = order[-1]
    expected = f"<td class=n>1000</td><td class=n>{selection.main.predicted_loss[last]:.4f}</td><td class=n>6</td>"
    assert expected in folded
    assert folded.count("<td class=n>a remark</td>") == sum(row % 2 for row in order[100:])
    assert full.count("a remark</li>") == sum(row % 2 for row in order[:100])
    measured = {
        name: {"kernel_spectrum": [2.0, 1.0]} for name in (thousand.names[order[0]], thousand.names[order[500]])
    }
    tangents = render_html(dataclasses.replace(selection, facts={"tangents": measured}))
    assert tangents.count('aria-labelledby="spectrum-') == 1
    assert "1 candidate(s) that rank lower have no figure here." in tangents
    few = render_html(of_many(make, thousand.rows(np.arange(100))))
    assert "<summary>The other" not in few
    assert "have no figure here" not in few


def test_the_curves_of_some_candidates_are_those_of_all(make):
    selection = make("averaged", names=tuple("abcdef"))
    every = predicted_curves(selection, selection.main)
    some = predicted_curves(selection, selection.main, np.array([4, 1]))
    for part, whole in ((some.losses, every.losses), (some.interval, every.interval)):
        np.testing.assert_array_equal(part[[1, 4]], whole[[1, 4]])
        assert np.isfinite(part[[1, 4]]).all()
        assert np.isnan(part[[0, 2, 3, 5]]).all()
