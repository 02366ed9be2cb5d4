"""Make the live benchmark: pre-train 14 small candidates, fine-tune each on three tasks at doubling sizes, measure.

    python benchmarks/demo/make_data.py            # texts and tokenizer, once
    python benchmarks/live/make.py [--minutes 55]  # goes on where it was; stops by itself between two runs
    python benchmarks/live/make.py --smoke         # everything at toy scale, seconds each, into a folder of its own

Each row of results/live/runs.jsonl is a finished measurement; the file only grows and can be committed at any time.
Kinds of rows: "model" (weights, NLPmetrics), "zero" (size 0, kernels and traces), "log_me", "run" (a fine-tuning run,
with kernels and traces at the weights kept; a quarter of them are made with seed 1 besides, without these). What is
measured of kernels: tangents.py. package.py makes tables of the rows, analyse.py works out what they say.

Measured so far are 12 candidates: the two of width 128 take an hour each on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from candidates import CANDIDATES, LENGTH, Candidate
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))  # the scripts are run by path

from make_data import DEMO, END_OF_TEXT

from data import TASKS, Source
from lensjax.finetune import DivergedError, FineTuner, Plan, Search, Weights, target_features, tune
from lensjax.jobs.pretrained_scores import POSITIONS, samples_for
from lensjax.models import init_model, load_model, load_tokenizer, save_pretrained
from lensjax.selectors import log_me, nlp_metrics
from lensjax.tasks import Encoded, batches, bucket_lengths, encode, load_task
from tangents import measure_tangents

SIZES = (100, 200, 400, 800, 1_600, 3_200)
SEED = 2025
BATCH = 16
EXAMPLES = 32  # of a kernel and a trace
LOG_ME_SAMPLES = 400  # at most: the smallest budget that analyse.py compares methods at
PLAN = Plan(learning_rate=1e-3, batch_size=32, max_epochs=12, patience=2)
RESULTS = Path(__file__).parents[1] / "results" / "live"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is."""

    candidates: tuple[Candidate, ...] = CANDIDATES
    tasks: tuple[str, ...] = TASKS
    sizes: tuple[int, ...] = SIZES
    steps: float = 1.0
    validation: int = 300
    test: int = 500
    plan: Plan = PLAN


SMOKE = Scale(
    candidates=(CANDIDATES[0], CANDIDATES[11]),
    tasks=TASKS[:1],
    sizes=(20, 40),
    steps=0.002,
    validation=20,
    test=20,
    plan=Plan(learning_rate=1e-3, batch_size=16, max_epochs=1),
)


