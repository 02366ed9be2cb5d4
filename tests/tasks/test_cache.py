"""Tokens on disk: made once, never trusted blindly."""

import dataclasses

import numpy as np
import pytest

from lensjax import models
from lensjax.tasks import Encoded, Example, cached, encode
from lensjax.tasks.cache import directory, key_of

EXAMPLES = [Example("one", "first"), Example("two", "second and more"), Example("", "text alone", "")]


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("LENSJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one.ids, other.ids, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    np.testing.assert_array_equal(one.prompt_lengths, other.prompt_lengths)
    for name in ("truncated", "separate", "target_bytes", "packed", "counted"):
        assert getattr(one, name) == getattr(other, name)
        assert type(getattr(one, name)) is type(getattr(other, name))


@pytest.mark.parametrize(("separate", "pack"), [(False, False), (True, False), (False, True)])
def test_what_comes_back_is_what_was_made(own, tiny_models, separate, pack):
    tokenizer = models.load_tokenizer(tiny_models[0])
    examples = EXAMPLES[:2] if separate else EXAMPLES
    made = encode(examples, tokenizer, 12, separate=separate, pack=pack)
    first = cached("k", lambda: made)
    assert first is made
    assert_same(cached("k", lambda: pytest.fail("it was made again")), made)
    assert [p.name for p in own.iterdir()] == ["k.npz"]


def test_no_samples_come_back_too(own):
    cached("none", lambda: Encoded((), np.zeros(0, int), 0))
    assert len(cached("none", lambda: pytest.fail("it was made again"))) == 0


@pytest.mark.parametrize("damage", [b"", b"not an archive", "half"])
def test_a_damaged_file_is_made_again(own, damage):
    made = Encoded((np.arange(5, dtype=np.int32),), np.array([2]), 0)
    cached("k", lambda: made)
    path = own / "k.npz"
    path.write_bytes(path.read_bytes()[:100] if damage == "half" else damage)
    assert cached("k", lambda: made) is made  # not what was read
    mended = cached("k", lambda: pytest.fail("it was not mended"))
    assert mended is not made
    assert_same(mended, made)


def archive(path, **changes):
    arrays = {
        "ids": np.arange(5, dtype=np.int32),
        "lengths": np.array([3, 2]),
        "prompt_lengths": np.array([1, 2]),
        "facts": np.array([0, 0, 0, -1]),
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": None},
        {"ids": np.arange(5.0)},
        {"ids": np.arange(5)},
        {"ids": np.arange(-1, 4, dtype=np.int32)},
        {"ids": np.array(["a"])},
        {"ids": np.array([{}], dtype=object)},
        {"lengths": np.array([6, -1])},
        {"lengths": np.array([3, 3])},
        {"lengths": np.array([[3, 2]])},
        {"lengths": np.array([3.0, 2.0])},
        {"prompt_lengths": np.array([1])},
        {"prompt_lengths": np.array([4, 2])},
        {"prompt_lengths": np.array([-1, 2])},
        {"facts": np.array([0, 0, 0])},
        {"facts": np.array([0, 0, 0, 0])},
        {"facts": np.array([0, 2, 0, -1])},
        {"facts": np.array([-1, 0, 0, -1])},
        {"facts": np.array(0)},
    ],
)
def test_arrays_that_are_no_encoding_are_made_again(own, changes):
    own.mkdir(parents=True)
    archive(own / "k.npz")
    assert len(cached("k", lambda: pytest.fail("it was made again"))) == 2
    archive(own / "k.npz", **changes)
    made = Encoded((np.arange(5, dtype=np.int32),), np.array([2]), 0)
    assert cached("k", lambda: made) is made


def test_an_archive_that_unpacks_to_more_than_its_size_is_made_again(own):
    own.mkdir(parents=True)
    zeros = np.zeros(10**6, np.int32)
    np.savez_compressed(own / "k.npz", ids=zeros, lengths=[10**6], prompt_lengths=[0], facts=[0, 0, 0, -1])
    made = Encoded((np.arange(5, dtype=np.int32),), np.array([2]), 0)
    assert cached("k", lambda: made) is made


def test_where_nothing_can_be_written_tokens_are_made_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LENSJAX_CACHE", str(tmp_path / "file"))
    made = Encoded((np.arange(5, dtype=np.int32),), np.array([2]), 0)
    assert cached("k", lambda: made) is made
    assert cached("k", lambda: made) is made


def test_a_key_changes_with_all_that_tokens_depend_on():
    keys = {
        key_of(EXAMPLES, "a", 12, {"pack": False}),
        key_of(EXAMPLES, "b", 12, {"pack": False}),
        key_of(EXAMPLES, "a", 13, {"pack": False}),
        key_of(EXAMPLES, "a", 12, {"pack": True}),
        key_of(EXAMPLES[:2], "a", 12, {"pack": False}),
        key_of([*EXAMPLES[:2], dataclasses.replace(EXAMPLES[2], template="{input}")], "a", 12, {"pack": False}),
        # What is at the end of one text is not at the start of the next.
        key_of([Example("ab", "c")], "a", 1),
        key_of([Example("a", "bc")], "a", 1),
    }
    assert len(keys) == 8
    assert key_of(EXAMPLES, "a", 12, {"pack": False}) in keys


def test_a_key_changes_with_the_encoding(monkeypatch):
    before = key_of(EXAMPLES, "a", 12)
    assert key_of(EXAMPLES, "a", 12) == before
    monkeypatch.setattr("lensjax.tasks.cache.ENCODING_VERSION", 1)
    assert key_of(EXAMPLES, "a", 12) != before


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("LENSJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert directory() == tmp_path / "lensjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directory() == tmp_path / ".cache" / "lensjax"
