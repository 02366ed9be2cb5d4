"""What is known of a data set of the hub before its rows are fetched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lensjax.errors import InputError
from lensjax.tasks.example import PROMPT, Example, RowReader
from lensjax.tasks.sources import cannot_load
from lensjax.tasks.specification import ResolvedSource, TaskSource
from lensjax.tasks.task import Task

BYTES_PER_TOKEN = 3  # assumed where only the bytes of a data set are known; English has about 4


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """What is known of a task whose rows have not been downloaded.

    Attributes
    ----------
    task : Task
        A placeholder: as many samples as there will be at most, all of them equal, and no fingerprint.
    download, disk : int or None
        Bytes to download, and bytes that the data set then takes in the cache of `datasets`.
    cache : Path
        Directory of the cache of `datasets`.
    tokens : int or None
        Tokens of a text on average, estimated from the data set's size in bytes; None where samples have an input and
        a target.
    notes : tuple of str
        What was assumed.
    """

    task: Task
    download: int | None
    disk: int | None
    cache: Path
    tokens: int | None
    notes: tuple[str, ...]


def summarize_dataset(source: TaskSource) -> DatasetSummary | None:
    """Say how many samples a data set of the hub has, without downloading its rows.

    Returns
    -------
    DatasetSummary or None
        None for files, directories and data sets that are in the cache of `datasets`: reading them downloads nothing.

    Raises
    ------
    InputError
        As `lensjax.tasks.load_task`, as far as the data set's metadata shows it; if it does not say how many rows there
        are and `limit` does not either.
    """
    resolved = source.resolve()
    if not resolved.on_hub:
        return None
    name, dataset, config, splits = resolved.label, resolved.dataset, resolved.config, resolved.splits

    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset, config, revision=resolved.revision)
    except Exception as error:
        raise cannot_load(dataset, config, splits["train"], error) from error
    if Path(builder.cache_dir).is_dir():
        return None
    info = builder.info
    _check_fields(resolved.read, info.features, f"{dataset}, its fields")
    notes: list[str] = []
    train = _training_samples(
        source, resolved, {part: _rows(dataset, config, split, info) for part, split in splits.items()}, notes
    )
    tokens = None
    if resolved.text_only:
        described = (info.splits or {}).get(splits["train"].partition("[")[0].partition("+")[0])
        if described is not None and described.num_bytes and described.num_examples:
            tokens = max(1, round(described.num_bytes / described.num_examples / BYTES_PER_TOKEN))
        notes.append(
            f"the texts of {name} are not here: {tokens} tokens are assumed for each, {BYTES_PER_TOKEN} bytes a token"
            if tokens
            else f"the texts of {name} are not here, and nothing is known of their lengths"
        )
    else:
        notes.append(
            f"the samples of {name} are not here: each is taken for as long as --max-length allows, so tokens, FLOPs, "
            "hours and memory are upper bounds"
        )
    notes.append("repeated and empty samples, which are left out when the data is read, are counted")
    sample = Example("", "text", "") if resolved.text_only else Example("input", "target", source.template or PROMPT)
    task = Task(
        name=resolved.task_name,
        train=(sample,) * train,
        validation=(sample,) * source.validation,
        test=(sample,) * source.test,
        seed=source.seed,
        fingerprint="",
        text_only=resolved.text_only,
    )
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    return DatasetSummary(task, info.download_size, info.dataset_size, cache, tokens, tuple(notes))


def _training_samples(
    source: TaskSource, resolved: ResolvedSource, rows: Mapping[str, int | None], notes: list[str]
) -> int:
    """Return how many training samples are left at most once validation and test samples are set aside.

    Parameters
    ----------
    source : TaskSource
    resolved : ResolvedSource
        Of that source.
    rows : mapping
        Rows of each split, None where the hub does not say.
    notes : list of str
        Assumptions are added to it.

    Raises
    ------
    InputError
        If their number is not known, or there are too few.
    """
    name, limit = resolved.label, source.limit
    available = rows["train"]
    if limit is not None:
        if available is None:
            notes.append(f"the hub does not say how many rows {name} has: --limit {limit} is taken for their number")
        available = min(limit, limit if available is None else available)
    if available is None:
        raise InputError(
            f"--task {name}: the hub does not say how many rows its split {resolved.splits['train']!r} has. Give "
            "--limit, which is then taken for their number, or fetch the data set first."
        )
    for part, wanted in (("test", source.test), ("validation", source.validation)):
        if part not in rows:
            available -= wanted
            continue
        known = rows[part]
        if known is not None and known < wanted:
            raise InputError(
                f"{name}: its {part} split has {known} samples, but {wanted} are asked for. Lower --{part}."
            )
    if available < 1:
        raise InputError(
            f"{name}: too few samples to set {source.validation} aside for validation and {source.test} for the test "
            "loss. Lower --validation and --test."
        )
    return available


def _rows(dataset: str, config: str | None, split: str, info: Any) -> int | None:
    """Return how many rows a split has, a slice of it included; None if the metadata does not say."""
    import datasets

    if not info.splits:
        return None
    lengths = {name: described.num_examples for name, described in info.splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError, KeyError) as error:
        raise cannot_load(dataset, config, split, error) from error
    if any(not lengths.get(part.splitname) for part in parts):
        return None
    return sum((lengths[p.splitname] if p.to is None else p.to) - (p.from_ or 0) for p in parts)


def _check_fields(read: RowReader, features: Any, where: str) -> None:
    """Refuse fields that the data set does not have, by reading a row of placeholders of its features' types."""

    def placeholder(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: placeholder(inner) for name, inner in feature.items()}
        if isinstance(feature, list) or hasattr(feature, "feature"):
            return []
        # A translation is a mapping of languages to texts.
        languages = getattr(feature, "languages", None)
        if languages:
            return dict.fromkeys(languages, "text")
        return 0 if getattr(feature, "dtype", "string") not in ("string", "large_string") else "text"

    if features:
        read(where, {name: placeholder(feature) for name, feature in features.items()})
