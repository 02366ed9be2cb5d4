"""The examples of the README and of public names' docstrings, run; and how results show themselves in a notebook."""

import doctest
import inspect
import re
import sys

import jax.numpy as jnp
import pytest

import lensjax
from lensjax import data
from support.paths import ROOT

README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
IN_README = ("ntk_blocks", "ntk_features")  # a model and a file are more than a docstring should show
SHOWN = [name for name in lensjax.__all__ if name not in ("SELECTORS", "UnsupportedBackendError", *IN_README)]


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


@pytest.mark.parametrize("place", range(len(README)))
def test_the_readme_is_true(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "gpt2").symlink_to(data.path("demo", "models", "bible-tiny"))
    own = {}
    exec(compile(README[place], "README.md", "exec"), own)
    if "layers" in own:
        assert set(IN_README) <= set(re.findall(r"lensjax\.(\w+)\(", README[place]))
        assert capsys.readouterr().out.startswith("NTK by transform")
        assert own["layers"]["layers.0.mlp_in"].shape == own["kernel"].shape == (3, 3)
        assert own["features"].shape == (3, 64)
        assert own["report"].method == "transform"
    else:
        assert own["fits"].predict(1_638_400).shape == (30,)
        assert own["kernel"].shape == (5, 5)


def test_a_notebook_shows_the_report_with_names_escaped():
    _, report = lensjax.ntk(lambda w, x: w["a&b"] @ x, {"a&b": jnp.ones(2)}, jnp.ones((3, 2)), return_report=True)
    assert report._repr_html_().startswith("<pre>NTK by ")
