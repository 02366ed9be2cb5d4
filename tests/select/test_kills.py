"""Whole selections, killed at random moments and resumed."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lensjax.journal import JOURNAL

KILLS = 50
PATIENCE = 20.0  # seconds


def command(*arguments, log, cache):
    return subprocess.Popen(
        [sys.executable, "-m", "lensjax.select", *map(str, arguments)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LENSJAX_CACHE": str(cache)},
    )


def survivors(mark):
    """Return the processes that have the mark in their environment, this one and its own left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def journal(directory):
    path = directory / JOURNAL
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_selection_killed_fifty_times_ends_as_an_undisturbed_one(tiny_models, tiny_task, tmp_path):
    """SIGKILL to the command itself; its workers see that it is gone. Two rates: trials are interrupted too."""
    sizes = ("--smallest", 5, "--visible", 40, "--validation", 20, "--test", 20, "--max-length", 24)
    # Long enough for kills to fall between the trials of a run.
    training = ("--max-epochs", 30, "--patience", 30, "--batch-size", 1, "--learning-rate", 0.0001, 0.001)
    models = (*tiny_models, *(f"{m}+lora" for m in tiny_models))
    options = ("--models", *models, "--task", tiny_task, *sizes, *training, "--quiet")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with (tmp_path / "log").open("w") as log:
        assert command(*options, "--out", whole, log=log, cache=tmp_path).wait() == 0
        rng = np.random.default_rng(0)
        kills = finished = torn_runs = 0
        while kills < KILLS:
            resumed = (torn / "command.json").exists()
            process = command(*(("--resume", torn) if resumed else (*options, "--out", torn)), log=log, cache=tmp_path)
            try:
                # From imports to the middle of training: a start takes seconds, and so does a run.
                status = process.wait(float(rng.uniform(0.5, 12.0)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                # The journal is whole but for a torn last line, and never loses a record.
                path = torn / JOURNAL
                lines = path.read_bytes().rpartition(b"\n")[0].count(b"\n") + 1 if path.exists() else 0
                assert lines >= finished
                finished = lines
                records = [json.loads(line) for line in path.read_text().splitlines()[:lines]] if lines else []
                torn_runs += bool({r["part_of"] for r in records} - {r["key"] for r in records} - {""})
                continue
            assert status == 0
            # It came to its end before all kills: a fresh one takes the rest.
            check(torn, whole)
            shutil.rmtree(torn)
            finished = 0
        last = ("--resume", torn) if (torn / "command.json").exists() else (*options, "--out", torn)
        assert command(*last, log=log, cache=tmp_path).wait() == 0
    check(torn, whole)
    # Some kills fell between the trials of a run, and no process of a killed selection lives on.
    assert torn_runs > 0
    for process in survivors(str(tmp_path)):
        # Those of the last command may be about to end.
        with contextlib.suppress(ProcessLookupError):
            assert select.select([os.pidfd_open(process)], [], [], PATIENCE)[0], f"process {process} lives on"


def check(found, wanted):
    """No finished run was made twice, and the result is the undisturbed one's."""
    runs, undisturbed = journal(found), journal(wanted)
    keys = [r["key"] for r in runs]
    assert len(set(keys)) == len(keys)
    losses = {r["key"]: r["test_loss"] for r in undisturbed}
    assert set(keys) == set(losses)
    for run in runs:
        assert run["reason"]
        np.testing.assert_allclose(run["test_loss"] or 0.0, losses[run["key"]] or 0.0, rtol=1e-5)
    texts = [json.loads((d / "selection.json").read_text()) for d in (found, wanted)]
    best = [next(iter(t["methods"].values()))["best"] for t in texts]
    assert best[0] == best[1]
    for one, other in zip(*(t["candidates"] for t in texts), strict=True):
        assert (one["name"], one["flops"]) == (other["name"], other["flops"])
        np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-5)
