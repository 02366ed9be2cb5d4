import json
import pathlib
import types

import pytest

from lensjax.errors import InputError
from lensjax.tune.comparison import read_comparison

VERSION_1 = pathlib.Path(__file__).parent.parent / "report" / "selection_schema_1.json"
CANDIDATE = types.SimpleNamespace(name="alpha", fingerprint="aaaa")
SETTINGS = {"task": "0123456789abcdef", "plan": {"epochs": 2}, "max_length": 128, "samples": 12800}


def test_a_selection_of_an_earlier_version_is_read():
    found = read_comparison(VERSION_1, CANDIDATE, **SETTINGS)
    (entry,) = [
        e for e in json.loads(VERSION_1.read_text())["methods"]["averaged"]["ranking"] if e["name"] == "org/alpha"
    ]
    assert found.name == "org/alpha"
    assert found.loss == entry["predicted_loss"]
    assert found.interval == tuple(entry["interval"])
    assert (found.certainty, found.target, found.per_byte, found.caveats) == (0.9, 12800, False, ())


def test_a_selection_of_a_later_version_is_refused(tmp_path):
    document = json.loads(VERSION_1.read_text()) | {"schema": 3}
    (tmp_path / "selection.json").write_text(json.dumps(document))
    message = rf"^--selection {tmp_path}: the selection's schema version is 3; this program reads 1 to 2\. "
    with pytest.raises(InputError, match=message):
        read_comparison(tmp_path, CANDIDATE, **SETTINGS)
