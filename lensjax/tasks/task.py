"""A task: samples of input and target text, or of text alone, split once into training, validation and test."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lensjax._messages import did_you_mean
from lensjax.errors import InputError
from lensjax.tasks.presets import PRESETS
from lensjax.tasks.sources import SUFFIXES, Row, dataset_rows, file_rows, missing

PROMPT = "{input}: "
"""The text before the target; a space at the end of a template goes with the target's first word."""

CHAT = "chat"
"""The template that stands for the tokenizer's own chat template."""

ENCODING = 2
"""Changes with what `encode` makes of a sample; fingerprints of tasks and names of cached tokens change with it."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample: the model reads `input` and is scored on `target`, both as they were written.

    A template is all that stands between them: nothing is added, and nothing is stripped. Its spaces at the end are the
    separator, which is scored together with the target, for most tokenizers make one token of a space and the word
    after it. With `PROMPT` a model reads ``question:`` and is scored on `` answer``; with ``{input}``, the target
    follows at once, as source code and its indentation do.

    For language modelling the input and the template are empty, and the whole text is the target.
    """

    input: str
    target: str
    template: str = PROMPT

    @property
    def prompt(self) -> str:
        """The text before the separator, unless the template is `CHAT`; what an encoder reads."""
        return self.template.rstrip(" ").replace("{input}", self.input)

    @property
    def separator(self) -> str:
        """The spaces at the end of the template; a decoder that reads no prompt is not given them."""
        return self.template[len(self.template.rstrip(" ")) :]

    @property
    def completion(self) -> str:
        """The text that counts in the loss, the separator and the target."""
        return self.separator + self.target


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
    name, preset = str(source), None
    path = Path(source)
    if name.startswith(("https://", "http://")):
        raise InputError(f"{name}: is an address; download it and name the file, or name a data set as owner/name.")
    is_file = path.is_file() or name.lower().endswith(SUFFIXES)
    if not is_file and name in PRESETS:
        preset = PRESETS[name]
        if text_field is None and input_field is None and target_field is None:
            input_field, target_field, text_field = preset.input_field, preset.target_field, preset.text_field
        config, revision = config or preset.config, revision or preset.revision
    elif not is_file and not path.is_dir() and name.count("/") != 1:
        raise missing(path)
    if is_file and text_field is None and ".txt" in path.name.lower():
        given = {"--input-field": input_field, "--target-field": target_field, "--template": template}
        wrong = [flag for flag, value in given.items() if value is not None]
        if wrong:
            raise InputError(
                f"{name}: a file of texts has no fields, so there is nothing for {' and '.join(wrong)}; leave "
                f"{'it' if len(wrong) == 1 else 'them'} out, or give a .jsonl or .csv file."
            )
        text_field = "text"
    read = _reader(input_field, target_field, text_field, template)
    splits = dict(preset.splits if preset else {"train": "train"})
    asked = {"train": split, "validation": validation_split, "test": test_split}
    splits |= {part: given for part, given in asked.items() if given is not None}
    if is_file:
        if any(value is not None for value in (config, *asked.values(), revision)):
            raise InputError(
                f"{name} is a local file: configuration, splits and revision are those of a data set; leave them out."
            )
        if limit is not None:
            raise InputError(
                f"{name} is a local file and is read whole: --limit {limit} is for data sets; leave it out."
            )
        rows: dict[str, Iterable[Row]] = {"train": file_rows(path)}
    else:
        dataset = preset.dataset if preset else name
        rows = {
            part: dataset_rows(dataset, config, found, revision, limit=limit if part == "train" else None, seed=seed)
            for part, found in splits.items()
        }
    parts = {part: [read(where, row) for where, row in of] for part, of in rows.items()}
    full = {part: [example for example in examples if example is not None] for part, examples in parts.items()}
    empty = sum(map(len, parts.values())) - sum(map(len, full.values()))
    notes = [f"{empty} empty texts were left out"] if empty else []
    known = path.name.split(".")[0] if is_file else name
    return _split(known, full, notes, validation=validation, test=test, seed=seed, text_only=text_field is not None)


