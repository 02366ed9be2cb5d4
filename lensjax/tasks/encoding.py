"""Token batches of few shapes from samples: encoding, packing, bucketing."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lensjax.errors import InputError
from lensjax.tasks.chat import dialogues, shared_length, tokenizer_suffix
from lensjax.tasks.example import CHAT, Example

IGNORED = -100
"""Label of a position that does not count in the loss, as in transformers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Samples as token ids.

    Attributes
    ----------
    ids : tuple of int32 arrays
        Tokens of each sample's text with its special tokens; if `separate`, those of the prompt, then the labels.
    prompt_lengths : int array (n,)
        Leading tokens that do not count in the loss.
    truncated : int
        Samples whose target was cut at the maximum length.
    separate : bool
        Whether prompt and target go to an encoder and a decoder instead of forming one sequence.
    target_bytes : int
        UTF-8 bytes of the targets, without separators, as far as they were kept; 0 if not known.
    packed : int or None
        Tokens of a row if the samples are joined and cut into rows; None if each sample is padded to a row of its own.
    """

    ids: tuple[np.ndarray, ...]
    prompt_lengths: np.ndarray
    truncated: int
    separate: bool = False
    target_bytes: int = 0
    packed: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def token_counts(self) -> np.ndarray:
        """Tokens of each sample, prompt and target, int (n,)."""
        return np.array([len(i) for i in self.ids], int)

    @functools.cached_property
    def rows(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Token ids and prompt lengths of the rows of batches: of each sample, or of the rows they are packed into."""
        if self.packed is None or not self.ids:
            return self.ids, self.prompt_lengths
        joined = np.concatenate(self.ids)
        packed = tuple(joined[i : i + self.packed] for i in range(0, len(joined), self.packed))
        return packed, np.zeros(len(packed), int)

    @property
    def lengths(self) -> np.ndarray:
        """Length each row needs in a batch, int (rows,): of the longer side if the two are separate."""
        ids, prompts = self.rows
        counts = np.array([len(i) for i in ids], int)
        return np.maximum(prompts, counts - prompts) if self.separate else counts

    @functools.cached_property
    def counted(self) -> int:
        """Tokens that have a loss; the first token of a single sequence has none, for nothing comes before it."""
        ids, prompts = self.rows
        return sum(len(i) - (int(p) if self.separate else max(int(p), 1)) for i, p in zip(ids, prompts, strict=True))

    @property
    def tokens_per_byte(self) -> float:
        """Tokens that have a loss for each byte of target text: times a loss per token, it is the loss per byte.

        NaN if the bytes are not known.
        """
        return self.counted / self.target_bytes if self.target_bytes else float("nan")

    def first(self, n: int) -> Encoded:
        """Return the first n samples; the bytes of their targets are not known."""
        return Encoded(self.ids[:n], self.prompt_lengths[:n], self.truncated, self.separate, 0, self.packed)


