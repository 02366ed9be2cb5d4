"""The options of `lensjax.select`: what each is called, takes and means; nothing heavy is imported for `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lensjax.commands.options import (
    LORA_OPTIONS,
    PLAN_OPTIONS,
    TASK_OPTIONS,
    Parser,
    add_completion,
    add_lora_options,
    add_task_options,
    add_training_options,
    number,
    samples,
)
from lensjax.errors import InputError
from lensjax.report.figures.formats import FORMATS
from lensjax.select import budget
from lensjax.selectors.methods import NAMES

PROGRAM, SCRIPT = "lensjax.select", "lensjax-select"
DESCRIPTION = """\
Tells which language model to fine-tune on your data, what loss to expect, how sure that is, and what it cost to find
out: by fine-tuning each candidate on small subsets, or from losses that you have measured already.

examples:
  python -m lensjax.select
      the demo: small models, real text, minutes on a laptop
  python -m lensjax.select --task my.jsonl --input-field question --target-field answer \\
          --models ./gpt2 ./my-checkpoint smollm2.gguf+lora --dry-run
      say what would be run, how long it takes, and whether it fits into memory; without --dry-run: do it
  python -m lensjax.select --task my.jsonl --models ./gpt2 ./my-checkpoint --budget 3h --out runs/mine
      in three hours at most; candidates that cannot win are dropped early
  python -m lensjax.select --resume runs/mine
      continue an interrupted selection (the same command again does it too)
  python -m lensjax.select --config mine.toml
      the same options from a file; --print-config writes such a file
  python -m lensjax.select --losses table.csv --target 1000000
      from losses you already have: a table, Trainer runs, exports of Weights & Biases or MLflow
  python -m lensjax.select --losses published:flan --visible 204800 --method all
      rank 30 language models from published losses
"""
EPILOG = """\
exit status: 0 chosen; 1 a candidate failed or does not fit, or the selection could not be finished; 2 the input cannot
be used; 130 interrupted
"""

READING = ("pattern", "samples_column", "model_column", "repeats", "same_step")
"""Options of reading other tools' runs."""
LOSSES_ONLY = ("metric", *READING, "lower_is_better", "tokens_per_sample")
"""Options that go only with ``--losses``."""
FINE_TUNING_ONLY = (
    *TASK_OPTIONS,
    *PLAN_OPTIONS,
    *LORA_OPTIONS,
    *("learning_rate", "batch_size", "models", "out", "smallest", "verify", "budget", "in_process", "tangents"),
    *("loss_unit", "dry_run"),
)
"""Options that do not go with ``--losses``, for nothing is fine-tuned then."""


def parser() -> Parser:
    """Build the parser. Options default to None, so that those that do not go with ``--losses`` can be refused."""
    p = Parser(
        prog=f"python -m {PROGRAM}",
        usage=f"python -m {PROGRAM} [options]",
        allow_abbrev=False,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_task_options(p.add_argument_group("task", "the data to fine-tune on"))
    _add_candidates(p.add_argument_group("candidates", "the models to choose from"))
    _add_choice(p.add_argument_group("choice", "how, for how much data, and at what cost"))
    add_training_options(p.add_argument_group("training", "of each run"))
    table = p.add_argument_group("losses", "instead of fine-tuning: losses measured already")
    table.add_argument(
        "--losses",
        metavar="TABLE",
        help="CSV file; directory of Trainer runs or of ours; export of Weights & Biases; database, store or export of "
        "MLflow; or published:flan, published:gigaword, published:wmt19, live:definitions, live:novels, live:packages",
    )
    table.add_argument(
        "--metric",
        metavar="NAME",
        help="which metric of the runs is the loss, by its name there (default: eval_loss and the like; of ours, "
        "test_loss)",
    )
    _add_reading(table)
    table.add_argument(
        "--tokens-per-sample", type=number, metavar="X", help="for the cost (default 1: the paper's 6 N D)"
    )
    _add_output(p.add_argument_group("output", "what is written, and where"))
    return p


def _add_reading(group: Any) -> None:
    """Add the options in `READING`, and what says that the numbers are losses."""
    group.add_argument(
        "--pattern",
        metavar="TEXT",
        help="how the runs' names say model and number of samples, such as '{model}-{samples}' or "
        "'{model}/n{samples}-seed*', where * is left out (default: a number that ends a name counts if a word such as "
        "n200 or 200samples says so, or if the numbers are the same growing sizes for each model)",
    )
    group.add_argument(
        "--samples-column", metavar="NAME", help="column or parameter of the runs with the number of training samples"
    )
    group.add_argument("--model-column", metavar="NAME", help="column or parameter of the runs with the model's name")
    group.add_argument(
        "--repeats",
        choices=("refuse", "mean", "lowest"),
        help="what to do with several runs of one model on equally many samples, such as seeds (default refuse)",
    )
    group.add_argument(
        "--same-step",
        choices=("refuse", "first", "last"),
        help="which of a run's losses counts where several at one step differ: the training loop's own comes first "
        "(default refuse)",
    )
    group.add_argument(
        "--lower-is-better",
        action="store_true",
        default=None,
        help="the numbers are losses, although most rise with the number of samples (default: they are refused)",
    )


def _add_candidates(group: Any) -> None:
    group.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="directories, GGUF files or Hugging Face ids (default: demo models); "
        "MODEL+lora is fine-tuned by low-rank adapters",
    )
    add_lora_options(group)


