"""The command line: options in, exit status out. What it does is in `job`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lensjax._display import printable_lines
from lensjax.commands import options
from lensjax.commands.completion import write_completion
from lensjax.commands.exit_codes import FAILED, INTERRUPTED, guarded
from lensjax.errors import InputError
from lensjax.jobs.defaults import ADAPTED

PROGRAM, SCRIPT = "lensjax.tune", "lensjax-tune"
DESCRIPTION = """\
Fine-tunes one model on your data and keeps it: AdamW, early stopping on validation loss, the best weights on disk as
soon as they are found, in Hugging Face format (MODEL+lora: adapters in peft's format). A selection ends with the
command that does this to the model it chose.

examples:
  python -m lensjax.tune --model ./gpt2 --task my.jsonl --input-field question --target-field answer --out tuned
      on all data but those set aside for validation and test, which are the same as in lensjax.select
  python -m lensjax.tune --model ./gpt2+lora --lora-rank 16 --task my.jsonl --out tuned
      low-rank adapters only
  python -m lensjax.tune --model ./gpt2 --task my.jsonl --learning-rate 1e-4 3e-4 1e-3 --out tuned
      search: the rate with the lowest validation loss is kept
  python -m lensjax.tune --model ./gpt2 --task my.jsonl --selection runs/mine --out tuned
      and say whether the test loss is what the selection in runs/mine expected
"""
EPILOG = """\
The directory gets config.json, model.safetensors and the tokenizer, or the adapters; and tune.json, the record: losses,
steps, hyper-parameters, versions, seconds, FLOPs.

exit status: 0 done; 1 training gave no model or could not be finished; 2 the input cannot be used; 130 interrupted
"""


def parser() -> options.Parser:
    """Build the parser. What `lensjax.select` has too means the same here."""
    p = options.Parser(
        prog=f"python -m {PROGRAM}",
        usage=f"python -m {PROGRAM} --model MODEL --out DIR [options]",
        allow_abbrev=False,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="directory, GGUF file or Hugging Face id; MODEL+lora is fine-tuned by low-rank adapters",
    )
    options.add_lora_options(model)
    task = p.add_argument_group("task", "the data to fine-tune on")
    options.add_task_options(task)
    task.add_argument(
        "--samples",
        type=options.samples,
        metavar="N",
        help="train on N of the training samples only, the same as a selection's subset of N (default: all)",
    )
    options.add_training_options(p.add_argument_group("training"), demo=False)
    output = p.add_argument_group("output")
    output.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory for the model")
    output.add_argument(
        "--overwrite", action="store_true", help="replace the model in --out as soon as there are weights to keep"
    )
    output.add_argument(
        "--selection",
        type=Path,
        metavar="DIR",
        help="run directory of the selection that chose the model: say whether the loss is what it expected",
    )
    talk = output.add_mutually_exclusive_group()
    talk.add_argument("--quiet", action="store_true", help="no progress, only the result")
    talk.add_argument("--verbose", action="store_true", help="say more; tracebacks of errors")
    options.add_completion(output, SCRIPT)
    return p


def run(arguments: Sequence[str], out: TextIO, err: TextIO) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name.
    out, err : text streams
        Result and progress.

    Returns
    -------
    int
        Exit status.

    Raises
    ------
    InputError
        Before any long work, if something given cannot be used.
    """
    options.check_text(arguments)
    if write_completion(parser(), SCRIPT, arguments, out):
        return 0
    given = parser().parse_args(arguments)
    from lensjax.jobs.request import JobRequest
    from lensjax.progress.console import Console
    from lensjax.tune.job import Tuning, TuningError, prepare_job

    for flag in options.LORA_OPTIONS:
        if getattr(given, flag) is not None and not given.model.endswith(ADAPTED):
            name = "--" + flag.replace("_", "-")
            raise InputError(f"{name}: the model has no adapters; name it {given.model}{ADAPTED}, or remove {name}.")
    chosen = {n: getattr(given, n) for n in options.TASK_OPTIONS if getattr(given, n) is not None}
    plan, search = options.plan_of(given, demo=False)
    request = JobRequest(models=(given.model,), plan=plan, search=search, lora=options.lora_of(given), **chosen)
    wanted = {"samples": given.samples, "selection": given.selection, "overwrite": given.overwrite}
    job = prepare_job(request, given.out, **wanted, arguments=[str(a) for a in arguments])
    tuning = Tuning(job, Console(err, quiet=given.quiet, verbose=given.verbose))
    try:
        outcome = tuning.execute()
    except TuningError as error:
        if given.verbose:
            err.write(printable_lines("".join(traceback.format_exception(error))) + "\n")
        err.write(printable_lines(f"{PROGRAM}: {error}") + "\n")
        return FAILED
    except KeyboardInterrupt:
        err.write("\n" + printable_lines(f"{PROGRAM}: interrupted. {tuning.kept}") + "\n")
        return INTERRUPTED
    out.write(tuning.render(outcome) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the process's streams; return its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return guarded(PROGRAM, lambda: run(given, sys.stdout, sys.stderr), interrupted="Training had not begun.")
