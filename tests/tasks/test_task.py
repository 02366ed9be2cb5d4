import dataclasses
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lensjax.errors import InputError
from lensjax.tasks import CHAT, IGNORED, PRESETS, Encoded, Example, batches, bucket_lengths, encode, load_task

ROWS = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(50)]


class Words:
    """A tokenizer of whole words, with the call signature of transformers."""

    bos_token_id = None
    eos_token_id = 1
    pad_token_id = 0

    def __call__(self, text=None, text_target=None, add_special_tokens=True):
        return {"input_ids": [[2 + len(w) for w in t.split()] for t in text or text_target]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join("x" * (i - 2) for i in ids)


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
    with pytest.raises(InputError, match=r"t\.jsonl: no such file\. --task takes a file \(\.jsonl, "):
        load(tmp_path / "t.jsonl")
    (tmp_path / "t.xlsx").write_text("")
    with pytest.raises(InputError, match=r"t\.xlsx: unknown kind of file"):
        load(tmp_path / "t.xlsx")
    (tmp_path / "t.parquet").write_text("")
    with pytest.raises(InputError, match=r"t\.parquet: cannot be read as Parquet"):
        load(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"squad: no such file\. --task takes a file .* or one of flan, wikitext"):
        load("squad")
    for line in ("[" * 100000, "9" * 5000, '{"input": "a\\ud800", "target": "b"}', '{"input": 1' + "0" * 400 + "}"):
        (tmp_path / "t.jsonl").write_text(line + "\n")
        with pytest.raises(InputError, match=r"line 1: not JSON \(it "):
            load(tmp_path / "t.jsonl")
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

    def __call__(self, text=None, text_target=None, add_special_tokens=True):
        found = super().__call__(text, text_target)["input_ids"]
        return {"input_ids": [[90, *i, 91] if text and add_special_tokens else i for i in found]}


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


def test_parquet_and_nested_fields(tmp_path):
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    assert load(table).train == load(write(tmp_path / "t.jsonl")).train
    nested = write(tmp_path / "n.jsonl", [{"translation": {"zh": r["q"], "en": r["a"]}} for r in ROWS])
    found = load(nested, input_field="translation.zh", target_field="translation.en")
    assert found.train == load(table).train
    with pytest.raises(InputError, match=r"line 1: no field 'translation\.de' \(found: 'translation'\)"):
        load(nested, input_field="translation.de", target_field="translation.en")


def test_texts_for_language_modelling(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(f"line {i}\n\n" for i in range(40)))
    task = load(path, input_field=None, target_field=None)
    assert task.text_only
    assert len(task.train) == 25
    assert (task.train[0].prompt, task.train[0].completion[:5]) == ("", "line ")
    rows = [{"text": "" if i % 3 == 0 else f"text {i}"} for i in range(60)]
    found = load(write(tmp_path / "t.jsonl", rows), input_field=None, target_field=None, text_field="text")
    assert found.notes == ("20 empty texts were left out",)
    with pytest.raises(InputError, match="--text-field text is language modelling"):
        load(path, text_field="text")


def save(directory, **splits):
    """Write a data set directory as the hub has them, a Parquet file for each split."""
    directory.mkdir(parents=True)
    for split, rows in splits.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{split}-00000-of-00001.parquet")
    return str(directory)


SCHEMAS = {
    "flan": lambda i: {"inputs": f"question {i}", "targets": f"answer {i}", "_task_name": "t"},
    "wikitext": lambda i: {"text": f"paragraph {i} \n" if i % 2 else ""},
    "gigaword": lambda i: {"document": f"question {i}", "summary": f"answer {i}"},
    "wmt19": lambda i: {"translation": {"zh": f"question {i}", "en": f"answer {i}"}},
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_read_data_of_the_published_schema(name, tmp_path, monkeypatch):
    preset = PRESETS[name]
    rows = [SCHEMAS[name](i) for i in range(120)]
    parts = {"train": rows[:80], "validation": rows[80:100], "test": rows[100:]}
    own = sorted(set(preset.splits.values()))
    directory = save(tmp_path / "data", **{split: parts[split] for split in own})
    local = dataclasses.replace(preset, dataset=directory, config=None, revision=None)
    monkeypatch.setitem(PRESETS, name, local)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    task = load_task(name, validation=4, test=9)
    assert (len(task.validation), len(task.test)) == (4, 9)
    assert task.name == name
    assert task.text_only == (name == "wikitext")
    tested = {example.target for example in task.test}
    where = preset.splits.get("test", "train")
    field = preset.text_field or preset.target_field
    of_split = {str(row.get(field) or row.get("translation", {}).get("en")) for row in parts[where]}
    assert tested <= of_split
    if name != "wikitext":
        example = task.train[0]
        assert example.input.removeprefix("question") == example.target.removeprefix("answer")


def test_samples_of_two_splits_are_taken_out_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = save(tmp_path / "data", train=ROWS, validation=ROWS[5:12], test=ROWS[:10])
    task = load(directory, validation_split="validation", test_split="test", validation=2)
    assert not {*task.train} & {*task.test, *task.validation}
    assert len(task.train) == 50 - 12
    assert task.notes == (
        "5 samples of validation are in another split too: left out",
        "12 samples of train are in another split too: left out",
    )
    with pytest.raises(InputError, match="its test split has 10 distinct samples, but 11 are asked for"):
        load(directory, validation_split="validation", test_split="test", validation=2, test=11)
    limited = load(directory, limit=30)
    assert len(limited.train) == 15
    assert load(directory, limit=30, seed=1).train != limited.train
    with pytest.raises(InputError, match="split 'nothing': cannot be loaded"):
        load(directory, split="nothing")


def test_a_local_file_has_no_splits(tmp_path):
    with pytest.raises(InputError, match="is a local file: configuration, splits and revision"):
        load(write(tmp_path / "t.jsonl"), split="train")


def test_templates(tmp_path):
    path = write(tmp_path / "t.jsonl")
    example = load(path, template="Q: {input}\nA: ").train[0]
    assert example.prompt + example.completion == f"Q: {example.input}\nA: {example.target}"
    assert load(path, template="Q: {input}\nA: ").fingerprint != load(path).fingerprint
    with pytest.raises(InputError, match=r"--template 'Q: ' has no \{input\} where the input goes"):
        load(path, template="Q: ")


class Chatting(Words):
    chat_template = "a template"
    bos_token_id = 7

    def apply_chat_template(self, talk, tokenize, add_generation_prompt=False):
        assert not tokenize
        written = "".join(f"{'*' * len(m['role'])} {m['content']} / " for m in talk)
        return written + "*" * len("assistant") + " " if add_generation_prompt else written


def test_the_chat_template_is_the_tokenizers_own():
    found = encode([Example("a bb", "ccc d", CHAT)], Chatting(), 64)
    assert found.ids[0].tolist() == [6, 3, 4, 3, 11, 5, 3, 3]  # no BOS and no end of text: the template has none
    assert found.prompt_lengths.tolist() == [5]
    with pytest.raises(InputError, match="a candidate's tokenizer has no chat template"):
        encode([Example("a", "b", CHAT)], Words(), 64)


def test_texts_are_packed_into_full_rows():
    texts = [Example("", "a bb ccc", ""), Example("", "dddd", ""), Example("", "e ff", "")]
    found = encode(texts, Words(), 4, pack=True)
    assert found.truncated == 0
    assert [row.tolist() for row in found.rows[0]] == [[3, 4, 5, 1], [6, 1, 3, 4], [1]]
    assert found.lengths.tolist() == [4, 4, 1]
    # The subset of two samples is packed by itself: nothing of the third is in it.
    assert [row.tolist() for row in found.first(2).rows[0]] == [[3, 4, 5, 1], [6, 1]]
    assert found.counted == 3 + 3
    assert found.target_bytes == len("a bb ccc" + "dddd" + "e ff")
    (batch,) = batches(found, batch_size=3, buckets=(4,), pad_id=0)
    assert batch["labels"].tolist() == [[3, 4, 5, 1], [6, 1, 3, 4], [1, IGNORED, IGNORED, IGNORED]]
    with pytest.raises(InputError, match="an encoder-decoder model has no input to read in language modelling"):
        encode(texts, Words(), 4, separate=True)


def test_loss_per_byte_is_the_same_whatever_the_tokens():
    examples = [Example("q", "aa bb cc")]
    words, letters = encode(examples, Words(), 64), encode(examples, Letters(), 64)
    assert (words.counted, letters.counted) == (4, 10)
    # A summed loss of 20 nats, shared among the tokens of each; the separator is no text of the target.
    assert words.target_bytes == letters.target_bytes == encode(examples, Words(), 64, separate=True).target_bytes == 8
    assert 20 / words.counted * words.tokens_per_byte == pytest.approx(20 / 8)
    assert 20 / letters.counted * letters.tokens_per_byte == pytest.approx(20 / 8)
    cut = encode(examples, Words(), 3)
    assert (cut.truncated, cut.target_bytes) == (1, len("xx xx"))


class Letters(Words):
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [[ord(c) for c in t] for t in text]}


def test_the_fingerprint_of_a_chat_has_the_inputs_in_it(tmp_path):
    one = load(write(tmp_path / "t.jsonl"), template=CHAT)
    other = load(write(tmp_path / "u.jsonl", [{**row, "q": row["q"] + "?"} for row in ROWS]), template=CHAT)
    assert one.fingerprint != other.fingerprint
    assert load(tmp_path / "t.jsonl", template=CHAT).fingerprint == one.fingerprint


def test_a_limit_is_for_data_sets(tmp_path):
    with pytest.raises(InputError, match="is a local file and is read whole: --limit 5 is for data sets"):
        load(write(tmp_path / "t.jsonl"), limit=5)


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    raw = bytearray(gzip.compress(write(tmp_path / "t.jsonl").read_bytes()))
    raw[20:60] = bytes(40)
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"t\.jsonl\.gz: not readable"):
        load(path)


def test_no_sample_is_dropped_for_want_of_a_padded_length():
    with pytest.raises(InputError, match="a sample needs 9 tokens, but the longest of the padded lengths is 8"):
        next(batches(encoded([3, 9]), batch_size=2, buckets=(8,), pad_id=0))


@pytest.mark.parametrize("word", ["null", "NA", "None", "nan", "N/A"])
def test_words_that_spreadsheets_read_as_nothing_are_words_in_a_directory_of_csv_files(tmp_path, word):
    directory = tmp_path / "data"
    directory.mkdir()
    lines = [f"question {number},{word if number % 2 else f'answer {number}'}" for number in range(30)]
    for file in (directory / "train.csv", tmp_path / "one.csv"):
        file.write_text("\n".join(["q,a", *lines]) + "\n")
    whole, single = load(directory), load(tmp_path / "one.csv")
    assert whole.train == single.train
    assert {example.target.strip() for example in whole.train} >= {word}