def _add_choice(group: Any) -> None:
    group.add_argument(
        "--target", type=samples, metavar="N", help="training samples the chosen model will be tuned on (default: all)"
    )
    group.add_argument(
        "--visible",
        type=samples,
        metavar="N",
        help="largest subset the choice may be based on (default: an eighth of the target)",
    )
    group.add_argument(
        "--smallest", type=samples, metavar="N", help="smallest subset (default 200, demo task 50); sizes double"
    )
    group.add_argument(
        "--budget",
        type=_budget,
        metavar="X",
        help=f"what the choice may cost, never exceeded: {budget.HELP.replace('%', '%%')}. Candidates race, and only "
        "those that may win are trained on larger subsets; with another --method, the largest subset is what is paid "
        "for",
    )
    group.add_argument(
        "--method",
        metavar="NAME",
        help=f"{NAMES[0]} (default), {', '.join(NAMES[1:])}: see docs/methods.md",
    )
    group.add_argument("--gamma", type=samples, metavar="N", help="Algorithm 1: points that make a line (default 3)")
    group.add_argument("--tau", type=number, metavar="X", help="Algorithm 1: deviation that ends it (default 5)")
    group.add_argument(
        "--loss-unit", choices=("token", "byte"), help="compare losses per token (default, as the paper) or per byte"
    )
    group.add_argument(
        "--tangents",
        type=samples,
        metavar="N",
        help="measure the candidates' neural tangent kernels and Hessian traces too, on N samples",
    )
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="tune all on --target samples too, and judge the choice (default off)",
    )


def _add_output(group: Any) -> None:
    group.add_argument(
        "--dry-run",
        action="store_true",
        default=None,
        help="train and download nothing: say what would run, its FLOPs, hours, memory and disk, and what does not fit",
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/TASK-...)")
    group.add_argument("--resume", type=Path, metavar="DIR", help="continue the selection in that run directory")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="read options from a TOML file; those given here win"
    )
    group.add_argument(
        "--print-config", action="store_true", help="print all options, defaults too, as a TOML file, and stop"
    )
    group.add_argument("--html", type=Path, metavar="FILE", help="write the report there, one HTML file")
    group.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    group.add_argument("--figures", type=Path, metavar="DIR", help="write the figures there")
    group.add_argument(
        "--figure-format",
        nargs="+",
        choices=FORMATS,
        help="of the figures (default svg; png needs matplotlib: pip install 'lensjax[figures]')",
    )
    group.add_argument(
        "--in-process",
        action=argparse.BooleanOptionalAction,
        help="fine-tune in this process, not in one for each candidate: a crash then ends everything (default off)",
    )
    verbosity = group.add_mutually_exclusive_group()
    verbosity.add_argument("--quiet", action="store_true", help="no progress, only the result")
    verbosity.add_argument("--verbose", action="store_true", help="say more: each evaluation, all options, tracebacks")
    add_completion(group, SCRIPT)


def _budget(text: str) -> budget.Budget:
    """Parse a budget given on the command line."""
    try:
        return budget.Budget.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
