"""A task: pairs of input and target text, split once, and token batches of few shapes for a given tokenizer."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lensjax.errors import InputError

IGNORED = -100  # label of a position that does not count in the loss, as in transformers
PROMPT = "{input}:"  # the text before the target; the target follows after one space
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample: the model reads `input` and is scored on `target`."""

    input: str
    target: str

    @property
    def prompt(self) -> str:
        """The text before the target."""
        return PROMPT.format(input=self.input)

    @property
    def completion(self) -> str:
        """The text that counts in the loss."""
        return f" {self.target}"


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A split data set.

    Attributes
    ----------
    name : str
    train : tuple of Example
        In an order drawn once by `seed`: the subset of size n is the first n, so that subsets are nested.
    validation, test : tuple of Example
        For early stopping and for the losses that are compared; never in `train`.
    seed : int
    fingerprint : str
        Changes whenever a sample, the split or the order changes.
    notes : tuple of str
        What was done to the data, for the report.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    seed: int
    fingerprint: str
    notes: tuple[str, ...] = ()

    def subset(self, size: int) -> tuple[Example, ...]:
        """Return the training subset of `size` samples.

        Raises
        ------
        ValueError
            If there are fewer training samples than that.
        """
        if not 0 <= size <= len(self.train):
            raise ValueError(f"no subset of {size} of {len(self.train)} training samples")
        return self.train[:size]


def load_task(
    path: Path,
    *,
    input_field: str,
    target_field: str,
    validation: int = 300,
    test: int = 500,
    seed: int = 0,
) -> Task:
    """Read, check and split a data set of input -> target samples.

    Samples with equal input and target are kept once, so that no test sample is also trained on.

    Parameters
    ----------
    path : Path
        A ``.jsonl`` (one object a line) or ``.csv`` file with a header, optionally gzip-compressed.
    input_field, target_field : str
        Names of the fields.
    validation, test : int
        Samples set aside.
    seed : int
        Seed of the split and of the order in which subsets grow.

    Raises
    ------
    InputError
        No such file, a file of another kind, a line that does not parse, a missing field, an empty text, or too few
        samples to set `validation` and `test` aside.
    """
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"{path}: holds no sample.")
    examples = [
        Example(_text(path, line, row, input_field), _text(path, line, row, target_field)) for line, row in rows
    ]
    distinct = list(dict.fromkeys(examples))
    notes = []
    if len(distinct) < len(examples):
        notes.append(f"{len(examples) - len(distinct)} repeated samples were kept once")
    if len(distinct) <= validation + test:
        raise InputError(
            f"{path}: {len(distinct)} distinct samples, but {validation} are set aside for validation and {test} for "
            "the test loss. Add samples or lower --validation and --test."
        )
    order = np.random.default_rng(seed).permutation(len(distinct))
    shuffled = tuple(distinct[i] for i in order)
    digest = hashlib.sha256(json.dumps([seed, validation, test]).encode())
    for example in shuffled:
        digest.update(json.dumps([example.prompt, example.completion]).encode())
    return Task(
        name=path.name.split(".")[0],
        train=shuffled[test + validation :],
        validation=shuffled[test : test + validation],
        test=shuffled[:test],
        seed=seed,
        fingerprint=digest.hexdigest()[:16],
        notes=tuple(notes),
    )


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file. --task takes {', '.join(SUFFIXES)}.")
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown kind of file. --task takes {', '.join(SUFFIXES)}.")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable ({error}); save it as UTF-8 text.") from error
    if ".csv" in name:
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({str(error).partition(': line')[0]}).") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a {type(row).__name__}, not an object with named fields.")
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        repeated = next((name for name in header if header.count(name) > 1), None)
        if repeated is not None:
            raise InputError(f"{path}: the header names {repeated!r} twice; rename one column.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)} columns. "
                    "Put quotes around texts with commas."
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error}).") from None


def _text(path: Path, line: int, row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        found = ", ".join(repr(k) for k in row)
        raise InputError(
            f"{path}, line {line}: no field {field!r} (found: {found}). Name the fields with --input-field and "
            "--target-field."
        )
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        shown = "empty" if isinstance(value, str) else f"{value!r}, not text"
        raise InputError(f"{path}, line {line}: field {field!r} is {shown}. Fill it or remove the sample.")
    return value.strip()


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
    """

    ids: tuple[np.ndarray, ...]
    prompt_lengths: np.ndarray
    truncated: int
    separate: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def token_counts(self) -> np.ndarray:
        """Tokens of each sample, prompt and target, int (n,)."""
        return np.array([len(i) for i in self.ids], int)

    @property
    def lengths(self) -> np.ndarray:
        """Length each sample needs in a batch, int (n,): of the longer side if the two are separate."""
        counts = self.token_counts
        return np.maximum(self.prompt_lengths, counts - self.prompt_lengths) if self.separate else counts

    def first(self, n: int) -> Encoded:
        """Return the first n samples."""
        return Encoded(self.ids[:n], self.prompt_lengths[:n], self.truncated, self.separate)


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int, *, separate: bool = False) -> Encoded:
    """Tokenise samples as prompt + target + end of text.

    Parameters
    ----------
    examples : sequence of Example
    tokenizer : transformers tokenizer
    max_length : int
        Tokens kept of each sample; if `separate`, of each side.
    separate : bool
        For encoder-decoder models: the prompt gets the tokenizer's own special tokens and stays apart from the target.

    Raises
    ------
    InputError
        If the prompt alone fills `max_length`, so that no target token would be left.
    """
    if not examples:
        return Encoded((), np.zeros(0, int), 0, separate)
    prompts = tokenizer([e.prompt for e in examples], add_special_tokens=separate)["input_ids"]
    targets = tokenizer([e.completion for e in examples], add_special_tokens=False)["input_ids"]
    start = [] if separate or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, truncated = [], 0
    for example, prompt, target in zip(examples, prompts, targets, strict=True):
        whole = start + prompt + target + end
        most = len(prompt) + max_length if separate else max_length
        if len(start) + len(prompt) >= max_length + separate:
            raise InputError(
                f"a sample's input alone has {len(prompt)} tokens, but at most {max_length} tokens fit: "
                f"{example.input[:60]!r}... Raise --max-length (up to the model's limit) or shorten the input."
            )
        truncated += len(whole) > most
        ids.append(np.array(whole[:most], np.int32))
    return Encoded(tuple(ids), np.array([len(start) + len(p) for p in prompts], int), truncated, separate)


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

    A batch holds samples of one bucket only. The last one of a bucket is filled up with rows whose labels are all
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
    """
    place = np.searchsorted(np.asarray(buckets), encoded.lengths)
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
            ids, split = encoded.ids[sample], encoded.prompt_lengths[sample]
            read = ids[:split] if encoded.separate else ids
            input_ids[row, : len(read)] = read
            mask[row, : len(read)] = 1
            first = 0 if encoded.separate else split
            labels[row, first : first + len(ids) - split] = ids[split:]
        yield {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
