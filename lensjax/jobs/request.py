"""TODO"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lensjax import data
from lensjax.select.request import Request
from lensjax.tasks import Task, load_task
from lensjax.tasks.dataset_info import Outline, outline

DEMO_TASK = ("demo", "wordnet_definitions.jsonl")
DEMO_FIELDS = ("word", "definition")
DEMO_LEARNING_RATE = 2e-3  # for models of about a million weights; `Plan`'s default suits larger ones


def task_of(request: Request) -> Task:
    """Load the task that a request names, the demo's if it names none."""
    source, options = _source(request)
    return load_task(source, **options)


def _outline(request: Request) -> Outline | None:
    source, options = _source(request)
    return outline(source, **options)


def _source(request: Request) -> tuple[str | Path, dict[str, Any]]:
    """Return what `load_task` and `outline` are given."""
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
        source = request.task
    options |= {"config": request.dataset_config, "validation": request.validation, "test": request.test}
    return source, options | {"seed": request.seed}
