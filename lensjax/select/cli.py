"""The command line: options in, exit status out. What it does is in `from_losses` and `live`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lensjax.errors import InputError, SelectionError, UnsupportedBackendError
from lensjax.runs import write_atomically
from lensjax.select import budget

if TYPE_CHECKING:
    from lensjax.report.selection import Selection

PROGRAM = "lensjax.select"
EXAMPLES = """\
examples:
  python -m lensjax.select
      the demo: small models, real text, minutes on a laptop
  python -m lensjax.select --losses published:flan --visible 204800 --method all
      rank 30 language models from published losses
  python -m lensjax.select --losses table.csv --target 1000000
      rank from losses you already have
  python -m lensjax.select --task my.jsonl --input-field question --target-field answer \\
          --models ./gpt2 ./my-checkpoint --out runs/mine
      fine-tune two models on subsets of your data and choose one
  The same command again, or --resume DIR, continues an interrupted selection.

exit status: 0 chosen; 1 a candidate failed, or the selection could not be finished; 2 the input cannot be used;
130 interrupted
"""

COMMAND, REPORT = "command.json", "report.html"
SCHEDULES, PRECISIONS, SHARDINGS = (
    ("constant", "linear", "cosine"),
    ("auto", "float32", "bfloat16"),
    ("auto", "none", "data", "full"),
)
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
LOSSES_ONLY = ("tokens_per_sample",)
LIVE_ONLY = (
    *("task", "input_field", "target_field", "models", "out", "smallest", "seed", "validation", "test", "max_length"),
    *("learning_rate", "batch_size", "max_epochs", "verify", "budget"),
    *("text_field", "template", "dataset_config", "split", "validation_split", "test_split", "revision", "limit"),
    *("schedule", "dropout", "micro_batch", "precision", "sharding", "weight_decay", "patience", "in_process"),
    "tangents",
    *("loss_unit", "lora_rank", "lora_alpha", "lora_dropout"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message}. See python -m lensjax.select --help.")


def parser() -> argparse.ArgumentParser:
    """Build the parser. Options default to None, so that one given for the other mode can be refused."""
    p = _Parser(
        prog=f"python -m {PROGRAM}",
        allow_abbrev=False,
        description="Choose which language model to fine-tune, from small fine-tuning runs or from measured losses.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    both = p.add_argument_group("the choice")
    both.add_argument("--target", type=_samples, metavar="N", help="training samples the chosen model will be tuned on")
    both.add_argument("--visible", type=_samples, metavar="N", help="largest subset the choice may be based on")
    both.add_argument(
        "--method", default="averaged", metavar="NAME", help="averaged (default), lens, ats, rectified, ..., all"
    )
    both.add_argument("--gamma", type=int, default=3, help="Algorithm 1: points that make a line (default 3)")
    both.add_argument("--tau", type=float, default=5.0, help="Algorithm 1: deviation that ends it (default 5)")
    both.add_argument("--html", type=Path, metavar="FILE", help="write the report there, one HTML file")
    both.add_argument("--figures", type=Path, metavar="DIR", help="write the figures there, as SVG")
    both.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    both.add_argument("--quiet", action="store_true", help="no progress, only the result")
    table = p.add_argument_group("from losses measured already")
    table.add_argument(
        "--losses", metavar="TABLE", help="CSV file, or published:flan, published:gigaword, published:wmt19"
    )
    table.add_argument(
        "--tokens-per-sample", type=float, metavar="X", help="for the cost (default 1: the paper's 6 N D)"
    )
    live = p.add_argument_group("by fine-tuning")
    live.add_argument(
        "--task",
        metavar="DATA",
        help="a file of samples (.jsonl, .csv, .parquet, .txt), a data set of the hub (owner/name), or one of flan, "
        "wikitext, gigaword, wmt19 (default: WordNet definitions)",
    )
    live.add_argument("--input-field", metavar="NAME", help="field the model reads (default input)")
    live.add_argument("--target-field", metavar="NAME", help="field it is to produce (default target)")
    live.add_argument("--text-field", metavar="NAME", help="instead of both: language modelling on this field")
    live.add_argument(
        "--template", metavar="TEXT", help="prompt with {input} in it (default '{input}:'), or chat: the model's own"
    )
    live.add_argument("--dataset-config", metavar="NAME", help="configuration of a data set")
    live.add_argument("--split", metavar="NAME", help="split of a data set to train on (default train)")
    live.add_argument("--validation-split", metavar="NAME", help="its split for early stopping (default: set aside)")
    live.add_argument("--test-split", metavar="NAME", help="its split for the test loss (default: set aside)")
    live.add_argument("--revision", metavar="NAME", help="branch or commit of a data set")
    live.add_argument("--limit", type=_samples, metavar="N", help="read at most N training samples of a data set")
    live.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="directories, GGUF files or Hugging Face ids (default: demo models); "
        "MODEL+lora is fine-tuned by low-rank adapters",
    )
    live.add_argument("--lora-rank", type=_samples, metavar="N", help="of the adapters (default 8)")
    live.add_argument("--lora-alpha", type=float, metavar="X", help="their scale is alpha / rank (default 16)")
    live.add_argument("--lora-dropout", type=float, metavar="X", help="on their inputs (default 0)")
    live.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/TASK-...)")
    live.add_argument(
        "--smallest", type=_samples, metavar="N", help="smallest subset (default 200, demo task 50); sizes double"
    )
    live.add_argument("--resume", type=Path, metavar="DIR", help="continue the selection in that run directory")
    live.add_argument(
        "--budget",
        type=_budget,
        metavar="X",
        help=f"what the choice may cost, never exceeded: {budget.HELP.replace('%', '%%')}. Candidates race, and only "
        "those that may win are trained on larger subsets; with another --method, the largest subset is what is paid "
        "for",
    )
    live.add_argument("--validation", type=_samples, metavar="N", help="samples for early stopping (default 300)")
    live.add_argument("--test", type=_samples, metavar="N", help="samples for the test loss (default 500)")
    live.add_argument("--seed", type=_seed, help="of the split and the order of samples (default 0)")
    live.add_argument("--max-length", type=_samples, metavar="N", help="tokens kept of a sample (default 128)")
    live.add_argument(
        "--loss-unit", choices=("token", "byte"), help="compare losses per token (default, as the paper) or per byte"
    )
    live.add_argument(
        "--learning-rate",
        type=float,
        nargs="+",
        metavar="X",
        help="of AdamW (default 0.0003, demo models 0.002); of several, each run takes the one with the lowest "
        "validation loss, and all are paid for",
    )
    live.add_argument(
        "--batch-size",
        type=_samples,
        nargs="+",
        metavar="N",
        help="samples per step (default 32); several: searched",
    )
    live.add_argument("--max-epochs", type=_samples, metavar="N", help="passes over a subset at most (default 10)")
    live.add_argument("--patience", type=_samples, metavar="N", help="evaluations without progress (default 2)")
    live.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate after its warm-up (default constant)")
    live.add_argument("--weight-decay", type=float, metavar="X", help="of AdamW (default 0.01)")
    live.add_argument("--dropout", action="store_true", default=None, help="turn the models' own dropout on")
    live.add_argument(
        "--micro-batch", type=_samples, metavar="N", help="samples in memory at once; gradients are accumulated"
    )
    live.add_argument(
        "--precision", choices=PRECISIONS, help="of the computation (default auto: bfloat16 on GPUs, float32 on CPUs)"
    )
    live.add_argument(
        "--sharding",
        choices=SHARDINGS,
        help="over several devices: samples (data), weights too (full), or none (default auto: what fits)",
    )
    live.add_argument(
        "--in-process",
        action="store_true",
        default=None,
        help="fine-tune in this process, not in one for each candidate: a crash then ends everything",
    )
    live.add_argument(
        "--tangents",
        type=_samples,
        metavar="N",
        help="measure the candidates' neural tangent kernels and Hessian traces too, on N samples",
    )
    live.add_argument("--verify", action="store_true", default=None, help="tune all on --target samples too, and judge")
    return p


def _seed(text: str) -> int:
    """Read a seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def _budget(text: str) -> budget.Budget:
    """Read a budget."""
    try:
        return budget.Budget.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _samples(text: str) -> int:
    """Read a whole number of samples; 1e6 and 1_000_000 are fine."""
    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not value.is_integer() or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(value)


