"""How long fine-tuning takes on a machine: by the speed of matrix products, or by that of runs made before."""

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
UTILISATION = {"cpu": 0.65, "gpu": 0.4, "tpu": 0.4}  # of the speed of large matrices, by wide models; gpu, tpu: a guess
NARROW = 64  # features at which half of that is reached
STEP_SECONDS = 0.005  # that a step takes beside its arithmetic
RUN_SECONDS = 1.0  # that a run takes beside its steps
START_SECONDS = 5.0  # of a candidate's process
COMPILE_SECONDS = (1.0, 0.5)  # for each padded length: in any case, and for each layer


class Shapes:
    """How many batches of which padded length a task makes for one tokenizer.

    Attributes
    ----------
    longest : int
        Tokens of the longest padded row.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        packed = tokens.train.packed
        self.buckets = tokens.buckets if packed is None else (-(-packed // 8) * 8,)
        self.longest = self.buckets[-1]
        self.sums = np.concatenate([[0], np.cumsum(tokens.train.token_counts)])
        self._lengths = {id(part): part.lengths if packed is None else None for part in tokens.parts}

    def trained(self, size: int) -> int:
        """Return the tokens of the first samples of the training set."""
        return int(self.sums[size])

    def batches(self, part: Encoded, size: int, batch_size: int) -> dict[int, int]:
        """Return padded length -> number of batches of the first samples of a part."""
        lengths = self._lengths[id(part)]
        if lengths is None:
            assert part.packed is not None
            rows = math.ceil(int(part.token_counts[:size].sum()) / part.packed)
            return {self.longest: math.ceil(rows / batch_size)}
        held = np.bincount(np.searchsorted(self.buckets, lengths[:size]), minlength=len(self.buckets))
        return {length: math.ceil(n / batch_size) for length, n in zip(self.buckets, held, strict=True) if n}

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest input, which always has to fit."""
        return max(int(part.prompt_lengths.max(initial=0)) for part in self.tokens.parts)


def layers_of(candidate: Candidate) -> int:
    """Return how many layers a candidate has, those of encoder and decoder together."""
    return candidate.config.layers + getattr(candidate.config, "decoder_layers", 0)


