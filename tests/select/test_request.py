"""A request as it is prepared: subset sizes, what defines its runs, paths that are meant from elsewhere."""

from types import SimpleNamespace

import pytest

from lensjax.errors import InputError
from lensjax.finetune import Search
from lensjax.journal import key_of
from lensjax.models import Lora
from lensjax.select.budget import Budget
from lensjax.select.request import Prepared, Request, prepare


@pytest.fixture
def settings(tiny_models, tiny_task):
    rest = {"smallest": 10, "validation": 20, "test": 20, "max_length": 24}
    return {"models": tuple(map(str, tiny_models)), "task": str(tiny_task), **rest}


def test_sizes_double_up_to_what_is_visible(settings):
    prepared = prepare(Request(**settings, visible=45))
    assert prepared.sizes == (10, 20, 40)
    assert prepared.target == 100
    assert not prepared.races
    assert prepared.ledger().amount == float("inf")


def test_a_race_has_sizes_of_its_own(settings):
    request = Request(**settings, budget=None, target=1000)
    assert not request.races
    raced = prepare(Request(**settings, budget=Budget.parse("50%"), target=800))
    assert raced.races
    assert raced.sizes == (10, 20, 100)
    assert not Request(**settings, budget=Budget.parse("50%"), method="lens").races


def test_the_definition_is_that_of_the_runs_and_the_specification_that_of_the_selection(settings):
    one, other = (prepare(Request(**settings, visible=visible)) for visible in (20, 40))
    assert one.definition == other.definition
    assert one.specification != other.specification
    assert one.default_directory != other.default_directory
    assert one.default_directory.parent.name == "runs"


def test_relative_paths_are_meant_from_the_base(settings, tiny_models, tmp_path, monkeypatch):
    base = tiny_models[0].parent
    monkeypatch.chdir(tmp_path)
    names = (f"{tiny_models[0].name}+lora", tiny_models[1].name)
    with pytest.raises(InputError, match="tiny-8: is no directory here"):
        prepare(Request(**{**settings, "models": names}, visible=20))
    prepared = prepare(Request(**{**settings, "models": names}, visible=20, base=base, lora=Lora(rank=2)))
    assert [c.name for c in prepared.candidates] == ["tiny-8+lora", "tiny-16"]
    assert [c.asked for c in prepared.candidates] == list(names)
    assert prepared.candidates[1].path == tiny_models[1]


# The digests are those that were computed before `parallel_trials` and `prune_after` had these names.
REQUESTS = {
    "default": (Request(), "72b22998f67d6b0a"),
    "search": (Request(search=Search((1e-3, 3e-4), (8, 16))), "108c7966d8b1a922"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_identifies_a_run_is_what_it_was(name):
    request, digest = REQUESTS[name]
    task = SimpleNamespace(fingerprint="0123456789abcdef", text_only=False)
    found = Prepared(request, task, (), {}, (50, 100), 1600, 128, ()).definition
    assert list(found["search"]) == ["learning_rates", "batch_sizes", "lanes", "hopeless_after", "retry"]
    assert key_of(found) == digest
