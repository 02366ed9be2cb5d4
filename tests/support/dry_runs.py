"""A small selection for dry runs, a machine, and runs that a journal holds already."""

from lensjax.finetune import Plan
from lensjax.journal import Journal, Run
from lensjax.select.dry_run.machine import Machine
from lensjax.select.records import run_key
from lensjax.select.request import prepare

GIB = 2**30
HERE = Machine("cpu", "a processor", 1, 8 * GIB, {"float32": 1e11})
SMALL = {"smallest": 10, "visible": 20, "validation": 20, "test": 20, "max_length": 24}
PLAN = Plan(max_epochs=2, batch_size=8, learning_rate=0.01)


def recorded(request, seconds, size=10):
    """Put a run of each candidate into the journal of a selection, without making it."""
    prepared = prepare(request)
    train = next(iter(prepared.tokens.values())).train
    journal = Journal(request.out, prepared.specification)
    for candidate, taken in zip(prepared.candidates, seconds, strict=True):
        tokens = 2 * int(train.first(size).token_counts.sum())
        flops = candidate.flops_per_token * tokens
        journal.append(
            Run(run_key(prepared, candidate, size), candidate.name, size, 3.0, 1, tokens, flops, taken, samples=20)
        )
    journal.close()
