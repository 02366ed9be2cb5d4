"""The tokenizer of a GGUF file, as a fast tokenizer of transformers.

The fields say vocabulary, merges or scores, and special tokens; how a byte-level vocabulary cuts text before merging
they say only by name. transformers' own reader of them imports torch, and cuts for names it does not know, SmolLM2's
among them, as GPT-2 does.

References
----------
llama.cpp, src/llama-vocab.cpp: which name means which expressions, and what holds where a field is missing; Sennrich et
al. 2016, Neural machine translation of rare words with subword units; Kudo & Richardson 2018, SentencePiece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lensjax.errors import InputError
from lensjax.models.checkpoints.gguf.file import GGUFFile
from lensjax.models.checkpoints.hub import without_advice

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of tokenizer.ggml.token_type."""

SPACE = "▁"
"""What SentencePiece writes for a space."""

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORD + r"|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
_THREE = r"[0-9][0-9][0-9]"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", _THREE),
    **dict.fromkeys(("gpt-2", "phi-2"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
"""tokenizer.ggml.pre -> expressions, applied one after the other: each match, and each text between, is cut off."""

WHOLE_WORDS = frozenset(("llama-bpe", "llama3", "llama-v3", "tekken"))
"""Those whose pieces are looked up whole before anything is merged, and which begin a text with the BOS token."""

COMPOSED = frozenset(("qwen2",))
"""Those that bring text into Unicode's normal form C first; llama.cpp does not, the models' own tokenizers do."""


def gguf_tokenizer(file: GGUFFile) -> Any:
    """Return the tokenizer of a GGUF file.

    Parameters
    ----------
    file : GGUFFile

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        With special tokens, chat template and the model's longest input. Text after a special token, like text at the
        start, gets SentencePiece's leading space where the file asks for one, as in llama.cpp.

    Raises
    ------
    InputError
        If the file has no tokenizer, one of a kind that is not supported, or one whose fields do not fit together.
    """
    kind = file.text("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind is None:
        raise InputError(f"{file.path}: has no tokenizer; convert the model again, from a directory that holds one.")
    if kind not in builders:
        raise InputError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}, which is not supported; supported: gpt2 (byte-level BPE), "
            "llama (SentencePiece BPE)."
        )
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = file.fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(
            f"{file.path}: {len(tokens)} tokens have {len(types)} types; download the file or convert the model again."
        )
    special = _special_tokens(file, tokens, types)
    tokenizer, add_bos = builders[kind](file, tokens, types)
    _add_tokens(tokenizer, types)
    _frame(file, tokenizer, special, add_bos)
    with without_advice():
        from transformers import PreTrainedTokenizerFast
    options: dict[str, Any] = {name: token for name, (token, _) in special.items()}
    context = file.fields.get(f"{file.fields.get('general.architecture')}.context_length")
    if context is not None:
        options["model_max_length"] = context
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)
    found.chat_template = file.text("tokenizer.chat_template")
    found.name_or_path = str(file.path)
    return found


def _strings(file: GGUFFile, name: str) -> list[str]:
    value = file.fields.get(name)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise InputError(f"{file.path}: has no list of texts {name}; convert the model again.")
    return value


def _byte_level(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """Return a tokenizer that merges the bytes of the pieces its pre-tokenizer cuts, and whether BOS is the rule."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.text("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        problem = "has no tokenizer.ggml.pre" if name is None else f"tokenizer.ggml.pre is {name!r}, which is unknown"
        raise InputError(
            f"{file.path}: {problem}, so how its tokenizer cuts text is not known; supported: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Convert the model again, or use its Hugging Face files."
        )
    merges = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        # A piece that is a space is written as one, so the separator is not at the start.
        place = merge.find(" ", 1)
        if place < 0:
            raise InputError(f"{file.path}: the merge {merge!r} is not two tokens; convert the model again.")
        merges.append((merge[:place], merge[place + 1 :]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    absent = {part for pair in merges for part in (*pair, "".join(pair)) if part not in vocabulary}
    if absent:
        raise InputError(
            f"{file.path}: merges of the tokenizer speak of {len(absent)} tokens that it does not have, such as "
            f"{min(absent)!r}; convert the model again."
        )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if name in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, name in WHOLE_WORDS


def _sentencepiece(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """Return a tokenizer that merges characters in the order of the scores, and that BOS is the rule."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{file.path}: has no tokenizer.ggml.scores for its tokens; convert the model again.")
    # In tokens that users defined, llama.cpp's converter writes spaces as spaces.
    spelled = [
        token.replace(" ", SPACE) if kind == USER_DEFINED else token for token, kind in zip(tokens, types, strict=True)
    ]
    vocabulary = {token: i for i, token in enumerate(spelled)}
    rank: dict[str, tuple[float, int]] = {}
    for i, (token, kind, score) in enumerate(zip(spelled, types, scores, strict=True)):
        if kind == NORMAL:
            rank[token] = (-score, i)
    unknown = file.fields.get("tokenizer.ggml.unknown_token_id")
    if unknown is None:
        unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(rank, vocabulary),
            unk_token=None if unknown is None else spelled[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    prefix = file.fields.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _merges(rank: dict[str, tuple[float, int]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, best first: SentencePiece joins any two whose join has a score."""
    pairs = []
    for token, order in rank.items():
        for place in range(1, len(token)):
            first, second = token[:place], token[place:]
            if first in rank and second in rank:
                pairs.append((order, vocabulary[first], vocabulary[second], first, second))
    return [(first, second) for _, _, _, first, second in sorted(pairs)]


def _add_tokens(tokenizer: Any, types: Sequence[int]) -> None:
    """Make tokens of control and those that users defined match whole, the longest first, before anything is merged."""
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        texts = [tokenizer.id_to_token(i) for i, its in enumerate(types) if its == kind]
        # What users defined is spelled as the normaliser writes it and sought there, control tokens in the text itself.
        found = [AddedToken(text, normalized=SPACE in text and not special, special=special) for text in texts]
        tokenizer.add_special_tokens(found) if special else tokenizer.add_tokens(found)


def _special_tokens(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Return transformers' name of a special token -> the token and its id."""
    # The misspelling is the specification's.
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
    found = {}
    for theirs, ours in names.items():
        number = file.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise InputError(
                f"{file.path}: tokenizer.ggml.{theirs}_token_id is {number}, but there are {len(tokens)} tokens; "
                "convert the model again."
            )
        # Files name a token such as "!" where there is none; transformers would then cut it out of every text.
        if types[number] != NORMAL or ours in ("bos", "eos"):
            found[f"{ours}_token"] = (tokens[number], number)
    return found


def _frame(file: GGUFFile, tokenizer: Any, special: dict[str, tuple[str, int]], add_bos: bool) -> None:
    """Make the tokenizer put BOS before and EOS after a text, as the file says; `add_bos` where it says nothing."""
    from tokenizers.processors import TemplateProcessing

    wanted = {
        "bos_token": file.fields.get("tokenizer.ggml.add_bos_token", add_bos and "bos_token" in special),
        "eos_token": file.fields.get("tokenizer.ggml.add_eos_token", False),
    }
    for name, asked in wanted.items():
        if asked and name not in special:
            raise InputError(f"{file.path}: the tokenizer adds a {name}, but has none; convert the model again.")
    before = [special["bos_token"][0]] if wanted["bos_token"] else []
    after = [special["eos_token"][0]] if wanted["eos_token"] else []
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[special[name] for name, asked in wanted.items() if asked],
        )
