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
from lensjax.select.dry_run.duration import BatchShapes, total_layers
from lensjax.select.dry_run.forecast import MemoryNeed, format_bytes
from lensjax.select.dry_run.machine import Machine
from lensjax.select.request import Prepared

PROCESS_BYTES = (650 * 2**20, 32 * 2**20)  # of a process that has compiled: constant part, and part for each layer
UNEVEN_REMEDY = "Choose a --batch-size (or --micro-batch) that is a multiple of their number, or --sharding auto."
SHORTEST_ROWS = 16  # no remedy proposes a smaller --max-length
Change = tuple[str, dict[str, Any]]
"""What to type, and the settings that it changes."""


class MemoryEstimate:
    """How much memory fine-tuning one candidate needs, with the settings asked for and with changed ones.

    Attributes
    ----------
    devices : int
        Devices that share a batch; known once `need` was called, as is the next.
    full : bool
        Whether they share the weights too.
    """

    def __init__(self, prepared: Prepared, candidate: Candidate, shapes: BatchShapes, machine: Machine) -> None:
        self.prepared, self.candidate, self.shapes, self.machine = prepared, candidate, shapes, machine
        self.plan = dataclasses.replace(prepared.request.plan, lora=candidate.lora)
        self.batch_sizes = [size for size, _ in prepared.request.search.grid(self.plan)]
        self.devices, self.full = 1, False

    @property
    def basis(self) -> str:
        """A sentence on how memory was estimated."""
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
        """Return the memory that one device needs, and how many devices need it from the same memory."""
        platform = self.machine.platform
        devices, full = self._place(plan)
        copies = devices if platform == "cpu" else 1
        per_device = footprint(
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
        return per_device, copies

    def _parallel_trials(self, plan: Plan, devices: int) -> int:
        """Return how many learning rates a plan trains at once if a batch is shared by that number of devices."""
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
        """Bytes of the process itself, as far as it shares the devices' memory."""
        if self.machine.platform != "cpu":
            return 0
        return PROCESS_BYTES[0] + PROCESS_BYTES[1] * total_layers(self.candidate)

    def need(self) -> MemoryNeed:
        """Return the memory that the candidate needs, with a remedy if it does not fit."""
        candidate, available = self.candidate, self.machine.memory
        try:
            self.devices, self.full = self._place(self.plan)
            per_device, copies = self._footprint(self.plan, self.shapes.longest)
        except InputError as error:
            # Training would refuse this candidate too.
            parts = dict.fromkeys(("weights", "optimiser", "working", "process"), 0)
            own = {"parameters": candidate.parameters, "trainable": candidate.trainable, **parts}
            return MemoryNeed(candidate.name, **own, available=available, problem=str(error), remedy=UNEVEN_REMEDY)
        need = MemoryNeed(
            name=candidate.name,
            parameters=candidate.parameters,
            trainable=candidate.trainable,
            weights=copies * per_device.weights,
            optimiser=copies * per_device.optimiser,
            working=copies * per_device.working,
            process=self._process,
            available=available,
            download=0 if candidate.listing is None else candidate.listing.missing,
        )
        if available is None or need.memory <= available:
            return need
        problem = f"it needs about {format_bytes(need.memory)} of memory, and {format_bytes(available)} are free."
        return dataclasses.replace(need, problem=problem, remedy=self._remedy(available))

    def _changes(self) -> dict[str, list[Change]]:
        """Return kind -> changes of settings that save memory.

        The kinds are in the order in which they are tried, those first that cost the user least; so are the changes of
        a kind.
        """
        plan = self.plan
        common_divisor = math.gcd(*self.batch_sizes)
        current = min(plan.micro_batch or max(self.batch_sizes), max(self.batch_sizes))
        smaller = [m for m in range(current - 1, 0, -1) if common_divisor % m == 0]
        changes: dict[str, list[Change]] = {"micro": [(f"--micro-batch {m}", {"micro_batch": m}) for m in smaller]}
        if self.machine.platform != "cpu" and plan.precision == "float32":
            changes["half"] = [("--precision bfloat16", {"precision": "bfloat16"})]
        if plan.lora is None:
            name = shlex.quote(self.candidate.asked + ADAPTED)
            changes["lora"] = [(f"--models ... {name} in its place", {"lora": self.prepared.request.lora})]
        lengths = []
        # Packed texts may have rows of any length; otherwise prompts must fit, and targets are cut.
        any_length = self.shapes.tokens.train.packed or self.prepared.summary is not None
        least = SHORTEST_ROWS if any_length else max(SHORTEST_ROWS, self.shapes.longest_prompt + 2)
        length = self.shapes.longest // 2
        while length // 8 * 8 >= least:
            lengths.append((f"--max-length {length // 8 * 8}", {"length": length // 8 * 8}))
            length //= 2
        changes["length"] = lengths
        if self.machine.devices > 1 and not self.full:
            changes["full"] = [("--sharding full", {"sharding": "full"})]
        if len(self.batch_sizes) == 1:
            # A micro-batch does not help evaluations, which compute a whole batch at once.
            halves = itertools.takewhile(lambda size: size > 0, (self.batch_sizes[0] >> n for n in range(1, 16)))
            changes["batch"] = [(f"--batch-size {size}", {"batch_size": size}) for size in halves]
        return {kind: own for kind, own in changes.items() if own}

    def _remedy(self, available: int) -> str:
        """Return the sentence that says which settings make the candidate fit; as few changes as possible."""
        all_changes = self._changes()

        def divisible(kinds: Collection[str]) -> dict[str, list[Change]]:
            """Return the changes of these kinds whose batches can be divided among the devices.

            Others would leave devices idle, so that the remaining ones need more memory.
            """
            devices = self.machine.devices if "full" in kinds else self.devices
            allowed = {}
            for kind in kinds:
                sizes = ({"micro_batch", "batch_size"} & settings.keys() for _, settings in all_changes[kind])
                pairs = zip(all_changes[kind], sizes, strict=True)
                allowed[kind] = [c for c, names in pairs if all(c[1][name] % devices == 0 for name in names)]
            return allowed

        def memory_with(choice: Iterable[Change]) -> float:
            """Return the bytes needed with these changes; infinite if training would refuse them."""
            settings = {name: value for _, change in choice for name, value in change.items()}
            length = settings.pop("length", self.shapes.longest)
            batch_size = settings.get("batch_size")
            plan = dataclasses.replace(self.plan, **settings)
            try:
                per_device, copies = self._footprint(plan, length, batch_size, available)
            except InputError:
                return math.inf
            return copies * per_device.total + self._process

        nothing = "No setting makes it fit: leave this candidate out, or use a machine with more memory."
        # Tracing takes time: first all changes together, each the strongest of its kind.
        together = (divisible(all_changes), divisible(all_changes.keys() - {"full"}))
        if all(memory_with([own[-1] for own in changes.values() if own]) > available for changes in together):
            return nothing
        for number in range(1, len(all_changes) + 1):
            for kinds in itertools.combinations(all_changes, number):
                changes = divisible(kinds)
                # If the strongest change of each kind does not help, weaker ones do not either.
                if not all(changes.values()) or memory_with([changes[kind][-1] for kind in kinds]) > available:
                    continue
                # Micro-batches change only the speed: together with another change, the smallest is tried at once.
                tried = (changes[k][-1:] if number > 1 and k == "micro" else changes[k] for k in kinds)
                choice = next(c for c in itertools.product(*tried) if memory_with(c) <= available)
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
                return f"Remedy: {texts} ({reasons}). It then needs about {format_bytes(int(memory_with(choice)))}."
        return nothing
