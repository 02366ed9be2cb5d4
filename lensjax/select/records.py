"""Records of runs in the journal: written, read back, and described in words."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from lensjax.environment import versions
from lensjax.finetune import Trial
from lensjax.finetune.results import PRUNED
from lensjax.finetune.search import Point
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.job import Result
from lensjax.journal import Run, key_of
from lensjax.select.request import Prepared


def run_key(prepared: Prepared, candidate: Candidate, size: int) -> str:
    """Return the key of a run: a digest of everything that its loss depends on."""
    return key_of({**prepared.definition, "candidate": candidate.fingerprint, "size": size})


def common_facts(prepared: Prepared, candidate: Candidate) -> dict[str, Any]:
    """Return the facts that are recorded with every run of a candidate."""
    return {
        "parameters": candidate.parameters,
        "lora": None if candidate.lora is None else asdict(candidate.lora),
        "fingerprint": candidate.fingerprint,
        # For a hub id this is the snapshot's directory, whose name is the commit.
        "path": str(candidate.path),
        "versions": versions(),
        "definition": prepared.definition,
    }


def trial_record(key: str, candidate: Candidate, size: int, trial: Trial) -> Run:
    """Return the record of a trial; `key` is that of its run."""
    point = f"{key} {trial.learning_rate!r} {trial.batch_size}"
    return Run(
        key_of({"trial": point}),
        candidate.name,
        size,
        trial.test_loss,
        steps=trial.steps,
        tokens=trial.tokens,
        flops=trial.flops,
        reason=trial.reason,
        facts={"trial": asdict(trial)},
        samples=trial.samples,
        part_of=key,
    )


def read_trial(stored: dict[str, Any]) -> Trial:
    """Return the trial that a record in the journal holds."""
    history = tuple((int(step), float(loss)) for step, loss in stored["validation_history"])
    # The first journals called pruned trials hopeless.
    status = PRUNED if stored["status"] == "hopeless" else stored["status"]
    trial = Trial(**{**stored, "status": status, "validation_history": history})
    for name in ("learning_rate", "batch_size", "steps", "steps_run", "steps_per_epoch", "samples", "tokens", "flops"):
        if isinstance(getattr(trial, name), bool) or not isinstance(getattr(trial, name), int | float):
            raise TypeError(f"{name} is {getattr(trial, name)!r}, not a number")
    return trial


def known_trials(records: Iterable[Run]) -> dict[Point, Trial]:
    """Return the trials among the records of a run by their hyper-parameters; one that cannot be read is made again."""
    known = {}
    for record in records:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            trial = read_trial(record.facts["trial"])
            known[float(trial.learning_rate), int(trial.batch_size)] = trial
    return known


def version_notes(records: Iterable[Run]) -> list[str]:
    """Say which recorded runs were made by other versions of the packages than those installed now."""
    now, counts = versions(), collections.Counter[str]()
    for record in records:
        then = record.facts.get("versions")
        if isinstance(then, dict):
            others = [f"{name} {then[name]}" for name in now if then.get(name, now[name]) != now[name]]
            counts[", ".join(others)] += bool(others)
    return [
        f"{count} record{'s' * (count > 1)} of the journal {'were' if count > 1 else 'was'} made with {others}; "
        f"installed now: {', '.join(f'{name} {now[name]}' for name in now if f'{name} ' in others)}. "
        "Choose a new --out to measure all with the same versions"
        for others, count in counts.items()
        if count
    ]


def run_record(prepared: Prepared, candidate: Candidate, size: int, result: Result, why: str, seconds: float) -> Run:
    """Return the record of a finished run."""
    outcome = result.outcome
    own = asdict(outcome)
    shared = {name: own.pop(name) for name in ("test_loss", "steps", "tokens", "flops", "reason", "samples")}
    own["validation_loss"] = own["validation_loss"] if size else None  # JSON knows no NaN
    own["training_seconds"] = own.pop("seconds")
    own["test_loss_per_byte"] = outcome.test_loss * prepared.tokens[candidate.tokenizer].test.tokens_per_byte
    own |= {"step_flops": outcome.step_flops, "evaluation_flops": outcome.evaluation_flops, "why": why}
    facts = {**common_facts(prepared, candidate), **own, **result.facts}
    return Run(run_key(prepared, candidate, size), candidate.name, size, **shared, seconds=seconds, facts=facts)


def by_xla(runs: Sequence[Run]) -> str:
    """Say how many FLOPs XLA's cost analysis counts for the same runs; "" if it is not known for all of them."""
    counted = [(run.facts.get("step_flops"), run.facts.get("evaluation_flops")) for run in runs if run.size]
    if not counted or any(count is None for counts in counted for count in counts):
        return ""
    steps, evaluations = (sum(counts) for counts in zip(*counted, strict=True))
    own = sum(run.flops for run in runs)
    if not own:
        return ""
    return (
        f"; XLA counts {steps:.3g} FLOPs for the same training steps ({steps / own:.2f} times as many, "
        f"padding included) and {evaluations:.3g} for evaluations"
    )


def describe_trial(trial: Trial) -> str:
    """Describe a trial for `--verbose`: its hyper-parameters, its losses and why it ended."""
    text = f"trial with learning rate {trial.learning_rate:g}, batch size {trial.batch_size}: {trial.status}"
    if trial.test_loss is not None:
        text += f", test loss {trial.test_loss:.4f} with the weights of step {trial.steps}"
    history = ", ".join(f"{loss:.4f} at step {step}" for step, loss in trial.validation_history)
    return f"{text}; {trial.reason}; validation loss {history}"


def describe_run(run: Run) -> str:
    """Describe a run for `--verbose`: its devices, its precision, its FLOPs and its memory."""
    facts = run.facts
    if "device" not in facts:
        return f"{run.flops:.3g} FLOPs"
    text = f"made on {facts['devices']} JAX device(s) {facts['device']} in {facts['precision']}"
    text += f", sharding {facts['sharding']}; {run.flops:.3g} FLOPs"
    if "peak_bytes" in facts:
        text += f", at most {facts['peak_bytes'] / 2**20:,.0f} MiB of memory"
    return text
