"""What the user asked for: which models, which data, how to train; shared by the commands that select and tune."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lensjax import data
from lensjax.finetune import Plan, Search
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.defaults import ADAPTED, DEMO_FIELDS, DEMO_TASK
from lensjax.jobs.job import RunnerConfig
from lensjax.jobs.tokens import Tokens
from lensjax.models import Lora
from lensjax.tasks import Task
from lensjax.tasks.dataset_info import DatasetSummary, summarize_dataset
from lensjax.tasks.specification import TaskSource
from lensjax.tasks.task import read_task


@dataclasses.dataclass(frozen=True)
class JobRequest:
    """The models, the task and the training that were asked for; `None` means the default.

    Attributes
    ----------
    models : tuple of str
        Directories, GGUF files or Hugging Face ids; empty: the demo's models.
    task : str, Path or None
        A file, a data set or a preset, see `lensjax.tasks.load_task`. None: the demo's WordNet definitions.
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
        Directory that relative paths of models and data start from; None: the current one.
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
        """Directory that relative paths start from."""
        return Path.cwd() if self.base is None else self.base

    def located(self, name: str | Path) -> str | Path:
        """Return a model's or data set's path as seen from the current directory; a hub id is returned unchanged."""
        text = str(name)
        path = self.base_directory / text.removesuffix(ADAPTED)
        if self.base_directory == Path.cwd() or not path.exists():
            return name
        return f"{path}{ADAPTED}" if text.endswith(ADAPTED) else path

    def runner_config(self, candidate: Candidate, tokens: Tokens) -> RunnerConfig:
        """Return what a runner needs to do jobs of a candidate with these tokens."""
        return RunnerConfig(
            name=candidate.name,
            path=candidate.path,
            vocabulary=candidate.config.vocab_size,
            plan=dataclasses.replace(self.plan, lora=candidate.lora),
            search=self.search,
            tokens=tokens,
            seed=self.seed,
        )


def task_of(request: JobRequest) -> Task:
    """Load the task that a request names, the demo's if it names none."""
    return read_task(task_source(request))


def dataset_summary_of(request: JobRequest) -> DatasetSummary | None:
    """Summarize the data set that a request names from its metadata; None if it is here already."""
    return summarize_dataset(task_source(request))


def task_source(request: JobRequest) -> TaskSource:
    """Return what a request says about the data; the demo's file and fields if it names no task."""
    source = request.located(request.task) if request.task is not None else data.path(*DEMO_TASK)
    input_field, target_field = request.input_field, request.target_field
    if request.task is None and request.text_field is None:
        input_field, target_field = input_field or DEMO_FIELDS[0], target_field or DEMO_FIELDS[1]
    return TaskSource(
        source,
        input_field=input_field,
        target_field=target_field,
        text_field=request.text_field,
        template=request.template,
        config=request.dataset_config,
        split=request.split,
        validation_split=request.validation_split,
        test_split=request.test_split,
        revision=request.revision,
        limit=request.limit,
        validation=request.validation,
        test=request.test,
        seed=request.seed,
    )
