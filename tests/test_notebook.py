"""What results look like at a prompt and in a notebook."""

import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lensjax
from lensjax._display import MOST_ROWS, cell, listed, table
from lensjax.bound import generalization_bound
from lensjax.losses.curves import Curves

HOSTILE = "<script>alert('a & b')</script>"


def loss(w, x):
    return ((x @ w["a"].T) ** 2).mean()


def curves():
    losses = np.array([[3.0, 2.5, 2.25, np.nan], [4.0, 2.4, 2.0, 1.9]])
    return Curves(names=(HOSTILE, "b"), sizes=np.array([0.0, 100.0, 200.0, 400.0]), losses=losses, source="mine")


def cells(shown):
    """Texts of a table's rows; it must be well-formed and hold no element that a name brought in."""
    root = ElementTree.fromstring(shown.replace("colspan=3", 'colspan="3"'))
    assert {element.tag for element in root.iter()} == {"table", "caption", "tr", "th", "td"}
    return root.find("caption").text, [[c.text or "" for c in row] for row in root.findall("tr")]


def results():
    weights, x = {"a": jnp.ones((3, 2))}, jnp.arange(10.0).reshape(5, 2)
    kernel = lensjax.ntk(lambda w, x: (w["a"] @ x).sum(), weights, x)
    return {
        "Curves(2 candidates": curves(),
        "Scores(averaged, 2 candidates, best first: b, <script>": lensjax.SELECTORS["averaged"](curves(), 1e4),
        "Fits(law='power', 2 curves": lensjax.fit(curves(), law="power"),
        "TraceEstimate(hessian trace ": lensjax.hessian_trace(loss, weights, x, key=jax.random.key(0), probes=2),
        "KernelDynamics(outputs (5,), eigenvalues ": lensjax.kernel_dynamics(kernel, outputs=jnp.ones(5)),
    }


def test_one_short_line_at_a_prompt():
    for begin, result in results().items():
        assert repr(result).startswith(begin)
        assert "\n" not in repr(result)
        assert len(repr(result)) < 200


def test_curves_in_a_notebook():
    caption, rows = cells(curves()._repr_html_())
    assert caption == "mine"
    assert rows == [
        ["candidate", "0", "100", "200", "400"],
        [HOSTILE, "3.000", "2.500", "2.250", ""],
        ["b", "4.000", "2.400", "2.000", "1.900"],
    ]


def test_scores_in_a_notebook_are_in_order():
    scores = lensjax.SELECTORS["averaged"](curves(), 1e4)
    _, (header, first, second) = cells(scores._repr_html_())
    assert header == ["candidate", "predicted loss", "from", "to", "P(best)", "status"]
    assert [first[0], second[0]] == ["b", HOSTILE]
    assert float(first[1]) == pytest.approx(scores.predicted_loss[1], rel=1e-3)
    assert float(first[2]) < float(first[1]) < float(first[3])
    plain = lensjax.SELECTORS["zero_shot"](curves(), 1e4)
    assert cells(plain._repr_html_())[1][0] == ["candidate", "predicted loss", "status"]


def test_fits_in_a_notebook():
    fits = lensjax.fit(curves(), law="power")
    _, (header, *rows) = cells(fits._repr_html_())
    assert header == ["curve", *fits.params, "status"]
    assert [row[-1] for row in rows] == list(fits.status)
    inside = []
    jax.make_jaxpr(lambda x: inside.append(lensjax.fit(curves().sizes, x, law="power")._repr_html_()))(curves().losses)
    assert inside == ["<pre>Fits(law=&#x27;power&#x27;)</pre>"]


def test_traces_and_bounds_in_a_notebook():
    trace = lensjax.hessian_trace(loss, {"a": jnp.ones((3, 2))}, jnp.ones((5, 2)), key=jax.random.key(0), probes=2)
    _, rows = cells(trace._repr_html_())
    assert rows == [["block", "trace", "standard error"], ["a", cell(trace.trace), cell(trace.standard_error)]]
    bound = generalization_bound(2.0, 100, {"a": 0.5}, traces={"a": 3.0}, loss_bound=5.0, test_loss=2.5)
    caption, rows = cells(bound._repr_html_())
    assert caption.startswith(f"Bound {bound.value:.4g} = ")
    assert caption.endswith("test loss 2.5")
    assert rows[1][0] == "a"
    assert rows[1][1] == "0.5000"


def test_a_long_table_is_cut_and_says_so():
    _, rows = cells(table("many", ["name", "x", "y"], [(str(i), i, None) for i in range(MOST_ROWS + 5)]))
    assert len(rows) == MOST_ROWS + 2
    assert rows[-1] == ["and 5 more"]


def test_names_listed():
    assert listed("abc") == "a, b, c"
    assert listed("abcde") == "a, b, c, and 2 more"
