"""What a selection by fine-tuning needs, all of it checked before long work: task, candidates, subset sizes, tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lensjax import environment
from lensjax.errors import InputError
from lensjax.jobs.candidates import Candidate, find_candidates
from lensjax.jobs.request import JobRequest, dataset_summary_of, task_of
from lensjax.jobs.tokens import Tokens, placeholder_tokens, tokens_of
from lensjax.journal import ENCODING, key_of
from lensjax.select.budget import Budget, Ledger
from lensjax.selectors import DEFAULT, DEFAULT_RACE, GAMMA, TAU, check_rule, method
from lensjax.selectors.methods import LOG_ME
from lensjax.tasks import Task
from lensjax.tasks.dataset_info import DatasetSummary
from lensjax.tasks.example import ENCODING_VERSION

DEMO_SMALLEST, SMALLEST = 50, 200
TARGET_TO_VISIBLE = 8  # target / largest subset, by default


@dataclasses.dataclass(frozen=True)
class Request(JobRequest):
    """What the user asked a selection for; `None` means the default.

    Attributes
    ----------
    out : Path or None
        Run directory.
    smallest, visible, target : int or None
        Smallest subset (by default `SMALLEST`, for the demo task `DEMO_SMALLEST`); largest subset that may be used
        (by default an eighth of the target); samples the choice is made for (by default all of the task's).
    method : str
    gamma, tau : int, float
    budget : Budget or None
        What the choice may cost, verification not included. With the method "averaged" the candidates race
        (`lensjax.selectors.propose`); with others the budget decides the largest subset. None: all candidates are
        trained on all subset sizes that the method needs.
    loss_unit : {"token", "byte"}
        Whether a loss is the mean over tokens, as in the paper, or over UTF-8 bytes of target text, which are the
        same for every tokenizer.
    tangents : int
        Training samples on which each candidate's neural tangent kernel and Hessian trace are measured at the end;
        0: they are not measured.
    verify : bool
        Fine-tune every candidate on `target` samples too, and say how good the choice was.

    See `lensjax.jobs.request.JobRequest` for the models, the task and the training.
    """

    out: Path | None = None
    smallest: int | None = None
    visible: int | None = None
    target: int | None = None
    method: str = DEFAULT
    gamma: int = GAMMA
    tau: float = TAU
    budget: Budget | None = None
    loss_unit: str = "token"
    tangents: int = 0
    verify: bool = False

    @property
    def races(self) -> bool:
        """Whether the candidates race instead of being trained on all sizes."""
        return self.budget is not None and method(self.method).races


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that was checked as a whole, with all that was loaded or computed for it.

    Attributes
    ----------
    request : Request
    task : Task
    candidates : tuple of Candidate
    tokens : mapping of str to Tokens
        The task's tokens, by the candidates' `tokenizer`.
    sizes : tuple of int
        Subset sizes, ascending.
    target : int
        Samples the choice is made for.
    max_length : int
        Tokens kept of a sample, for the candidates' limits maybe fewer than were asked for.
    notes : tuple of str
        For the report.
    summary : DatasetSummary or None
        Of a data set that was not downloaded, for a dry run: then `task` and `tokens` are placeholders of its size.
    """

    request: Request
    task: Task
    candidates: tuple[Candidate, ...]
    tokens: Mapping[str, Tokens]
    sizes: tuple[int, ...]
    target: int
    max_length: int
    notes: tuple[str, ...]
    summary: DatasetSummary | None = None

    @property
    def definition(self) -> dict[str, Any]:
        """Everything that a run's loss depends on except its candidate and size; a run's key is made of all three."""
        request = self.request
        return {
            "task": self.task.fingerprint,
            "validation": request.validation,
            "test": request.test,
            "seed": request.seed,
            "max_length": self.max_length,
            "packed": self.task.text_only,
            "plan": dataclasses.asdict(request.plan),
            "search": request.search.as_record(),
        }

    @property
    def specification(self) -> dict[str, Any]:
        """Everything that a run directory belongs to: two selections share one only if this is equal."""
        return {
            **self.definition,
            ENCODING: ENCODING_VERSION,
            "candidates": {c.name: c.fingerprint for c in self.candidates},
            "sizes": list(self.sizes),
            "target": self.target,
            "gamma": self.request.gamma,
            "tau": self.request.tau,
            "loss_unit": self.request.loss_unit,
        }

    @property
    def default_directory(self) -> Path:
        """Run directory without --out; it depends on the specification, so that the same command continues there."""
        return Path("runs") / f"{self.task.name}-{key_of(self.specification)[:8]}"

    @property
    def races(self) -> bool:
        """Whether the candidates race instead of being trained on all sizes."""
        return self.request.races

    def ledger(self) -> Ledger:
        """Return a new account of the budget."""
        plan, search = self.request.plan, self.request.search
        return Ledger(
            self.request.budget,
            weights={c.name: float(c.parameters) for c in self.candidates},
            flops_per_sample={
                c.name: c.flops_per_token * self.tokens[c.tokenizer].most_per_sample(self.sizes)
                for c in self.candidates
            },
            passes=plan.max_epochs * search.trials(plan),
            target=self.target,
        )


def prepare(request: Request, *, fetch: bool = True) -> Prepared:
    """Check a request as a whole before any long work.

    Parameters
    ----------
    request : Request
    fetch : bool
        Whether to download weights and rows of data sets from the hub. If not, only the models' configurations,
        tokenizers and headers of weight files are read, and only the data set's metadata.

    Raises
    ------
    InputError
        As `lensjax.tasks.load_task` and `lensjax.models.check_checkpoint`; if there are fewer than two candidates or
        one is named twice; if subset sizes do not fit the task or each other.
    """
    environment.require_exact_backend()
    check_rule(request.gamma, request.tau)
    request.plan.check()
    request.search.check(request.plan)
    summary = None if fetch else dataset_summary_of(request)
    task = task_of(request) if summary is None else summary.task
    sizes, target = _sizes(request, len(task.train))
    candidates = find_candidates(request.models, request.lora, fetch=fetch, locate=request.located)
    limits = [c.config.max_length for c in candidates]
    max_length = min([request.max_length, *(n for n in limits if n is not None)])
    notes = [*task.notes, *(summary.notes if summary is not None else ())]
    tokens: dict[str, Tokens] = {}
    for candidate in candidates:
        needed = target if request.verify else sizes[-1]
        if summary is not None:
            if candidate.tokenizer not in tokens:
                tokens[candidate.tokenizer] = placeholder_tokens(summary, candidate, sizes[-1], needed, max_length)
            continue
        if candidate.tokenizer not in tokens:
            encoded = tokens_of(task, candidate, sizes[-1], needed, max_length)
            tokens[candidate.tokenizer] = encoded
            truncated = sum(part.truncated for part in encoded.parts)
            if truncated:
                notes.append(f"{truncated} samples were cut at {max_length} tokens ({candidate.name}'s tokenizer)")
        tokens[candidate.tokenizer].check_vocabulary("--models", candidate)
    if len(tokens) > 1 and request.loss_unit == "token":
        notes.append(
            "the candidates have different tokenizers: losses per token are compared as in the paper, but a token is "
            "not the same piece of text for all of them; --loss-unit byte compares the same text"
        )
    if (
        len({tokenizer.removesuffix("-separate") for tokenizer in tokens}) > 1
        and LOG_ME in method(request.method).pretrained_scores
    ):
        notes.append(
            "the candidates have different tokenizers: LogME's classes are each candidate's own tokens, so that "
            "method log_me hardly compares them"
        )
    if request.tangents > sizes[-1]:
        raise InputError(f"--tangents {request.tangents}: the largest subset has {sizes[-1]} samples; lower it.")
    prepared = Prepared(request, task, candidates, tokens, sizes, target, max_length, tuple(notes), summary)
    _check_budget(prepared)
    return prepared


def _check_budget(prepared: Prepared) -> None:
    """Refuse a budget that does not pay for the runs that every choice needs."""
    budget, request = prepared.request.budget, prepared.request
    if budget is None:
        return
    if prepared.races:
        least = DEFAULT_RACE.sizes(prepared.target, prepared.sizes[0], prepared.sizes[-1])[0]
    else:
        least = prepared.sizes[: method(request.method).sizes_needed(request.gamma)]
    ledger = prepared.ledger()
    needed = sum(ledger.price(c.name, size) for c in prepared.candidates for size in least)
    if needed > ledger.amount:
        raise InputError(
            f"--budget ({ledger.describe(ledger.amount)}): training every candidate on {', '.join(map(str, least))} "
            f"samples alone may cost up to {ledger.describe(needed)}. Raise --budget, or lower --smallest or "
            "--max-epochs."
        )


def _sizes(request: Request, available: int) -> tuple[tuple[int, ...], int]:
    """Return the doubling subset sizes, ascending, and the target."""
    target = available if request.target is None else request.target
    smallest = request.smallest or (DEMO_SMALLEST if request.task is None else SMALLEST)
    if available < smallest:
        raise InputError(
            f"the task has {available} training samples, fewer than the smallest subset ({smallest}). Add "
            "samples, set fewer aside (--validation, --test), or lower --smallest."
        )
    visible = request.visible
    if visible is None:
        visible = max(min(target // TARGET_TO_VISIBLE, available), smallest)
    if visible < smallest:
        raise InputError(f"--visible {visible} is below the smallest subset ({smallest}); lower --smallest.")
    if visible > available:
        raise InputError(f"--visible {visible}: the task has {available} training samples; lower it.")
    if request.races:
        return _race_sizes(request, smallest, available, target), target
    sizes = []
    size = smallest
    while size <= visible:
        sizes.append(size)
        size *= 2
    if target <= sizes[-1]:
        raise InputError(
            f"--target {target} is not above the largest visible subset ({sizes[-1]}). Raise --target or lower "
            "--visible."
        )
    needed = method(request.method).sizes_needed(request.gamma)
    if len(sizes) < needed:
        raise InputError(
            f"{len(sizes)} subset size(s) ({', '.join(map(str, sizes))}) are too few: method {request.method} needs "
            f"{needed}. Lower --smallest or raise --visible."
        )
    if request.verify and target > available:
        raise InputError(f"--verify: the target is {target} samples, but the task has {available} to fine-tune on.")
    return tuple(sizes), target


def _race_sizes(request: Request, smallest: int, available: int, target: int) -> tuple[int, ...]:
    """Return the sizes of a race's runs, ascending."""
    if request.visible is not None and request.visible < 2 * smallest:
        raise InputError(f"--visible {request.visible}: with --budget it is at least two of --smallest ({smallest}).")
    common, stages = DEFAULT_RACE.sizes(target, smallest, available if request.visible is None else request.visible)
    if common[-1] > available or common[-1] >= target:
        raise InputError(
            f"--budget: the task has {available} training samples, but every candidate is first trained on "
            f"{', '.join(map(str, common))}. Lower --smallest."
        )
    return (*common, *(size for size, _ in stages))
