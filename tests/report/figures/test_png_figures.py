"""Figures as PNG: what is in the files, what stands in them, what is refused; nothing of the user's changes."""

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from lensjax.errors import InputError
from lensjax.report.figures import data, png_figures, svg_figures
from lensjax.report.figures.export import check_formats, write_figures
from lensjax.report.predicted_curves import predicted_curves

TANGENTS = {"kernel_spectrum": [9.0, 0.5, 0.01, -1e-9], "trace_by_layer": {"tokens": 2.0, "layers.0.mlp": -0.5}}


@pytest.fixture
def rich(make):
    """A selection with everything in it."""
    return make("averaged", truth=np.array([1.2, 1.6, 1.1]), facts={"tangents": {"beta": TANGENTS}})


def texts(figure):
    """Return the texts of a figure that can be seen."""
    (axes,) = figure.axes
    found = [axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel(), *(t.get_text() for t in axes.texts)]
    found += [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    return found + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def curve_of(selection, row):
    predicted = predicted_curves(selection, selection.main)
    return png_figures.curve(selection, row, predicted, data.shared_axes(selection, predicted))


def test_there_is_a_png_for_each_svg(rich, tmp_path):
    files = write_figures(rich, tmp_path, ("svg", "png"))
    names = [file.stem for file in files if file.suffix == ".svg"]
    assert [file.name for file in files] == [f"{name}.{kind}" for kind in ("svg", "png") for name in names]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    assert len(names) == 2 + 3 + 2
    widths = {}
    for name in names:
        image = imread(tmp_path / f"{name}.png")
        assert image.ndim == 3
        assert image.std() > 0.02  # something is drawn
        assert (image[:3] > 0.99).mean() > 0.9  # and not beyond the edge
        widths[name] = image.shape[1]
    assert widths.pop("ranking") == 8 * png_figures.DPI
    assert set(widths.values()) == {round(6.4 * png_figures.DPI)}


def test_a_curve_shows_what_was_measured_fitted_and_expected(rich):
    row = 0
    figure = curve_of(rich, row)
    (axes,) = figure.axes
    assert texts(figure)[:3] == ["alpha", "training samples", "test loss (nats per token)"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        *("90 % interval", "fit", "forecast", "measured", "measured, not used", "expected at 12,800"),
        "measured at 12,800",
    ]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    used = rich.main.used[row]
    np.testing.assert_array_equal(lines["measured"], np.c_[rich.curves.sizes, rich.curves.losses[row]][used])
    (spare,) = lines["measured, not used"]
    assert axes.get_xlim()[0] < spare[0] < 200  # before the first size, for a logarithmic axis has no 0
    assert spare[1] == rich.curves.losses[row, 0]
    np.testing.assert_array_equal(lines["expected at 12,800"], [[12800, rich.main.predicted_loss[row]]])
    np.testing.assert_array_equal(lines["measured at 12,800"], [[12800, 1.2]])
    found = predicted_curves(rich, rich.main)
    both = np.concatenate([lines["fit"], lines["forecast"][1:]])
    np.testing.assert_array_equal(both, np.c_[found.sizes, found.losses[row]])
    assert lines["fit"][-1, 0] == rich.curves.sizes[used][-1]
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks[0] == "1k" or "0" in ticks
    assert "12.8k" in ticks


def test_the_phase_transition_is_marked(make):
    selection = make("lens", zero_shot=False)
    rows = [row for row in range(3) if np.isfinite(selection.main.details["transition"][row])]
    marked = 0
    for row in rows:
        (axes,) = curve_of(selection, row).axes
        low, high = axes.get_xlim()
        transition = selection.main.details["transition"][row]
        found = [text for text in axes.texts if text.get_text() == "power phase begins"]
        assert len(found) == (low <= transition <= high)
        marked += len(found)
        for text in found:
            assert text.xy[0] == transition
    assert marked


def test_the_ranking_shows_each_candidate_with_its_interval(rich):
    figure = png_figures.ranking(rich)
    (axes,) = figure.axes
    order = rich.main.order
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [rich.curves.names[row] for row in order]
    places = {line.get_label(): line.get_xdata() for line in axes.lines}
    np.testing.assert_array_equal(places["expected"], rich.main.predicted_loss[order])
    np.testing.assert_array_equal(places["measured"], rich.truth[order])
    (bars,) = axes.collections
    ends = np.array([segment[:, 0] for segment in bars.get_segments()])
    inside = np.clip(rich.main.interval[order], *axes.get_xlim())
    np.testing.assert_allclose(ends, inside)
    shown = texts(figure)
    assert "P(best)" in shown
    assert f"{100 * rich.main.best_probability[order[0]]:.0f} %" in shown
    assert "test loss expected at 12,800 samples (nats per token)" in shown


def test_the_cost_is_that_of_the_svg(rich):
    figure = png_figures.cost(rich)
    (axes,) = figure.axes
    widths = [bar.get_width() for bar in axes.patches]
    spent, best = rich.spent(rich.main), rich.full_flops[rich.main.order[0]]
    assert widths == [spent, spent, best, rich.full_flops.sum()]
    shown = [text for text in texts(figure) if text.endswith(" %")]
    drawn = ET.fromstring(svg_figures.cost(rich, name="cost", alone=True))
    assert shown == [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text") if t.text.endswith(" %")]


def test_kernels_and_traces():
    kept, dropped = data.eigenvalues(TANGENTS["kernel_spectrum"])
    figure = png_figures.spectrum(kept, dropped, "beta")
    (line,) = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 9.0], [2, 0.5], [3, 0.01]])
    assert "rank of the eigenvalue (1 not above 0 left out)" in texts(figure)
    assert "beta: kernel spectrum" in texts(figure)
    figure = png_figures.traces(data.layers(TANGENTS["trace_by_layer"]), "beta")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2.0, -0.5]
    assert {"beta: Hessian trace by layer", "tokens", "layers.0.mlp", "2", "-0.5"} <= set(texts(figure))


