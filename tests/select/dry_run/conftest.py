"""Requests of a small selection, their dry runs, and a model of wide layers."""

import json
import shutil

import jax
import pytest

from lensjax import models
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.request import Request
from support.dry_runs import HERE, PLAN, SMALL


@pytest.fixture
def request_of(tiny_models, tiny_task, tmp_path):
    def request_of(*candidates, **options):
        chosen = {**SMALL, "task": tiny_task, "plan": PLAN, "out": tmp_path / "out", **options}
        return Request(models=candidates or tuple(map(str, tiny_models)), **chosen)

    return request_of


@pytest.fixture
def dry_run_of(request_of):
    def dry_run_of(*candidates, machine=HERE, **options):
        request = request_of(*candidates, **options)
        return dry_run(request, request.out, machine=machine)

    return dry_run_of


@pytest.fixture
def wide_model(tiny_models, tmp_path):
    """A model whose weights take more memory than its activations."""
    raw = json.loads((tiny_models[0] / "config.json").read_text())
    raw |= {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_inner": 1024}
    directory = tmp_path / "wide"
    models.save_pretrained(models.init_model(raw, jax.random.key(3)), directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_models[0] / file, directory / file)
    return directory
