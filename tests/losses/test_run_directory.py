"""Losses from the journals of selections."""

import json

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.losses import read, read_journal


def journal(directory, runs, end="\n"):
    directory.mkdir()
    records = [
        {"key": k, "candidate": c, "size": s, "test_loss": loss, "steps": 5, "tokens": 9, "flops": 1.0, "seconds": 1.0}
        | {"reason": "patience", "facts": {"parameters": n, "test_loss_per_byte": None if loss is None else loss / 4}}
        for k, c, s, loss, n in runs
    ]
    (directory / "runs.jsonl").write_text("\n".join(json.dumps(r) for r in records) + end)
    return directory


def test_our_own_journal(tmp_path):
    runs = [("k1", "a", 0, 4.0, 100), ("k2", "a", 50, None, 100), ("k2", "a", 50, 3.0, 100), ("k3", "b", 50, 2.0, 200)]
    directory = journal(tmp_path / "run", runs, end='\n{"key": "k4", "cand')
    curves = read(directory)
    assert curves.names == ("a", "b")
    np.testing.assert_array_equal(curves.losses, [[4.0, 3.0], [np.nan, 2.0]])
    np.testing.assert_array_equal(curves.parameters, [100, 200])
    np.testing.assert_array_equal(read(directory / "runs.jsonl", metric="test_loss_per_byte").losses[:, 1], [0.75, 0.5])
    more = journal(tmp_path / "more", [("k5", "b", 0, 5.0, 200)])
    assert read_journal(directory, more).at(0).tolist() == [4.0, 5.0]


def test_what_the_journal_of_a_selection_holds_is_what_is_read(tmp_path):
    from lensjax.journal import Journal, Run

    log = Journal(tmp_path / "out", {"sizes": [50]})
    for name in ("a", "b"):
        log.append(Run(f"t{name}", name, 50, 2.9, facts={"parameters": 10}, part_of=f"k{name}"))
        log.append(Run(f"k{name}", name, 50, 2.5, facts={"parameters": 10}))
    log.close()
    curves = read(tmp_path / "out")
    assert curves.names == ("a", "b")
    assert curves.at(50).tolist() == [2.5, 2.5]


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"key": "k", "candidate": "a", "size": "x", "test_loss": 1}']
)
def test_malformed_journals(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"runs\.jsonl, line 1: not a run record\. Remove that line\."):
        read(path)
