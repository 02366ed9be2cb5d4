"""Fine-tuning speed: our `FineTuner` against `transformers.Trainer` on torch, same data, same batches, float32.

    python benchmarks/train_speed.py               # needs the parity extra: torch and accelerate
    python benchmarks/train_speed.py --case demo

Tokens per second of the training steps alone, AdamW with weight decay and clipping, no dropout. A run of `--short` and
one of `--long` steps are timed, and the difference is that of the steps between them: what a run does once (copying
weights, the first evaluation) is in both. Ours and the Trainer's take turns in one process (A B A B); the ratio is that
of the medians. Beside it: seconds until the first step is done (making the model, tracing, compiling; no imports), and
those of a run of one step later on.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
import transformers
from environment import RESULTS, write_result

from lensjax import data, models
from lensjax.finetune import FineTuner, Plan
from lensjax.tasks import Encoded

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DEMO = "mixed-medium"
CASES = {"gpt2-124M": (8, 64), "demo": (32, 32)}  # samples and tokens of a batch


def config_of(case: str) -> dict:
    """Return the configuration of a case's model."""
    if case == "demo":
        found = json.loads((data.path("demo", "models") / DEMO / "config.json").read_text())
        return found | {k: 0.0 for k in found if k.endswith(("pdrop", "dropout"))}
    return GPT2 | NO_DROPOUT


def rows_of(case: str, steps: int) -> np.ndarray:
    """Return the token ids (samples, tokens) of so many steps."""
    batch, length = CASES[case]
    return np.random.default_rng(0).integers(1, config_of(case)["vocab_size"], (steps * batch, length), dtype=np.int32)


class Ours:
    """`FineTuner` on rows of full length."""

    def __init__(self, case: str) -> None:
        begun = time.perf_counter()
        self.batch, length = CASES[case]
        model = models.init_model(config_of(case), jax.random.key(0))
        plan = Plan(batch_size=self.batch, max_epochs=1, min_steps_between=1, precision="float32", sharding="none")
        self.tuner = FineTuner(model, plan, (length,), 0)
        self.case = case
        self.prepared = time.perf_counter() - begun

    def __call__(self, steps: int) -> float:
        """Train for so many steps and return the seconds."""
        rows = rows_of(self.case, steps)
        encoded = Encoded(tuple(rows), np.zeros(len(rows), int), 0)
        begun = time.perf_counter()
        self.tuner.run(encoded, encoded.first(self.batch), encoded.first(self.batch), seed=0)
        return time.perf_counter() - begun


class Theirs:
    """`transformers.Trainer` on the same rows."""

    def __init__(self, case: str) -> None:
        begun = time.perf_counter()
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        self.case = case
        config = transformers.AutoConfig.for_model(**config_of(case))
        self.model = transformers.AutoModelForCausalLM.from_config(config).float()
        self.prepared = time.perf_counter() - begun

    def __call__(self, steps: int) -> float:
        """Train for so many steps and return the seconds."""
        ids = torch.from_numpy(rows_of(self.case, steps)).long()
        samples = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = transformers.Trainer(
                model=self.model,
                args=transformers.TrainingArguments(
                    output_dir=directory,
                    per_device_train_batch_size=CASES[self.case][0],
                    max_steps=steps,
                    learning_rate=3e-4,
                    weight_decay=0.01,
                    max_grad_norm=1.0,
                    lr_scheduler_type="constant_with_warmup",
                    warmup_steps=10,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=True,
                    dataloader_pin_memory=False,
                ),
                train_dataset=samples,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            begun = time.perf_counter()
            trainer.train()
            return time.perf_counter() - begun


def compare(case: str, short: int, long: int, rounds: int) -> dict:
    """Time both in turns."""
    peers = {"ours": Ours(case), "trainer": Theirs(case)}
    first = {name: peer.prepared + peer(1) for name, peer in peers.items()}
    warm = {name: peer(1) for name, peer in peers.items()}
    for peer in peers.values():
        peer(short)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, peer in peers.items():
            seconds[name].append((peer(long) - peer(short)) / (long - short))
    batch, length = CASES[case]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    speeds = {name: batch * length / value for name, value in medians.items()}
    ratio = speeds["ours"] / speeds["trainer"]
    print(f"{case}: {speeds['ours']:.0f} against {speeds['trainer']:.0f} tokens a second, ratio {ratio:.2f}")
    return {
        "batch": [batch, length],
        "seconds_per_step": seconds,
        "tokens_per_second": speeds,
        "ours_over_trainer": ratio,
        "seconds_to_first_step": first,
        "seconds_of_one_step_run_when_warm": warm,
    }


def main() -> None:
    """Run the cases asked for; the results of others stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--short", type=int, default=3)
    parser.add_argument("--long", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    path = Path(RESULTS) / "train_speed.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    for case in given.case or CASES:
        cases[case] = compare(case, given.short, given.long, given.rounds)
        write_result("train_speed", {"limit": 1.0, "cases": cases})


if __name__ == "__main__":
    main()
