"""The command line: options in, exit status out. What it does is in `from_losses` and `driver`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lensjax._files import read_json, write_atomically
from lensjax.commands.completion import write_completion
from lensjax.commands.exit_codes import FAILED, guarded
from lensjax.commands.options import LORA_OPTIONS, TASK_OPTIONS, check_text, lora_of, plan_of
from lensjax.errors import InputError
from lensjax.jobs.defaults import ADAPTED
from lensjax.report.figures.formats import FORMATS
from lensjax.select.config_file import errors_name_file, print_config, read_config
from lensjax.select.options import FINE_TUNING_ONLY, LOSSES_ONLY, PROGRAM, READING, SCRIPT, parser

if TYPE_CHECKING:
    from lensjax.select.request import Request
    from lensjax.selection import Selection

COMMAND, CONFIG, REPORT = "command.json", "config.toml", "report.html"
VERBOSITY_FLAGS = ("--quiet", "--verbose")
OUTPUT_FLAGS = ("--json", "--html", "--figures", "--figure-format", "--out")


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
    check_text(arguments)
    if write_completion(parser(), SCRIPT, arguments, out):
        return 0
    given = parser().parse_args(arguments)
    if given.config is None:
        return _run(given, arguments, out, err, own_process=own_process)
    now = _without(arguments, ("--config",))
    before = _yielding(read_config(given.config), now)
    with errors_name_file(given.config, before, now):
        arguments = [*before, *now]
        return _run(parser().parse_args(arguments), arguments, out, err, own_process=own_process)


def _run(given: argparse.Namespace, arguments: Sequence[str], out: TextIO, err: TextIO, *, own_process: bool) -> int:
    """Run the command with all its options, those of a file too, or continue an earlier one."""
    own_process = own_process and not given.in_process
    if given.resume is not None:
        arguments, base = resumed(given.resume.absolute(), arguments, given)
        given = parser().parse_args(arguments)
        return _select(given, _without(arguments, OUTPUT_FLAGS), out, err, base=base, own_process=own_process)
    return _select(given, arguments, out, err, base=Path.cwd(), own_process=own_process)


def _without(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the arguments without these options and their values."""
    kept, skip = [], False
    for argument in arguments:
        if argument.startswith("--"):
            skip = argument.partition("=")[0] in flags
        if not skip:
            kept.append(argument)
    return kept


