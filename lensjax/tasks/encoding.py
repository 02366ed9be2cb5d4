"""Token batches of few shapes from samples: encoding, packing, bucketing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lensjax.errors import InputError
from lensjax.tasks.task import CHAT, Example

IGNORED = -100
"""Label of a position that does not count in the loss, as in transformers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Samples as token ids.

    Attributes
    ----------
    ids : tuple of int32 arrays
        Prompt, target and end-of-text token of each sample.
    prompt_lengths : int array (n,)
        Leading tokens that do not count in the loss.
    truncated : int
        Samples whose target was cut at the maximum length.
    separate : bool
        Whether prompt and target go to an encoder and a decoder instead of forming one sequence.
    target_bytes : int
        UTF-8 bytes of the targets as far as they were kept, 0 if not known.
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


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, separate: bool = False, pack: bool = False
) -> Encoded:
    """Tokenise samples as prompt + target + end of text.

    Parameters
    ----------
    examples : sequence of Example
    tokenizer : transformers tokenizer
        Fast ones share a batch of texts among the cores.
    max_length : int
        Tokens kept of each sample; if `separate`, of each side; if `pack`, the length of the rows, and nothing is cut.
    separate : bool
        For encoder-decoder models: the prompt gets the tokenizer's own special tokens and stays apart from the target.
    pack : bool
        For texts without inputs: join them, each with its end of text, and cut rows of `max_length` tokens.

    Raises
    ------
    InputError
        If the prompt alone fills `max_length`, so that no target token would be left; if the tokenizer has no chat
        template where one is asked for; if texts without inputs are for an encoder-decoder.
    """
    if not examples:
        return Encoded((), np.zeros(0, int), 0, separate, 0, max_length if pack else None)
    if separate and not all(e.template for e in examples):
        raise InputError(
            "an encoder-decoder model has no input to read in language modelling; give --input-field and "
            f"--target-field, or leave this candidate out{_of(tokenizer)}."
        )
    chat = any(e.template == CHAT for e in examples)
    prompts = (
        _chat_prompts(examples, tokenizer)
        if chat
        else tokenizer([e.prompt for e in examples], add_special_tokens=separate)["input_ids"]
    )
    targets = tokenizer([e.completion for e in examples], add_special_tokens=False)["input_ids"]
    # A chat template writes its own start.
    start = [] if separate or chat or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, truncated, kept_bytes = [], 0, 0
    for example, prompt, target in zip(examples, prompts, targets, strict=True):
        whole = start + prompt + target + end
        first = len(start) + len(prompt)
        most = len(prompt) + max_length if separate else max_length
        if pack:
            most = len(whole)
        elif first >= max_length + separate:
            raise InputError(
                f"a sample's input alone has {len(prompt)} tokens, but at most {max_length} tokens fit: "
                f"{example.input[:60]!r}... Raise --max-length (up to the model's limit) or shorten the input."
            )
        if len(whole) > most:
            truncated += 1
            kept_bytes += len(tokenizer.decode(whole[first:most]).encode())
        else:
            kept_bytes += len(example.completion.encode())
        ids.append(np.array(whole[:most], np.int32))
    lengths = np.array([len(start) + len(p) for p in prompts], int)
    return Encoded(tuple(ids), lengths, truncated, separate, kept_bytes, max_length if pack else None)


def _of(tokenizer: Any) -> str:
    """Say which candidate's tokenizer it is, as far as it knows."""
    known = getattr(tokenizer, "name_or_path", "")
    return f" ({known})" if known else ""


def _chat_prompts(examples: Sequence[Example], tokenizer: Any) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"--template chat: a candidate's tokenizer has no chat template{_of(tokenizer)}; give a template with "
            "{input} instead."
        )
    talks = [[{"role": "user", "content": e.input}] for e in examples]
    found = tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [list(ids) for ids in found["input_ids"]]


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