class DurationEstimate:
    """How long runs take here: by the speed of matrix products, or by that of the journal's runs.

    Attributes
    ----------
    basis : str
        What the estimate rests on.
    """

    def __init__(
        self,
        prepared: Prepared,
        shapes: Mapping[str, Shapes],
        machine: Machine,
        devices: Mapping[str, int],
        runs: Sequence[Run],
    ) -> None:
        self.prepared, self.shapes, self.devices = prepared, shapes, devices
        ((dtype, self.matmul),) = machine.speed.items()
        self.share = UTILISATION[machine.platform]
        self.factor: dict[str, float] = {}
        by_name = {c.name: c for c in prepared.candidates}
        taken: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            candidate = by_name.get(run.candidate)
            if candidate is None or not run.size or run.part_of or run.test_loss is None or not run.seconds:
                continue
            if run.size not in (*prepared.sizes, prepared.target) or run.size > len(self.parts(candidate).train):
                continue
            # What was trained on, of what might have been.
            share = run.flops / self.flops(candidate, run.size)
            expected = RUN_SECONDS + share * (self.training(candidate, run.size) - RUN_SECONDS)
            expected += 0.0 if run.candidate in taken else self.start(candidate)
            taken.setdefault(run.candidate, []).append((run.seconds, expected))
        for name, pairs in taken.items():
            self.factor[name] = sum(s for s, _ in pairs) / sum(e for _, e in pairs)
        everyone = [pair for pairs in taken.values() for pair in pairs]
        self.other = sum(s for s, _ in everyone) / sum(e for _, e in everyone) if everyone else 1.0
        number = len(everyone)
        if number:
            self.basis = (
                f"from the {number} finished run{'s' if number > 1 else ''} in the run directory, which took "
                f"{self.other:.2g} times as long as this machine's speed would have it; at most, for training often "
                "stops before the last pass that is allowed"
            )
        else:
            many = f" each, {machine.devices} of them" if machine.devices > 1 else ""
            guess = (
                "" if machine.platform == "cpu" else ", which is a guess: no such device was there to calibrate it on"
            )
            self.basis = (
                f"just now this machine ({machine.kind}) multiplied {dtype} matrices at {self.matmul / 1e9:,.0f} "
                f"GFLOP/s{many}; wide models are taken to reach {self.share:.0%} of it{guess}. Padding, evaluations, "
                "loading and compiling are in it; a machine that is busier then than it was now takes longer. At most, "
                "for training often stops before the last pass that is allowed"
            )

    def parts(self, candidate: Candidate) -> Tokens:
        """Return a candidate's tokens."""
        return self.prepared.tokens[candidate.tokenizer]

    def flops(self, candidate: Candidate, size: int) -> float:
        """Return what all passes and trials of a run cost at most, as `lensjax.finetune.Outcome` counts it."""
        plan, search = self.prepared.request.plan, self.prepared.request.search
        passes = plan.max_epochs * (search.trials(plan) - 1)
        return candidate.flops_per_token * self.shapes[candidate.tokenizer].trained(size) * passes

    def _arithmetic(self, candidate: Candidate, work: float) -> float:
        """Return the seconds that so many floating-point operations take, by this machine's speed alone."""
        width = candidate.config.width
        used = self.share * width / (width + NARROW) * self.devices.get(candidate.name, 1)
        return work / (self.matmul * used)

    def training(self, candidate: Candidate, size: int) -> float:
        """Return the seconds of a run at most, by this machine's speed alone, loaded and compiled."""
        request, parts = self.prepared.request, self.parts(candidate)
        shapes, plan = self.shapes[candidate.tokenizer], request.plan
        work = steps = 0.0
        for batch_size, rates in request.search.grid(plan):
            made = shapes.batches(parts.train, size, batch_size)
            per_epoch = sum(made.values())
            evaluations = 1 + min(plan.max_epochs, math.ceil(plan.max_epochs * per_epoch / plan.min_steps_between))
            trained = sum(n * batch_size * _row(candidate, length, 1.0) for length, n in made.items())
            checking = self._evaluating(candidate, parts.validation, batch_size)
            testing = self._evaluating(candidate, parts.test, batch_size)
            work += len(rates) * (plan.max_epochs * trained + evaluations * checking[0] + testing[0])
            steps += len(rates) * (plan.max_epochs * per_epoch + (evaluations * checking[1] + testing[1]) / 3)
        return RUN_SECONDS + steps * STEP_SECONDS + self._arithmetic(candidate, work)

    def _evaluating(self, candidate: Candidate, part: Encoded, batch_size: int) -> tuple[float, int]:
        made = self.shapes[candidate.tokenizer].batches(part, len(part), batch_size)
        work = sum(n * batch_size * _row(candidate, length, 1 / 3) for length, n in made.items())
        return work, sum(made.values())

    def start(self, candidate: Candidate) -> float:
        """Return the seconds until a candidate is loaded and compiled."""
        each = COMPILE_SECONDS[0] + COMPILE_SECONDS[1] * layers_of(candidate)
        return START_SECONDS + len(self.shapes[candidate.tokenizer].buckets) * each

    def run(self, candidate: Candidate, size: int) -> float:
        """Return the seconds of a run at most."""
        factor = self.factor.get(candidate.name, self.other)
        if size == 0:
            parts, batch_size = self.parts(candidate), self.prepared.request.plan.batch_size
            return RUN_SECONDS + factor * self._arithmetic(
                candidate, self._evaluating(candidate, parts.test, batch_size)[0]
            )
        return factor * self.training(candidate, size)

    def measurement(self, candidate: Candidate, flops: float) -> float:
        """Return the seconds of measuring a kernel and a Hessian trace."""
        return self.start(candidate) + self.factor.get(candidate.name, self.other) * self._arithmetic(candidate, flops)


def _row(candidate: Candidate, length: int, share: float) -> float:
    """Floating-point operations of training on one padded row, attention's scores included, or a share of them.

    An evaluation is a third; under adapters, where no gradient of frozen weights is formed, it is half.
    """
    attention = 12 * layers_of(candidate) * candidate.config.width * length**2
    weights = candidate.flops_per_token if share == 1 else 6 * share * candidate.parameters
    return weights * length + share * attention