def _yielding(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Return earlier arguments without those that the ones given now exclude instead of overriding them."""
    return _without(before, VERBOSITY_FLAGS) if any(flag in now for flag in VERBOSITY_FLAGS) else list(before)


def resumed(directory: Path, arguments: Sequence[str], given: argparse.Namespace) -> tuple[list[str], Path]:
    """Return the arguments that a selection was started with, and where; those given now come after and win.

    Raises
    ------
    InputError
        If the directory holds no selection that can be continued.
    """
    path = directory / COMMAND
    try:
        stored = read_json(path)
        before, place = [str(a) for a in stored["arguments"]], Path(stored["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"--resume {directory}: holds no {COMMAND} of a selection; name its run directory, or give again the "
            "command that started it."
        ) from None
    if not place.is_dir():
        raise InputError(f"--resume {directory}: was started in {place}, which is no directory now; make it again.")
    for flag, value in (("--out", given.out), ("--losses", given.losses)):
        if value is not None and Path(value).absolute() != directory:
            raise InputError(
                f"{flag} {value}: --resume {directory} continues the selection there; remove {flag} or --resume."
            )
    now = _without(arguments, ("--resume",))
    return [*_yielding(before, now), *now, "--out", str(directory)], place


def _select(
    given: argparse.Namespace, arguments: Sequence[str], out: TextIO, err: TextIO, *, base: Path, own_process: bool
) -> int:
    """Run the command; the data and models that `arguments` name are relative to `base`."""
    if given.print_config:
        out.write(print_config(given))
        return 0
    _check(given)
    from lensjax.report.figures.export import write_figures
    from lensjax.report.html import render_html
    from lensjax.report.text import render

    if given.dry_run:
        return _dry_run(given, out, base)
    if own_process and given.losses is None:
        import jax

        jax.config.update("jax_platforms", "cpu")
    selection = _from_losses(given) if given.losses is not None else _live(given, arguments, err, base)
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
        write_figures(selection, given.figures, given.figure_format or FORMATS[:1])
    return FAILED if selection.failures or selection.unverified else 0


def _dry_run(given: argparse.Namespace, out: TextIO, base: Path) -> int:
    from lensjax.select.dry_run.estimate import dry_run

    request = _request(given, base)
    found = dry_run(request, request.out)
    out.write(found.render() + "\n")
    if given.json is not None:
        write_atomically(given.json, json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n")
    return 0 if found.fits else FAILED


def _check(given: argparse.Namespace) -> None:
    """Refuse options that contradict each other or name what cannot be written, before anything is read."""
    from lensjax.report.figures.export import check_formats
    from lensjax.selectors import DEFAULT, GAMMA, TAU, check_rule, get_selector

    # These options serve with --losses and without; they have one default.
    for name, default in (("method", DEFAULT), ("gamma", GAMMA), ("tau", TAU)):
        if getattr(given, name) is None:
            setattr(given, name, default)
    if given.method != "all":
        get_selector(given.method)
    check_rule(given.gamma, given.tau)
    wrong = FINE_TUNING_ONLY if given.losses is not None else LOSSES_ONLY
    for name in wrong:
        if getattr(given, name) is not None:
            flag = "--" + name.replace("_", "-")
            where = "belongs to selection by fine-tuning" if given.losses is not None else "needs --losses"
            raise InputError(f"{flag} {where}; remove {flag}{' or --losses' if given.losses is not None else ''}.")
    for flag, file in (("--json", given.json), ("--html", given.html)):
        if file is not None:
            _check_file(flag, file)
    if given.json is not None and given.html is not None and given.json.absolute() == given.html.absolute():
        raise InputError(f"--json and --html are both {given.json}; name two files.")
    for place in () if given.figures is None else (given.figures, *given.figures.parents):
        if place.is_file():
            what = "is a file" if place == given.figures else f"{place} is a file"
            raise InputError(f"--figures {given.figures}: {what}; name a directory.")
    if given.figure_format is not None and given.figures is None:
        raise InputError("--figure-format: no figures are asked for; add --figures DIR, or remove --figure-format.")
    check_formats(given.figure_format or ())
    adapted = any(model.endswith(ADAPTED) for model in given.models or ())
    for flag in LORA_OPTIONS:
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

    names = {"samples_column": "samples", "model_column": "model"}
    reading = {names.get(n, n): getattr(given, n) for n in READING if getattr(given, n) is not None}
    return select_from_losses(
        given.losses,
        visible=given.visible,
        target=given.target,
        method=given.method,
        gamma=given.gamma,
        tau=given.tau,
        metric=given.metric,
        tokens_per_sample=1.0 if given.tokens_per_sample is None else given.tokens_per_sample,
        lower_is_better=bool(given.lower_is_better),
        reading=reading,
    )


def _request(given: argparse.Namespace, base: Path) -> Request:
    from lensjax.select.request import Request

    names = (
        *TASK_OPTIONS,
        *("out", "smallest", "visible", "target", "method", "gamma", "tau", "verify", "budget"),
        *("loss_unit", "tangents"),
    )
    chosen = {n: getattr(given, n) for n in names if getattr(given, n) is not None}
    plan, search = plan_of(given, demo=not given.models)
    return Request(models=tuple(given.models or ()), plan=plan, search=search, lora=lora_of(given), base=base, **chosen)


def _live(given: argparse.Namespace, arguments: Sequence[str], err: TextIO, base: Path) -> Selection:
    """Select by fine-tuning; `arguments` are what a later session is to be started with."""
    from lensjax.progress.console import Console
    from lensjax.select.driver import select
    from lensjax.select.request import prepare
    from lensjax.select.session import Session

    request = _request(given, base)
    console = Console(err, quiet=given.quiet, verbose=given.verbose)
    settings = print_config(given, lasting=True)
    if given.verbose:
        console.line(settings)
    prepared = prepare(request)
    directory = request.out or prepared.default_directory
    session = Session(prepared, directory, console, isolate=not given.in_process)
    command = {"arguments": [str(a) for a in arguments], "directory": str(base)}
    write_atomically(directory / COMMAND, json.dumps(command, indent=2) + "\n")
    write_atomically(directory / CONFIG, settings)
    return select(session)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the process's streams; return its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return guarded(
        PROGRAM,
        lambda: run(given, sys.stdout, sys.stderr, own_process=arguments is None),
        interrupted="Runs that had finished are kept; the same command continues.",
    )
