"""The dry run of a selection: its runs, their time, memory and disk, before weights or rows are downloaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lensjax.jobs.candidates import Candidate
from lensjax.jobs.defaults import EXTRA_MEASUREMENTS, TANGENTS
from lensjax.jobs.tangent_measurements import FLOPS_TEXT
from lensjax.journal import Journal, Run
from lensjax.select.budget import Ledger, charged_records, left_out
from lensjax.select.dry_run.duration import BatchShapes, DurationEstimate, total_layers
from lensjax.select.dry_run.forecast import (
    AS_IT_IS,
    CHOICE,
    FEATURES,
    KERNEL,
    LATER,
    SPECTRA,
    VERIFICATION,
    DiskNeed,
    DryRun,
    PlannedRun,
    format_bytes,
)
from lensjax.select.dry_run.machine import Machine, free_disk, inspect_machine
from lensjax.select.dry_run.memory import MemoryEstimate
from lensjax.select.extra_measurements import score, tangents
from lensjax.select.records import run_key
from lensjax.select.request import Prepared, Request, prepare
from lensjax.select.session import STOPWATCH
from lensjax.select.timing import elapsed
from lensjax.selectors import DEFAULT_RACE, method
from lensjax.selectors.methods import LOG_ME, NLP_METRICS
from lensjax.tasks.cache import directory as cache_directory

# Measured in benchmarks/forecast.py.
RUN_DISK = 32 * 2**10  # bytes of a run's record in the run directory, and of each trial's
DIRECTORY_DISK = 4 * 2**20  # bytes of the report and everything else there
COMPILED_DISK = 2**17  # bytes of compiled programs for each layer and padded length, until the selection is finished

PURPOSES = {TANGENTS: KERNEL, NLP_METRICS: SPECTRA, LOG_ME: FEATURES}


def dry_run(request: Request, directory: Path | None = None, *, machine: Machine | None = None) -> DryRun:
    """Say what a selection would run and how much that takes; nothing is fine-tuned, no weights or rows are downloaded.

    Parameters
    ----------
    request : Request
    directory : Path, optional
        Run directory, by default the one that the selection would make. Its journal is read, but neither locked nor
        changed.
    machine : Machine, optional
        Where the selection would run; by default this machine, see `inspect_machine`.

    Returns
    -------
    DryRun

    Raises
    ------
    InputError
        As `prepare` and `Journal`: the dry run refuses what the selection would refuse.
    """
    prepared = prepare(request, fetch=False)
    if directory is None and prepared.summary is None:
        directory = prepared.default_directory
    runs_there: tuple[Run, ...] = ()
    notices: list[str] = []
    if directory is not None and prepared.summary is None:
        journal = Journal(directory, prepared.specification, read_only=True)
        runs_there, notices = journal.lines, journal.notices
    machine = machine or inspect_machine(request.plan.precision)
    shapes = {key: BatchShapes(tokens) for key, tokens in prepared.tokens.items()}
    memory = [MemoryEstimate(prepared, c, shapes[c.tokenizer], machine) for c in prepared.candidates]
    needs = [m.need() for m in memory]
    clock = DurationEstimate(prepared, shapes, machine, {m.candidate.name: m.devices for m in memory}, runs_there)
    planned = _planned(prepared, shapes, clock, runs_there)
    ledger = prepared.ledger()
    otherwise = sum(run.seconds for run in charged_records(runs_there))
    ledger.update(runs_there, otherwise if directory is None else elapsed(directory / STOPWATCH, otherwise))
    runs, flops, seconds, notes = _affordable(prepared, planned, ledger)
    # Candidates without runs left need no memory.
    unfinished = {run.candidate for run in runs if not run.done}
    needs = [n if n.name in unfinished else dataclasses.replace(n, problem="", remedy="") for n in needs]
    places, problems = _disk(prepared, shapes, runs, directory)
    if request.tangents:
        notes.append(
            "what measuring kernels and Hessian traces (--tangents) takes of memory is not in the forecast: only the "
            "compiled programs tell"
        )
    budget = "" if request.budget is None else ledger.describe(ledger.amount)
    if ledger.spent:
        budget += f", of which {ledger.describe(ledger.spent)} are spent"
    return DryRun(
        task=prepared.task.name,
        directory=None if directory is None else str(directory),
        method=request.method,
        target=prepared.target,
        train=len(prepared.task.train),
        validation=len(prepared.task.validation),
        test=len(prepared.task.test),
        sizes=tuple(sorted({r.size for r in runs if r.purpose in (CHOICE, LATER)})) or prepared.sizes,
        max_length=prepared.max_length,
        passes=request.plan.max_epochs,
        needs=tuple(needs),
        runs=tuple(runs),
        flops=flops,
        seconds=seconds,
        budget=budget,
        places=tuple(places),
        basis={"FLOPs": _flops_basis(prepared), "Time": clock.basis, "Memory": memory[0].basis},
        notes=(*prepared.notes, *notices, *notes),
        problems=tuple(problems),
    )


def _planned(
    prepared: Prepared, shapes: Mapping[str, BatchShapes], clock: DurationEstimate, runs: Sequence[Run]
) -> list[PlannedRun]:
    """Return all runs that there may be if the budget does not matter; see `PlannedRun.sure`."""
    request = prepared.request
    done = {run.key for run in runs if run.test_loss is not None and not run.part_of}
    measured = {run.key for run in runs if run.part_of in EXTRA_MEASUREMENTS}
    trials = request.search.trials(request.plan) - 1
    common = DEFAULT_RACE.sizes(prepared.target, prepared.sizes[0], prepared.sizes[-1])[0] if prepared.races else ()
    chosen = method(request.method)
    sizes = chosen.sizes(prepared.sizes)
    sure_sizes = sizes[::-1][: chosen.sizes_needed(request.gamma)] if chosen.stops_early else sizes
    planned = []
    for candidate in prepared.candidates:
        own = shapes[candidate.tokenizer]
        started = False

        def add(
            size: int, purpose: str, *, sure: bool, candidate: Candidate = candidate, own: BatchShapes = own
        ) -> None:
            """Plan a fine-tuning run, or an evaluation if `size` is 0."""
            nonlocal started
            known = prepared.summary is None and run_key(prepared, candidate, size) in done
            seconds = 0.0
            if not known:
                # The first run of a candidate loads and compiles.
                seconds = clock.run(candidate, size) + (0.0 if started else clock.start(candidate))
                started = True
            tokens = own.training_tokens(size)
            flops = clock.flops(candidate, size) if size else 0.0
            planned.append(
                PlannedRun(candidate.name, size, purpose, sure, known, trials if size else 0, tokens, flops, seconds)
            )

        if prepared.races:
            for size in prepared.sizes:
                add(size, CHOICE if size in common else LATER, sure=size in common)
        else:
            add(0, AS_IT_IS, sure=True)
            for size in sizes:
                add(size, CHOICE, sure=size in sure_sizes)
        if request.verify:
            add(prepared.target, VERIFICATION, sure=True)
        extra = [tangents(prepared, candidate, request.tangents)] if request.tangents else []
        extra += [score(prepared, candidate, name) for name in chosen.pretrained_scores]
        for one in extra:
            known = prepared.summary is None and one.key in measured
            seconds = 0.0 if known else clock.measurement(candidate, one.flops)
            tokens = own.training_tokens(one.samples)
            planned.append(
                PlannedRun(
                    *(candidate.name, one.samples, PURPOSES[one.name], True, known, 1, tokens, one.flops, seconds)
                )
            )
    order = (AS_IT_IS, CHOICE, LATER, SPECTRA, FEATURES, VERIFICATION, KERNEL)
    return sorted(planned, key=lambda run: (order.index(run.purpose), run.size))


def _affordable(
    prepared: Prepared, planned: Sequence[PlannedRun], ledger: Ledger
) -> tuple[list[PlannedRun], tuple[float, float], tuple[float, float], list[str]]:
    """Return the runs that the budget may pay for; (sure, at most) of their FLOPs and seconds; and notes."""
    request, budget = prepared.request, prepared.request.budget
    notes: list[str] = []
    runs = list(planned)
    timed = ledger.timed

    def price(run: PlannedRun) -> float:
        return run.seconds if timed else ledger.price(run.candidate, run.size)

    def on_budget(run: PlannedRun) -> bool:
        return run.purpose in (CHOICE, LATER)

    if budget is not None and not prepared.races:
        # Every candidate is trained on what the budget pays for with all of them.
        def prices(size: int) -> list[float]:
            return [price(r) for r in runs if on_budget(r) and r.size == size and not (timed and r.done)]

        kept = ledger.affordable(prepared.sizes, prices, method(request.method).sizes_needed(request.gamma))
        if len(kept) < len(prepared.sizes):
            first = prepared.sizes[len(kept)]
            notes.append(left_out(first))
        runs = [r for r in runs if not on_budget(r) or r.size in kept]
    left = [r for r in runs if not r.done]
    sure = [r for r in left if r.sure]
    possible = [r for r in left if not r.sure]
    cap = math.inf if budget is None else max(0.0, ledger.left - sum(price(r) for r in sure if on_budget(r)))

    def bounds(value: Callable[[PlannedRun], float]) -> tuple[float, float]:
        least = sum(map(value, sure))
        return least, least + _most([(price(r), value(r)) for r in possible], cap)

    flops, seconds = bounds(lambda r: r.flops), bounds(lambda r: r.seconds)
    if timed:
        # When the time is spent, the run under way is stopped.
        outside = sum(r.seconds for r in sure if r.purpose == VERIFICATION)
        seconds = tuple(min(s, outside + max(ledger.left, 0.0)) for s in seconds)  # type: ignore[assignment]
    return runs, flops, seconds, notes


def _most(items: Sequence[tuple[float, float]], limit: float) -> float:
    """Return an upper bound of the total value of (price, value) items that cost no more than `limit`.

    It is the optimum of the fractional knapsack problem: items in the order of price per value, the last one in part.
    """
    total = 0.0
    for price, value in sorted(items, key=lambda item: item[0] / max(item[1], 1e-300)):
        share = 1.0 if price <= limit else limit / price
        total += share * value
        limit -= share * price
    return total


def _flops_basis(prepared: Prepared) -> str:
    """Return the sentence on how FLOPs are counted."""
    request = prepared.request
    lora = any(c.lora for c in prepared.candidates)
    trials = request.search.trials(request.plan) - 1
    counted_as = {
        NLP_METRICS: "products and eigenvalues of the weights",
        LOG_ME: "2 for each weight and token it reads",
    }
    other = "".join(f"; {name}: {counted_as[name]}" for name in method(request.method).pretrained_scores)
    if request.tangents:
        other += f"; kernel and Hessian trace: {FLOPS_TEXT}"
    return (
        f"6 for each trained weight{' (4 for each frozen one)' if lora else ''} and token, "
        f"{request.plan.max_epochs} passes{f' and {trials} trials' if trials > 1 else ''} at most; padding and "
        f"evaluations are not in it{other}. A run whose trials all diverge is tried once more"
    )


def _disk(
    prepared: Prepared,
    shapes: Mapping[str, BatchShapes],
    runs: Sequence[PlannedRun],
    directory: Path | None,
) -> tuple[list[DiskNeed], list[str]]:
    """Return the disk space needed in each directory, and a problem for each file system that has too little."""
    wanted: list[tuple[str, Path, int]] = []  # what, where, bytes
    downloads = sum({c.listing.name: c.listing.missing for c in prepared.candidates if c.listing}.values())
    if downloads:
        from huggingface_hub import constants

        wanted.append(("models, from the hub", Path(constants.HF_HUB_CACHE), downloads))
    if prepared.summary is not None:
        size = (prepared.summary.download or 0) + (prepared.summary.disk or 0)
        if size:
            wanted.append(("data set, from the hub", prepared.summary.cache, size))
        tokens = sum(
            4 * int(part.token_counts.sum()) + 16 * len(part) for s in shapes.values() for part in s.tokens.parts
        )
        wanted.append(("tokens", cache_directory(), tokens))
    left = [r for r in runs if not r.done]
    if left:
        layers = sum(total_layers(c) * len(shapes[c.tokenizer].buckets) for c in prepared.candidates)
        own = DIRECTORY_DISK + sum(RUN_DISK * (1 + r.trials) for r in left) + COMPILED_DISK * layers
        wanted.append(("runs, report, programs", directory or Path("runs"), own))
    places, used, free_of = [], dict[int, int](), dict[int, int]()
    for what, path, needed in wanted:
        free, system = free_disk(path)
        places.append(DiskNeed(what, str(path), needed, free))
        used[system], free_of[system] = used.get(system, 0) + needed, free
    problems = [
        f"the disk has {format_bytes(free_of[system])} free, and {format_bytes(needed)} are needed "
        f"({_on_system(wanted, system)}). Make room, or set HF_HOME, LENSJAX_CACHE or --out to a larger disk"
        for system, needed in used.items()
        if needed > free_of[system]
    ]
    return places, problems


def _on_system(wanted: Sequence[tuple[str, Path, int]], system: int) -> str:
    """Return what takes how much space on one file system."""
    return "; ".join(f"{what} {format_bytes(size)}" for what, path, size in wanted if free_disk(path)[1] == system)
