"""Inputs and labels are those of transformers' documented recipes, token for token, for every kind of tokenizer."""

import json

import numpy as np
import pytest

from lensjax.tasks import IGNORED, Example, batches, encode, load_task
from support import tokenizer_kinds

DECODERS, ENCODER_DECODERS = tokenizer_kinds.DECODERS, tokenizer_kinds.ENCODER_DECODERS

SAMPLES = (
    ("rear", "bring up"),
    ("question one", "answer, and two"),
    ("12 + 345", "357"),
    ("Ünïcödé naïve", "déjà-vu ½ ²"),
    ("你好", "世界。这是"),
    ("one ", "two"),
    ("the word", "  two spaces first"),
    ("def f(x):\n", "    return x\n"),
    ("the house", "\u3000\u3000第一段。\n"),
    ("one", "\n\ntwo\n\n\n"),
    ("😀😃", "👍🏽 up"),
    ("it", "'s the word"),
)
TEMPLATES = ("{input}: ", "{input}", "Q: {input}\nA: ", "### {input}\n\n", "{input} =>")
LOSSY = ("t5", "xglm", "bert")
"""Those that do not keep white space or unknown characters: what they decode to is another text."""


@pytest.fixture(scope="module", params=DECODERS)
def named(request, tmp_path_factory):
    return request.param, DECODERS[request.param](tmp_path_factory.mktemp("tokenizer") / "t.gguf")


def ended(tokenizer, ids):
    """Return ids with the end-of-text token, where the tokenizer has one and has not written it."""
    end = tokenizer.eos_token_id
    language = tokenizer.convert_ids_to_tokens(ids[-1]) in getattr(tokenizer, "lang_code_to_id", ())
    return ids if end is None or ids[-1 - language] == end else [*ids, end]


