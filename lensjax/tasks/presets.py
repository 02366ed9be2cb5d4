"""The data sets of the papers: their ids on the hub, and which fields to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Preset:
    """A data set of the hub.

    Attributes
    ----------
    dataset : str
        Its id.
    config : str or None
        Its configuration.
    input_field, target_field : str or None
        Fields to read; names of nested fields are joined by dots.
    text_field : str or None
        Instead of these, for language modelling.
    splits : mapping
        "train", and where the data set has them "validation" and "test", to the names of its splits.
    revision : str or None
        Branch or commit.
    """

    dataset: str
    config: str | None = None
    input_field: str | None = None
    target_field: str | None = None
    text_field: str | None = None
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"train": "train"})
    revision: str | None = None


ALL_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
PRESETS: Mapping[str, Preset] = {
    # The instructions of Wei et al. 2022, as Open-Orca collected them; it has one split.
    "flan": Preset("Open-Orca/FLAN", input_field="inputs", target_field="targets"),
    # Merity et al. 2016.
    "wikitext": Preset("Salesforce/wikitext", "wikitext-103-raw-v1", text_field="text", splits=ALL_SPLITS),
    # See et al. 2017. The repository itself holds a loading script, which is never run; this is the hub's conversion.
    "gigaword": Preset(
        "Harvard/gigaword",
        input_field="document",
        target_field="summary",
        splits=ALL_SPLITS,
        revision="refs/convert/parquet",
    ),
    # Barrault et al. 2019, Chinese to English; its test set is not published there.
    "wmt19": Preset(
        "wmt/wmt19",
        "zh-en",
        input_field="translation.zh",
        target_field="translation.en",
        splits={"train": "train", "test": "validation"},
    ),
}
"""Names that `--task` takes, and what they stand for."""
