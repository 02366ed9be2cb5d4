"""What is known of a data set of the hub before its rows are fetched."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from lensjax.errors import InputError
from lensjax.tasks.presets import PRESETS
from lensjax.tasks.sources import SUFFIXES
from lensjax.tasks.task import PROMPT, Example, Task, _reader

TYPICAL_BYTES = 3  # of text for each token, where only the bytes of a data set are known; English has about 4


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """A task whose rows are not here.

    Attributes
    ----------
    task : Task
        With as many samples as there will be at most, all the same; without a fingerprint.
    download, disk : int or None
        Bytes that fetching the data set takes, and those it then fills in the cache of `datasets`.
    cache : Path
        That cache.
    tokens : int or None
        In a text on average, guessed from the bytes of the data set; None where samples have an input and a target.
    notes : tuple of str
        What was assumed.
    """

    task: Task
    download: int | None
    disk: int | None
    cache: Path
    tokens: int | None
    notes: tuple[str, ...]


def summarize_dataset(
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
) -> DatasetSummary | None:
    """Say how many samples a data set of the hub has, without fetching its rows.

    Parameters
    ----------
    source, input_field, ...
        As in `load_task`.

    Returns
    -------
    DatasetSummary or None
        None for files, directories and data sets that are in the cache of `datasets`: `load_task` fetches nothing.

    Raises
    ------
    InputError
        As `load_task`, as far as the data set's metadata shows it; if it does not say how many rows there are and
        `limit` does not either.
    """
    name, path = str(source), Path(source)
    preset = PRESETS.get(name)
    if (
        path.is_file()
        or name.lower().endswith(SUFFIXES)
        or (preset is None and (path.is_dir() or name.count("/") != 1))
    ):
        return None
    if preset is not None and text_field is None and input_field is None and target_field is None:
        input_field, target_field, text_field = preset.input_field, preset.target_field, preset.text_field
    config = config or (preset.config if preset else None)
    revision = revision or (preset.revision if preset else None)
    splits = dict(preset.splits if preset else {"train": "train"})
    asked = {"train": split, "validation": validation_split, "test": test_split}
    splits |= {part: given for part, given in asked.items() if given is not None}
    read = _reader(input_field, target_field, text_field, template)
    dataset = preset.dataset if preset else name

    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset, config, revision=revision)
    except Exception as error:
        raise _refusal(dataset, config, splits["train"], error) from error
    if Path(builder.cache_dir).is_dir():
        return None
    info = builder.info
    _check_fields(read, info.features, f"{dataset}, its fields")
    rows = {part: _rows(dataset, config, found, info) for part, found in splits.items()}
    available, notes = rows.pop("train"), []
    if limit is not None:
        if available is None:
            notes.append(f"the hub does not say how many rows {name} has: --limit {limit} is taken for their number")
        available = min(limit, limit if available is None else available)
    if available is None:
        raise InputError(
            f"--task {name}: the hub does not say how many rows its split {splits['train']!r} has. Give --limit, which "
            "is then taken for their number, or fetch the data set first."
        )
    for part, wanted in (("test", test), ("validation", validation)):
        known = rows.get(part)
        if part in rows:
            if known is not None and known < wanted:
                raise InputError(
                    f"{name}: its {part} split has {known} samples, but {wanted} are asked for. Lower --{part}."
                )
        else:
            available -= wanted
    if available < 1:
        raise InputError(
            f"{name}: too few samples to set {validation} aside for validation and {test} for the test loss. Lower "
            "--validation and --test."
        )
    text_only = text_field is not None
    tokens = None
    if text_only:
        described = (info.splits or {}).get(splits["train"].partition("[")[0].partition("+")[0])
        if described is not None and described.num_bytes and described.num_examples:
            tokens = max(1, round(described.num_bytes / described.num_examples / TYPICAL_BYTES))
        notes.append(
            f"the texts of {name} are not here: {tokens} tokens are assumed for each, {TYPICAL_BYTES} bytes a token"
            if tokens
            else f"the texts of {name} are not here, and nothing is known of their lengths"
        )
    else:
        notes.append(
            f"the samples of {name} are not here: each is taken for as long as --max-length allows, so tokens, FLOPs, "
            "hours and memory are upper bounds"
        )
    notes.append("repeated and empty samples, which are left out when the data is read, are counted")
    shape = Example("", "text", "") if text_only else Example("input", "target", template or PROMPT)
    task = Task(
        name=name.split("/")[-1],
        train=(shape,) * available,
        validation=(shape,) * validation,
        test=(shape,) * test,
        seed=seed,
        fingerprint="",
        text_only=text_only,
    )
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    return DatasetSummary(task, info.download_size, info.dataset_size, cache, tokens, tuple(notes))


def _refusal(dataset: str, config: str | None, split: str, error: Exception) -> InputError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    of = "" if config is None else f", configuration {config!r}"
    return InputError(
        f"--task {dataset}{of}, split {split!r}: cannot be loaded ({reason}). Check the id, the configuration "
        "(--dataset-config) and the split (--split), or give a local file."
    )


def _rows(dataset: str, config: str | None, split: str, info: Any) -> int | None:
    """Return how many rows a split has, a slice of it included; None if the metadata does not say."""
    import datasets

    if not info.splits:
        return None
    lengths = {name: found.num_examples for name, found in info.splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError, KeyError) as error:
        raise _refusal(dataset, config, split, error) from error
    if any(not lengths.get(part.splitname) for part in parts):
        return None
    return sum((lengths[p.splitname] if p.to is None else p.to) - (p.from_ or 0) for p in parts)


def _check_fields(read: Any, features: Any, where: str) -> None:
    """Refuse fields that the data set does not have, by reading a row made up for its features."""

    def made_up(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: made_up(inner) for name, inner in feature.items()}
        if isinstance(feature, list) or hasattr(feature, "feature"):
            return []
        # A translation is a mapping of languages to texts.
        languages = getattr(feature, "languages", None)
        if languages:
            return dict.fromkeys(languages, "text")
        return 0 if getattr(feature, "dtype", "string") not in ("string", "large_string") else "text"

    if features:
        read(where, {name: made_up(feature) for name, feature in features.items()})
