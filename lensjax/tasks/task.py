"""A task: samples of input and target text, or of text alone, split once into training, validation and test."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping

import numpy as np

from lensjax.errors import InputError
from lensjax.tasks.example import CHAT, ENCODING_VERSION, Example
from lensjax.tasks.sources import Row, dataset_rows, file_rows
from lensjax.tasks.specification import ResolvedSource, TaskSource


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A split data set.

    Attributes
    ----------
    name : str
    train : tuple of Example
        In an order drawn once from `seed`: the subset of size n is the first n, so that subsets are nested.
    validation, test : tuple of Example
        Samples for early stopping, and for the losses that are compared; none of them is in `train`.
    seed : int
    fingerprint : str
        Changes whenever a sample, the split or the order changes.
    notes : tuple of str
        For the report: which samples were left out, and why.
    text_only : bool
        Language modelling: there are no inputs, and texts may be packed into rows of full length.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    seed: int
    fingerprint: str
    notes: tuple[str, ...] = ()
    text_only: bool = False

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
    source: str | os.PathLike[str],
    *,
    input_field: str | None = None,
    target_field: str | None = None,
    text_field: str | None = None,
    template: str | None = None,
    config: str | None = None,
    split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    validation: int = 300,
    test: int = 500,
    seed: int = 0,
) -> Task:
    """Read, check and split a data set of input -> target samples, or of texts.

    Texts stay as they were written, white space included. Samples that are equal are kept once; those that the
    validation or test split of a data set holds too are taken out of training. Both are noted.

    Parameters
    ----------
    source : str or path
        A ``.jsonl`` (one object a line), ``.csv`` (with a header), ``.parquet`` or ``.txt`` (one text a line) file, all
        but Parquet optionally gzip-compressed; the id of a data set on the Hugging Face hub, or a directory that
        `datasets` reads; or the name of one of `PRESETS`, which fills in what is not given.
    input_field, target_field : str, optional
        Names of the fields, by default ``input`` and ``target``; a dot between the names of nested ones.
    text_field : str, optional
        Instead of these, for language modelling: the whole text counts in the loss. The default for text files.
    template : str, optional
        Prompt with ``{input}`` where the input goes, by default `PROMPT`; or `CHAT` for the tokenizer's chat template.
        The target follows at once: a separator is written at the template's end, see `Example`.
    config, split, validation_split, test_split, revision : str, optional
        Of a data set. Where it has no split of its own for validation or test, samples of the training split are set
        aside.
    limit : int, optional
        Training rows of a data set that are read, drawn by `seed`.
    validation, test : int
        Samples set aside, or taken from the splits of their own.
    seed : int
        Seed of the split and of the order in which subsets grow.

    Raises
    ------
    InputError
        A source that cannot be read, a missing field, an empty text, a template without ``{input}``, fields that
        contradict each other, or too few samples to set `validation` and `test` aside.
    """
    return read_task(
        TaskSource(
            source,
            input_field=input_field,
            target_field=target_field,
            text_field=text_field,
            template=template,
            config=config,
            split=split,
            validation_split=validation_split,
            test_split=test_split,
            revision=revision,
            limit=limit,
            validation=validation,
            test=test,
            seed=seed,
        )
    )


def read_task(source: TaskSource) -> Task:
    """Read, check and split what a `TaskSource` names; see `load_task`.

    Raises
    ------
    InputError
    """
    resolved = source.resolve()
    rows: dict[str, Iterable[Row]]
    if resolved.file is not None:
        rows = {"train": file_rows(resolved.file)}
    else:
        rows = {
            part: dataset_rows(
                resolved.dataset,
                resolved.config,
                split,
                resolved.revision,
                limit=source.limit if part == "train" else None,
                seed=source.seed,
            )
            for part, split in resolved.splits.items()
        }
    examples = {part: [resolved.read(where, row) for where, row in part_rows] for part, part_rows in rows.items()}
    samples = {part: [example for example in found if example is not None] for part, found in examples.items()}
    empty = sum(map(len, examples.values())) - sum(map(len, samples.values()))
    notes = [f"{empty} empty texts were left out"] if empty else []
    return _split(source, resolved, samples, notes)


def _split(source: TaskSource, resolved: ResolvedSource, parts: Mapping[str, list[Example]], notes: list[str]) -> Task:
    """Draw the training, validation and test samples, no sample twice; adds to `notes` which ones were left out."""
    name, validation, test, seed = resolved.label, source.validation, source.test, source.seed
    if not parts["train"]:
        raise InputError(f"{name}: holds no sample. Name a file with at least {validation + test + 1} of them.")
    kept = {part: list(dict.fromkeys(examples)) for part, examples in parts.items()}
    repeated = sum(map(len, parts.values())) - sum(map(len, kept.values()))
    if repeated:
        notes.append(f"{repeated} repeated samples were kept once")
    # A sample in several splits stays in the test split, so that test losses do not change.
    seen: set[Example] = set()
    for part in ("test", "validation", "train"):
        if part in kept:
            new = [example for example in kept[part] if example not in seen]
            if len(new) < len(kept[part]):
                notes.append(f"{len(kept[part]) - len(new)} samples of {part} are in another split too: left out")
            kept[part] = new
            seen.update(new)
    rng = np.random.default_rng(seed)
    shuffled = {part: tuple(kept[part][i] for i in rng.permutation(len(kept[part]))) for part in kept}
    train, set_aside = shuffled["train"], 0
    taken = {}
    for part, wanted in (("test", test), ("validation", validation)):
        if part in shuffled:
            if len(shuffled[part]) < wanted:
                raise InputError(
                    f"{name}: its {part} split has {len(shuffled[part])} distinct samples, but {wanted} are asked for. "
                    f"Lower --{part}."
                )
            taken[part] = shuffled[part][:wanted]
        else:
            taken[part] = train[set_aside : set_aside + wanted]
            set_aside += wanted
    if len(train) <= set_aside:
        raise InputError(
            f"{name}: {len(train)} distinct samples, but {validation} are set aside for validation and {test} for "
            f"the test loss. {f'{repeated} more are repeated. ' if repeated else ''}Add samples or lower --validation "
            "and --test."
        )
    digest = hashlib.sha256(json.dumps([ENCODING_VERSION, seed, validation, test]).encode())
    for example in (*taken["test"], *taken["validation"], *train[set_aside:]):
        # Under `CHAT` each tokenizer writes the prompt itself, so only the input is the same for all.
        prompt = [CHAT, example.input] if example.template == CHAT else example.prompt
        digest.update(json.dumps([prompt, example.separator, example.target]).encode())
    return Task(
        name=resolved.task_name,
        train=train[set_aside:],
        validation=taken["validation"],
        test=taken["test"],
        seed=seed,
        fingerprint=digest.hexdigest()[:16],
        notes=tuple(notes),
        text_only=resolved.text_only,
    )
