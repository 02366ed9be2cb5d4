"""Tables 8 to 11: sensitivity to learning rate, batch size and input length.

No table of losses varies these, so each number needs the 14 models fine-tuned anew; this script writes the commands
down. With --run it executes them, one run directory for each setting, and with --collect it reads what they wrote. For
Table 11, --lengths FILE first makes the three files of samples: the shortest or the longest are dropped until the mean
input has 22 or 18 tokens of GPT-2 (the paper does not name its tokenizer), from samples that have 20.

Run: python benchmarks/paper/sensitivity.py [--lengths FILE] [--run | --collect]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
from common import GPU, MODELS, NOT, REPRODUCED, Finding, save

RATES, BATCHES = ("3e-5", "1e-4", "3e-4", "1e-3"), ("64", "128", "256")
TASKS = {"flan": (78.31, 78.43), "gigaword": (85.69, 85.79), "wikitext": (82.50, 82.61)}
LENGTHS = {18: 77.39, 20: 78.14, 22: 76.89}
BUDGET = ("--smallest", "200", "--visible", "25600", "--target", "204800", "--verify", "--method", "all")


def command(task: str, out: str, *more: str) -> list[str]:
    models = ("--models", *MODELS.values())
    return ["python", "-m", "lensjax.select", "--task", task, *models, *BUDGET, *more, "--out", out]


def write_lengths(source: Path) -> None:
    """Write the samples of Table 11 from a file with the fields input and target."""
    from lensjax.models import load_tokenizer

    tokenizer = load_tokenizer("gpt2")
    samples = [json.loads(line) for line in source.read_text().splitlines()]
    lengths = np.array([len(tokenizer(sample["input"])["input_ids"]) for sample in samples])
    Path("runs/paper").mkdir(parents=True, exist_ok=True)
    for wanted in LENGTHS:
        # The longest go where the mean is to fall, the shortest where it is to rise.
        order = np.argsort(lengths if wanted < lengths.mean() else -lengths, kind="stable")
        means = np.cumsum(lengths[order]) / np.arange(1, len(order) + 1)
        near = np.flatnonzero(np.abs(means - wanted) <= 0.5)
        if not len(near):
            raise SystemExit(f"{source}: no subset has inputs of {wanted} tokens on average.")
        kept = np.sort(order[: int(near[-1]) + 1])
        text = "".join(json.dumps(samples[at]) + "\n" for at in kept)
        Path(f"runs/paper/flan-length-{wanted}.jsonl").write_text(text)


def commands() -> dict[str, list[list[str]]]:
    """All settings: by name of the table, the commands."""
    found = {
        f"Tables 8 to 10, {task}": [
            command(task, f"runs/paper/{task}-{rate}-{batch}", "--learning-rate", rate, "--batch-size", batch)
            for rate in RATES
            for batch in BATCHES
        ]
        for task in TASKS
    }
    # The paper drops the shortest or the longest samples until the mean is right; here a file for each mean length.
    found["Table 11"] = [
        command(f"runs/paper/flan-length-{length}.jsonl", f"runs/paper/flan-length-{length}") for length in LENGTHS
    ]
    return found


def pear_corr_of(run: list[str]) -> float | None:
    """PearCorr in percent that a finished run reports for LensLLM, None if it has not ended."""
    path = Path(run[run.index("--out") + 1]) / "selection.json"
    if not path.exists():
        return None
    method = json.loads(path.read_text())["methods"].get("lens", {})
    return 100 * method["metrics"]["PearCorr"] if method.get("metrics") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="fine-tune everything (days on one GPU)")
    parser.add_argument("--collect", action="store_true", help="read what finished runs report")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="make the samples of Table 11 from this .jsonl")
    options = parser.parse_args()
    if options.lengths:
        write_lengths(options.lengths)
    everything = commands()
    if options.run:
        for runs in everything.values():
            for run in runs:
                subprocess.run(run, check=True)
    findings, numbers = [], {}
    for title, runs in everything.items():
        task = title.rsplit(" ", 1)[-1]
        low, high = TASKS.get(task, (min(LENGTHS.values()), max(LENGTHS.values())))
        found = [pear_corr_of(run) for run in runs] if options.run or options.collect else [None] * len(runs)
        known = [value for value in found if value is not None]
        numbers[title] = {"commands": [shlex.join(run) for run in runs], "PearCorr": found}
        if len(known) < len(runs):
            verdict, ours = GPU, f"{len(known)} of {len(runs)} settings run"
        else:
            verdict = REPRODUCED if np.ptp(known) <= 2 * (high - low) else NOT
            ours = f"{min(known):.2f} to {max(known):.2f}"
        reason = f"{len(runs)} commands like: `{shlex.join(runs[0])}`" if verdict == GPU else ""
        findings.append(
            Finding(f"{title}: PearCorr over the settings", f"{low:.2f} to {high:.2f}", ours, verdict, reason)
        )
    save(
        "sensitivity",
        "Tables 8 to 11: learning rate, batch size, input length",
        "none: every number needs new fine-tuning runs of 14 models up to 6.7 billion weights",
        findings,
        numbers,
    )


if __name__ == "__main__":
    main()
