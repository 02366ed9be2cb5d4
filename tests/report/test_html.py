import dataclasses
import html.parser
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lensjax._display import escaped
from lensjax.environment import versions
from lensjax.errors import InputError
from lensjax.report.figures.export import write_figures
from lensjax.report.html import render_html
from lensjax.report.predicted_curves import predicted_curves
from lensjax.selectors import SELECTORS

VOID = {"meta", "br", "img", "link", "hr", "input"}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}


class Page(html.parser.HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def tags(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return " ".join("".join(t for tag, t in self.texts if tag not in ("style", "title", "desc")).split())


@pytest.fixture
def rich(make):
    """A selection with everything in it."""
    facts = {
        "tune_command": "python -m lensjax.select --fine-tune 'alpha & co'",
        "command": "python -m lensjax.select <here>",
        "task": "0123456789abcdef",
        "seed": 7,
        "seconds": 3661.0,
        "versions": {"jax": "0.10.1"},
        "notes": ["3 samples were cut"],
        "specification": {"plan": {"learning_rate": 0.002}},
        "tangents": {
            "alpha": {"kernel_spectrum": [4.0, 1.0, 0.25, 0.0], "trace_by_layer": {"layers.0": 3.0, "head": -1.0}},
            "beta": {},
        },
    }
    return make(
        *("averaged", "lens", "ats", "zero_shot"),
        truth=np.array([1.0, 1.6, 0.9]),
        failures={"broken": "MemoryError: no room for <3.2 GiB>"},
        unverified={"beta": "OSError: gone"},
        refused={"power": "too few points"},
        failed_flops=1e9,
        facts=facts,
    )


def test_the_page_is_well_formed_and_headings_are_in_order(rich):
    text = render_html(rich)
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.tags("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    pointed = [i for _, attrs in page.elements for i in attrs.get("aria-labelledby", "").split()]
    assert set(pointed) <= set(ids)
    assert len(page.tags("main")) == 1


def test_nothing_is_loaded_and_nothing_can_run(rich):
    page = Page(render_html(rich))
    assert not page.tags("script")
    assert not page.tags("link")
    assert not page.tags("img")
    for _, attrs in page.elements:
        assert not LOADS & set(attrs), attrs
        assert not [name for name in attrs if name.startswith("on")]
    styles = "".join(t for tag, t in page.texts if tag == "style")
    assert "@import" not in styles
    assert "url(" not in styles
    assert "prefers-color-scheme:dark" in styles
    policy = [m["content"] for m in page.tags("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_answer_is_one_sentence_with_its_certainty_and_cost(make):
    selection = make("averaged")
    scores = selection.main
    loss, (low, high) = scores.predicted_loss[scores.order[0]], scores.interval[scores.order[0]]
    chance, share = scores.best_probability[scores.order[0]], selection.spent(scores) / selection.full_flops.sum()
    page = Page(render_html(selection))
    assert (
        f"Fine-tune {scores.best}: on 12,800 samples its test loss should be about "
        f"{loss:.3f} nats per token (90 % sure: between {low:.3f} and {high:.3f}); it is the best of the 3 candidates "
        f"with probability {100 * chance:.0f} %, and finding out cost {100 * share:.1f} % of fine-tuning them all."
    ) in page.text


def test_headers_name_the_columns_and_rows_of_every_table(rich):
    page = Page(render_html(rich))
    heads = [attrs.get("scope") for attrs in page.tags("th")]
    assert set(heads) == {"col", "row"}
    assert len(page.tags("caption")) == len(page.tags("table")) == 3


def test_every_candidate_has_a_figure_that_can_be_read_out(rich):
    text = render_html(rich)
    page = Page(text)
    svgs = [attrs for attrs in page.tags("svg") if attrs.get("role") == "img"]
    curves = [a for a in svgs if a["aria-labelledby"].startswith("curve-")]
    assert len(curves) == len(rich.curves)
    assert [t for tag, t in page.texts if tag == "title" and t.startswith("Loss curve of ")] == [
        f"Loss curve of {rich.curves.names[row]}" for row in rich.main.order
    ]
    described = [t for tag, t in page.texts if tag == "desc"]
    assert len(described) == len(svgs)
    best = rich.main.order[0]
    assert f"Expected at 12,800: {rich.main.predicted_loss[best]:.4f}" in described[0]
    assert "The power phase begins at about" in described[0]
    # Four measurements of `beta` and five of the others, the zero-shot one not paid for by this method.
    assert text.count('<circle class="paid" cx') - 1 - 3 == int(rich.main.used.sum())  # legend, spectrum
    assert text.count('<circle class="spare" cx') - 1 == 3


def test_each_figure_is_an_svg_document_of_its_own(rich, tmp_path):
    files = write_figures(rich, tmp_path / "figures")
    names = [f"curve-{row + 1:02}-{rich.curves.names[row]}.svg" for row in rich.main.order]
    assert [f.name for f in files] == [
        *("ranking.svg", "cost.svg", *names, "spectrum-01-alpha.svg", "traces-01-alpha.svg")
    ]
    for file in files:
        root = ET.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert root.find("{http://www.w3.org/2000/svg}desc").text


def test_points_lie_where_the_losses_are(make, tmp_path):
    """Positions on both axes are affine in the logarithms, and a smaller loss lies lower."""
    selection = make("averaged", zero_shot=False)
    file = write_figures(selection, tmp_path)[2]
    circles = ET.parse(file).getroot().iter("{http://www.w3.org/2000/svg}circle")
    points = np.array([[float(c.get("cx")), float(c.get("cy"))] for c in circles if c.get("class") == "paid"])
    row = selection.main.order[0]
    known = np.isfinite(selection.curves.losses[row])
    sizes, losses = np.log(selection.curves.sizes[known]), np.log(selection.curves.losses[row][known])
    for values, pixels in ((sizes, points[:, 0]), (losses, points[:, 1])):
        slope, start = np.polyfit(values, pixels, 1)
        np.testing.assert_allclose(start + slope * values, pixels, atol=0.11)
    assert np.all(np.diff(points[:, 0]) > 0)
    assert np.all(np.diff(points[:, 1]) > 0)


@pytest.mark.parametrize("method", ["averaged", "lens", "rectified", "power", "ats"])
def test_drawn_curves_end_at_the_predictions(make, method):
    selection = make(method, complete=True)
    found = predicted_curves(selection, selection.main)
    assert found.sizes[-1] == selection.target
    assert found.sizes[0] == 200
    np.testing.assert_allclose(found.losses[:, -1], selection.main.predicted_loss, rtol=1e-9)
    assert np.isfinite(found.losses).all()
    if method == "averaged":
        np.testing.assert_allclose(found.interval[:, -1], selection.main.interval, rtol=1e-9)
        assert found.reason == ""
    else:
        assert found.interval is None
        assert found.reason == f"Method {method} gives no interval; the default method, averaged, does."


def test_a_curve_that_misses_the_prediction_is_not_drawn(make):
    selection = make("averaged")
    moved = dataclasses.replace(selection.main, predicted_loss=selection.main.predicted_loss + np.array([0, 0.1, 0]))
    found = predicted_curves(selection, moved)
    assert np.isnan(found.losses[1]).all()
    assert np.isnan(found.interval[1]).all()
    assert np.isfinite(found.losses[[0, 2]]).all()


@pytest.mark.parametrize(("method", "reason"), [("lens", "gives no interval"), ("zero_shot", "without predicting a")])
def test_missing_intervals_are_absent_and_the_reason_is_given(make, method, reason):
    text = render_html(make(method))
    page = Page(text)
    assert 'class="band"' not in text
    assert "90 % interval" not in page.text
    assert "P(best)" not in page.text
    assert reason in page.text
    assert "sure that is" in page.text or "knows no certainty" in page.text
    assert "knows no intervals and no probabilities" in page.text


def test_candidates_without_a_score_come_last_with_the_reason(make):
    selection = make("averaged")
    scores = dataclasses.replace(
        selection.main,
        score=np.array([np.nan, 2.0, 1.0]),
        predicted_loss=np.array([np.nan, 2.0, 1.0]),
        interval=np.array([[np.nan, np.nan], [1.5, 2.5], [0.9, 1.2]]),
        status=("failed: too few points", "fine", "fine"),
    )
    page = Page(render_html(dataclasses.replace(selection, scores={"averaged": scores})))
    assert "alpha: failed: too few points" in page.text
    assert [a["class"] for a in page.tags("tr") if a.get("class") in ("best", "out")] == ["best", "out"]


def test_an_order_that_is_not_that_of_the_expected_losses_is_explained(make):
    selection = make("averaged")
    words = "The order is by the method's score, which weighs more than the expected loss."
    for score, shown in ((np.array([1.0, 2.0, 3.0]), False), (np.array([3.0, 2.0, 1.0]), True)):
        scores = dataclasses.replace(selection.main, score=score, predicted_loss=np.array([1.0, 2.0, 3.0]))
        page = Page(render_html(dataclasses.replace(selection, scores={"averaged": scores})))
        assert (words in page.text) == shown


def test_without_any_score_there_is_an_error(make):
    selection = make("averaged")
    scores = dataclasses.replace(selection.main, score=np.full(3, np.nan))
    with pytest.raises(InputError, match="no candidate could be scored"):
        render_html(dataclasses.replace(selection, scores={"averaged": scores}))


def test_hostile_names_and_texts_are_escaped(make, hostile, tmp_path):
    evil = hostile[1]
    selection = make(
        names=hostile,
        source=evil,
        cost_note=evil,
        failures={hostile[0]: evil},
        unverified={evil: hostile[2]},
        facts={
            "tune_command": evil,
            "command": hostile[0],
            "directory": evil,
            "task": evil,
            "notes": [evil],
            "specification": {evil: [evil, {hostile[0]: hostile[2]}]},
            "versions": {evil: hostile[0]},
            "tangents": {evil: {"kernel_spectrum": [1.0], "trace_by_layer": {hostile[0]: 1.0, evil: 2.0}}},
        },
    )
    text = render_html(selection)
    page = Page(text)
    text.encode()
    assert not page.tags("script")
    assert not page.tags("img")
    assert "\x00" not in text
    assert "\x1b" not in text
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")]
    names = [t for tag, t in page.texts if tag == "bdi"]
    assert hostile[0] in names
    assert evil in names
    assert "\u202eright-to-left\ufffd\ufffd[31m \ufffd" in names
    for file in write_figures(selection, tmp_path):
        assert file.parent == tmp_path
        assert ET.parse(file).getroot().tag.endswith("svg")
    assert "\x00" not in selection._repr_html_()
    assert not Page(f"<body>{selection._repr_html_()}</body>").tags("script")


def test_what_failed_what_is_next_and_how_it_was_made_are_told(rich):
    page = Page(render_html(rich))
    for expected in (
        "broken: MemoryError: no room for <3.2 GiB>",
        "beta: OSError: gone",
        "power: too few points",
        "python -m lensjax.select --fine-tune 'alpha & co'",
        "python -m lensjax.select <here>",
        "Data fingerprint 0123456789abcdef",
        "Seed 7",
        "Versions jax 0.10.1",
        "3 samples were cut",
        '"learning_rate": 0.002',
        "Time of all runs 1:01:01",
        "1.00e+09 of them went to candidates that failed",
    ):
        assert expected in page.text.replace("  ", " "), expected


def test_a_package_that_is_not_installed_is_not_passed_over(monkeypatch):
    monkeypatch.setattr("lensjax.environment.PACKAGES", ("numpy", "no-such-package"))
    found = versions()
    assert (found["numpy"], found["no-such-package"]) == (np.__version__, "not installed")


def test_folds_are_there_only_with_something_inside(make, rich):
    assert "Tangents: kernels and curvature" in Page(render_html(rich)).text
    page = Page(render_html(make("averaged")))
    assert "Tangents" not in page.text
    assert "All methods" not in page.text
    assert "Nothing: every run that was needed was made." in page.text


def test_spectra_and_traces_are_drawn_and_what_is_missing_is_said(rich):
    page = Page(render_html(rich))
    described = [t for tag, t in page.texts if tag == "desc"]
    assert "3 eigenvalues from 4 down to 0.25; 1 that are not above 0 are left out." in described
    assert "layers.0 3; head -1" in described
    assert "Nothing was computed." in page.text


def test_what_was_saved_counts_fine_tuning_the_best_candidate(make):
    selection = make("averaged")
    full = selection.full_flops.sum()
    kept = selection.spent(selection.main) + selection.full_flops[selection.main.order[0]]
    assert f"{100 * (1 - kept / full):.1f} % is saved" in Page(render_html(selection)).text
    dear = make("averaged", failed_flops=full)
    assert "nothing is saved at this size" in Page(render_html(dear)).text
    unknown = make("averaged", flops=np.full((3, 5), np.nan))
    page = Page(render_html(unknown))
    assert "what finding out cost is not known" in page.text
    assert "The cost is not known" in page.text


def test_the_right_choice_and_the_wrong_one_are_told_apart(make):
    best = make("averaged").main.order[0]
    truth = np.array([1.5, 1.6, 1.4])
    truth[best] = 1.0
    assert "the choice was right" in Page(render_html(make("averaged", truth=truth))).text
    truth[(best + 1) % 3] = 0.5
    assert "with 0.500, against 1.000 of the choice" in Page(render_html(make("averaged", truth=truth))).text


def test_notebooks_show_the_answer_and_the_ranking(make):
    selection = make("averaged")
    page = Page(f"<body>{selection._repr_html_()}</body>")
    assert f"Fine-tune {selection.best}: on 12,800 samples" in page.text
    assert len(page.tags("table")) == 1
    assert not [attrs for _, attrs in page.elements if "id" in attrs]


def test_one_size_only(make):
    curves = make().curves
    one = dataclasses.replace(curves, sizes=curves.sizes[1:2], losses=curves.losses[:, 1:2])
    scores = {"averaged": SELECTORS["averaged"](one, 12800.0)}
    text = render_html(make(curves=one, scores=scores, flops=np.zeros((3, 1))))
    assert "Of this choice, mind: one size only: a guess" in Page(text).text
    assert 'class="forecast"' in text


def test_zero_shot_losses_only(make, tmp_path):
    curves = make().curves
    only = dataclasses.replace(curves, sizes=curves.sizes[:1], losses=curves.losses[:, :1])
    scores = {"zero_shot": SELECTORS["zero_shot"](only, 12800.0)}
    selection = make(curves=only, scores=scores, flops=np.zeros((3, 1)))
    page = Page(render_html(selection))
    assert "no run of this candidate was used" in page.text
    assert len([a for a in page.tags("svg") if a.get("aria-labelledby", "").startswith("curve-")]) == 3
    assert [f.name for f in write_figures(selection, tmp_path)][:2] == ["ranking.svg", "cost.svg"]


def test_no_losses_at_all(make):
    curves = make().curves
    empty = dataclasses.replace(curves, losses=np.full(curves.losses.shape, np.nan))
    scores = {"model_size": SELECTORS["model_size"](empty, 12800.0)}
    page = Page(render_html(make(curves=empty, scores=scores)))
    assert "Measured: nothing." in "".join(t for tag, t in page.texts if tag == "desc")


def test_texts_are_safe_in_attributes_too():
    assert escaped("a\"b'c<d>&\x07") == "a&quot;b&#x27;c&lt;d&gt;&amp;\ufffd"