def test_hostile_names_are_shown_as_they_are(make, hostile):
    names = ("$\\frac{1}{0}$ and $", *hostile, "\N{CJK UNIFIED IDEOGRAPH-4E2D}\n_^%#&")
    selection = make("averaged", names=names, facts={"tangents": {names[0]: TANGENTS}})
    written = png_figures.render_all(selection)
    assert len(written) == 2 + 6 + 2
    assert all(content.startswith(b"\x89PNG") for content in written.values())
    titles = [texts(curve_of(selection, row))[0] for row in range(6)]
    assert titles[:2] == ["$\\frac{1}{0}$ and $", '<script>alert("x")</script>']
    assert "\N{REPLACEMENT CHARACTER}right-to-left\N{REPLACEMENT CHARACTER}" in titles[3]
    assert len(titles[4]) == 60
    assert titles[5] == 2 * "\N{REPLACEMENT CHARACTER}" + "_^%#&"
    for row in range(6):
        children = curve_of(selection, row).axes[0].get_children()
        (title,) = [child for child in children if isinstance(child, Text) and child.get_text() == titles[row]]
        assert not title.get_parse_math()
    assert not any(label.get_parse_math() for label in png_figures.ranking(selection).axes[0].get_yticklabels())


@pytest.mark.parametrize("method", ["zero_shot", "subtuning", "ats", "rectified"])
def test_methods_that_say_less_have_figures_too(make, method):
    selection = make(method, complete=True, flops=np.full((3, 5), np.nan))
    written = png_figures.render_all(selection)
    assert len(written) == 1 + 3
    assert "cost" not in written


def test_nothing_of_the_users_matplotlib_changes(rich):
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        styled = png_figures.render_all(rich)
        assert dict(matplotlib.rcParams) == before
    assert styled == png_figures.render_all(rich)  # the same selection gives the same bytes
    code = "import sys, lensjax.report.figures.png_figures; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_formats_are_checked_before_anything_is_written(rich, tmp_path, monkeypatch):
    check_formats(("svg", "png"))
    with pytest.raises(
        InputError, match=r"^--figure-format pngs: no such format; choose svg or png\. Did you mean png\?$"
    ):
        write_figures(rich, tmp_path / "figures", ("svg", "pngs"))
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else known(name))
    check_formats(("svg",))
    message = (
        r"^--figure-format png: needs matplotlib, which is not installed: pip install 'lensjax\[figures\]', or choose "
        r"svg\.$"
    )
    with pytest.raises(InputError, match=message):
        write_figures(rich, tmp_path / "figures", ("svg", "png"))
    assert not (tmp_path / "figures").exists()
