"""Whether fine-tuning a candidate fits into memory, and which settings make it fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Collection, Iterable
from typing import Any

from lensjax.errors import InputError
from lensjax.finetune import Plan
from lensjax.finetune.memory import Footprint, footprint, weight_counts
from lensjax.finetune.search import parallel_trials
from lensjax.finetune.sharding import UnevenBatchError, decide
from lensjax.jobs.candidates import Candidate
from lensjax.jobs.defaults import ADAPTED
from lensjax.select.dry_run.duration import Shapes, layers_of
from lensjax.select.dry_run.forecast import MemoryNeed, amount
from lensjax.select.dry_run.machine import Machine
from lensjax.select.request import Prepared

PROCESS_BYTES = (650 * 2**20, 32 * 2**20)  # of a process that has compiled: in any case, and for each layer
REMEDY = "Choose a --batch-size (or --micro-batch) that is a multiple of their number, or --sharding auto."
SHORTEST = 16  # tokens that a remedy shortens samples to


class MemoryEstimate:
    """What one candidate needs of memory, as it is asked for and with changes."""

    def __init__(self, prepared: Prepared, candidate: Candidate, shapes: Shapes, machine: Machine) -> None:
        self.prepared, self.candidate, self.shapes, self.machine = prepared, candidate, shapes, machine
        self.plan = dataclasses.replace(prepared.request.plan, lora=candidate.lora)
        self.batch_sizes = [size for size, _ in prepared.request.search.grid(self.plan)]
        self.devices, self.full = 1, False

    @property
    def basis(self) -> str:
        """How memory was estimated."""
        where = (
            "the process and what compiling takes are in it, and it is compared with what is free now"
            if self.machine.platform == "cpu"
            else "of the device, and not calibrated there"
        )
        return (
            "at most: copies of the weights, AdamW's moments, gradients, and what the backward pass keeps of a batch "
            f"of the longest samples, found by tracing the model without its weights; {where}"
        )

    def _place(self, plan: Plan) -> tuple[int, bool]:
        """Return how many devices share a batch, and whether they share the weights too, as `lensjax.finetune` decides.

        Raises
        ------
        InputError
            If they cannot as they are asked to.
        """
        total, trained = weight_counts(self.candidate.config, plan.lora)
        try:
            return decide(
                plan.sharding,
                plan.computed_at_once(self.batch_sizes),
                trainable=trained,
                frozen=total - trained,
                devices=self.machine.devices,
                # The host's memory is that of all its devices together.
                memory=None if self.machine.platform == "cpu" else self.machine.memory,
            )
        except UnevenBatchError as error:
            raise InputError(error.problem) from error

    def _footprint(
        self, plan: Plan, length: int, batch_size: int | None = None, limit: float = math.inf
    ) -> tuple[Footprint, int]:
        """Return the memory of one device, and how many devices have it of the same memory."""
        platform = self.machine.platform
        devices, full = self._place(plan)
        copies = devices if platform == "cpu" else 1
        found = footprint(
            self.candidate.config,
            plan,
            batch_size=batch_size or max(self.batch_sizes),
            length=length,
            platform=platform,
            devices=devices,
            full=full,
            parallel_trials=self._parallel_trials(plan, devices),
            limit=limit / copies,
        )
        return found, copies

    def _parallel_trials(self, plan: Plan, devices: int) -> int:
        """Return how many learning rates are trained at once by a plan, if so many devices share a batch."""
        search = self.prepared.request.search
        total, trained = weight_counts(self.candidate.config, plan.lora)
        return parallel_trials(
            search,
            max(len(rates) for _, rates in search.grid(plan)),
            parameters=total,
            trainable=trained,
            memory=self.machine.memory,
            platform=self.machine.platform,
            sharded=devices > 1,
        )

    @property
    def _process(self) -> int:
        if self.machine.platform != "cpu":
            return 0
        return PROCESS_BYTES[0] + PROCESS_BYTES[1] * layers_of(self.candidate)

    def need(self) -> MemoryNeed:
        """Return what the candidate needs, and a remedy if it does not fit."""
        candidate, available = self.candidate, self.machine.memory
        try:
            self.devices, self.full = self._place(self.plan)
            found, copies = self._footprint(self.plan, self.shapes.longest)
        except InputError as error:
            # What training would refuse of this candidate.
            parts = dict.fromkeys(("weights", "optimiser", "working", "process"), 0)
            own = {"parameters": candidate.parameters, "trainable": candidate.trainable, **parts}
            return MemoryNeed(candidate.name, **own, available=available, problem=str(error), remedy=REMEDY)
        need = MemoryNeed(
            name=candidate.name,
            parameters=candidate.parameters,
            trainable=candidate.trainable,
            weights=copies * found.weights,
            optimiser=copies * found.optimiser,
            working=copies * found.working,
            process=self._process,
            available=available,
            download=0 if candidate.listing is None else candidate.listing.missing,
        )
        if available is None or need.memory <= available:
            return need
        problem = f"it needs about {amount(need.memory)} of memory, and {amount(available)} are free."
        return dataclasses.replace(need, problem=problem, remedy=self._remedy(available))

    def _changes(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """Return kinds of changes, the cheapest first, and of each the flags to type, the mildest first."""
        plan, count = self.plan, self.machine.devices
        micro = math.gcd(*self.batch_sizes)
        most = min(plan.micro_batch or max(self.batch_sizes), max(self.batch_sizes))
        sizes = [m for m in range(most - 1, 0, -1) if micro % m == 0]
        changes: dict[str, list[tuple[str, dict[str, Any]]]] = {
            "micro": [(f"--micro-batch {m}", {"micro_batch": m}) for m in sizes]
        }
        if self.machine.platform != "cpu" and plan.precision == "float32":
            changes["half"] = [("--precision bfloat16", {"precision": "bfloat16"})]
        if plan.lora is None:
            name = shlex.quote(self.candidate.asked + ADAPTED)
            changes["lora"] = [(f"--models ... {name} in its place", {"lora": self.prepared.request.lora})]
        lengths = []
        # With packed texts, shorter rows lose nothing; else the inputs must fit, and what does not fit is cut off.
        free = self.shapes.tokens.train.packed or self.prepared.summary is not None
        least = SHORTEST if free else max(SHORTEST, self.shapes.longest_prompt + 2)
        length = self.shapes.longest // 2
        while length // 8 * 8 >= least:
            lengths.append((f"--max-length {length // 8 * 8}", {"length": length // 8 * 8}))
            length //= 2
        changes["length"] = lengths
        if count > 1 and not self.full:
            changes["full"] = [("--sharding full", {"sharding": "full"})]
        if len(self.batch_sizes) == 1:
            # Evaluations take a batch whole, whatever the micro-batch.
            halves = itertools.takewhile(lambda size: size > 0, (self.batch_sizes[0] >> n for n in range(1, 16)))
            changes["batch"] = [(f"--batch-size {size}", {"batch_size": size}) for size in halves]
        return {kind: made for kind, made in changes.items() if made}

    def _remedy(self, available: int) -> str:
        every = self._changes()

        def usable(kinds: Collection[str]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
            """Return the changes of these kinds that leave each device something to do, if devices share the work.

            With fewer samples at once than that, fewer devices would share, and memory would be needed for more.
            """
            devices = self.machine.devices if "full" in kinds else self.devices
            found = {}
            for kind in kinds:
                sizes = ({"micro_batch", "batch_size"} & change.keys() for _, change in every[kind])
                pairs = zip(every[kind], sizes, strict=True)
                found[kind] = [c for c, names in pairs if all(c[1][name] % devices == 0 for name in names)]
            return found

        def needed(choice: Iterable[tuple[str, dict[str, Any]]]) -> float:
            settings = {name: value for _, change in choice for name, value in change.items()}
            length = settings.pop("length", self.shapes.longest)
            batch_size = settings.get("batch_size")
            plan = dataclasses.replace(self.plan, **settings)
            try:
                found, copies = self._footprint(plan, length, batch_size, available)
            except InputError:
                return math.inf
            return copies * found.total + self._process

        nothing = "No setting makes it fit: leave this candidate out, or use a machine with more memory."
        together = (usable(every), usable(every.keys() - {"full"}))
        if all(needed([made[-1] for made in changes.values() if made]) > available for changes in together):
            return nothing
        for number in range(1, len(every) + 1):
            for kinds in itertools.combinations(every, number):
                changes = usable(kinds)
                # If the strongest of them do not help, none does.
                if not all(changes.values()) or needed([changes[kind][-1] for kind in kinds]) > available:
                    continue
                # Micro-batches change nothing but the speed: with another change, the smallest is tried at once.
                mild = (changes[k][-1:] if number > 1 and k == "micro" else changes[k] for k in kinds)
                choice = next(c for c in itertools.product(*mild) if needed(c) <= available)
                texts = " and ".join(text for text, _ in choice)
                why = {
                    "micro": "fewer samples at once; the result is the same, up to rounding",
                    "half": "computes with half as many bytes",
                    "lora": "trains small adapters instead of all weights",
                    "length": "cuts longer samples off, for all candidates",
                    "full": "the devices share the weights",
                    "batch": "fewer samples in a step, for all candidates",
                }
                reasons = "; ".join(why[kind] for kind in kinds)
                return f"Remedy: {texts} ({reasons}). It then needs about {amount(int(needed(choice)))}."
        return nothing
