"""The options of the commands: what each is called, takes and means; nothing heavy is imported for `--help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensjax.errors import InputError
from lensjax.hints import did_you_mean, number_hint, ungrouped
from lensjax.select import budget

if TYPE_CHECKING:
    from lensjax.finetune import Plan, Search
    from lensjax.models import Lora

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

METHODS = (
    *("averaged", "lens", "ats", "rectified", "power", "subtuning", "zero_shot", "model_size"),
    *("nlp_metrics", "log_me", "all"),
)
SCHEDULES, PRECISIONS, SHARDINGS = (
    ("constant", "linear", "cosine"),
    ("auto", "float32", "bfloat16"),
    ("auto", "none", "data", "full"),
)
DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")
"""What options begin with, and what word processors make of it."""
ALIASES = {
    "--lr": "--learning-rate",
    "--data": "--task",
    "--dataset": "--task",
    "--max-samples": "--limit",
    "--max-steps": "--max-epochs",
    "--output-dir": "--out",
    "--samples": "--target",
    "--dtype": "--precision",
}
"""Options of other programs."""
SHELLS = ("bash", "zsh", "fish", "tcsh")
FIGURE_FORMATS = ("svg", "png")

TASK_OPTIONS = (
    *("task", "input_field", "target_field", "text_field", "template", "dataset_config", "split", "validation_split"),
    *("test_split", "revision", "limit", "validation", "test", "seed", "max_length"),
)
PLAN_OPTIONS = (
    *("max_epochs", "patience", "schedule", "weight_decay", "dropout", "micro_batch", "precision", "sharding"),
)
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout")
LOSSES_ONLY = ("metric", "tokens_per_sample")
LIVE_ONLY = (
    *TASK_OPTIONS,
    *PLAN_OPTIONS,
    *LORA_OPTIONS,
    *("learning_rate", "batch_size", "models", "out", "smallest", "verify", "budget", "in_process", "tangents"),
    *("loss_unit", "dry_run"),
)


class Parser(argparse.ArgumentParser):
    """Raises `InputError` where argparse would end the process, and says which option may have been meant."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Refuse the arguments.

        Raises
        ------
        InputError
        """
        head, listing, choices = message.partition(" (choose from ")
        # Newer versions of argparse leave the quotes out.
        message = head + listing + choices.replace("'", "")
        end = "" if message.endswith((".", "?")) else "."
        raise InputError(f"{message}{end}{self._hint(message)} See {self.prog} --help.")

    def _hint(self, message: str) -> str:
        """Return what may have been meant, a sentence after a space, or ""."""
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        if choice:
            return did_you_mean(choice[1], choice[2].split(", "))
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if not unknown:
            return ""
        name = unknown[1].partition("=")[0]
        if not name.startswith(DASHES):
            return " Each value follows the option that it is for; options that are switched on or off take none."
        name = "--" + name.lstrip("".join(DASHES)).replace("_", "-")
        if name in ALIASES:
            return f" Did you mean {ALIASES[name]}?"
        known = [flag[2:] for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        return did_you_mean(name[2:], known, "--")


def parser() -> Parser:
    """Build the parser. Options default to None, so that one given for the other mode can be refused."""
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
        help="CSV file; directory of Trainer runs or of ours; export of Weights & Biases or MLflow; or published:flan, "
        "published:gigaword, published:wmt19, live:definitions, live:novels, live:packages",
    )
    table.add_argument(
        "--metric",
        metavar="NAME",
        help="which metric of the runs is the loss, by its name there (default: eval_loss and the like; of ours, "
        "test_loss)",
    )
    table.add_argument(
        "--tokens-per-sample", type=number, metavar="X", help="for the cost (default 1: the paper's 6 N D)"
    )
    _add_output(p.add_argument_group("output", "what is written, and where"))
    return p


def add_task_options(group: Any) -> None:
    """Add the options in `TASK_OPTIONS`."""
    group.add_argument(
        "--task",
        metavar="DATA",
        help="a file of samples (.jsonl, .csv, .parquet, .txt), a data set of the hub (owner/name), or one of flan, "
        "wikitext, gigaword, wmt19 (default: WordNet definitions)",
    )
    group.add_argument("--input-field", metavar="NAME", help="field the model reads (default input)")
    group.add_argument("--target-field", metavar="NAME", help="field it is to produce (default target)")
    group.add_argument("--text-field", metavar="NAME", help="instead of both: language modelling on this field")
    group.add_argument(
        "--template", metavar="TEXT", help="prompt with {input} in it (default '{input}:'), or chat: the model's own"
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a data set")
    group.add_argument("--split", metavar="NAME", help="split of a data set to train on (default train)")
    group.add_argument("--validation-split", metavar="NAME", help="its split for early stopping (default: set aside)")
    group.add_argument("--test-split", metavar="NAME", help="its split for the test loss (default: set aside)")
    group.add_argument("--revision", metavar="NAME", help="branch or commit of a data set")
    group.add_argument("--limit", type=samples, metavar="N", help="read at most N training samples of a data set")
    group.add_argument("--validation", type=samples, metavar="N", help="samples for early stopping (default 300)")
    group.add_argument("--test", type=samples, metavar="N", help="samples for the test loss (default 500)")
    group.add_argument("--seed", type=seed, metavar="N", help="of the split and the order of samples (default 0)")
    group.add_argument("--max-length", type=samples, metavar="N", help="tokens kept of a sample (default 128)")


def add_lora_options(group: Any) -> None:
    """Add the options in `LORA_OPTIONS`."""
    group.add_argument("--lora-rank", type=samples, metavar="N", help="of the adapters (default 8)")
    group.add_argument("--lora-alpha", type=number, metavar="X", help="their scale is alpha / rank (default 16)")
    group.add_argument("--lora-dropout", type=number, metavar="X", help="on their inputs (default 0)")


def add_training_options(group: Any, *, demo: bool = True) -> None:
    """Add learning rate, batch size, and the options in `PLAN_OPTIONS`; `demo`: the models may be the demo's."""
    group.add_argument(
        "--learning-rate",
        type=number,
        nargs="+",
        metavar="X",
        help=f"of AdamW (default 0.0003{', demo models 0.002' if demo else ''}); of several, each run takes the one "
        "with the lowest validation loss, and all are paid for",
    )
    group.add_argument(
        "--batch-size",
        type=samples,
        nargs="+",
        metavar="N",
        help="samples per step (default 32); several: searched",
    )
    group.add_argument("--max-epochs", type=samples, metavar="N", help="passes over a subset at most (default 10)")
    group.add_argument("--patience", type=samples, metavar="N", help="evaluations without progress (default 2)")
    group.add_argument(
        "--schedule", choices=SCHEDULES, help="of the learning rate after its warm-up (default constant)"
    )
    group.add_argument("--weight-decay", type=number, metavar="X", help="of AdamW (default 0.01)")
    group.add_argument("--dropout", action=argparse.BooleanOptionalAction, help="the models' own dropout (default off)")
    group.add_argument(
        "--micro-batch", type=samples, metavar="N", help="samples in memory at once; gradients are accumulated"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, help="of the computation (default auto: bfloat16 on GPUs, float32 on CPUs)"
    )
    group.add_argument(
        "--sharding",
        choices=SHARDINGS,
        help="over several devices: samples (data), weights too (full), or none (default auto: what fits)",
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
        "--method", metavar="NAME", help=f"{METHODS[0]} (default), {', '.join(METHODS[1:])}: see the README"
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
        choices=FIGURE_FORMATS,
        help="of the figures (default svg; png needs matplotlib: pip install 'lensjax[figures]')",
    )
    group.add_argument(
        "--in-process",
        action=argparse.BooleanOptionalAction,
        help="fine-tune in this process, not in one for each candidate: a crash then ends everything (default off)",
    )
    talk = group.add_mutually_exclusive_group()
    talk.add_argument("--quiet", action="store_true", help="no progress, only the result")
    talk.add_argument("--verbose", action="store_true", help="say more: each evaluation, all options, tracebacks")
    add_completion(group, SCRIPT)