def _reader(
    input_field: str | None, target_field: str | None, text_field: str | None, template: str | None
) -> Callable[[str, Mapping[str, Any]], Example | None]:
    """Return what makes an example of a row, or None of an empty text."""
    if text_field is not None:
        if input_field is not None or target_field is not None or template is not None:
            raise InputError(
                f"--text-field {text_field} is language modelling, where there is no input, target or template; leave "
                "--input-field, --target-field and --template out, or --text-field."
            )
        # Data sets of texts mark the ends of paragraphs by empty rows.
        return lambda where, row: None if row.get(text_field) == "" else Example("", _text(where, row, text_field), "")
    shape = PROMPT if template is None else template
    if shape != CHAT and "{input}" not in shape:
        raise InputError(f"--template {template!r} has no {{input}} where the input goes; add it, or give {CHAT!r}.")
    first, second = input_field or "input", target_field or "target"
    return lambda where, row: Example(_text(where, row, first), _text(where, row, second), shape)


def _text(where: str, row: Mapping[str, Any], field: str) -> str:
    value: Any = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            found = ", ".join(repr(k) for k in row)
            raise InputError(
                f"{where}: no field {field!r} (found: {found}). Name the fields with --input-field and "
                f"--target-field, or --text-field.{did_you_mean(field, _fields(row))}"
            )
        value = value[name]
    if isinstance(value, str) and value.strip():
        return value
    shown = "empty" if isinstance(value, str) else f"{'null' if value is None else shortened(value)}, not text"
    remedy = "Fill it or remove the sample"
    if isinstance(value, Mapping) and value:
        remedy = f"It holds fields of its own; name one of {', '.join(_fields(value, f'{field}.'))}"
    elif isinstance(value, (list, tuple)):
        remedy = "Make it one text, or name another field"
    elif value is not None and not isinstance(value, str):
        remedy = f'Write it as text, "{value}", or name another field'
    raise InputError(f"{where}: field {field!r} is {shown}. {remedy}.")


def shortened(value: object, most: int = 60) -> str:
    """Return a value as Python writes it, no longer than `most` characters and "..."."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _fields(row: Mapping[str, Any], before: str = "") -> list[str]:
    """Return the names of a sample's fields, nested ones with a dot between."""
    found = []
    for name, value in row.items():
        found += _fields(value, f"{before}{name}.") if isinstance(value, Mapping) else [f"{before}{name}"]
    return found


def _split(
    name: str,
    parts: Mapping[str, list[Example]],
    notes: list[str],
    *,
    validation: int,
    test: int,
    seed: int,
    text_only: bool,
) -> Task:
    if not parts["train"]:
        raise InputError(f"{name}: holds no sample. Name a file with at least {validation + test + 1} of them.")
    kept = {part: list(dict.fromkeys(examples)) for part, examples in parts.items()}
    repeated = sum(map(len, parts.values())) - sum(map(len, kept.values()))
    if repeated:
        notes.append(f"{repeated} repeated samples were kept once")
    # Test samples stay, for they are what is compared; the others go.
    held: set[Example] = set()
    for part in ("test", "validation", "train"):
        if part in kept:
            left = [example for example in kept[part] if example not in held]
            if len(left) < len(kept[part]):
                notes.append(f"{len(kept[part]) - len(left)} samples of {part} are in another split too: left out")
            kept[part] = left
            held.update(left)
    rng = np.random.default_rng(seed)
    shuffled = {part: tuple(kept[part][i] for i in rng.permutation(len(kept[part]))) for part in kept}
    train, cut = shuffled["train"], 0
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
            taken[part], cut = train[cut : cut + wanted], cut + wanted
    if len(train) <= cut:
        raise InputError(
            f"{name}: {len(train)} distinct samples, but {validation} are set aside for validation and {test} for "
            f"the test loss. {f'{repeated} more are repeated. ' if repeated else ''}Add samples or lower --validation "
            "and --test."
        )
    digest = hashlib.sha256(json.dumps([ENCODING, seed, validation, test]).encode())
    for example in (*taken["test"], *taken["validation"], *train[cut:]):
        # The prompt of `CHAT` is made by each tokenizer: what it is made of counts.
        prompt = [CHAT, example.input] if example.template == CHAT else example.prompt
        digest.update(json.dumps([prompt, example.separator, example.target]).encode())
    return Task(
        name=name.split("/")[-1],
        train=train[cut:],
        validation=taken["validation"],
        test=taken["test"],
        seed=seed,
        fingerprint=digest.hexdigest()[:16],
        notes=tuple(notes),
        text_only=text_only,
    )
