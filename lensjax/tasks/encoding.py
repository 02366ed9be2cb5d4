"""Token batches of few shapes from samples: encoding, packing, bucketing."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lensjax.errors import InputError
from lensjax.tasks.chat import dialogues, of, shared_length
from lensjax.tasks.task import CHAT, Example

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
        Instead of padding, the samples are joined, and cut into rows of so many tokens.
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
        """What a batch's rows are made of, ids and prompt lengths: the samples, or what they are packed into."""
        if self.packed is None or not self.ids:
            return self.ids, self.prompt_lengths
        joined = np.concatenate(self.ids)
        cut = tuple(joined[i : i + self.packed] for i in range(0, len(joined), self.packed))
        return cut, np.zeros(len(cut), int)

    @property
    def lengths(self) -> np.ndarray:
        """Length each row needs in a batch, int (rows,): of the longer side if the two are separate."""
        ids, prompts = self.rows
        counts = np.array([len(i) for i in ids], int)
        return np.maximum(prompts, counts - prompts) if self.separate else counts

    @functools.cached_property
    def counted(self) -> int:
        """Tokens that have a loss: in one sequence, the first token of all is predicted by nothing."""
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
    """What becomes tokens at once: `whole`, scored from the character `scored` on, with the target at `target`."""

    whole: str
    scored: int
    target: int


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Tokens of a text.

    `scored` of them, from the first, hold nothing that is scored; each of `offsets` is where in the text one begins and
    ends, none for tokenizers that do not know; those from `added` on are no text, but what the tokenizer writes after.
    """

    ids: list[int]
    scored: int
    offsets: list[tuple[int, int]]
    added: int


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

    - The end-of-text token follows each target and each text where the tokenizer does not write it itself, for else no
      model learns to stop, and packed texts run into each other. It stands once between texts, also where it begins
      them as well.
    - A token that holds the last character of the prompt and the first of the target is scored. The boundary is found
      by the offsets of the characters; a tokenizer without offsets is asked for the prompt alone, and what its tokens
      begin with in common is the prompt.
    - Prompts are never cut: that is an error. A target is cut at `max_length` without an end-of-text token, also that
      of an encoder-decoder, so that no model learns to stop in the middle.
    - The last packed row is shorter than the others; it is kept.
    """
    if not examples:
        return Encoded((), np.zeros(0, int), 0, separate, 0, max_length if pack else None)
    if separate and not all(e.template for e in examples):
        raise InputError(
            "an encoder-decoder model has no input to read in language modelling; give --input-field and "
            f"--target-field, or leave this candidate out{of(tokenizer)}."
        )
    chat = any(e.template == CHAT for e in examples)
    talks = dialogues(examples, tokenizer) if chat else []
    read: list[list[int]] = [[] for _ in examples]
    if separate:
        prompts = [asked for asked, _, _ in talks] if chat else [e.prompt for e in examples]
        read = tokenizer(prompts, add_special_tokens=not chat)["input_ids"]
        texts = [_Text(e.target, 0, 0) for e in examples]
    elif chat:
        pairs = zip(examples, talks, strict=True)
        texts = [_Text(whole, at, whole.index(e.target.strip(), at)) for e, (_, whole, at) in pairs]
    else:
        lengths = [len(e.prompt) for e in examples]
        texts = [
            _Text(e.prompt + e.completion, n, n + len(e.separator)) for e, n in zip(examples, lengths, strict=True)
        ]
    found = _tokens(texts, tokenizer, special=separate or not chat, labels=separate)
    end = tokenizer.eos_token_id
    ids: list[np.ndarray] = []
    firsts: list[int] = []
    truncated = kept_bytes = 0
    for example, prompt, text, tokens in zip(examples, read, texts, found, strict=True):
        written = end is None or (chat and not separate) or end in (*tokens.ids[tokens.added :], *tokens.ids[-1:])
        first = len(prompt) if separate else tokens.scored
        whole = [*prompt, *tokens.ids, *([] if written else [end])]
        if pack and ids and whole[0] == end:
            whole, first = whole[1:], max(first - 1, 0)
        most = len(prompt) + max_length if separate else max_length
        if pack:
            most = len(whole)
        elif first >= max_length + separate:
            raise InputError(
                f"a sample's input alone has {first} tokens, but at most {max_length} tokens fit: "
                f"{example.input[:60]!r}... Raise --max-length (up to the model's limit) or shorten the input."
            )
        target_bytes = len(example.target.encode())
        if len(whole) > most:
            truncated += 1
            target_bytes = min(
                target_bytes, _bytes_kept(text, tokenizer, whole[first:most], tokens.offsets[: most - len(prompt)])
            )
        kept_bytes += target_bytes
        ids.append(np.array(whole[:most], np.int32))
        firsts.append(first)
    return Encoded(tuple(ids), np.array(firsts, int), truncated, separate, kept_bytes, max_length if pack else None)


def _tokens(texts: Sequence[_Text], tokenizer: Any, *, special: bool, labels: bool) -> list[_Tokens]:
    """Tokenise whole texts; with `labels`, as what a decoder is to write."""
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
    found = []
    for number, (text, own, offsets) in enumerate(
        zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        # Special tokens that the tokenizer adds belong to no text; they are before and after it.
        inside = encoded.sequence_ids(number)
        start = next((place for place, part in enumerate(inside) if part is not None), len(own))
        after = len(own) - next((place for place, part in enumerate(reversed(inside)) if part is not None), 0)
        scored = bisect.bisect_right(offsets, text.scored, start, after, key=lambda span: span[1])
        found.append(_Tokens(list(own), scored, offsets, after))
    return found


def _bytes_kept(text: _Text, tokenizer: Any, scored: list[int], offsets: list[tuple[int, int]]) -> int:
    """Return the UTF-8 bytes of a target up to where its tokens were cut."""
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
    # Least padding by dynamic programming: cost[j] = padding if the values up to j are covered and j is a bucket.
    below = np.concatenate([[0], np.cumsum(counts)])
    cost = values * below[1:]
    choice = [[int(v)] for v in values]
    for _ in range(most - 1):
        better = cost.copy()
        picked = list(choice)
        for j in range(len(values)):
            for i in range(j):
                padded = cost[i] + values[j] * (below[j + 1] - below[i + 1])
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

    A batch holds rows of one bucket only. The last one of a bucket is filled up with rows whose labels are all
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
    place = np.searchsorted(np.asarray(buckets), encoded.lengths)
    if (place == len(buckets)).any():
        raise InputError(
            f"a sample needs {encoded.lengths.max()} tokens, but the longest of the padded lengths is {max(buckets)}; "
            "make them with bucket_lengths of all samples."
        )
    groups: list[tuple[int, np.ndarray]] = []
    for number, length in enumerate(buckets):
        members = np.flatnonzero(place == number)
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
            ids, split = rows[sample], prompt_lengths[sample]
            read = ids[:split] if encoded.separate else ids
            input_ids[row, : len(read)] = read
            mask[row, : len(read)] = 1
            first = 0 if encoded.separate else split
            labels[row, first : first + len(ids) - split] = ids[split:]
        yield {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