@dataclasses.dataclass(frozen=True)
class _Text:
    """A text to be tokenised in one piece.

    Attributes
    ----------
    whole : str
    scored : int
        Character from which on the text counts in the loss.
    target : int
        Character at which the target begins, after the separator.
    """

    whole: str
    scored: int
    target: int


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Tokens of a text.

    Attributes
    ----------
    ids : list of int
    prompt : int
        Leading tokens that hold no character which counts in the loss.
    offsets : list of (int, int)
        Characters at which each token begins and ends; empty for tokenizers that do not tell.
    text_end : int
        Index after the last token of text; special tokens follow.
    """

    ids: list[int]
    prompt: int
    offsets: list[tuple[int, int]]
    text_end: int


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, separate: bool = False, pack: bool = False
) -> Encoded:
    """Tokenise samples as transformers does, each text whole.

    Parameters
    ----------
    examples : sequence of Example
    tokenizer : transformers tokenizer
        Fast ones share a batch of texts among the cores.
    max_length : int
        Tokens kept of each sample; if `separate`, of each side; if `pack`, the length of the rows, and nothing is cut.
    separate : bool
        For encoder-decoder models: the prompt is read by the encoder, the target alone makes the labels.
    pack : bool
        For texts without inputs: join them, each with its end of text, and cut rows of `max_length` tokens.

    Raises
    ------
    InputError
        If the prompt alone fills `max_length`, so that no target token would be left; if texts without inputs are for
        an encoder-decoder; see `lensjax.tasks.chat.dialogues`.

    Notes
    -----
    The tokens are those of the recipes that transformers documents, with the special tokens that the tokenizer itself
    adds and no others:

    - prompt and target: ``tokenizer(prompt + separator + target)``, and the end-of-text token;
    - a chat: ``tokenizer.apply_chat_template(dialogue)``, with what the template itself writes after the answer;
    - an encoder-decoder: ``tokenizer(prompt)`` for the encoder, ``tokenizer(text_target=target)`` for the labels;
    - language modelling: ``tokenizer(text)`` one after the other, cut into rows.

    These differences are meant:

    - The end-of-text token follows each target and each text where the tokenizer does not write it itself; otherwise
      no model would learn to stop, and packed texts would run into each other. Between two packed texts there is one,
      even where the tokenizer begins texts with it too.
    - A token that holds the last character of the prompt and the first of the target is scored. The boundary is found
      by the offsets of the characters; with a tokenizer without offsets, the prompt is the longest common prefix of
      the tokens of the whole text and of the prompt alone.
    - Prompts are never cut: one that is too long is an error. A target is cut at `max_length` without an end-of-text
      token, also that of an encoder-decoder, so that no model learns to stop in the middle.
    - The last packed row is shorter than the others; it is kept.
    """
    if not examples:
        return Encoded((), np.zeros(0, int), 0, separate, 0, max_length if pack else None)
    if separate and not all(e.template for e in examples):
        raise InputError(
            "an encoder-decoder model has no input to read in language modelling; give --input-field and "
            f"--target-field, or leave this candidate out{tokenizer_suffix(tokenizer)}."
        )
    chat = any(e.template == CHAT for e in examples)
    written = dialogues(examples, tokenizer) if chat else []
    encoder_ids: list[list[int]] = [[] for _ in examples]
    if separate:
        prompts = [prompt for prompt, _, _ in written] if chat else [e.prompt for e in examples]
        encoder_ids = tokenizer(prompts, add_special_tokens=not chat)["input_ids"]
        texts = [_Text(e.target, 0, 0) for e in examples]
    elif chat:
        pairs = zip(examples, written, strict=True)
        texts = [_Text(whole, at, whole.index(e.target.strip(), at)) for e, (_, whole, at) in pairs]
    else:
        lengths = [len(e.prompt) for e in examples]
        texts = [
            _Text(e.prompt + e.completion, n, n + len(e.separator)) for e, n in zip(examples, lengths, strict=True)
        ]
    tokenised = _tokenise(texts, tokenizer, special=separate or not chat, labels=separate)
    end = tokenizer.eos_token_id
    ids: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    truncated = target_bytes = 0
    for example, encoder, text, tokens in zip(examples, encoder_ids, texts, tokenised, strict=True):
        has_end = end is None or (chat and not separate) or end in (*tokens.ids[tokens.text_end :], *tokens.ids[-1:])
        prompt_length = len(encoder) if separate else tokens.prompt
        whole = [*encoder, *tokens.ids, *([] if has_end else [end])]
        if pack and ids and whole[0] == end:
            whole, prompt_length = whole[1:], max(prompt_length - 1, 0)
        limit = len(encoder) + max_length if separate else max_length
        if pack:
            limit = len(whole)
        elif prompt_length >= max_length + separate:
            raise InputError(
                f"a sample's input alone has {prompt_length} tokens, but at most {max_length} tokens fit: "
                f"{example.input[:60]!r}... Raise --max-length (up to the model's limit) or shorten the input."
            )
        own_bytes = len(example.target.encode())
        if len(whole) > limit:
            truncated += 1
            kept = whole[prompt_length:limit], tokens.offsets[: limit - len(encoder)]
            own_bytes = min(own_bytes, _target_bytes_kept(text, tokenizer, *kept))
        target_bytes += own_bytes
        ids.append(np.array(whole[:limit], np.int32))
        prompt_lengths.append(prompt_length)
    packed = max_length if pack else None
    return Encoded(tuple(ids), np.array(prompt_lengths, int), truncated, separate, target_bytes, packed)


def _tokenise(texts: Sequence[_Text], tokenizer: Any, *, special: bool, labels: bool) -> list[_Tokens]:
    """Tokenise whole texts.

    Parameters
    ----------
    texts : sequence of _Text
    tokenizer : transformers tokenizer
    special : bool
        Whether the tokenizer adds its special tokens.
    labels : bool
        Whether they are the labels of an encoder-decoder model.
    """
    whole = {"text_target" if labels else "text": [t.whole for t in texts]}
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(**whole, add_special_tokens=special)["input_ids"]
        if labels:
            return [_Tokens(list(own), 0, [], len(own)) for own in ids]
        before = tokenizer([t.whole[: t.scored] for t in texts], add_special_tokens=special)["input_ids"]
        return [
            _Tokens(list(own), shared_length(own, part), [], len(own)) for own, part in zip(ids, before, strict=True)
        ]
    encoded = tokenizer(**whole, add_special_tokens=special, return_offsets_mapping=True)
    tokenised = []
    for number, (text, own, offsets) in enumerate(
        zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        # Special tokens before and after the text have no sequence number.
        sequences = encoded.sequence_ids(number)
        start = next((place for place, part in enumerate(sequences) if part is not None), len(own))
        stop = len(own) - next((place for place, part in enumerate(reversed(sequences)) if part is not None), 0)
        prompt = bisect.bisect_right(offsets, text.scored, start, stop, key=lambda offset: offset[1])
        tokenised.append(_Tokens(list(own), prompt, offsets, stop))
    return tokenised


def _target_bytes_kept(text: _Text, tokenizer: Any, scored: list[int], offsets: list[tuple[int, int]]) -> int:
    """Return the UTF-8 bytes of the beginning of a target that is left after its tokens were cut.

    Parameters
    ----------
    text : _Text
    tokenizer : transformers tokenizer
    scored : list of int
        Tokens that are left and count in the loss.
    offsets : list of (int, int)
        Offsets of all that are left; empty if the tokenizer does not tell.
    """
    if offsets:
        return len(text.whole[text.target : max(stop for _, stop in offsets)].encode())
    kept = str(tokenizer.decode(scored, skip_special_tokens=True))
    return len(kept.removeprefix(text.whole[text.scored : text.target]).encode())


def bucket_lengths(lengths: np.ndarray, most: int = 3) -> tuple[int, ...]:
    """Choose at most `most` padded lengths (multiples of 8) that waste few padding tokens.

    Parameters
    ----------
    lengths : int array (n,)
        Tokens of each sample; the longest always fits.

    Returns
    -------
    tuple of int
        Ascending. A model compiles once per length.
    """
    rounded = -(-np.asarray(lengths) // 8) * 8
    values, counts = np.unique(rounded, return_counts=True)
    # Dynamic programming: cost[j] is the least padding of the values up to j if the longest bucket is values[j].
    samples_up_to = np.concatenate([[0], np.cumsum(counts)])
    cost = values * samples_up_to[1:]
    choice = [[int(v)] for v in values]
    for _ in range(most - 1):
        better, picked = cost.copy(), list(choice)
        for j in range(len(values)):
            for i in range(j):
                padded = cost[i] + values[j] * (samples_up_to[j + 1] - samples_up_to[i + 1])
                if padded < better[j]:
                    better[j], picked[j] = padded, [*choice[i], int(values[j])]
        cost, choice = better, picked
    return tuple(choice[-1])


Batch = dict[str, np.ndarray]


def batches(
    encoded: Encoded,
    *,
    batch_size: int,
    buckets: Sequence[int],
    pad_id: int,
    rng: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """Cut samples into batches of fixed shapes, each (batch_size, one of `buckets`).

    A batch holds rows of one bucket only. The last batch of a bucket is filled up with rows whose labels are all
    ignored, so that no shape depends on the number of samples.

    Parameters
    ----------
    encoded : Encoded
    batch_size : int
    buckets : sequence of int
        Padded lengths, ascending.
    pad_id : int
        Token for padding; it never counts.
    rng : numpy Generator, optional
        Shuffles samples within buckets and the order of the batches; without it the order is fixed.

    Yields
    ------
    dict
        `input_ids`, `attention_mask`, `labels`: int32 (batch_size, length); `labels` is `IGNORED` where nothing counts.
        If the samples are separate, `input_ids` holds the prompt and `labels` the target, each from position 0.

    Raises
    ------
    InputError
        If a sample is longer than the longest of `buckets`.
    """
    rows, prompt_lengths = encoded.rows
    bucket = np.searchsorted(np.asarray(buckets), encoded.lengths)
    if (bucket == len(buckets)).any():
        raise InputError(
            f"a sample needs {encoded.lengths.max()} tokens, but the longest of the padded lengths is {max(buckets)}; "
            "make them with bucket_lengths of all samples."
        )
    groups: list[tuple[int, np.ndarray]] = []
    for number, length in enumerate(buckets):
        members = np.flatnonzero(bucket == number)
        if rng is not None:
            members = rng.permutation(members)
        groups += [(length, members[i : i + batch_size]) for i in range(0, len(members), batch_size)]
    order = range(len(groups)) if rng is None else rng.permutation(len(groups))
    for g in order:
        length, members = groups[g]
        input_ids = np.full((batch_size, length), pad_id, np.int32)
        labels = np.full((batch_size, length), IGNORED, np.int32)
        mask = np.zeros((batch_size, length), np.int32)
        for row, sample in enumerate(members):
            ids, prompt_length = rows[sample], prompt_lengths[sample]
            inputs = ids[:prompt_length] if encoded.separate else ids
            input_ids[row, : len(inputs)] = inputs
            mask[row, : len(inputs)] = 1
            first = 0 if encoded.separate else prompt_length
            labels[row, first : first + len(ids) - prompt_length] = ids[prompt_length:]
        yield {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
