"""A task as the token ids of one tokenizer."""

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
    """The task as one tokenizer sees it; candidates with the same tokenizer share it.

    Attributes
    ----------
    train, validation, test : Encoded
    visible : int
        Training samples of the largest subset; the others are there for verification only.
    pad_id : int
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

        Samples for verification only never change how the others are batched: a longer one gets a length of its own.
        """
        seen = np.concatenate([part.lengths for part in (self.train.first(self.visible), self.validation, self.test)])
        found = bucket_lengths(seen)
        longest = int(self.train.lengths.max())
        return found if longest <= found[-1] else (*found, -(-longest // 8) * 8)

    @property
    def mean(self) -> float:
        """Tokens of a training sample on average."""
        return float(self.train.token_counts.mean())

    def most_per_sample(self, sizes: tuple[int, ...]) -> float:
        """Return the most tokens for each sample that any of these subsets has."""
        sums = self.train.token_counts.cumsum()
        return max(float(sums[size - 1]) / size for size in sizes)

    def check_vocabulary(self, option: str, candidate: Candidate) -> None:
        """Refuse a tokenizer that gives tokens which the model does not know; `option` named the model.

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
    """Encode the first `largest` training samples for a candidate, and those set aside; from the cache if it can be."""
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
    """Return tokens of the sizes that those of a task which is not here have at most, or are taken to have."""
    task = summary.task
    tokenizer = _tokenizer(candidate)
    separate = getattr(candidate.config, "is_encoder_decoder", False)
    encode(task.train[:1], tokenizer, max_length, separate=separate, pack=task.text_only)  # refuses what cannot be read
    length = summary.tokens or max_length * (1 + separate)

    def encoded(count: int) -> Encoded:
        prompts = np.full(count, max_length if separate else 0)
        packed = max_length if task.text_only else None
        return Encoded((np.zeros(length, np.int32),) * count, prompts, 0, separate, 0, packed)

    train, validation, test = map(encoded, (largest, len(task.validation), len(task.test)))
    return Tokens(train, validation, test, visible, 0)


def _tokenizer(candidate: Candidate) -> Any:
    """Load a candidate's tokenizer, which messages then call by the candidate's name."""
    found = models.load_tokenizer(candidate.path)
    found.name_or_path = candidate.name
    return found
