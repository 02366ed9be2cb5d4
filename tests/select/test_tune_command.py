"""The command that fine-tunes the chosen model: what it says is what the selection's runs were made with."""

import dataclasses
import shlex

import pytest

from lensjax.commands import options
from lensjax.finetune import Plan, Search
from lensjax.journal import Run
from lensjax.models import Lora
from lensjax.select.request import Request, prepare
from lensjax.select.tune_command import tune_command, tune_facts, tune_note
from lensjax.tune import cli

SIZES = {"smallest": 10, "visible": 40, "validation": 20, "test": 20, "max_length": 24}


@pytest.fixture
def request_of(tiny_models, tiny_task):
    def request_of(**changes):
        both = tuple(map(str, tiny_models))
        return Request(**{"models": both, "task": str(tiny_task), **SIZES, "plan": Plan(batch_size=8), **changes})

    return request_of


def run(name, size, rate=0.01, batch=8):
    return Run("key", name, size, 1.0, facts={"learning_rate": rate, "batch_size": batch})


def understood(command):
    """Return what the command's own parser makes of it: the plan, the search and everything else."""
    python, dash, module, *arguments = shlex.split(command)
    assert (python, dash, module) == ("python", "-m", "lensjax.tune")
    given = cli.parser().parse_args(arguments)
    return given, *options.plan_of(given, demo=False), options.lora_of(given)


def test_every_option_of_the_task_and_the_training_is_said(request_of, tiny_models, tmp_path):
    plan = Plan(
        batch_size=16,
        learning_rate=0.0123456789,
        max_epochs=3,
        patience=4,
        schedule="cosine",
        weight_decay=0.1,
        dropout=True,
        micro_batch=4,
        precision="float32",
        sharding="none",
    )
    asked = request_of(
        input_field="input",
        target_field="target",
        template="-it's{input}$HOME\n",
        seed=3,
        models=(f"{tiny_models[0]}+lora", str(tiny_models[1])),
        lora=Lora(rank=2, alpha=3.5, dropout=0.25),
        plan=plan,
    )
    prepared = prepare(asked)
    name = f"{tiny_models[0].name}+lora"
    runs = [run(name, 40, plan.learning_rate, 16), run(tiny_models[1].name, 80, 1.0, 1)]
    given, found, search, lora = understood(tune_command(prepared, name, runs, tmp_path))
    assert (found, search, lora) == (plan, Search(), asked.lora)
    assert given.model == asked.models[0]
    for option in options.TASK_OPTIONS:
        said, default = getattr(given, option), getattr(Request(), option)
        assert (default if said is None else said) == getattr(asked, option), option
    assert given.samples is None
    assert given.selection == tmp_path
    assert given.out == tmp_path / f"tuned-{name}"


def test_what_is_the_default_is_not_said(request_of, tiny_models, tmp_path):
    prepared = prepare(request_of(plan=Plan(), max_length=64, models=tuple(map(str, tiny_models))))
    command = tune_command(prepared, "tiny-8", [run("tiny-8", 40, 3e-4, 32)], tmp_path)
    flags = [part for part in shlex.split(command) if part.startswith("--")]
    expected = ("model", "task", "validation", "test", "max-length", "learning-rate", "batch-size", "selection", "out")
    assert flags == [f"--{name}" for name in expected]


def test_of_a_search_the_values_chosen_for_the_largest_run_are_taken(request_of, tmp_path):
    prepared = prepare(request_of(search=Search((0.01, 0.1), (4, 8))))
    runs = [run("tiny-8", 0, 9.0, 9), run("tiny-8", 40, 0.1, 4), run("tiny-8", 20, 0.01, 8), run("tiny-16", 40)]
    _, plan, search, _ = understood(tune_command(prepared, "tiny-8", runs, tmp_path))
    assert (plan.learning_rate, plan.batch_size, search) == (0.1, 4, Search())
    # Nothing was trained (methods that look at nothing but sizes, say): all are searched.
    _, plan, search, _ = understood(tune_command(prepared, "tiny-8", runs[:1], tmp_path))
    assert search == Search((0.01, 0.1), (4, 8))


def test_the_target_is_said_if_it_is_not_all_of_the_data(request_of, tmp_path):
    prepared = prepare(request_of(target=90))
    assert understood(tune_command(prepared, "tiny-8", [], tmp_path))[0].samples == 90
    more = prepare(request_of(target=1_000_000))
    assert understood(tune_command(more, "tiny-8", [], tmp_path))[0].samples is None
    note = tune_note(more, "tiny-8", tmp_path)
    assert "1000000 training samples, but 100 are at hand" in note
    assert tune_note(prepared, "tiny-8", tmp_path) == ""
    assert set(tune_facts(prepared, "tiny-8", [], tmp_path)) == {"tune_command"}
    assert tune_facts(more, "tiny-8", [], tmp_path)["tune_note"] == note


def test_a_length_that_another_candidate_imposed_is_said(request_of, tmp_path):
    prepared = dataclasses.replace(prepare(request_of(max_length=64)), max_length=23)
    assert understood(tune_command(prepared, "tiny-8", [], tmp_path))[0].max_length == 23


def test_models_and_task_are_named_as_they_were(request_of, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_models[0].parent)
    prepared = prepare(request_of(models=("./tiny-8", "tiny-16/")))
    given = understood(tune_command(prepared, "tiny-8", [], tmp_path))[0]
    assert given.model == "./tiny-8"
    assert understood(tune_command(prepared, "tiny-16", [], tmp_path))[0].model == "tiny-16/"
    assert tune_note(prepared, "tiny-8", tmp_path) == f"Its paths are relative to {tiny_models[0].parent}."


@pytest.mark.parametrize("order", [("a/tiny", "tiny"), ("tiny", "a/tiny")])
def test_a_model_is_not_taken_for_another_of_the_same_name(request_of, tiny_models, tmp_path, monkeypatch, order):
    (tmp_path / "a").mkdir()
    for place, model in zip(("a/tiny", "tiny"), tiny_models, strict=True):
        (tmp_path / place).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    prepared = prepare(request_of(models=order))
    for name in order:
        assert understood(tune_command(prepared, name, [], tmp_path))[0].model == name


def test_the_demo_needs_no_task_and_names_its_model_by_path(tmp_path):
    prepared = prepare(Request())
    candidate = prepared.candidates[0]
    given, plan, _, _ = understood(
        tune_command(prepared, candidate.name, [run(candidate.name, 50, 2e-3, 32)], tmp_path)
    )
    assert given.task is None
    assert given.model == str(candidate.path)
    assert (plan.learning_rate, plan.batch_size) == (2e-3, 32)


def test_what_only_a_program_can_ask_for_is_noted(request_of, tiny_models, tmp_path):
    models = (f"{tiny_models[0]}+lora", str(tiny_models[1]))
    prepared = prepare(request_of(models=models, plan=Plan(clip=2.0), lora=Lora(rank_stabilised=True)))
    note = tune_note(prepared, "tiny-8+lora", tmp_path)
    assert note == "No option says clip=2.0, rank_stabilised=True: use lensjax.finetune.FineTuner for that."
    assert "rank_stabilised" not in tune_note(prepared, "tiny-16", tmp_path)
