"""A task's samples as token ids of one tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lensjax import models
from lensjax.errors import InputError
from lensjax.jobs.candidates import Candidate
from lensjax.tasks import Encoded, Example, Task, bucket_lengths, cached, encode
from lensjax.tasks.cache import key_of as encoding_key
from lensjax.tasks.dataset_info import DatasetSummary


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A task's samples as one tokenizer's tokens; candidates with the same tokenizer share them.

    Attributes
    ----------
    train, validation, test : Encoded
    visible : int
        Training samples of the largest subset; those after them are for verification only.
    pad_id : int
        Token for padding.
    """

    train: Encoded
    validation: Encoded
    test: Encoded
    visible: int
    pad_id: int

    @property
    def parts(self) -> tuple[Encoded, ...]:
        """Training, validation and test samples."""
        return (self.train, self.validation, self.test)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Padded lengths that hold every sample.

        Samples for verification only do not change how the others are batched: if one of them is longer than all
        others, one more length is added.
        """
        visible = [part.lengths for part in (self.train.first(self.visible), self.validation, self.test)]
        buckets = bucket_lengths(np.concatenate(visible))
        longest = int(self.train.lengths.max())
        return buckets if longest <= buckets[-1] else (*buckets, -(-longest // 8) * 8)

    @property
    def mean(self) -> float:
        """Tokens of a training sample on average."""
        return float(self.train.token_counts.mean())

    def most_per_sample(self, sizes: tuple[int, ...]) -> float:
        """Return tokens per sample of the subset, of these sizes, where that is highest."""
        sums = self.train.token_counts.cumsum()
        return max(float(sums[size - 1]) / size for size in sizes)

    def check_vocabulary(self, option: str, candidate: Candidate) -> None:
        """Refuse a tokenizer with tokens outside the model's vocabulary; `option` is the one that named the model.

        Raises
        ------
        InputError
        """
        largest = max(int(ids.max()) for part in self.parts for ids in part.ids)
        if largest >= candidate.config.vocab_size:
            raise InputError(
                f"{option} {candidate.name}: its tokenizer gives token {largest}, but the model knows "
                f"{candidate.config.vocab_size} tokens. Use the tokenizer the model was trained with."
            )


def tokens_of(task: Task, candidate: Candidate, visible: int, largest: int, max_length: int) -> Tokens:
    """Encode validation, test and the first `largest` training samples for a candidate, or read them from the cache."""
    tokenizer = _tokenizer(candidate)
    separate = getattr(candidate.config, "is_encoder_decoder", False)

    def encoded(part: Sequence[Example]) -> Encoded:
        settings = {"separate": separate, "pack": task.text_only}
        key = encoding_key(part, candidate.tokenizer, max_length, settings)
        return cached(key, lambda: encode(part, tokenizer, max_length, **settings))

    train, validation, test = map(encoded, (task.subset(largest), task.validation, task.test))
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return Tokens(train, validation, test, visible, pad)


def placeholder_tokens(
    summary: DatasetSummary, candidate: Candidate, visible: int, largest: int, max_length: int
) -> Tokens:
    """Return placeholders for the tokens of a task that was not downloaded, as many as there are at most or assumed."""
    task = summary.task
    tokenizer = _tokenizer(candidate)
    separate = getattr(candidate.config, "is_encoder_decoder", False)
    encode(task.train[:1], tokenizer, max_length, separate=separate, pack=task.text_only)  # raises what encoding would
    length = summary.tokens or max_length * (1 + separate)

    def encoded(count: int) -> Encoded:
        prompts = np.full(count, max_length if separate else 0)
        packed = max_length if task.text_only else None
        return Encoded((np.zeros(length, np.int32),) * count, prompts, 0, separate, 0, packed)

    train, validation, test = map(encoded, (largest, len(task.validation), len(task.test)))
    return Tokens(train, validation, test, visible, 0)


def _tokenizer(candidate: Candidate) -> Any:
    """Load a candidate's tokenizer; its name, which messages show, is the candidate's."""
    tokenizer = models.load_tokenizer(candidate.path)
    tokenizer.name_or_path = candidate.name
    return tokenizer
