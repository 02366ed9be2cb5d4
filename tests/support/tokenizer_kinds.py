"""Tiny tokenizers of every kind that candidates have, made without a network: a builder for each name."""

import json

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    MBartTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
    XGLMTokenizer,
)
from transformers.tokenization_utils_base import generate_merges

from lensjax.models import load_tokenizer
from support.paths import GOLDEN

TOKENIZERS = json.loads((GOLDEN / "tokenizers.json").read_text())
PAGE = TOKENIZERS["page"]
WORDS = ("question", "answer", "rear", "bring", "up", "return", "def", "the", "word", "and", "one", "two", "house")
TEXT = [PAGE, "### =>", *(f"{a}: {b}" for a in WORDS for b in WORDS)]


def byte_level_bpe(special=(), size=700):
    """Return vocabulary and merges trained on a page, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_level(before=(), after=(), **options):
    """Return a byte-level tokenizer whose post-processor writes `before` and `after` around a text."""
    vocabulary, merges = byte_level_bpe(["<s>", "</s>"])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if before or after:
        special = [(token, vocabulary[token]) for token in {*before, *after}]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": "<s>", "eos_token": "</s>"} | options))


def sentencepiece_bpe(name, spelled=lambda piece: piece):
    """Return the golden pieces of a SentencePiece BPE model as vocabulary and merges."""
    golden = TOKENIZERS["sentencepiece"][name]
    vocabulary = {spelled(piece): i for i, piece in enumerate(golden["pieces"])}
    scores = {piece: golden["scores"][i] for piece, i in vocabulary.items()}
    return vocabulary, generate_merges(vocabulary, scores)


def llama(**options):
    vocabulary, merges = sentencepiece_bpe("llama")
    return LlamaTokenizer(vocab=vocabulary, merges=merges, **options)


def llama_prepending():
    """Return it as Llama-2's tokenizer.json has it: a normalizer prepends the space."""
    vocabulary, merges = sentencepiece_bpe("llama")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma(**options):
    names = {"<s>": "<bos>", "</s>": "<eos>"}
    vocabulary, merges = sentencepiece_bpe("gemma", lambda piece: names.get(piece, piece))
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **options)


def unigram_pieces(first):
    """Return pieces with scores: special tokens, characters, and words with and without the mark of a space."""
    characters = sorted({c for text in TEXT for c in text if not c.isspace()} | {"▁", "\n"})
    pieces = [(token, 0.0) for token in first] + [(c, -12.0) for c in characters]
    return pieces + [(f"{mark}{word}", -6.0 if mark else -7.0) for word in WORDS for mark in ("▁", "")]


def xglm(**options):
    return XGLMTokenizer(vocab=unigram_pieces(["<s>", "<pad>", "</s>", "<unk>"]), **options)


def t5():
    return T5Tokenizer(vocab=unigram_pieces(["<pad>", "</s>", "<unk>"]), extra_ids=10)


def mbart():
    """Return a tokenizer that frames what is read and what is written by different languages."""
    pieces = unigram_pieces(["<s>", "<pad>", "</s>", "<unk>"])
    return MBartTokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="ro_RO")


def bart():
    vocabulary, merges = byte_level_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return BartTokenizer(vocab=vocabulary, merges=merges)


def gpt2(**options):
    vocabulary, merges = byte_level_bpe(["<|endoftext|>"])
    return GPT2Tokenizer(vocab=vocabulary, merges=merges, **options)


def opt():
    """Return GPT-2's kind with a first token that is also the last, as OPT has it."""
    return byte_level(before=["</s>"], bos_token="</s>")


def qwen2():
    vocabulary, merges = byte_level_bpe(["<|endoftext|>"])
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges)


def llama3():
    """Return a byte-level tokenizer with a BOS token that looks words up whole and cuts digits in threes."""
    vocabulary, merges = byte_level_bpe(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    cut = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    frame = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def bert(**options):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab(), **options)


