"""How long fine-tuning takes on a machine, from the speed of matrix products and of runs made before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lensjax.jobs.candidates import Candidate
from lensjax.jobs.tokens import Tokens
from lensjax.journal import Run
from lensjax.select.dry_run.machine import Machine
from lensjax.select.request import Prepared
from lensjax.tasks import Encoded

# Calibrated in benchmarks/forecast.py, on two cores.
UTILISATION = {"cpu": 0.65, "gpu": 0.4, "tpu": 0.4}  # share of the matrix products' speed; gpu and tpu are guesses
HALF_SPEED_WIDTH = 64  # features at which a model reaches half of that share
STEP_SECONDS = 0.005  # overhead of a step
RUN_SECONDS = 1.0  # overhead of a run
START_SECONDS = 5.0  # to start a candidate's process
COMPILE_SECONDS = (1.0, 0.5)  # to compile for one padded length: constant part, and part for each layer


class BatchShapes:
    """How many batches of each padded length a task has for one tokenizer.

    Attributes
    ----------
    tokens : Tokens
    buckets : tuple of int
        Padded lengths, ascending.
    longest : int
        The longest of them.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        packed = tokens.train.packed
        self.buckets = tokens.buckets if packed is None else (-(-packed // 8) * 8,)
        self.longest = self.buckets[-1]
        self._tokens_up_to = np.concatenate([[0], np.cumsum(tokens.train.token_counts)])
        self._lengths = {id(part): part.lengths if packed is None else None for part in tokens.parts}

    def training_tokens(self, size: int) -> int:
        """Return how many tokens the first `size` training samples have, padding left out."""
        return int(self._tokens_up_to[size])

    def batches(self, part: Encoded, size: int, batch_size: int) -> dict[int, int]:
        """Return padded length -> number of batches, for the first `size` samples of `part`, one of `tokens.parts`."""
        lengths = self._lengths[id(part)]
        if lengths is None:
            assert part.packed is not None
            rows = math.ceil(int(part.token_counts[:size].sum()) / part.packed)
            return {self.longest: math.ceil(rows / batch_size)}
        rows_of = np.bincount(np.searchsorted(self.buckets, lengths[:size]), minlength=len(self.buckets))
        return {length: math.ceil(n / batch_size) for length, n in zip(self.buckets, rows_of, strict=True) if n}

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt; prompts are never cut."""
        return max(int(part.prompt_lengths.max(initial=0)) for part in self.tokens.parts)


def total_layers(candidate: Candidate) -> int:
    """Return how many layers a candidate has, in encoder and decoder together."""
    return candidate.config.layers + getattr(candidate.config, "decoder_layers", 0)


class DurationEstimate:
    """How long runs take on this machine.

    A run's time is its arithmetic at the speed of matrix products, with overheads. Where the journal holds finished
    runs, it is multiplied by how much longer these took than estimated.

    Attributes
    ----------
    basis : str
        A sentence on what the estimate is based on.
    """

    def __init__(
        self,
        prepared: Prepared,
        shapes: Mapping[str, BatchShapes],
        machine: Machine,
        devices: Mapping[str, int],
        runs: Sequence[Run],
    ) -> None:
        self.prepared, self.shapes, self.devices = prepared, shapes, devices
        ((dtype, self.matmul),) = machine.speed.items()
        self.utilisation = UTILISATION[machine.platform]
        self.slowdowns: dict[str, float] = {}  # of candidates with finished runs
        by_name = {c.name: c for c in prepared.candidates}
        measured: dict[str, list[tuple[float, float]]] = {}  # of each candidate, (seconds, estimate) of its runs
        for run in runs:
            candidate = by_name.get(run.candidate)
            if candidate is None or not run.size or run.part_of or run.test_loss is None or not run.seconds:
                continue
            if run.size not in (*prepared.sizes, prepared.target) or run.size > len(self.parts(candidate).train):
                continue
            # Training may have stopped early: the estimate is of all passes.
            share = run.flops / self.flops(candidate, run.size)
            expected = RUN_SECONDS + share * (self.training(candidate, run.size) - RUN_SECONDS)
            expected += 0.0 if run.candidate in measured else self.start(candidate)
            measured.setdefault(run.candidate, []).append((run.seconds, expected))
        for name, pairs in measured.items():
            self.slowdowns[name] = sum(s for s, _ in pairs) / sum(e for _, e in pairs)
        everyone = [pair for pairs in measured.values() for pair in pairs]
        self.mean_slowdown = sum(s for s, _ in everyone) / sum(e for _, e in everyone) if everyone else 1.0
        number = len(everyone)
        if number:
            self.basis = (
                f"from the {number} finished run{'s' if number > 1 else ''} in the run directory, which took "
                f"{self.mean_slowdown:.2g} times as long as this machine's speed would have it; at most, for training "
                "often stops before the last pass that is allowed"
            )
        else:
            devices_text = f" each, {machine.devices} of them" if machine.devices > 1 else ""
            guess = (
                "" if machine.platform == "cpu" else ", which is a guess: no such device was there to calibrate it on"
            )
            self.basis = (
                f"just now this machine ({machine.kind}) multiplied {dtype} matrices at {self.matmul / 1e9:,.0f} "
                f"GFLOP/s{devices_text}; wide models are taken to reach {self.utilisation:.0%} of it{guess}. Padding, "
                "evaluations, loading and compiling are in it; a machine that is busier then than it was now takes "
                "longer. At most, for training often stops before the last pass that is allowed"
            )

    def parts(self, candidate: Candidate) -> Tokens:
        """Return a candidate's tokens."""
        return self.prepared.tokens[candidate.tokenizer]

    def _slowdown(self, candidate: Candidate) -> float:
        """Return how many times as long as estimated a candidate's runs take; the mean of all if it has none yet."""
        return self.slowdowns.get(candidate.name, self.mean_slowdown)

    def flops(self, candidate: Candidate, size: int) -> float:
        """Return the FLOPs of all passes and trials of a run at most, as `lensjax.finetune.Outcome` counts them."""
        plan, search = self.prepared.request.plan, self.prepared.request.search
        passes = plan.max_epochs * (search.trials(plan) - 1)
        return candidate.flops_per_token * self.shapes[candidate.tokenizer].training_tokens(size) * passes

    def _arithmetic(self, candidate: Candidate, flops: float) -> float:
        """Return the seconds that a number of floating-point operations takes at this machine's speed."""
        width = candidate.config.width
        utilisation = self.utilisation * width / (width + HALF_SPEED_WIDTH) * self.devices.get(candidate.name, 1)
        return flops / (self.matmul * utilisation)

    def training(self, candidate: Candidate, size: int) -> float:
        """Return the seconds of a run at most, at this machine's speed, once the candidate is loaded and compiled."""
        request, parts = self.prepared.request, self.parts(candidate)
        shapes, plan = self.shapes[candidate.tokenizer], request.plan
        flops = steps = 0.0
        for batch_size, rates in request.search.grid(plan):
            batches = shapes.batches(parts.train, size, batch_size)
            per_epoch = sum(batches.values())
            evaluations = 1 + min(plan.max_epochs, math.ceil(plan.max_epochs * per_epoch / plan.min_steps_between))
            epoch = sum(n * batch_size * _row_flops(candidate, length) for length, n in batches.items())
            validation = self._evaluation(candidate, parts.validation, batch_size)
            test = self._evaluation(candidate, parts.test, batch_size)
            flops += len(rates) * (plan.max_epochs * epoch + evaluations * validation[0] + test[0])
            steps += len(rates) * (plan.max_epochs * per_epoch + (evaluations * validation[1] + test[1]) / 3)
        return RUN_SECONDS + steps * STEP_SECONDS + self._arithmetic(candidate, flops)

    def _evaluation(self, candidate: Candidate, part: Encoded, batch_size: int) -> tuple[float, int]:
        """Return the FLOPs and the batches of an evaluation on a part of the task."""
        batches = self.shapes[candidate.tokenizer].batches(part, len(part), batch_size)
        flops = sum(n * batch_size * _row_flops(candidate, length, share=1 / 3) for length, n in batches.items())
        return flops, sum(batches.values())

    def start(self, candidate: Candidate) -> float:
        """Return the seconds until a candidate is loaded and compiled."""
        each = COMPILE_SECONDS[0] + COMPILE_SECONDS[1] * total_layers(candidate)
        return START_SECONDS + len(self.shapes[candidate.tokenizer].buckets) * each

    def run(self, candidate: Candidate, size: int) -> float:
        """Return the seconds of a run at most."""
        slowdown = self._slowdown(candidate)
        if size == 0:
            parts, batch_size = self.parts(candidate), self.prepared.request.plan.batch_size
            flops, _ = self._evaluation(candidate, parts.test, batch_size)
            return RUN_SECONDS + slowdown * self._arithmetic(candidate, flops)
        return slowdown * self.training(candidate, size)

    def measurement(self, candidate: Candidate, flops: float) -> float:
        """Return the seconds of a measurement other than fine-tuning, from its floating-point operations."""
        return self.start(candidate) + self._slowdown(candidate) * self._arithmetic(candidate, flops)


def _row_flops(candidate: Candidate, length: int, share: float = 1.0) -> float:
    """Return the floating-point operations of one padded row, attention's scores included.

    Parameters
    ----------
    candidate : Candidate
    length : int
        Tokens of the row.
    share : float
        1 for training. An evaluation, a forward pass alone, takes 1/3 of training all weights. Under adapters, where no
        gradients of frozen weights are computed, that is half of training.
    """
    attention = 12 * total_layers(candidate) * candidate.config.width * length**2
    weights = candidate.flops_per_token if share == 1 else 6 * share * candidate.parameters
    return weights * length + share * attention
