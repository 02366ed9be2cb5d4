"""The options that the commands share; nothing heavy is imported for `--help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lensjax._messages import did_you_mean, number_hint, ungrouped
from lensjax.errors import InputError
from lensjax.finetune.choices import PRECISIONS, SCHEDULES, SHARDINGS
from lensjax.jobs.defaults import DEMO_LEARNING_RATE

if TYPE_CHECKING:
    from lensjax.finetune import Plan, Search
    from lensjax.models import Lora

DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}", "\N{MINUS SIGN}")
"""The character that options begin with, and those that word processors replace it by."""
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
"""What other programs call these options."""
SHELLS = ("bash", "zsh", "fish", "tcsh")
TASK_OPTIONS = (
    *("task", "input_field", "target_field", "text_field", "template", "dataset_config", "split", "validation_split"),
    *("test_split", "revision", "limit", "validation", "test", "seed", "max_length"),
)
PLAN_OPTIONS = (
    *("max_epochs", "patience", "schedule", "weight_decay", "dropout", "micro_batch", "precision", "sharding"),
)
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout")


class Parser(argparse.ArgumentParser):
    """Raises `InputError` where argparse would end the process, and says which option may have been meant.

    Its properties offer what argparse keeps, but has no public way to ask for.
    """

    @property
    def options(self) -> tuple[argparse.Action, ...]:
        """All options and arguments, in the order in which they were added."""
        return tuple(self._actions)

    @property
    def options_by_group(self) -> dict[str, list[argparse.Action]]:
        """The same, by the titles of their groups; ``--help`` and the like are in a group of argparse's own."""
        groups: dict[str, list[argparse.Action]] = {}
        for option in self.options:
            groups.setdefault(option.container.title, []).append(option)  # type: ignore[attr-defined]
        return groups

    def error(self, message: str) -> None:  # type: ignore[override]
        """Refuse the arguments.

        Raises
        ------
        InputError
        """
        head, phrase, choices = message.partition(" (choose from ")
        # Newer versions of argparse leave the quotes out.
        message = head + phrase + choices.replace("'", "")
        end = "" if message.endswith((".", "?")) else "."
        raise InputError(f"{message}{end}{self._hint(message)} See {self.prog} --help.")

    def _hint(self, message: str) -> str:
        """Return a guess at what was meant, as a sentence after a space; "" if there is none."""
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
        known = [flag[2:] for action in self.options for flag in action.option_strings if flag.startswith("--")]
        return did_you_mean(name[2:], known, "--")


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
        "--template",
        metavar="TEXT",
        help="prompt with {input} in it, up to the target (default '{input}: '), or chat: the model's own",
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


def add_completion(group: Any, script: str) -> None:
    """Add ``--completion``, which `lensjax.commands.completion.write_completion` carries out."""
    group.add_argument(
        "--completion", choices=SHELLS, help=f"print what makes that shell complete {script}'s options, and stop"
    )


def plan_of(given: argparse.Namespace, *, demo: bool) -> tuple[Plan, Search]:
    """Return the plan and the search that options ask for.

    Parameters
    ----------
    given : argparse.Namespace
        With what `add_training_options` adds.
    demo : bool
        Whether the models are the demo's, whose learning rate is higher by default.
    """
    from lensjax.finetune import Plan, Search

    settings: dict[str, Any] = {"learning_rate": DEMO_LEARNING_RATE} if demo else {}
    settings |= {n: getattr(given, n) for n in PLAN_OPTIONS if getattr(given, n) is not None}
    # A single value goes into the plan; several are searched.
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
    """Refuse arguments that are not UTF-8, before any long work: neither the journal nor a report could hold them.

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
    """Parse a number given on the command line."""
    try:
        return float(text)
    except ValueError:
        hint = number_hint(text) or (" Put spaces between several." if "," in text else "")
        raise argparse.ArgumentTypeError(f"{text!r} is not a number.{hint}") from None


def seed(text: str) -> int:
    """Parse a seed given on the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def samples(text: str) -> int:
    """Parse a whole number above 0 given on the command line; 1e6 and 1_000_000 are fine."""
    try:
        value = float(ungrouped(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number.{number_hint(text)}") from None
    if not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(value)
