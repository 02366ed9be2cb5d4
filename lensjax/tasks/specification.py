"""Which data set the user named and how it is to be read: decided once, for reading it and for a dry run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from lensjax.errors import InputError
from lensjax.tasks.example import RowReader, row_reader
from lensjax.tasks.presets import PRESETS
from lensjax.tasks.sources import SUFFIXES, missing


@dataclasses.dataclass(frozen=True)
class ResolvedSource:
    """A file or data set with everything decided that its preset, its name and the user decide together.

    Attributes
    ----------
    label : str
        What messages call it.
    file : Path or None
        A local file, which is read whole; None for a data set.
    dataset : str
        Id on the hub or directory that `datasets` reads; for a file, its name.
    on_hub : bool
        Whether it is a data set of the hub, not a local file or directory.
    config, revision : str or None
        Of the data set.
    splits : mapping
        "train", and where there are splits of their own "validation" and "test", to the names of the splits.
    read : callable (where, row) -> Example or None
        Makes a sample of a row, see `lensjax.tasks.example.row_reader`.
    text_only : bool
        Whether it is for language modelling.
    """

    label: str
    file: Path | None
    dataset: str
    on_hub: bool
    config: str | None
    revision: str | None
    splits: Mapping[str, str]
    read: RowReader
    text_only: bool

    @property
    def task_name(self) -> str:
        """What the task is called."""
        return self.label.split("/")[-1]


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """What the user said about the data, None where nothing was said; see `lensjax.tasks.load_task`."""

    source: str | os.PathLike[str]
    input_field: str | None = None
    target_field: str | None = None
    text_field: str | None = None
    template: str | None = None
    config: str | None = None
    split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    revision: str | None = None
    limit: int | None = None
    validation: int = 300
    test: int = 500
    seed: int = 0

    def resolve(self) -> ResolvedSource:
        """Decide what is read, and how; only the existence of files is looked up.

        Raises
        ------
        InputError
            An address, a file that does not exist and cannot be a data set, settings that do not go with a file, or
            fields that contradict each other.
        """
        name, path = str(self.source), Path(self.source)
        if name.startswith(("https://", "http://")):
            raise InputError(f"{name}: is an address; download it and name the file, or name a data set as owner/name.")
        is_file = path.is_file() or name.lower().endswith(SUFFIXES)
        preset = None if is_file else PRESETS.get(name)
        if not is_file and preset is None and not path.is_dir() and name.count("/") != 1:
            raise missing(path)
        input_field, target_field, text_field = self.input_field, self.target_field, self.text_field
        named_fields = (input_field, target_field, text_field)
        if preset is not None and all(field is None for field in named_fields):
            input_field, target_field, text_field = preset.input_field, preset.target_field, preset.text_field
        if is_file and text_field is None and ".txt" in path.name.lower():
            self._refuse_fields_of_texts()
            text_field = "text"
        read = row_reader(input_field, target_field, text_field, self.template)
        if is_file:
            self._refuse_dataset_settings()
        splits = dict(preset.splits if preset else {"train": "train"})
        splits |= {part: given for part, given in self._named_splits.items() if given is not None}
        return ResolvedSource(
            label=path.name.split(".")[0] if is_file else name,
            file=path if is_file else None,
            dataset=preset.dataset if preset else name,
            on_hub=not is_file and (preset is not None or not path.is_dir()),
            config=self.config or (preset.config if preset else None),
            revision=self.revision or (preset.revision if preset else None),
            splits=splits,
            read=read,
            text_only=text_field is not None,
        )

    @property
    def _named_splits(self) -> dict[str, str | None]:
        return {"train": self.split, "validation": self.validation_split, "test": self.test_split}

    def _refuse_fields_of_texts(self) -> None:
        """Refuse names of fields, and a template, for a file of texts."""
        given = {
            "--input-field": self.input_field,
            "--target-field": self.target_field,
            "--template": self.template,
        }
        wrong = [flag for flag, value in given.items() if value is not None]
        if wrong:
            raise InputError(
                f"{self.source}: a file of texts has no fields, so there is nothing for {' and '.join(wrong)}; leave "
                f"{'it' if len(wrong) == 1 else 'them'} out, or give a .jsonl or .csv file."
            )

    def _refuse_dataset_settings(self) -> None:
        """Refuse for a file what only a data set has."""
        if any(value is not None for value in (self.config, *self._named_splits.values(), self.revision)):
            raise InputError(
                f"{self.source} is a local file: configuration, splits and revision are those of a data set; leave "
                "them out."
            )
        if self.limit is not None:
            raise InputError(
                f"{self.source} is a local file and is read whole: --limit {self.limit} is for data sets; leave it out."
            )
