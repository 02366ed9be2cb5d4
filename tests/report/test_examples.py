import doctest

import pytest

from lensjax import losses
from lensjax.report import html, schema


@pytest.mark.parametrize("module", [html, schema, losses], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0
