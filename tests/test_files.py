import json
import os

import pytest
from safetensors import SafetensorError

from lensjax._files import JSON_DEPTH, append_line, disk_error, parse_json, read_json, write_atomically
from lensjax.commands.exit_codes import BAD_INPUT, FAILED, guarded
from lensjax.errors import InputError

NO_SPACE = OSError(28, "No space left on device")


def raises(error):
    def raising(*_):
        raise error

    return raising


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for planted in (victim, tmp_path / "not there"):
        (tmp_path / "s.json.part").symlink_to(planted)
        write_atomically(tmp_path / "s.json", "text")
        assert (tmp_path / "s.json").read_text() == "text"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "victim"]
        assert victim.read_text() == "mine"


def test_a_link_planted_between_removing_and_opening_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    whole = os.open

    def planting(path, flags, *mode, **options):
        if str(path).endswith(".part"):
            os.symlink(victim, path)
        return whole(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", planting)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "s.json", "text")
    assert victim.read_text() == "mine"


def test_a_full_disk_leaves_the_old_content_and_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    write_atomically(path, "old")
    whole, calls = os.write, []

    def short(handle, content):
        calls.append(handle)
        return whole(handle, content[:3]) if len(calls) == 1 else raises(OSError(28, "No space left on device"))()

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, "something new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_a_full_disk_is_no_bad_input(tmp_path, capsys):
    path = tmp_path / "s.json"
    assert guarded("p", raises(OSError(28, "No space left on device", str(path))), interrupted="") == FAILED
    said = capsys.readouterr().err
    assert said == f"p: {path}: No space left on device. Make room and give the same command again.\n"
    assert guarded("p", raises(PermissionError(13, "Permission denied", str(path))), interrupted="") == BAD_INPUT
    assert capsys.readouterr().err == f"p: {path}: Permission denied. Check that it exists and may be used.\n"


def test_lines_are_appended_after_the_end_of_a_line(tmp_path):
    path = tmp_path / "lines"
    append_line(path, b"one")
    append_line(path, b"two")
    assert path.read_bytes() == b"one\ntwo\n"
    path.write_bytes(b"torn")
    append_line(path, b"three")
    assert path.read_bytes() == b"torn\nthree\n"


def test_errors_about_the_disk_are_known_whoever_raises_them():
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (disk_error(rust).errno, disk_error(rust).strerror) == (28, "No space left on device")
    assert disk_error(NO_SPACE) is NO_SPACE
    assert disk_error(SafetensorError("header too large")) is None


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ('{"a": 1,}', "Expecting property name"),
        (b"\xff{}", "invalid start byte"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (nested(100_000), f"nested more than {JSON_DEPTH} deep"),
        (nested(JSON_DEPTH + 1), f"nested more than {JSON_DEPTH} deep"),
        ("[" + "[]," * 200 + '{"a": ' * JSON_DEPTH + "0" + "}" * JSON_DEPTH + "]", "nested more than"),
        ("9" * 5000, "an integer of 5000 digits"),
        ("[-" + "9" * 309 + "]", "an integer of 309 digits"),
    ],
)
def test_json_beyond_bounds_is_a_value_error_with_the_reason(content, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(content)
    assert len(str(caught.value)) < 200


def test_json_within_bounds_is_what_the_standard_library_reads():
    for content in (
        nested(JSON_DEPTH),
        "[" + "{}," * 10000 + "{}]",
        '{"a": 1, "a": 2, "b": [NaN, Infinity, 1e999, true, null]}',
        '"\\ud83d\\ude00 \\ud800"',
        "-" + "9" * 308,
        " 5 ",
    ):
        for given in (content, content.encode()):
            assert repr(parse_json(given)) == repr(json.loads(content))


def test_half_a_character_is_refused_where_text_must_be_written_later():
    assert parse_json('{"a": "\\ud83d\\ude00"}', surrogates=False) == {"a": "\U0001f600"}
    for content in ('{"a": ["x\\ud800"]}', '{"\\udfff": 1}'):
        parse_json(content)
        with pytest.raises(ValueError, match=r"half a character \(\\ud"):
            parse_json(content, surrogates=False)


def test_a_json_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    for content in ("{", nested(100_000), "9" * 5000):
        path.write_text(content)
        with pytest.raises(InputError, match=r"a\.json: is not valid JSON \(.*\); download it again\.$"):
            read_json(path, "download it again")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
