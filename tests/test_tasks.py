import gzip
import json

import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.tasks import IGNORED, Encoded, Example, batches, bucket_lengths, encode, load_task

ROWS = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(50)]


class Words:
    """A tokenizer of whole words, with the call signature of transformers."""

    bos_token_id = None
    eos_token_id = 1
    pad_token_id = 0

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[2 + len(w) for w in t.split()] for t in texts]}


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def load(path, **options):
    options = {"input_field": "q", "target_field": "a", "validation": 5, "test": 10, **options}
    return load_task(path, **options)


def test_a_task_is_split_without_overlap_and_subsets_are_nested(tmp_path):
    task = load(write(tmp_path / "t.jsonl"))
    assert (len(task.train), len(task.validation), len(task.test)) == (35, 5, 10)
    assert len({*task.train, *task.validation, *task.test}) == 50
    assert task.subset(20)[:10] == task.subset(10)
    assert task.name == "t"
    with pytest.raises(ValueError, match="no subset of 36 of 35"):
        task.subset(36)


def test_the_seed_decides_the_split_and_the_fingerprint(tmp_path):
    path = write(tmp_path / "t.jsonl")
    assert load(path).test == load(path).test
    assert load(path).fingerprint == load(path).fingerprint
    assert load(path, seed=1).test != load(path).test
    assert load(path, seed=1).fingerprint != load(path).fingerprint
    changed = write(tmp_path / "u.jsonl", [*ROWS[:-1], {"q": "other", "a": "text"}])
    assert load(changed).fingerprint != load(path).fingerprint


