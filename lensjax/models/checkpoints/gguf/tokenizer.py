"""The tokenizer of a GGUF file, converted to a fast tokenizer of transformers.

The file has the vocabulary, its merges or scores, and the special tokens, but for byte-level BPE only the name of the
pre-tokenizer, which splits the text before merging. transformers' GGUF reader imports torch, and uses GPT-2's
pre-tokenizer for all names that it does not know, including SmolLM2's.

References
----------
llama.cpp, src/llama-vocab.cpp: the regular expressions of each pre-tokenizer, and the defaults of missing fields;
Sennrich et al. 2016, Neural machine translation of rare words with subword units; Kudo & Richardson 2018,
SentencePiece.
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
"""SentencePiece's symbol for a space."""

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
_EAST_ASIAN = r"[\u0800-\u9fa5\uac00-\ud7ff]+"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", _THREE),
    **dict.fromkeys(("gpt-2", "phi-2"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), (_LLAMA3,)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
"""tokenizer.ggml.pre -> regular expressions, applied one after the other; each splits off its matches."""

IGNORE_MERGES = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "tekken"))
"""Pre-tokenizers whose pieces are looked up in the vocabulary before merging, and which add BOS by default."""

NFC = frozenset(("qwen2",))
"""Tokenizers that first normalise text to Unicode NFC, as the models' own tokenizers do; llama.cpp does not."""


def gguf_tokenizer(file: GGUFFile) -> Any:
    """Return the tokenizer of a GGUF file.

    Parameters
    ----------
    file : GGUFFile

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        With special tokens, chat template and maximum length. If the file sets SentencePiece's leading space, text
        after a special token also gets one, as in llama.cpp.

    Raises
    ------
    InputError
        If the file has no tokenizer, one of an unsupported kind, or one with inconsistent fields.
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
    _add_bos_and_eos(file, tokenizer, special, add_bos)
    with without_advice():
        from transformers import PreTrainedTokenizerFast
    options: dict[str, Any] = {name: token for name, (token, _) in special.items()}
    context = file.fields.get(f"{file.fields.get('general.architecture')}.context_length")
    if context is not None:
        options["model_max_length"] = context
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)
    result.chat_template = file.text("tokenizer.chat_template")
    result.name_or_path = str(file.path)
    return result


def _strings(file: GGUFFile, name: str) -> list[str]:
    value = file.fields.get(name)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise InputError(f"{file.path}: has no list of texts {name}; convert the model again.")
    return value


def _byte_level(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """Return a byte-level BPE tokenizer, and whether it adds BOS by default."""
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
        # The first token may itself be a space, so the separator is searched from the second character on.
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
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in IGNORE_MERGES))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if name in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, name in IGNORE_MERGES


def _sentencepiece(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """Return a SentencePiece BPE tokenizer, which merges by score, and True: it adds BOS by default."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{file.path}: has no tokenizer.ggml.scores for its tokens; convert the model again.")
    # llama.cpp's converter writes user-defined tokens with plain spaces.
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
    """Return all pairs of tokens whose concatenation is a token, best score first, as SentencePiece merges them."""
    pairs = []
    for token, order in rank.items():
        for place in range(1, len(token)):
            first, second = token[:place], token[place:]
            if first in rank and second in rank:
                pairs.append((order, vocabulary[first], vocabulary[second], first, second))
    return [(first, second) for _, _, _, first, second in sorted(pairs)]


def _add_tokens(tokenizer: Any, types: Sequence[int]) -> None:
    """Register control and user-defined tokens, which are matched in the text before merging, the longest first."""
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        texts = [tokenizer.id_to_token(i) for i, token_type in enumerate(types) if token_type == kind]
        # User-defined tokens are searched in the normalised text, control tokens in the original text.
        added = [AddedToken(text, normalized=SPACE in text and not special, special=special) for text in texts]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)


def _special_tokens(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Return name of a special token in transformers -> (token, id)."""
    # "seperator" is spelled this way in the GGUF specification.
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
    special = {}
    for theirs, ours in names.items():
        number = file.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise InputError(
                f"{file.path}: tokenizer.ggml.{theirs}_token_id is {number}, but there are {len(tokens)} tokens; "
                "convert the model again."
            )
        # Files without such a token may name an ordinary one such as "!", which would then be special in every text.
        if types[number] != NORMAL or ours in ("bos", "eos"):
            special[f"{ours}_token"] = (tokens[number], number)
    return special


def _add_bos_and_eos(file: GGUFFile, tokenizer: Any, special: dict[str, tuple[str, int]], add_bos: bool) -> None:
    """Make the tokenizer add BOS and EOS as the file sets; `add_bos` is the default for BOS."""
    from tokenizers.processors import TemplateProcessing

    is_added = {
        "bos_token": file.fields.get("tokenizer.ggml.add_bos_token", add_bos and "bos_token" in special),
        "eos_token": file.fields.get("tokenizer.ggml.add_eos_token", False),
    }
    for name, added in is_added.items():
        if added and name not in special:
            raise InputError(f"{file.path}: the tokenizer adds a {name}, but has none; convert the model again.")
    before = [special["bos_token"][0]] if is_added["bos_token"] else []
    after = [special["eos_token"][0]] if is_added["eos_token"] else []
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[special[name] for name, added in is_added.items() if added],
        )
