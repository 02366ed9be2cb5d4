"""What a request says about the data."""

import dataclasses

from lensjax import data
from lensjax.jobs.defaults import DEMO_FIELDS, DEMO_TASK
from lensjax.jobs.request import JobRequest, task_source
from lensjax.tasks.specification import TaskSource


def test_without_a_task_it_is_the_demos():
    source = task_source(JobRequest())
    assert source == TaskSource(data.path(*DEMO_TASK), input_field=DEMO_FIELDS[0], target_field=DEMO_FIELDS[1])
    assert task_source(JobRequest(target_field="word")).target_field == "word"
    # Language modelling on one of the demo's fields has no input.
    texts = task_source(JobRequest(text_field="definition"))
    assert (texts.input_field, texts.target_field, texts.text_field) == (None, None, "definition")


def test_everything_that_is_said_about_the_data_is_passed_on():
    names = {field.name: f"<{field.name}>" for field in dataclasses.fields(TaskSource) if field.name != "source"}
    settings = {name.replace("config", "dataset_config"): value for name, value in names.items()}
    source = task_source(JobRequest(task="owner/data", **settings))
    assert source == TaskSource("owner/data", **names)


def test_a_file_is_looked_for_where_the_request_starts(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    request = JobRequest(task="mine.jsonl", base=tmp_path)
    assert task_source(request).source == tmp_path / "mine.jsonl"
    assert task_source(dataclasses.replace(request, task="owner/data")).source == "owner/data"
