"""Tokenizers of GGUF files against SentencePiece, the tokenizer classes of transformers, and published definitions."""

import json

import gguf
import jax
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.tokenization_utils_base import generate_merges

from lensjax.errors import InputError
from lensjax.models import from_pretrained, init_model, load_tokenizer, save_pretrained
from lensjax.models.checkpoints.gguf.tokenizer import PRE_TOKENIZERS
from lensjax.models.checkpoints.saving import export_tensors
from support.paths import GOLDEN

TOKENIZERS = json.loads((GOLDEN / "tokenizers.json").read_text())
PAGE, LINES = TOKENIZERS["page"], TOKENIZERS["lines"]
TEXTS = [PAGE, *LINES, *PAGE.split("\n")]

CONTROL, USER_DEFINED = 3, 4
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"

# The pre_tokenizer and normalizer of the models' published tokenizer.json.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


PUBLISHED = {
    "gpt-2": (None, BYTE_LEVEL | {"use_regex": True}),
    "smollm": (
        None,
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}],
        },
    ),
    "deepseek-coder": (
        None,
        {
            "type": "Sequence",
            "pretokenizers": [
                split("[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
                {"type": "Digits", "individual_digits": True},
                BYTE_LEVEL | {"use_regex": False},
            ],
        },
    ),
    "llama-bpe": (
        None,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
    "qwen2": (
        {"type": "NFC"},
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
    "tekken": (
        None,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


def published(name):
    """Return normalizer and pre-tokenizer of a tokenizer.json as the tokenizers library reads them."""
    normalizer, cut = PUBLISHED[name]
    if isinstance(cut, str):
        cut = {"type": "Sequence", "pretokenizers": [split(cut), BYTE_LEVEL | {"use_regex": False}]}
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    parts = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": cut, "model": empty}
    return Tokenizer.from_str(json.dumps(parts))


def train(name):
    """Train a vocabulary on the page with the published definition; return vocabulary and merges."""
    tokenizer = published(name)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([PAGE] * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write(path, tokens, types, *, model="gpt2", pre=None, merges=None, scores=None, change=lambda writer: None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    if scores is not None:
        writer.add_token_scores(scores)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_bpe(path, name, vocabulary, merges, added=(), **options):
    """Write a byte-level vocabulary with further tokens: (text, type)."""
    tokens = [*sorted(vocabulary, key=vocabulary.get), *(text for text, _ in added)]
    types = [1] * len(vocabulary) + [kind for _, kind in added]
    write(path, tokens, types, pre=name, merges=merges, **options)


ADDED = (("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<think>", USER_DEFINED))


def special_fields(writer):
    writer.add_bos_token_id(700)
    writer.add_eos_token_id(701)
    writer.add_pad_token_id(701)
    writer.add_unk_token_id(0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_byte_level_ids_are_those_of_the_published_definition(name, tmp_path):
    vocabulary, merges = train(name)
    write_bpe(tmp_path / "t.gguf", name, vocabulary, merges, ADDED, change=special_fields)
    ours = load_tokenizer(tmp_path / "t.gguf")
    reference = published(name)
    reference.model = models.BPE(vocabulary, merges, ignore_merges=name in ("llama-bpe", "tekken"))
    reference.add_special_tokens([AddedToken(text, normalized=False) for text, kind in ADDED if kind == CONTROL])
    reference.add_tokens([AddedToken(text, normalized=False) for text, kind in ADDED if kind != CONTROL])
    start = [700] if name in ("llama-bpe", "tekken") else []  # llama.cpp's rule where the file says nothing
    for text in [*TEXTS, "a<|im_start|>b <think> c<|im_end|>\n"]:
        assert ours(text)["input_ids"] == start + reference.encode(text).ids, text
        if name != "qwen2":
            assert ours.decode(reference.encode(text).ids) == text
    assert len(reference.encode(PAGE).ids) > 300


@pytest.mark.parametrize(("name", "kind"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_byte_level_ids_are_those_of_transformers_own_class(name, kind, tmp_path):
    vocabulary, merges = train(name)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    write_bpe(tmp_path / "t.gguf", name, vocabulary, merges)
    ours, theirs = load_tokenizer(tmp_path / "t.gguf"), kind(vocab=vocabulary, merges=merges)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text


def test_each_name_cuts_the_page_in_its_own_way(tmp_path):
    vocabulary, merges = train("smollm")
    found = set()
    for name in PUBLISHED:
        write_bpe(tmp_path / f"{name}.gguf", name, vocabulary, merges)
        tokenizer = load_tokenizer(tmp_path / f"{name}.gguf").backend_tokenizer
        found.add(tuple(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(PAGE)))
    assert len(found) == len(PUBLISHED)


def test_the_default_cuts_punctuation_and_three_digits(tmp_path):
    vocabulary, merges = train("gpt-2")
    write_bpe(tmp_path / "t.gguf", "default", vocabulary, merges)
    cut = load_tokenizer(tmp_path / "t.gguf").backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = [piece.replace("Ġ", " ") for piece, _ in cut("it's 12345, x+=~ `y`  z 7")]
    assert pieces == ["it", "'", "s", " ", "123", "45", ",", " x", "+=~", " `", "y", "`", " ", " z", " ", "7"]


def test_words_are_looked_up_whole_only_where_the_model_does_so(tmp_path):
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"ab": 256, "bc": 257, "abc": 258}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]  # of which the last can never apply
    found = {}
    for name in PUBLISHED:
        write_bpe(tmp_path / "t.gguf", name, vocabulary, merges, change=lambda writer: writer.add_add_bos_token(False))
        found[name] = load_tokenizer(tmp_path / "t.gguf")("abc")["input_ids"]
    parts = [vocabulary["a"], 257]
    assert found == dict.fromkeys(PUBLISHED, parts) | {"llama-bpe": [258], "tekken": [258]}


@pytest.mark.parametrize("name", ["llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"])
def test_other_names_of_the_pre_tokenizer_of_llama_3_give_the_same_ids(name, tmp_path):
    vocabulary, merges = train("llama-bpe")
    write_bpe(tmp_path / "a.gguf", "llama-bpe", vocabulary, merges, ADDED, change=special_fields)
    write_bpe(tmp_path / "b.gguf", name, vocabulary, merges, ADDED, change=special_fields)
    expected, ours = load_tokenizer(tmp_path / "a.gguf"), load_tokenizer(tmp_path / "b.gguf")
    for text in TEXTS:
        assert ours(text)["input_ids"] == expected(text)["input_ids"], text


def test_deepseek_coder_splits_lines_words_punctuation_and_digits(tmp_path):
    vocabulary, merges = train("deepseek-coder")
    write_bpe(tmp_path / "t.gguf", "deepseek-coder", vocabulary, merges)
    cut = load_tokenizer(tmp_path / "t.gguf").backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut("it's 12\n\n  x+=y (z)")]
    assert pieces == ["it", "'", "s", " ", "1", "2", "\n", "\n", " ", " x", "+=", "y", " (", "z", ")"]


def test_special_tokens_and_chat_template_are_those_of_the_file(tmp_path):
    vocabulary, merges = train("smollm")

    def change(writer):
        special_fields(writer)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)
        writer.add_chat_template(CHAT)

    write_bpe(tmp_path / "t.gguf", "smollm", vocabulary, merges, ADDED, change=change)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == 703
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (700, 701, 701)
    assert tokenizer.unk_token is None  # the file names "!", which is a token like others
    assert tokenizer.model_max_length == 4096
    assert tokenizer.chat_template == CHAT
    plain = tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert tokenizer("one two")["input_ids"] == [700, *plain, 701]
    assert tokenizer("one two", "one two")["input_ids"] == [700, *plain, 701, 700, *plain, 701]
    batch = tokenizer(["one two", "one"], padding=True)
    assert batch["input_ids"][1][-1] == 701
    assert batch["attention_mask"][1][-1] == 0
    ids = tokenizer("<think>one<|im_end|>", add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (702, 701)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>one"
    assert tokenizer.decode(ids) == "<think>one<|im_end|>"


def write_sentencepiece(path, name, change=lambda writer: None):
    golden = TOKENIZERS["sentencepiece"][name]
    # llama.cpp's converter writes the spaces of what users defined as spaces.
    pieces = [
        piece.replace("▁", " ") if kind == USER_DEFINED else piece
        for piece, kind in zip(golden["pieces"], golden["types"], strict=True)
    ]

    def fields(writer):
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(golden["prefix"])
        change(writer)

    write(path, pieces, golden["types"], model="llama", scores=golden["scores"], change=fields)
    return golden


@pytest.mark.parametrize("name", TOKENIZERS["sentencepiece"])
def test_ids_are_those_of_sentencepiece(name, tmp_path):
    golden = write_sentencepiece(tmp_path / "t.gguf", name)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    assert tokenizer(PAGE)["input_ids"] == [1, *golden["page"]]
    for line, ids in zip(LINES, golden["lines"], strict=True):
        if "<unk>" in line:
            continue  # text that names a special token is that token here, as in transformers
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == ids, line
    if name != "bytes-missing":
        assert tokenizer.decode(golden["page"]) == PAGE
    assert len(golden["page"]) > 400


def test_scores_decide_what_is_merged_not_the_order_of_the_tokens(tmp_path):
    golden = TOKENIZERS["sentencepiece"]["llama"]
    places = np.random.default_rng(0).permutation(len(golden["pieces"]))
    moved = {int(old): new for new, old in enumerate(places)}
    lists = [[golden[key][old] for old in places] for key in ("pieces", "types", "scores")]

    def change(writer):
        writer.add_unk_token_id(moved[0])
        writer.add_add_bos_token(False)

    write(tmp_path / "t.gguf", lists[0], lists[1], model="llama", scores=lists[2], change=change)
    assert load_tokenizer(tmp_path / "t.gguf")(PAGE)["input_ids"] == [moved[i] for i in golden["page"]]


def test_text_that_looks_like_a_byte_is_text(tmp_path):
    characters = ["<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "<0x41"]
    tokens = ["<unk>", "<0x41>", "<0x42>", *characters]
    scores = [0.0] * 3 + [-float(i) for i in range(len(characters))]

    def change(writer):
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(False)

    write(tmp_path / "t.gguf", tokens, [2, 6, 6] + [1] * 10, model="llama", scores=scores, change=change)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    assert tokenizer("<0x41>")["input_ids"] == [12, 8]
    assert tokenizer("AB")["input_ids"] == [1, 2]


@pytest.mark.parametrize(("name", "kind"), [("llama", LlamaTokenizer), ("gemma", GemmaTokenizer)])
def test_sentencepiece_ids_are_those_of_transformers_own_class(name, kind, tmp_path):
    golden = write_sentencepiece(tmp_path / "t.gguf", name)
    ours = load_tokenizer(tmp_path / "t.gguf")
    pieces = golden["pieces"]
    scores = dict(zip(pieces, golden["scores"], strict=True))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    rank = scores if name == "llama" else {piece: -i for i, piece in enumerate(pieces)}
    theirs = kind(
        vocab=vocabulary, merges=generate_merges(vocabulary, rank), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    theirs.add_tokens(
        [
            AddedToken(piece, normalized=False)
            for piece, its in zip(pieces, golden["types"], strict=True)
            if its == USER_DEFINED and "▁" not in piece
        ]
    )
    for text in TEXTS:
        if name == "llama" and (text.startswith((" ", "▁")) or "<unk>" in text):
            continue  # transformers adds no space before a space or after a special token; SentencePiece does
        mine = ours(text, add_special_tokens=False)["input_ids"]
        assert mine == theirs(text, add_special_tokens=False)["input_ids"], text


def test_a_control_token_is_found_as_it_is_written(tmp_path):
    golden = TOKENIZERS["sentencepiece"]["llama"]
    count = len(golden["pieces"])
    lists = [[*golden[key], new] for key, new in (("pieces", "▁<PRE>"), ("types", CONTROL), ("scores", 0.0))]

    def change(writer):
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(False)

    write(tmp_path / "t.gguf", lists[0], lists[1], model="llama", scores=lists[2], change=change)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    one = tokenizer("one")["input_ids"]
    assert tokenizer("one▁<PRE>one")["input_ids"] == [*one, count, *one]


def test_the_start_of_a_sentencepiece_text_follows_the_fields(tmp_path):
    ids = {}
    for asked in (None, False):
        change = (lambda writer: None) if asked is None else (lambda writer: writer.add_add_bos_token(False))
        write_sentencepiece(tmp_path / "t.gguf", "llama", change)
        ids[asked] = load_tokenizer(tmp_path / "t.gguf")("one")["input_ids"]
    assert ids[None] == [1, *ids[False]]


def test_model_and_tokenizer_come_from_one_file_and_are_saved_together(tmp_path):
    golden = TOKENIZERS["sentencepiece"]["llama"]
    raw = {
        "model_type": "llama",
        "vocab_size": len(golden["pieces"]),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }

    def change(writer):
        writer.add_embedding_length(16)
        writer.add_block_count(1)
        writer.add_feed_forward_length(16)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        for name, array in export_tensors(init_model(raw, jax.random.key(0))).items():
            writer.add_tensor(names[name], array)

    write_sentencepiece(tmp_path / "t.gguf", "llama", change)
    model, tokenizer = from_pretrained(tmp_path / "t.gguf")
    ids = tokenizer("The house was quiet")["input_ids"]
    assert model(np.array([ids])).shape == (1, len(ids), 700)
    save_pretrained(model, tmp_path / "saved", tokenizer)
    again, other = from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again(np.array([ids])), model(np.array([ids])))
    for text in TEXTS:
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert other.special_tokens_map == tokenizer.special_tokens_map


def test_a_saved_byte_level_tokenizer_gives_the_same_ids(tmp_path):
    vocabulary, merges = train("llama-bpe")
    write_bpe(tmp_path / "t.gguf", "llama-bpe", vocabulary, merges, ADDED, change=special_fields)
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    tokenizer.save_pretrained(tmp_path / "saved")
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    for text in [*TEXTS, "<|im_start|>a<think>"]:
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert', which is not supported; supported: gpt2 .*, llama"),
        (
            {"pre": "viking"},
            r"tokenizer\.ggml\.pre is 'viking', which is unknown, so .* supported: .*gpt-2.*qwen2.*Convert the model",
        ),
        ({"pre": None}, r"has no tokenizer\.ggml\.pre, so how its tokenizer cuts text is not known"),
        ({"merges": [("a", "c")]}, r"merges of the tokenizer speak of 1 tokens that it does not have, such as 'ac'"),
        ({"merges": [("ab",)]}, "the merge 'ab' is not two tokens"),
        ({"merges": None}, r"has no list of texts tokenizer\.ggml\.merges"),
        ({"types": [1]}, "4 tokens have 1 types"),
        ({"model": "llama"}, r"has no tokenizer\.ggml\.scores for its tokens"),
        ({"change": lambda w: w.add_eos_token_id(4)}, r"eos_token_id is 4, but there are 4 tokens"),
        (
            {"model": "llama", "scores": [0.0] * 4, "change": lambda w: w.add_unk_token_id(9)},
            r"unknown_token_id is 9, but there are 4 tokens",
        ),
        ({"change": lambda w: w.add_add_bos_token(True)}, "the tokenizer adds a bos_token, but has none"),
    ],
)
def test_tokenizers_that_cannot_be_had_are_refused(options, message, tmp_path):
    values = {"tokens": ["a", "b", "ab", "c"], "types": [1] * 4, "pre": "gpt-2", "merges": [("a", "b")]} | options
    write(tmp_path / "t.gguf", values.pop("tokens"), values.pop("types"), **values)
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path / "t.gguf")
    assert str(tmp_path / "t.gguf") in str(error.value)


def test_every_expression_compiles():
    from tokenizers import Regex

    for expressions in PRE_TOKENIZERS.values():
        pieces = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(e), "isolated") for e in expressions])
        assert "".join(piece for piece, _ in pieces.pre_tokenize_str(PAGE)) == PAGE
    assert normalizers.NFC().normalize_str("e\u0301") == "é"
