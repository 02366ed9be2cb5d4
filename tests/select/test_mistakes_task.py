"""Mistakes in the data to fine-tune on: each ends with one message that says what is wrong, where, and what to do."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

SAMPLES = [{"input": f"question {i}", "target": f"answer {i}"} for i in range(140)]
LINES = "".join(json.dumps(sample) + "\n" for sample in SAMPLES)
ONE = '{"input": "a", "target": "b"}\n'
KINDS = (
    "--task takes a file (.jsonl, .jsonl.gz, .csv, .csv.gz, .parquet, .txt, .txt.gz), the id of a data set "
    "(owner/name), or one of flan, wikitext, gigaword, wmt19."
)
SHAPE = 'each line is one object, such as {"input": "2 + 2", "target": "4"}.'
FIELDS = "Name the fields with --input-field and --target-field, or --text-field."
COMMAS = "save it with commas, and quotes around texts that hold commas."
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12\n"
POINTER = "it is a Git LFS pointer, not the file itself: fetch it with git lfs pull."
ASIDE = "20 are set aside for validation and 20 for the test loss."
LOWER = "Add samples or lower --validation and --test."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tasks.jsonl", f"tasks.jsonl: no such file. {KINDS} Did you mean task.jsonl?"),
        ("wikitex", f"wikitex: no such file. {KINDS} Did you mean wikitext?"),
        ("FLAN", f"FLAN: no such file. {KINDS} Did you mean flan?"),
        ("glue", f"glue: no such file. {KINDS}"),
        ("data/train/all.csv", f"data/train/all.csv: no such file. {KINDS}"),
        (
            "https://example.org/x.jsonl",
            "https://example.org/x.jsonl: is an address; download it and name the file, or name a data set as "
            "owner/name.",
        ),
    ],
)
def test_data_that_is_not_there(mistake, name, message):
    assert mistake(task=name) == message


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("my.xlsx", " Export the sheet as CSV in UTF-8."),
        ("my.json", f" Save it as .jsonl: {SHAPE}"),
        ("my.json.gz", f" Save it as .jsonl: {SHAPE}"),
        ("my.tsv", " Save it as .csv, with commas between the columns."),
        ("my.zip", " Unpack it."),
        ("my.ndjson", " If each line is a JSON object, end its name in .jsonl."),
        ("my", ""),
    ],
)
def test_files_of_another_kind(mistake, name, remedy):
    Path(name).write_text(LINES)
    assert mistake(task=name) == f"{name}: unknown kind of file. {KINDS}{remedy}"


def test_an_empty_directory(mistake):
    Path("data").mkdir()
    assert mistake(task="data") == f"--task data: the directory is empty. {KINDS}"


def test_a_data_set_that_cannot_be_loaded(mistake, monkeypatch):
    def load_dataset(name, *_, **__):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore that nobody reads")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check = "Check the id, the configuration (--dataset-config) and the split (--split), or give a local file"
    assert mistake("--split", "test", task="owner/name") == (
        f"--task owner/name, split 'test': cannot be loaded (Couldn't reach 'owner/name' on the Hub). {check}."
    )
    Path("data").mkdir()
    Path("data/my.csv").touch()
    assert mistake("--dataset-config", "en", task="data") == (
        "--task data, configuration 'en', split 'train': cannot be loaded (Couldn't reach 'data' on the Hub). "
        f"{check} such as data/my.csv."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE * 2 + ONE.replace("}", ""), f", line 3: not JSON (Expecting ',' delimiter). Mend it: {SHAPE}"),
        (
            json.dumps(SAMPLES, indent=1),
            f", line 1: not JSON (Expecting value), for it goes on in the next lines. Mend it: {SHAPE}",
        ),
        (
            json.dumps(SAMPLES[0], indent=1),
            ", line 1: not JSON (Expecting property name enclosed in double quotes), for it goes on in the next "
            f"lines. Mend it: {SHAPE}",
        ),
        (
            json.dumps(SAMPLES),
            f", line 1: a list, not an object with named fields. Write the samples one by one: {SHAPE}",
        ),
        (
            '"a text"\n',
            f", line 1: a str, not an object with named fields. Write the samples one by one: {SHAPE}",
        ),
        (
            "{'input': 'a', 'target': 'b'}\n",
            f", line 1: not JSON (Expecting property name enclosed in double quotes). Mend it: {SHAPE}",
        ),
        ("<!DOCTYPE html>\n", f", line 1: not JSON (Expecting value). Mend it: {SHAPE}"),
        (LFS, f": not readable: {POINTER}"),
        (LINES.encode("utf-16"), ": not readable: it is UTF-16 text: save it as UTF-8."),
        (
            LINES.encode("utf-16-le"),
            ": not readable: it holds NUL bytes, as UTF-16 text and programs' own files do: save it as UTF-8 text.",
        ),
        (
            ONE.encode() + ONE.replace("a", "caf\xe9").encode("latin-1"),
            ": not readable: line 2 has the byte 0xe9, which is '\xe9' in Latin-1: save it as UTF-8 text.",
        ),
        (
            gzip.compress(b"x"),
            ": not readable: it is compressed by gzip: end its name in .gz, or unpack it with gunzip.",
        ),
    ],
)
def test_lines_that_are_no_samples(mistake, text, message):
    Path("my.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert mistake(task="my.jsonl") == f"my.jsonl{message}"


@pytest.mark.parametrize(
    ("sample", "options", "message"),
    [
        ({"question": "a", "target": "b"}, (), f"no field 'input' (found: 'question', 'target'). {FIELDS}"),
        (
            {"Input": "a", "target": "b"},
            (),
            f"no field 'input' (found: 'Input', 'target'). {FIELDS} Did you mean Input?",
        ),
        (
            {"input": "a", "target": "b"},
            ("--input-field", "inputs"),
            f"no field 'inputs' (found: 'input', 'target'). {FIELDS} Did you mean input?",
        ),
        (
            {"title": "a", "body": "b"},
            ("--text-field", "text"),
            f"no field 'text' (found: 'title', 'body'). {FIELDS}",
        ),
        (
            {"pair": {"en": "a", "fr": "b"}},
            ("--input-field", "pair.de", "--target-field", "pair.fr"),
            f"no field 'pair.de' (found: 'pair'). {FIELDS} Did you mean pair.en?",
        ),
        (
            {"pair": {"en": "a", "fr": "b"}},
            ("--input-field", "pair", "--target-field", "pair.fr"),
            "field 'pair' is {'en': 'a', 'fr': 'b'}, not text. It holds fields of its own; name one of pair.en, "
            "pair.fr.",
        ),
        (
            {"messages": [{"role": "user", "content": 60 * "x"}]},
            ("--input-field", "messages"),
            f"field 'messages' is [{{'role': 'user', 'content': '{30 * 'x'}..., not text. Make it one text, or name "
            "another field.",
        ),
        ({"input": "a", "target": None}, (), "field 'target' is null, not text. Fill it or remove the sample."),
        (
            {"input": "a", "target": 3},
            (),
            "field 'target' is 3, not text. Write it as text, \"3\", or name another field.",
        ),
        ({"input": "a", "target": ""}, (), "field 'target' is empty. Fill it or remove the sample."),
        ({"input": " ", "target": "a"}, (), "field 'input' is empty. Fill it or remove the sample."),
    ],
)
def test_fields(mistake, sample, options, message):
    Path("my.jsonl").write_text("\ufeff" + json.dumps(sample) + "\n")
    assert mistake(*options, task="my.jsonl") == f"my.jsonl, line 1: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input;target\na;b\n", f": semicolons separate its columns ('input;target'); {COMMAS}"),
        ("input;target\na, or b;c\n", f": semicolons separate its columns ('input;target'); {COMMAS}"),
        ("input\ttarget\na\tb\n", f": tabs separate its columns ('input\\ttarget'); {COMMAS}"),
        ("input,target,input\na,b,c\n", ": the header names 'input' twice; rename one column."),
        (
            "input,target\na, or b,c\n",
            ", line 2: 3 cells, but the header has 2 columns. Put quotes around texts with commas.",
        ),
        (
            'input,target\n"a,b\n',
            ", line 2: not CSV (unexpected end of data). Close each quote; one inside a text is doubled.",
        ),
        ("input,target\na,\n", ", line 2: field 'target' is empty. Fill it or remove the sample."),
        ("a,b\nc,d\n", f", line 2: no field 'input' (found: 'a', 'b'). {FIELDS}"),
        (
            b"PK\x03\x04\x14\x00",
            ": not readable: it is a spreadsheet or a zip archive: export it as CSV, or unpack it.",
        ),
    ],
)
def test_tables(mistake, text, message):
    Path("my.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert mistake(task="my.csv") == f"my.csv{message}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("my.jsonl", "", "my: holds no sample. Name a file with at least 41 of them."),
        ("my.csv", "input,target\n", "my: holds no sample. Name a file with at least 41 of them."),
        ("my.jsonl", "".join(LINES.splitlines(keepends=True)[:14]), f"my: 14 distinct samples, but {ASIDE} {LOWER}"),
        ("my.jsonl", ONE * 200, f"my: 1 distinct samples, but {ASIDE} 199 more are repeated. {LOWER}"),
        ("my.txt", "one text\nanother\n", f"my: 2 distinct samples, but {ASIDE} {LOWER}"),
        (
            "my.jsonl",
            "".join(LINES.splitlines(keepends=True)[:45]),
            "the task has 5 training samples, fewer than the smallest subset (10). Add samples, set fewer aside "
            "(--validation, --test), or lower --smallest.",
        ),
    ],
)
def test_too_few_samples(mistake, name, text, message):
    Path(name).write_text(text)
    assert mistake(task=name) == message


def test_files_that_are_not_what_their_names_say(mistake):
    Path("my.parquet").write_text(LINES)
    wrong = "my.parquet: cannot be read as Parquet: "
    assert mistake(task="my.parquet") == f"{wrong}it does not begin with PAR1: export or download it again."
    Path("my.parquet").write_text(LFS)
    assert mistake(task="my.parquet") == f"{wrong}{POINTER}"
    Path("my.jsonl.gz").write_text(LINES)
    remedy = "take .gz off its name."
    assert mistake(task="my.jsonl.gz") == f"my.jsonl.gz: not readable as gzip, for it is not compressed; {remedy}"
    Path("my.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-20])
    assert mistake(task="my.jsonl.gz") == (
        "my.jsonl.gz: not readable as gzip (Compressed file ended before the end-of-stream marker was reached); "
        "compress it or download it again."
    )


def test_numbers_in_a_parquet_file(mistake):
    pyarrow.parquet.write_table(pyarrow.table({"input": ["a"], "target": [1]}), "my.parquet")
    assert mistake(task="my.parquet") == (
        "my.parquet, row 1: field 'target' is 1, not text. Write it as text, \"1\", or name another field."
    )


def test_a_chat_template_that_fails_is_one_message(mistake):
    Path("one/chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    assert mistake("--template", "chat") == (
        "--template chat: the chat template of a candidate's tokenizer (one) fails (TemplateError: System role not "
        "supported); mend it in its directory, give a template with {input} instead, or leave this candidate out."
    )


def test_fields_of_a_file_of_texts(mistake):
    Path("my.txt").write_text("one\ntwo\n")
    reason = "my.txt: a file of texts has no fields, so there is nothing for"
    remedy = "or give a .jsonl or .csv file."
    assert mistake("--input-field", "q", task="my.txt") == f"{reason} --input-field; leave it out, {remedy}"
    assert mistake("--target-field", "q", "--template", "{input}", task="my.txt") == (
        f"{reason} --target-field and --template; leave them out, {remedy}"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--template", "Q: "), "--template 'Q: ' has no {input} where the input goes; add it, or give 'chat'."),
        (("--template", "{text}"), "--template '{text}' has no {input} where the input goes; add it, or give 'chat'."),
        (
            ("--template", "chat"),
            "--template chat: a candidate's tokenizer has no chat template (one); give a template with {input} "
            "instead.",
        ),
        (
            ("--text-field", "input", "--template", "{input}"),
            "--text-field input is language modelling, where there is no input, target or template; leave "
            "--input-field, --target-field and --template out, or --text-field.",
        ),
        (
            ("--split", "train"),
            "task.jsonl is a local file: configuration, splits and revision are those of a data set; leave them out.",
        ),
        (
            ("--limit", 50),
            "task.jsonl is a local file and is read whole: --limit 50 is for data sets; leave it out.",
        ),
        (
            ("--max-length", 3),
            "a sample's input alone has 4 tokens, but at most 3 tokens fit: '683'... Raise --max-length (up to the "
            "model's limit) or shorten the input.",
        ),
    ],
)
def test_options_of_the_task(mistake, options, message):
    assert mistake(*options) == message
