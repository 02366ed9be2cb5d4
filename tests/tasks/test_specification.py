import dataclasses

import pytest

from lensjax.errors import InputError
from lensjax.tasks import PRESETS, Example
from lensjax.tasks.specification import TaskSource


def test_a_preset_fills_in_what_was_not_said():
    resolved = TaskSource("wmt19").resolve()
    preset = PRESETS["wmt19"]
    assert (resolved.label, resolved.dataset, resolved.config) == ("wmt19", preset.dataset, preset.config)
    assert resolved.splits == {"train": "train", "test": "validation"}
    assert resolved.on_hub
    assert resolved.file is None
    assert not resolved.text_only
    row = {"translation": {"zh": "\N{CJK UNIFIED IDEOGRAPH-4F60}", "en": "you"}}
    assert resolved.read("row 0", row) == Example("\N{CJK UNIFIED IDEOGRAPH-4F60}", "you")


def test_what_was_said_comes_before_the_preset():
    said = TaskSource("wikitext", config="small", revision="abc", split="train[:10%]", test_split="test[:5]")
    resolved = said.resolve()
    assert (resolved.config, resolved.revision) == ("small", "abc")
    assert resolved.splits == {"train": "train[:10%]", "validation": "validation", "test": "test[:5]"}
    assert resolved.text_only
    # One field named: none is the preset's.
    named = dataclasses.replace(said, input_field="question").resolve()
    assert not named.text_only
    assert named.read("row 0", {"question": "1 + 1", "target": "2"}) == Example("1 + 1", "2")


def test_a_data_set_of_the_hub_is_its_id():
    resolved = TaskSource("owner/some-data").resolve()
    assert (resolved.dataset, resolved.label, resolved.task_name) == ("owner/some-data",) * 2 + ("some-data",)
    assert resolved.splits == {"train": "train"}
    assert resolved.on_hub


def test_files_and_directories_are_not_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "data").mkdir(parents=True)
    directory = TaskSource("owner/data").resolve()
    assert (directory.file, directory.on_hub) == (None, False)
    # A file is one by its ending too, so that a misspelt name is not looked for on the hub.
    for name in ("here.jsonl", "owner/gone.csv.gz"):
        resolved = TaskSource(name).resolve()
        assert (str(resolved.file), resolved.on_hub) == (name, False)
    assert resolved.task_name == "gone"


def test_a_file_with_the_name_of_a_preset_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flan").write_text("")
    resolved = TaskSource("flan").resolve()
    assert (resolved.dataset, resolved.on_hub, str(resolved.file)) == ("flan", False, "flan")


def test_a_file_of_texts_is_for_language_modelling():
    resolved = TaskSource("book.txt.gz").resolve()
    assert resolved.text_only
    assert resolved.read("line 1", {"text": "once"}) == Example("", "once", "")
    assert resolved.read("line 2", {"text": ""}) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TaskSource("https://example.org/a.csv"), "is an address; download it"),
        (TaskSource("no-such-thing"), "no-such-thing: no such file. --task takes"),
        (TaskSource("a.txt", template="{input}"), "a file of texts has no fields, so there is nothing for --template;"),
        (TaskSource("a.jsonl", test_split="test"), "a.jsonl is a local file: configuration, splits and revision"),
        (TaskSource("a.jsonl", limit=5), "--limit 5 is for data sets"),
        (TaskSource("a/b", text_field="text", input_field="x"), "--text-field text is language modelling"),
        (TaskSource("a/b", template="say:"), r"--template 'say:' has no \{input\}"),
    ],
)
def test_what_cannot_be_meant_is_refused(source, message):
    with pytest.raises(InputError, match=message):
        source.resolve()