class Rows:
    """The file of rows: what is in it is done."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text().split("\n") if path.exists() else [""]
        if lines[-1]:  # a row cut short by a crash
            lines[-1] = ""
            path.write_text("\n".join(lines))
        self.rows = [json.loads(line) for line in lines if line]

    def done(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:200], flush=True)


def pretrain(candidate: Candidate, source: Source, tokenizer: Any, target: Path, steps: int) -> None:
    """Train one model from random weights and save it; its texts are drawn evenly."""
    streams = []
    for name in candidate.texts:
        encoded = tokenizer([END_OF_TEXT + text for text in source.text(name)], verbose=False)["input_ids"]
        streams.append(np.concatenate([np.asarray(ids, np.int32) for ids in encoded]))
    model = init_model(candidate.config(len(tokenizer)), jax.random.key(SEED))
    seq2seq = getattr(model.config, "is_encoder_decoder", False)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, candidate.learning_rate, max(steps // 20, 1), steps + 1, candidate.learning_rate / 50
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1))

    @jax.jit
    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        def mean(params: Any) -> jax.Array:
            # An encoder-decoder reads the first half of the window and is scored on the second.
            half = LENGTH // 2
            parts = (ids[:, :half], ids[:, half:]) if seq2seq else (ids, ids)
            batch = dict(zip(("input_ids", "labels"), parts, strict=True))
            batch["attention_mask"] = jnp.ones_like(batch["input_ids"])
            losses, counts = nnx.merge(graph, params, rest).loss_sums(batch)
            return losses.sum() / counts.sum()

        loss, gradient = jax.value_and_grad(mean)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, rng = optimiser.init(params), np.random.default_rng([SEED, CANDIDATES.index(candidate)])
    for number in range(steps):
        which = rng.integers(len(streams), size=BATCH)
        starts = [rng.integers(len(streams[i]) - LENGTH) for i in which]
        ids = np.stack([streams[i][s : s + LENGTH] for i, s in zip(which, starts, strict=True)])
        params, state, loss = step(params, state, ids)
        if (number + 1) % 200 == 0:
            print(f"{candidate.name}: step {number + 1} of {steps}, loss {float(loss):.3f}", flush=True)
    # Aside first: a model that is there is finished.
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        save_pretrained(nnx.merge(graph, params, rest), Path(aside) / "model", tokenizer, dtype=jnp.float32)
        (Path(aside) / "model").rename(target)


def work(scale: Scale, source: Source, rows: Rows, models: Path, only: Sequence[str] = ()) -> Iterator[None]:
    """Make whatever is missing (of all candidates if `only` names none); yields between two measurements."""
    tokenizer_path = source.work / "tokenizer"
    if not tokenizer_path.exists():
        tokenizer_path = next(p for p in sorted((DEMO / "models").iterdir()) if p.is_dir())
    tokenizer = load_tokenizer(tokenizer_path)
    pad_id = tokenizer.pad_token_id or 0
    models.mkdir(parents=True, exist_ok=True)
    for number, candidate in enumerate(scale.candidates):
        if only and candidate.name not in only:
            continue
        directory = models / candidate.name
        if not directory.exists():
            pretrain(candidate, source, tokenizer, directory, max(int(candidate.steps * scale.steps), 2))
            yield
        model = load_model(directory)
        params = nnx.state(model, nnx.Param)
        if not rows.done(kind="model", candidate=candidate.name):
            spectra = nlp_metrics(params, min_eigenvalues=40)
            names = ("pl_alpha", "e_tpl_alpha", "e_tpl_lambda", "log_norm", "log_spectral_norm")
            rows.add(
                {
                    "kind": "model",
                    "candidate": candidate.name,
                    "family": candidate.family,
                    "texts": candidate.texts,
                    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                    "nlp_metrics": {name: spectra.mean(name) for name in names},
                }
            )
            yield
        for task_number, name in enumerate(scale.tasks):
            yield from fine_tune(scale, source, rows, candidate, model, tokenizer, pad_id, name, number + task_number)


def fine_tune(
    scale: Scale,
    source: Source,
    rows: Rows,
    candidate: Candidate,
    model: Any,
    tokenizer: Any,
    pad_id: int,
    name: str,
    offset: int,
) -> Iterator[None]:
    """Make all measurements of one candidate on one task."""

    def fits(text: str) -> bool:
        return len(tokenizer(text, verbose=False)["input_ids"]) <= LENGTH * 3 // 4  # the rest is for the target

    task = load_task(source.task(name, fits), validation=scale.validation, test=scale.test, seed=0)
    separate = getattr(model.config, "is_encoder_decoder", False)

    def encoded(examples: Any) -> Encoded:
        return encode(examples, tokenizer, LENGTH, separate=separate)

    train = encoded(task.subset(scale.sizes[-1]))
    validation, test = encoded(task.validation), encoded(task.test)
    buckets = bucket_lengths(np.concatenate([train.lengths, validation.lengths, test.lengths]))
    here = {"candidate": candidate.name, "task": name}
    plan = scale.plan
    # Compiled when first needed: a task that is done costs nothing.
    tuners: list[FineTuner] = []

    def tuner() -> FineTuner:
        if not tuners:
            tuners.append(FineTuner(model, plan, buckets, pad_id))
        return tuners[0]

    # Padded to one length, so that what is compiled serves all tasks.
    few = train.first(min(EXAMPLES, len(train)))
    batch = next(batches(few, batch_size=EXAMPLES, buckets=(LENGTH,), pad_id=pad_id))
    seen: list[Any] = []

    def before() -> Any:
        if not seen:
            seen.append(measure_tangents(model, batch))
        return seen[0]

    if not rows.done(kind="zero", **here):
        outcome = tuner().zero_shot(test)
        rows.add({"kind": "zero", **here, "test_loss": outcome.test_loss} | before()[0])
        yield
    if not rows.done(kind="log_me", **here):
        # As the command does: of the first samples that hold enough tokens, none beyond the smallest budget compared.
        first = train.first(samples_for(train, min(LOG_ME_SAMPLES, len(train))))
        score = log_me(*target_features(model, first, buckets, pad_id, positions=POSITIONS, batch_size=BATCH))
        rows.add({"kind": "log_me", **here, "samples": len(first), "log_me": score})
        yield
    for index, size in enumerate(scale.sizes):
        # A quarter of the runs twice, spread over candidates, tasks and sizes.
        for seed in (0, 1) if (offset + index) % 4 == 0 else (0,):
            if rows.done(kind="run", **here, size=size, seed=seed):
                continue
            kept: list[Any] = []

            def keep(found: Weights, kept: list[Any] = kept) -> None:
                if found.finished:
                    kept[:] = [jax.tree.map(jnp.copy, found.params)]

            parts = (train.first(size), validation, test)
            try:
                outcome = tune(tuner(), *parts, search=Search(), seed=seed, on_weights=keep)
                keys = ("test_loss", "validation_loss", "steps", "steps_run", "tokens", "flops", "seconds", "reason")
                row = {key: getattr(outcome, key) for key in (*keys, "learning_rate")}
                if seed == 0:
                    row |= measure_tangents(tuner().model(kept[0]), batch, before()[1])[0]
            except DivergedError as error:
                row = {"test_loss": None, "reason": str(error)}
            rows.add({"kind": "run", **here, "size": size, "seed": seed, **row})
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--smoke", action="store_true", help="toy scale, without texts of make_data.py")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lensjax-demo")
    parser.add_argument("--models", type=Path, help="where the models are kept (default: WORK/live-models)")
    parser.add_argument("--out", type=Path, help="folder of the rows (default: results/live, or WORK/live-smoke)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these candidates, not all")
    options = parser.parse_args()
    folder = options.out or (options.work / "live-smoke" if options.smoke else RESULTS)
    base = folder if options.smoke else options.work
    source = Source(base, options.smoke)
    rows = Rows(folder / "runs.jsonl")
    began = time.monotonic()
    enough: Callable[[], bool] = lambda: time.monotonic() - began > 60 * options.minutes  # noqa: E731
    finished = True
    models = options.models or base / "live-models"
    for _ in work(SMOKE if options.smoke else Scale(), source, rows, models, options.only):
        if enough():
            finished = False
            break
    print("all done" if finished else "time is up; call again to go on")


if __name__ == "__main__":
    main()