def gguf_file(path, model, tokens, types, change):
    """Write a GGUF file that holds a tokenizer only, and read it back."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(path)


def gguf_llama(path, prefix=True, chat=None):
    golden = TOKENIZERS["sentencepiece"]["llama" if prefix else "gemma"]

    def change(writer):
        writer.add_token_scores(golden["scores"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(prefix)
        if chat is not None:
            writer.add_chat_template(chat)

    pairs = zip(golden["pieces"], golden["types"], strict=True)
    pieces = [piece.replace("▁", " ") if kind == 4 else piece for piece, kind in pairs]
    return gguf_file(path, "llama", pieces, golden["types"], change)


def gguf_byte_level(path, name, add_bos=None):
    vocabulary, merges = byte_level_bpe(["<|endoftext|>"])
    tokens = sorted(vocabulary, key=vocabulary.get)

    def change(writer):
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)

    return gguf_file(path, "gpt2", tokens, [3, *[1] * (len(tokens) - 1)], change)


DECODERS = {
    "gpt2": lambda path: gpt2(),
    "gpt2-prefix": lambda path: gpt2(add_prefix_space=True),
    "opt": lambda path: opt(),
    "qwen2": lambda path: qwen2(),
    "llama3": lambda path: llama3(),
    "bytes": lambda path: byte_level(),
    "bytes-bos": lambda path: byte_level(before=["<s>"]),
    "bytes-bos-eos": lambda path: byte_level(before=["<s>"], after=["</s>"]),
    "bytes-eos": lambda path: byte_level(after=["</s>"]),
    "bytes-no-eos": lambda path: byte_level(eos_token=None),
    "yi": lambda path: byte_level(add_bos_token=False),
    "llama": lambda path: llama(add_bos_token=True),
    "llama-bos-eos": lambda path: llama(add_bos_token=True, add_eos_token=True),
    "llama-legacy": lambda path: llama(add_bos_token=True, legacy=True),
    "llama-no-bos": lambda path: llama(),
    "llama-no-prefix": lambda path: llama(add_bos_token=True, add_prefix_space=False),
    "llama-prepending": lambda path: llama_prepending(),
    "gemma": lambda path: gemma(),
    "xglm": lambda path: xglm(),
    "xglm-no-prefix": lambda path: xglm(add_prefix_space=False),
    "t5": lambda path: t5(),
    "bert": lambda path: bert(),
    "bert-end": lambda path: bert(eos_token="[SEP]"),
    "byt5": lambda path: ByT5Tokenizer(),
    "gguf-llama": lambda path: gguf_llama(path),
    "gguf-llama-no-prefix": lambda path: gguf_llama(path, prefix=False),
    "gguf-gpt2": lambda path: gguf_byte_level(path, "gpt-2"),
    "gguf-qwen2": lambda path: gguf_byte_level(path, "qwen2", add_bos=False),
    "gguf-llama3": lambda path: gguf_byte_level(path, "llama-bpe"),
    "gguf-smollm-bos": lambda path: gguf_byte_level(path, "smollm", add_bos=True),
}
"""Name -> function of the path of a file that it may write."""

ADD_BOS = (
    *("opt", "llama3", "bytes-bos", "bytes-bos-eos", "llama", "llama-bos-eos", "llama-legacy", "llama-no-prefix"),
    *("llama-prepending", "gemma", "xglm", "xglm-no-prefix", "bert", "bert-end"),
    *("gguf-llama", "gguf-llama-no-prefix", "gguf-llama3", "gguf-smollm-bos"),
)
"""Those that write a token before a text."""

ENCODER_DECODERS = {
    "t5": lambda path: t5(),
    "bart": lambda path: bart(),
    "mbart": lambda path: mbart(),
    "byt5": lambda path: ByT5Tokenizer(),
    "bytes-eos": lambda path: byte_level(after=["</s>"]),
    "bytes": lambda path: byte_level(),
}