def add_completion(group: Any, script: str) -> None:
    """Add the option that `lensjax.select.complete.write_completion` answers."""
    group.add_argument(
        "--completion", choices=SHELLS, help=f"print what makes that shell complete {script}'s options, and stop"
    )


def plan_of(given: argparse.Namespace, *, demo: bool) -> tuple[Plan, Search]:
    """Return the training that options ask for.

    Parameters
    ----------
    given : argparse.Namespace
        With what `add_training_options` adds.
    demo : bool
        Whether the models are the demo's, whose learning rate is higher by default.
    """
    from lensjax.finetune import Plan, Search
    from lensjax.select.prepare import DEMO_LEARNING_RATE

    settings: dict[str, Any] = {"learning_rate": DEMO_LEARNING_RATE} if demo else {}
    settings |= {n: getattr(given, n) for n in PLAN_OPTIONS if getattr(given, n) is not None}
    # One value is the plan's, several are searched.
    rates, sizes = tuple(given.learning_rate or ()), tuple(given.batch_size or ())
    settings |= {"learning_rate": rates[0]} if len(rates) == 1 else {}
    settings |= {"batch_size": max(sizes)} if sizes else {}
    return Plan(**settings), Search(rates if len(rates) > 1 else (), sizes if len(sizes) > 1 else ())


def lora_of(given: argparse.Namespace) -> Lora:
    """Return the adapters that options ask for, see `add_lora_options`."""
    from lensjax.models import Lora

    chosen = {name.removeprefix("lora_"): getattr(given, name) for name in LORA_OPTIONS}
    return Lora(**{name: value for name, value in chosen.items() if value is not None})


def check_text(arguments: Iterable[str]) -> None:
    """Refuse names of files that no record and no report could hold, before any long work.

    Raises
    ------
    InputError
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InputError(f"{argument!a}: is not UTF-8; rename the file, and name it as it is then.") from None


def number(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        hint = number_hint(text) or (" Put spaces between several." if "," in text else "")
        raise argparse.ArgumentTypeError(f"{text!r} is not a number.{hint}") from None


def seed(text: str) -> int:
    """Read a seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def samples(text: str) -> int:
    """Read a whole number of samples; 1e6 and 1_000_000 are fine."""
    try:
        value = float(ungrouped(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number.{number_hint(text)}") from None
    if not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(value)


def _budget(text: str) -> budget.Budget:
    try:
        return budget.Budget.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
