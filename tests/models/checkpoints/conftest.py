"""A small model, in memory and saved."""

import jax
import pytest

from lensjax.models import init_model, save_pretrained
from support.checkpoints import SMALL


@pytest.fixture
def model():
    return init_model(SMALL, jax.random.key(0))


@pytest.fixture
def saved(model, tmp_path):
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"
