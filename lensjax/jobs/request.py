"""What a user asks of a job: which models, which data, how to train. Shared by choosing a model and tuning one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lensjax import data
from lensjax.finetune import Plan, Search
from lensjax.jobs.defaults import ADAPTED, DEMO_FIELDS, DEMO_TASK
from lensjax.models import Lora
from lensjax.tasks import Task, load_task
from lensjax.tasks.dataset_info import DatasetSummary, summarize_dataset


@dataclasses.dataclass(frozen=True)
class JobRequest:
    """The models, the task and the training that were asked for; `None` means the default.

    Attributes
    ----------
    models : tuple of str
        Directories, GGUF files or Hugging Face ids; empty: the demo models.
    task : str, Path or None
        A file, a data set or a preset, see `lensjax.tasks.load_task`. None: the WordNet sample.
    input_field, target_field, text_field, template : str or None
        See `lensjax.tasks.load_task`, as are the next two.
    dataset_config, split, validation_split, test_split, revision : str or None
    limit : int or None
    seed : int
    validation, test : int
        Samples set aside.
    max_length : int
        Tokens kept of a sample; the length of the rows that texts are packed into.
    lora : Lora
        Adapters of the models that are named with ``+lora``.
    plan : Plan
    search : Search
        Learning rates and batch sizes to try for each run.
    base : Path or None
        Directory that relative paths of models and data are meant from; None: the current one.
    """

    models: tuple[str, ...] = ()
    task: str | Path | None = None
    input_field: str | None = None
    target_field: str | None = None
    text_field: str | None = None
    template: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    revision: str | None = None
    limit: int | None = None
    seed: int = 0
    validation: int = 300
    test: int = 500
    max_length: int = 128
    lora: Lora = dataclasses.field(default_factory=Lora)
    plan: Plan = dataclasses.field(default_factory=Plan)
    search: Search = dataclasses.field(default_factory=Search)
    base: Path | None = None

    @property
    def base_directory(self) -> Path:
        """Directory that relative paths are meant from."""
        return Path.cwd() if self.base is None else self.base

    def located(self, name: str | Path) -> str | Path:
        """Return a model or data set as it can be opened from the current directory; a hub id stays as it is."""
        text = str(name)
        path = self.base_directory / text.removesuffix(ADAPTED)
        if self.base_directory == Path.cwd() or not path.exists():
            return name
        return f"{path}{ADAPTED}" if text.endswith(ADAPTED) else path


def task_of(request: JobRequest) -> Task:
    """Load the task that a request names, the demo's if it names none."""
    source, options = _source(request)
    return load_task(source, **options)


def dataset_summary_of(request: JobRequest) -> DatasetSummary | None:
    """Summarize the data set that a request names from its metadata; None if it is here already."""
    source, options = _source(request)
    return summarize_dataset(source, **options)


def _source(request: JobRequest) -> tuple[str | Path, dict[str, Any]]:
    """Return what `load_task` and `summarize_dataset` are given."""
    names = ("text_field", "template", "split", "validation_split", "test_split", "revision", "limit")
    options: dict[str, Any] = {name: getattr(request, name) for name in names}
    options |= {"input_field": request.input_field, "target_field": request.target_field}
    source: str | Path
    if request.task is None:
        source = data.path(*DEMO_TASK)
        if request.text_field is None:
            fields = zip(("input_field", "target_field"), DEMO_FIELDS, strict=True)
            options |= {name: options[name] or default for name, default in fields}
    else:
        source = request.located(request.task)
    options |= {"config": request.dataset_config, "validation": request.validation, "test": request.test}
    return source, options | {"seed": request.seed}
