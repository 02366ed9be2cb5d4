"""Data-parallel and fully-sharded training on forced host devices, in a process of its own."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.finetune.sharding import place
from support.paths import SUPPORT


@pytest.mark.parametrize("kind", ["plain", "adapters"])
def test_losses_do_not_depend_on_the_number_of_devices(kind):
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, SUPPORT / "sharded_worker.py", kind],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    alone = found["none 1"]
    assert alone["steps"] > 0
    assert alone["losses"][0] < alone["losses"][1]
    for name, run in found.items():
        assert run["devices"] == int(name.split()[1])
        assert run["steps"] == alone["steps"]
        np.testing.assert_allclose(run["losses"], alone["losses"], rtol=1e-5)
        # All but small vectors, which no number of devices may divide, are split.
        split = run["devices"] if name.startswith("full") else 1
        assert alone["bytes"] / split <= run["bytes"] < 1.1 * alone["bytes"] / split


def test_devices_that_do_not_divide_the_batch_are_refused_or_left_idle():
    class Device:
        def __init__(self, memory):
            self.memory = memory

        def memory_stats(self):
            return {"bytes_limit": self.memory}

    eight = [Device(10**9)] * 8
    with pytest.raises(InputError, match="8 devices do not divide 12 samples evenly; choose a batch size"):
        place("data", [12], trainable=10, frozen=0, devices=eight)
    with pytest.raises(InputError, match="8 devices do not divide 16 and 4 samples"):
        place("full", [16, 4], trainable=10, frozen=0, devices=eight)
    for sharding, batch in (("none", 16), ("auto", 7)):
        found = place(sharding, [batch], trainable=10, frozen=0, devices=eight)
        assert (found.devices, found.name) == (1, "none")
    assert place("auto", [16], trainable=10, frozen=0, devices=jax.devices()[:1]).devices == 1
    # 16 bytes for a trained weight, 4 for a frozen one: whole on each device if that is at most half of its memory.
    for trainable, frozen, name in ((31_000_000, 0, "data"), (32_000_000, 0, "full"), (10**6, 10**8, "data")):
        assert place("auto", [16], trainable=trainable, frozen=frozen, devices=eight).name == name