def row(encoded, pad=0):
    """Return input_ids and labels of one sample as a batch has them, without padding."""
    (batch,) = batches(encoded, batch_size=1, buckets=(512,), pad_id=pad)
    width = int(batch["attention_mask"].sum())
    labels = batch["labels"][0]
    return batch["input_ids"][0, :width].tolist(), labels[: width if not encoded.separate else None].tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_target_are_tokens_of_the_whole_text(named, template):
    name, tokenizer = named
    clean = 0
    for input, target in SAMPLES:
        encoded = encode([Example(input, target, template)], tokenizer, 512)
        whole = template.replace("{input}", input) + target
        ids, labels = row(encoded)
        assert ids == ended(tokenizer, tokenizer(whole)["input_ids"])
        read = int(encoded.prompt_lengths[0])
        assert labels == [IGNORED] * read + ids[read:]
        # Where the prompt's own tokens begin those of the whole text, they are what is not scored.
        prompt = template.rstrip(" ").replace("{input}", input)
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        before = tokenizer(prompt)["input_ids"]
        before = before[: before.index(alone[0]) + len(alone)]
        # An unknown token may hold characters of both.
        if ids[: len(before)] == before and before[-1] != tokenizer.unk_token_id:
            clean += 1
            assert read == len(before)
        assert labels[-1] == ids[-1]
        assert encoded.target_bytes == len(target.encode())
        if not name.startswith(LOSSY):
            text = tokenizer.decode(ids[read:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert target.rstrip("\n ").endswith(text.strip()) or target.strip() in text
            first = tokenizer.decode(ids[:read], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert prompt.strip().startswith(first.strip().rstrip("\ufffd"))
    # White space before a word is cut otherwise than at an end.
    assert clean >= (1 if template.endswith("\n\n") else len(SAMPLES) // 3)


def test_a_token_comes_before_a_text_only_where_the_tokenizer_writes_it(named):
    name, tokenizer = named
    ids = encode([Example("rear", "bring up")], tokenizer, 64).ids[0].tolist()
    first = tokenizer("rear: bring up", add_special_tokens=False)["input_ids"][0]
    assert (ids[0] != first) == (name in tokenizer_kinds.ADD_BOS)


@pytest.mark.parametrize("name", ["llama", "llama-prepending", "llama-legacy", "gguf-llama", "gpt2", "gemma"])
def test_a_target_begins_with_one_space_and_no_second(name, tmp_path):
    tokenizer = DECODERS[name](tmp_path / "t.gguf")
    encoded = encode([Example("rear", "word and")], tokenizer, 64)
    scored = tokenizer.convert_ids_to_tokens(encoded.ids[0][encoded.prompt_lengths[0] :].tolist())
    assert "".join(scored[:-1]).replace("Ġ", "▁") == "▁word▁and"


def test_a_token_of_prompt_and_target_is_scored():
    tokenizer = DECODERS["gpt2"](None)
    assert tokenizer.convert_ids_to_tokens(tokenizer("rear")["input_ids"]) == ["rear"]
    encoded = encode([Example("one re", "ar", "{input}")], tokenizer, 64)
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids[0].tolist())
    assert tokens == ["one", "Ġrear", "<|endoftext|>"]
    assert encoded.prompt_lengths.tolist() == [1]


def test_bytes_of_one_character_stay_on_their_side(tmp_path):
    for name in ("gpt2", "llama", "gemma", "gguf-llama"):
        tokenizer = DECODERS[name](tmp_path / "t.gguf")
        encoded = encode([Example("鼠", "鼠鼠", "{input}")], tokenizer, 64)
        ids, read = encoded.ids[0].tolist(), int(encoded.prompt_lengths[0])
        special = not name.startswith("gpt2")
        # Three bytes each, none of them merged; SentencePiece's mark of a space and BOS may come before.
        assert len(ids) - 1 - read == 6, (name, tokenizer.convert_ids_to_tokens(ids))
        assert tokenizer.decode(ids[read:-1]) == "鼠鼠"
        assert (ids[0] == tokenizer.bos_token_id) == special


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_encoder_decoder_reads_the_prompt_and_writes_the_target_alone(name, template):
    tokenizer = ENCODER_DECODERS[name](None)
    for input, target in SAMPLES:
        encoded = encode([Example(input, target, template)], tokenizer, 512, separate=True)
        ids, labels = row(encoded)
        assert ids == tokenizer(template.rstrip(" ").replace("{input}", input))["input_ids"]
        wanted = ended(tokenizer, tokenizer(text_target=target)["input_ids"])
        assert labels == wanted + [IGNORED] * (512 - len(wanted))
        assert encoded.counted == len(wanted)
        assert encoded.target_bytes == len(target.encode())


def test_labels_of_bart_are_framed_and_begin_without_a_space():
    tokenizer = ENCODER_DECODERS["bart"](None)
    encoded = encode([Example("rear", "bring up")], tokenizer, 32, separate=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids[0].tolist())
    assert tokens == ["<s>", "rear", ":", "</s>", "<s>", "bring", "Ġup", "</s>"]
    assert encoded.prompt_lengths.tolist() == [4]


def test_labels_of_mbart_end_with_their_own_language():
    tokenizer = ENCODER_DECODERS["mbart"](None)
    encoded = encode([Example("rear", "up")], tokenizer, 32, separate=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids[0].tolist())
    assert tokens == ["▁rear", ":", "</s>", "en_XX", "▁up", "</s>", "ro_RO"]


def test_packed_texts_are_those_of_the_recipe_with_one_end_between_them(named):
    name, tokenizer = named
    texts = [target for _, target in SAMPLES]
    encoded = encode([Example("", text, "") for text in texts], tokenizer, 32, pack=True)
    joined = []
    for text in texts:
        ids = ended(tokenizer, tokenizer(text)["input_ids"])
        repeated = joined and tokenizer.eos_token_id is not None and ids[0] == joined[-1] == tokenizer.eos_token_id
        joined += ids[1:] if repeated else ids
    rows = [list(joined[at : at + 32]) for at in range(0, len(joined), 32)]
    assert [found.tolist() for found in encoded.rows[0]] == rows
    assert encoded.rows[1].tolist() == [0] * len(rows)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id == tokenizer.bos_token_id:
        assert joined.count(tokenizer.eos_token_id) == len(texts) + (name in tokenizer_kinds.ADD_BOS)


def test_texts_that_are_not_packed_are_tokenised_whole(named):
    _, tokenizer = named
    for _, target in SAMPLES:
        encoded = encode([Example("", target, "")], tokenizer, 512)
        ids, labels = row(encoded)
        assert ids == ended(tokenizer, tokenizer(target)["input_ids"])
        # The first token of all is predicted by nothing, and special tokens before the text are not scored.
        read = int(encoded.prompt_lengths[0])
        before = tokenizer(target)["input_ids"].index(tokenizer(target, add_special_tokens=False)["input_ids"][0])
        assert read == before
        assert labels == [IGNORED] * read + ids[read:]


def test_a_cut_target_has_no_end_and_its_bytes_are_counted(named):
    name, tokenizer = named
    example = Example("rear", "word and house and word", "{input}: ")
    whole = encode([example], tokenizer, 512)
    for most in range(int(whole.prompt_lengths[0]) + 1, len(whole.ids[0])):
        cut = encode([example], tokenizer, most)
        assert cut.truncated == 1
        assert cut.ids[0].tolist() == whole.ids[0][:most].tolist()
        if not name.startswith(LOSSY):
            text = tokenizer.decode(cut.ids[0][int(cut.prompt_lengths[0]) :].tolist(), skip_special_tokens=True)
            assert cut.target_bytes == len(text.removeprefix(" "))
        assert 0 <= cut.target_bytes <= len(example.target)
    if tokenizer.eos_token_id is not None:
        assert cut.target_bytes == len(example.target)  # only the end of text was cut


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_source_code_is_learned_with_its_indentation(tmp_path):
    rows = [{"prompt": f"def f{i}(x):\n", "completion": f"    y = x + {i}\n    return y\n"} for i in range(8)]
    path = write(tmp_path / "code.jsonl", rows)
    task = load_task(path, input_field="prompt", target_field="completion", template="{input}", validation=2, test=2)
    tokenizer = DECODERS["gpt2"](None)
    for example in task.train:
        assert {"prompt": example.input, "completion": example.target} in rows
        text = tokenizer.decode(encode([example], tokenizer, 64).ids[0][:-1])
        compile(text, "sample", "exec")
        assert text == example.input + example.target


def test_texts_keep_the_white_space_they_were_written_with(tmp_path):
    rows = [{"text": f"\u3000\u3000第{i}段。 \n"} for i in range(8)]
    task = load_task(write(tmp_path / "t.jsonl", rows), text_field="text", validation=2, test=2)
    assert {e.target for e in (*task.train, *task.validation, *task.test)} == {row["text"] for row in rows}
    lines = tmp_path / "t.txt"
    lines.write_bytes("".join(f"  line {i} \r\n\r\n" for i in range(8)).encode())
    task = load_task(lines, validation=2, test=2)
    assert {e.target for e in (*task.train, *task.validation, *task.test)} == {f"  line {i} " for i in range(8)}
    table = tmp_path / "t.csv"
    table.write_text("input,target\n" + "".join(f'{i}," {i}"\n' for i in range(8)))
    assert {e.target for e in load_task(table, validation=2, test=2).train} <= {f" {i}" for i in range(8)}


def test_the_separator_is_the_templates():
    assert Example("a", "b").prompt + Example("a", "b").completion == "a: b"
    for template in ("{input}", "{input}=>", "{input}\n", "{input}  "):
        example = Example("a ", " b", template)
        assert example.prompt + example.completion == template.replace("{input}", "a ") + " b"
    assert Example("a", "b", "{input}\n").prompt == "a\n"
    assert Example("a", "b", "{input}  ").separator == "  "


def test_a_task_changes_its_fingerprint_with_its_separator(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"input": f"{i}", "target": f" {i}"} for i in range(8)])
    plain = write(tmp_path / "u.jsonl", [{"input": f"{i}", "target": f"{i}"} for i in range(8)])
    # The same texts, but an encoder-decoder does not get the separator.
    one = load_task(path, template="{input}:", validation=2, test=2)
    other = load_task(plain, template="{input}: ", validation=2, test=2)
    assert [e.prompt + e.completion for e in one.train] == [e.prompt + e.completion for e in other.train]
    assert one.fingerprint != other.fingerprint


def test_every_sample_of_a_batch_is_as_if_alone(named):
    _, tokenizer = named
    examples = [Example(input, target) for input, target in SAMPLES]
    together = encode(examples, tokenizer, 512)
    for place, example in enumerate(examples):
        alone = encode([example], tokenizer, 512)
        np.testing.assert_array_equal(together.ids[place], alone.ids[0])
        assert together.prompt_lengths[place] == alone.prompt_lengths[0]
