"""The examples in the docstrings of lensjax's public names, run; and how results show themselves in a notebook."""

import doctest
import inspect
import sys

import jax.numpy as jnp
import pytest

import lensjax

SHOWN = [name for name in lensjax.__all__ if name not in ("SELECTORS", "UnsupportedBackendError")]


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


def test_a_notebook_shows_the_report_with_names_escaped():
    _, report = lensjax.ntk(lambda w, x: w["a&b"] @ x, {"a&b": jnp.ones(2)}, jnp.ones((3, 2)), return_report=True)
    assert report._repr_html_().startswith("<pre>NTK by ")
