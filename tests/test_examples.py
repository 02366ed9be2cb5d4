"""The examples of the documentation and of public names' docstrings, run; and how results are shown in a notebook."""

import doctest
import inspect
import re
import sys

import jax.numpy as jnp
import pytest

import lensjax
from lensjax import data, losses
from lensjax.report import html, schema
from support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
]
# A model and a file, or minutes of training, are more than a docstring should show.
ON_PAGES = ("ntk_blocks", "ntk_features", "run_selection")
SHOWN = [
    name for name in lensjax.__all__ if name not in ("SELECTORS", "Selection", "UnsupportedBackendError", *ON_PAGES)
]


@pytest.mark.parametrize("name", SHOWN)
def test_examples_are_true(name):
    value = getattr(lensjax, name)
    module = sys.modules[value.__module__]
    names = {"jnp": jnp, **vars(module)}
    found = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(value), name, module=module, globs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    results = [runner.run(test) for test in found]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_on_pages_are_true(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "gpt2").symlink_to(data.path("demo", "models", "bible-tiny"))
    own = {}
    exec(compile(code, "page", "exec"), own)
    if "layers" in own:
        assert capsys.readouterr().out.startswith("NTK by transform")
        assert own["layers"]["layers.0.mlp_in"].shape == own["kernel"].shape == (3, 3)
        assert own["features"].shape == (3, 64)
        assert own["report"].method == "transform"
    elif "selection" in own:
        assert own["selection"].best in own["selection"].curves.names
    else:
        assert own["fits"].predict(1_638_400).shape == (30,)
        assert own["kernel"].shape == (5, 5)


def test_pages_show_what_no_docstring_does():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert set(ON_PAGES) <= set(re.findall(r"lensjax\.(\w+)\(", text))
    assert len(EXAMPLES) >= 3


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_a_notebook_shows_the_report_with_names_escaped():
    _, report = lensjax.ntk(lambda w, x: w["a&b"] @ x, {"a&b": jnp.ones(2)}, jnp.ones((3, 2)), return_report=True)
    assert report._repr_html_().startswith("<pre>NTK by ")


@pytest.mark.parametrize("module", [html, schema, losses], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0