def test_csv_and_compressed_files_give_the_same_samples(tmp_path):
    task = load(write(tmp_path / "t.jsonl"))
    table = tmp_path / "t.csv"
    table.write_text("q,a\n" + "".join(f"{r['q']},{r['a']}\n" for r in ROWS))
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    assert load(table).train == load(packed).train == task.train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,a\nx,one, two\n", "line 2: 3 cells, but the header has 2 columns. Put quotes around texts with commas."),
        ("q,a,q\nx,y,z\n", "the header names 'q' twice; rename one column."),
        ('q,a\nx,"open\n', "not CSV"),
    ],
)
def test_a_bad_csv_file_gets_one_clear_message(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(path)
    assert message in str(error.value)


def test_a_csv_file_may_hold_long_texts_and_line_breaks(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("q,a\n" + "".join(f'"q\n{i}",{"long " * 40000}{i}\n' for i in range(20)))
    assert {e.input for e in load(path).test} <= {f"q\n{i}" for i in range(20)}


def test_repeated_samples_are_kept_once_and_that_is_said(tmp_path):
    task = load(write(tmp_path / "t.jsonl", ROWS + ROWS[:7]))
    assert len(task.train) == 35
    assert task.notes == ("7 repeated samples were kept once",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x", "completion": "y"}], "line 1: no field 'q' (found: 'prompt', 'completion'). Name the fields"),
        ([*ROWS, {"q": " ", "a": "y"}], "line 51: field 'q' is empty. Fill it or remove the sample."),
        ([*ROWS, {"q": "x", "a": ""}], "line 51: field 'a' is empty."),
        ([*ROWS, {"q": "x", "a": 3}], "line 51: field 'a' is 3, not text."),
        ([*ROWS, ["x"]], "line 51: a list, not an object with named fields."),
        (ROWS[:15], "15 distinct samples, but 5 are set aside for validation and 10 for the test loss"),
        ([], "holds no sample"),
    ],
)
def test_a_bad_task_gets_one_clear_message(tmp_path, rows, message):
    with pytest.raises(InputError) as error:
        load(write(tmp_path / "t.jsonl", rows))
    assert message in str(error.value)


def test_an_unreadable_task_is_named(tmp_path):
    with pytest.raises(InputError, match=r"t\.jsonl: no such file\. --task takes \.jsonl"):
        load(tmp_path / "t.jsonl")
    (tmp_path / "t.parquet").write_text("")
    with pytest.raises(InputError, match=r"t\.parquet: unknown kind of file"):
        load(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text('{"q": "x"\n')
    with pytest.raises(InputError, match=r"line 1: not JSON"):
        load(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"not readable"):
        load(tmp_path / "t.jsonl.gz")


def test_encoding_counts_target_and_end_only():
    found = encode([Example("a bb", "ccc d")], Words(), 64)
    assert found.ids[0].tolist() == [3, 5, 5, 3, 1]  # "a", "bb:", "ccc", "d", end
    assert found.prompt_lengths.tolist() == [2]
    assert found.truncated == 0


def test_truncation_is_counted_and_a_prompt_that_fills_everything_refused():
    found = encode([Example("a", "b " * 9), Example("a", "b")], Words(), 5)
    assert [len(i) for i in found.ids] == [5, 3]
    assert found.truncated == 1
    with pytest.raises(InputError, match="a sample's input alone has 5 tokens, but at most 5 tokens fit"):
        encode([Example("a a a a a", "b")], Words(), 5)


class Wrapping(Words):
    """A tokenizer that wraps inputs in special tokens of its own, as those of encoder-decoder models do."""

    def __call__(self, texts, add_special_tokens):
        found = super().__call__(texts, add_special_tokens=False)["input_ids"]
        return {"input_ids": [[90, *i, 91] if add_special_tokens else i for i in found]}


def test_encoder_decoder_models_get_prompt_and_target_apart():
    found = encode([Example("a bb", "ccc d e"), Example("a", "b")], Wrapping(), 5, separate=True)
    assert [i.tolist() for i in found.ids] == [[90, 3, 5, 91, 5, 3, 3, 1], [90, 4, 91, 3, 1]]
    assert found.prompt_lengths.tolist() == [4, 3]
    assert found.lengths.tolist() == [4, 3]
    assert found.token_counts.tolist() == [8, 5]
    (batch,) = batches(found, batch_size=2, buckets=(8,), pad_id=0)
    assert batch["input_ids"].tolist() == [[90, 3, 5, 91, 0, 0, 0, 0], [90, 4, 91, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 3 + [0] * 5]
    assert batch["labels"].tolist() == [[5, 3, 3, 1] + [IGNORED] * 4, [3, 1] + [IGNORED] * 6]
    cut = encode([Example("a", "b b b b b b")], Wrapping(), 4, separate=True)
    assert cut.truncated == 1
    assert cut.lengths.tolist() == [4]
    with pytest.raises(InputError, match="at most 4 tokens fit"):
        encode([Example("a a a", "b")], Wrapping(), 4, separate=True)


def test_bucket_lengths_waste_the_least_padding():
    lengths = np.array([3] * 50 + [12] * 30 + [20] * 5 + [61])
    found = bucket_lengths(lengths, most=2)
    rounded = sorted({int(-(-n // 8) * 8) for n in lengths})

    def padding(buckets):
        return sum(min(b for b in buckets if b >= n) - n for n in lengths)

    best = min(padding((a, 64)) for a in rounded)
    assert found[-1] == 64
    assert padding(found) == best
    assert bucket_lengths(lengths, most=1) == (64,)
    assert bucket_lengths(np.array([5, 6]), most=3) == (8,)


def encoded(lengths):
    ids = tuple(np.arange(1, n + 1, dtype=np.int32) + 100 * k for k, n in enumerate(lengths))
    return Encoded(ids, np.ones(len(lengths), int), 0)


def test_batches_hold_every_sample_once_in_few_shapes():
    lengths = [3, 9, 4, 16, 2, 8, 10]
    found = list(batches(encoded(lengths), batch_size=2, buckets=(8, 16), pad_id=0, rng=np.random.default_rng(0)))
    assert {b["input_ids"].shape for b in found} == {(2, 8), (2, 16)}
    first = [int(row[0]) for b in found for row in b["input_ids"] if row.any()]
    seen = sorted(token // 100 for token in first)
    assert seen == list(range(7))
    for batch in found:
        counted = batch["labels"] != IGNORED
        assert (batch["labels"][counted] == batch["input_ids"][counted]).all()
        assert counted.sum() == (batch["attention_mask"].sum(1) - 1).clip(0).sum()  # all but the one-token prompt
        assert not counted[batch["attention_mask"] == 0].any()


def test_batches_without_a_generator_keep_one_order():
    one, two = (list(batches(encoded([3, 4, 5]), batch_size=2, buckets=(8,), pad_id=0)) for _ in range(2))
    for a, b in zip(one, two, strict=False):
        np.testing.assert_array_equal(a["input_ids"], b["input_ids"])
