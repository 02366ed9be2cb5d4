"""How long runs take: by the machine's speed, by that of finished runs; the batches that are counted."""

import dataclasses

import numpy as np
import pytest

from lensjax.journal import JOURNAL
from lensjax.select.dry_run.duration import COMPILE_SECONDS, START_SECONDS, BatchShapes
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.request import prepare
from lensjax.tasks import Encoded, batches
from support.dry_runs import HERE, recorded


def test_the_speed_of_finished_runs_counts_instead_of_the_machines(request_of):
    request = request_of()
    fresh = dry_run(request, request.out, machine=HERE)
    assert "multiplied float32 matrices at 100 GFLOP/s" in fresh.basis["Time"]
    recorded(request, (50.0, 200.0))
    forecast = dry_run(request, request.out, machine=HERE)
    assert "from the 2 finished runs in the run directory" in forecast.basis["Time"]
    assert {(r.candidate, r.size) for r in forecast.runs if r.done} == {("tiny-8", 10), ("tiny-16", 10)}
    assert all(r.seconds == 0 for r in forecast.runs if r.done)
    times = {r.candidate: r.seconds for r in forecast.runs if r.size == 20}
    by_machine = max(r.seconds for r in fresh.runs if r.size == 20)
    assert times["tiny-16"] > 2 * times["tiny-8"] > 4 * by_machine
    # One that has no runs yet is taken to be as fast as the others.
    lines = (request.out / JOURNAL).read_text().splitlines(keepends=True)
    (request.out / JOURNAL).write_text(lines[0])
    other = {r.candidate: r.seconds for r in dry_run(request, request.out, machine=HERE).runs if r.size == 20}
    assert other["tiny-8"] == pytest.approx(times["tiny-8"])
    assert by_machine < other["tiny-16"] < times["tiny-16"]


def test_runs_that_took_as_long_as_estimated_change_nothing(request_of):
    request = request_of(verify=True)
    fresh = dry_run(request, request.out, machine=HERE)
    shapes = BatchShapes(next(iter(prepare(request).tokens.values())))
    start = START_SECONDS + len(shapes.buckets) * (COMPILE_SECONDS[0] + COMPILE_SECONDS[1])  # of one layer
    of = {(r.candidate, r.size): r.seconds for r in fresh.runs}
    for size, more in ((10, start), (20, 0.0)):
        recorded(request, [of[name, size] + more for name in ("tiny-8", "tiny-16")], size)
    forecast = dry_run(request, request.out, machine=HERE)
    assert "from the 4 finished runs" in forecast.basis["Time"]
    for run in forecast.runs:
        assert run.seconds == (0 if run.done else pytest.approx(of[run.candidate, run.size], rel=1e-6))
    assert sum(run.done for run in forecast.runs) == 4


def test_batches_are_those_that_training_makes(request_of):
    prepared = prepare(request_of())
    tokens = next(iter(prepared.tokens.values()))
    shapes = BatchShapes(tokens)
    for part, size in ((tokens.train, 20), (tokens.train, 10), (tokens.validation, 20)):
        made = [b["labels"].shape for b in batches(part.first(size), batch_size=8, buckets=tokens.buckets, pad_id=0)]
        assert shapes.batches(part, size, 8) == {length: made.count((8, length)) for _, length in set(made)}
    assert shapes.training_tokens(20) == sum(len(ids) for ids in tokens.train.ids[:20])
    texts = Encoded(tuple(np.ones(n, np.int32) for n in (5, 30, 17, 9)), np.zeros(4, int), 0, packed=16)
    packed = BatchShapes(dataclasses.replace(tokens, train=texts, validation=texts, test=texts))
    made = [b["labels"].shape for b in batches(texts, batch_size=2, buckets=(16,), pad_id=0)]
    assert packed.batches(texts, 4, 2) == {16: len(made)}