def run(arguments: Sequence[str], out: TextIO, err: TextIO, *, own_process: bool = False) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name.
    out, err : text streams
        Result and progress.
    own_process : bool
        Whether this process is for this command alone: it then leaves accelerators to the processes that train.

    Returns
    -------
    int
        Exit status: 0, or 1 if a candidate failed.

    Raises
    ------
    InputError
        Before any long work, if something given cannot be used.
    """
    given = parser().parse_args(arguments)
    own_process = own_process and not given.in_process
    if given.resume is not None:
        arguments, place = resumed(given.resume.absolute(), arguments, given)
        given = parser().parse_args(arguments)
        with contextlib.chdir(place):
            return _select(given, _lasting(arguments), out, err, own_process=own_process)
    return _select(given, arguments, out, err, own_process=own_process)


def _lasting(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without those that name where this time's results go."""
    kept, skip = [], False
    for argument in arguments:
        flag, has_value, _ = argument.partition("=")
        if skip or flag in ("--json", "--html", "--figures", "--out"):
            skip = not skip and not has_value
            continue
        kept.append(argument)
    return kept


def resumed(directory: Path, arguments: Sequence[str], given: argparse.Namespace) -> tuple[list[str], Path]:
    """Return the arguments that a selection was started with, and where; those given now come after and win.

    Raises
    ------
    InputError
        If the directory holds no selection that can be continued.
    """
    path = directory / COMMAND
    try:
        stored = json.loads(path.read_text())
        before, place = [str(a) for a in stored["arguments"]], Path(stored["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"--resume {directory}: holds no {COMMAND} of a selection; name its run directory, or give again the "
            "command that started it."
        ) from None
    if not place.is_dir():
        raise InputError(f"--resume {directory}: was started in {place}, which is no directory now; make it again.")
    now = list(arguments)
    at = next(i for i, a in enumerate(now) if a == "--resume" or a.startswith("--resume="))
    del now[at : at + (1 if "=" in now[at] else 2)]
    # A path given now is meant from here, not from where the selection was started.
    files = {"--json": given.json, "--html": given.html, "--figures": given.figures}
    named = [part for flag, file in files.items() if file is not None for part in (flag, str(file.absolute()))]
    return [*before, *now, *named, "--out", str(directory)], place


def _select(given: argparse.Namespace, arguments: Sequence[str], out: TextIO, err: TextIO, *, own_process: bool) -> int:
    _check(given)
    from lensjax.report.figures import write_figures
    from lensjax.report.html import render_html
    from lensjax.report.text import render

    if own_process and given.losses is None:
        import jax

        jax.config.update("jax_platforms", "cpu")
    selection = _from_losses(given) if given.losses is not None else _live(given, arguments, err)
    text = render(selection)
    document = json.dumps(selection.as_dict(), indent=2, allow_nan=False) + "\n"
    # Whatever happens to the files, the result has been seen.
    out.write(text + "\n")
    out.flush()
    directory = selection.facts.get("directory")
    page = render_html(selection) if directory is not None or given.html is not None else ""
    if directory is not None:
        write_atomically(Path(directory) / "selection.txt", text + "\n")
        write_atomically(Path(directory) / "selection.json", document)
        write_atomically(Path(directory) / REPORT, page)
    if given.json is not None:
        write_atomically(given.json, document)
    if given.html is not None:
        write_atomically(given.html, page)
    if given.figures is not None:
        write_figures(selection, given.figures)
    return FAILED if selection.failures or selection.unverified else 0


def _check(given: argparse.Namespace) -> None:
    """Refuse options that contradict each other or name what cannot be written, before anything is read."""
    from lensjax.selectors import check_rule, get_selector

    if given.method != "all":
        get_selector(given.method)
    check_rule(given.gamma, given.tau)
    wrong = LIVE_ONLY if given.losses is not None else LOSSES_ONLY
    for name in wrong:
        if getattr(given, name) is not None:
            flag = "--" + name.replace("_", "-")
            where = "belongs to selection by fine-tuning" if given.losses is not None else "needs --losses"
            raise InputError(f"{flag} {where}; remove {flag}{' or --losses' if given.losses is not None else ''}.")
    for flag, file in (("--json", given.json), ("--html", given.html)):
        if file is not None:
            _check_file(flag, file)
    if given.figures is not None and given.figures.exists() and not given.figures.is_dir():
        raise InputError(f"--figures {given.figures}: is a file; name a directory.")
    adapted = any(model.endswith("+lora") for model in given.models or ())
    for flag in ("lora_rank", "lora_alpha", "lora_dropout"):
        if getattr(given, flag) is not None and not adapted:
            name = "--" + flag.replace("_", "-")
            raise InputError(f"{name}: no candidate has adapters; name one MODEL+lora, or remove {name}.")
    for rate in given.learning_rate or ():
        if not (rate > 0 and math.isfinite(rate)):
            raise InputError(f"--learning-rate is {rate:g}; it must be positive and finite.")
    if given.weight_decay is not None and not (given.weight_decay >= 0 and math.isfinite(given.weight_decay)):
        raise InputError(f"--weight-decay is {given.weight_decay:g}; it must be 0 or more, and finite.")


def _check_file(flag: str, file: Path) -> None:
    """Refuse a file that cannot be written."""
    if not file.parent.is_dir():
        raise InputError(f"{flag} {file}: there is no directory {file.parent}; make it first.")
    if file.is_dir():
        raise InputError(f"{flag} {file}: is a directory; name a file.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"{flag} {file}: cannot be written; name another file.")


def _from_losses(given: argparse.Namespace) -> Selection:
    from lensjax.select.from_losses import select_from_losses

    return select_from_losses(
        given.losses,
        visible=given.visible,
        target=given.target,
        method=given.method,
        gamma=given.gamma,
        tau=given.tau,
        tokens_per_sample=1.0 if given.tokens_per_sample is None else given.tokens_per_sample,
    )


def _live(given: argparse.Namespace, arguments: Sequence[str], err: TextIO) -> Selection:
    """Select by fine-tuning; `arguments` are what a later session is to be started with."""
    from lensjax.finetune import Plan, Search
    from lensjax.models import Lora
    from lensjax.report.progress import Console
    from lensjax.select.live import LiveSelection, default_directory
    from lensjax.select.prepare import DEMO_LEARNING_RATE, Request, prepare

    plan_names = (
        *("max_epochs", "patience", "schedule", "weight_decay", "dropout", "micro_batch", "precision", "sharding"),
    )
    names = (
        *("task", "input_field", "target_field", "out", "smallest", "seed", "validation", "test", "max_length"),
        *("visible", "target", "method", "gamma", "tau", "verify", "budget"),
        *("text_field", "template", "dataset_config", "split", "validation_split", "test_split", "revision", "limit"),
        *("loss_unit", "tangents"),
    )
    chosen = {n: getattr(given, n) for n in names if getattr(given, n) is not None}
    settings: dict[str, Any] = {} if given.models else {"learning_rate": DEMO_LEARNING_RATE}
    settings |= {n: getattr(given, n) for n in plan_names if getattr(given, n) is not None}
    # One value is the plan's, several are searched.
    rates, sizes = tuple(given.learning_rate or ()), tuple(given.batch_size or ())
    settings |= {"learning_rate": rates[0]} if len(rates) == 1 else {}
    settings |= {"batch_size": max(sizes)} if sizes else {}
    plan = Plan(**settings)
    search = Search(rates if len(rates) > 1 else (), sizes if len(sizes) > 1 else ())
    adapters = {name: getattr(given, f"lora_{name}") for name in ("rank", "alpha", "dropout")}
    lora = Lora(**{name: value for name, value in adapters.items() if value is not None})
    request = Request(models=tuple(given.models or ()), plan=plan, search=search, lora=lora, **chosen)
    prepared = prepare(request)
    console = Console(err, quiet=given.quiet)
    directory = request.out or default_directory(prepared)
    live = LiveSelection(prepared, directory, console, isolate=not given.in_process)
    command = {"arguments": [str(a) for a in arguments], "directory": str(Path.cwd())}
    write_atomically(directory / COMMAND, json.dumps(command, indent=2) + "\n")
    return live.execute()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the process's streams; return its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return run(given, sys.stdout, sys.stderr, own_process=arguments is None)
    except (InputError, UnsupportedBackendError) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return BAD_INPUT
    except SelectionError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return FAILED
    except OSError as error:
        what = error.filename or "a file"
        sys.stderr.write(f"{PROGRAM}: {what}: {error.strerror or error}. Check that it exists and may be used.\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{PROGRAM}: interrupted. Runs that had finished are kept; the same command continues.\n")
        return INTERRUPTED
