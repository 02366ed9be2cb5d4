import dataclasses
import subprocess
import sys

import pytest

from lensjax.errors import InputError
from lensjax.finetune import Plan, choices
from lensjax.select.options import parser
from support.paths import ROOT

CHOICES = {"schedule": choices.SCHEDULES, "precision": choices.PRECISIONS, "sharding": choices.SHARDINGS}


@pytest.mark.parametrize("name", CHOICES)
def test_the_options_take_what_a_plan_takes(name):
    (option,) = (option for option in parser().options if option.dest == name)
    assert tuple(option.choices) == CHOICES[name]
    for value in CHOICES[name]:
        dataclasses.replace(Plan(), **{name: value}).check()
    with pytest.raises(InputError, match=f"{name} is 'other'; choose one of {', '.join(CHOICES[name])}"):
        dataclasses.replace(Plan(), **{name: "other"}).check()


def test_reading_the_choices_loads_no_training():
    code = "import sys, lensjax.finetune.choices; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "lensjax.finetune.choices" in loaded
    assert not {"jax", "flax", "optax", "lensjax.finetune.config", "lensjax.finetune.tuner"} & loaded
