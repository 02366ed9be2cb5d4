"""Options in a TOML file: read, and printed back in full."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lensjax._messages import did_you_mean
from lensjax.commands.options import PLAN_OPTIONS, Parser, plan_of
from lensjax.errors import InputError
from lensjax.report.figures.formats import FORMATS
from lensjax.select.options import FINE_TUNING_ONLY, LOSSES_ONLY, PROGRAM, parser

COMMAND_LINE_ONLY = ("config", "print_config", "completion", "help", "dry_run", "resume")
"""Options that a file must not hold: they say what to do now, not what to choose from."""
OUTPUT_OPTIONS = ("out", "quiet", "verbose", "html", "json", "figures", "figure_format")
"""Options that a file may hold, but that the one in a run directory does not: they are for one call of the command."""
INPUT_OPTIONS = ("task", "models", "losses")
"""Options whose values a message may begin with instead of their names."""


def read_config(path: Path) -> list[str]:
    """Return the settings in a TOML file as command-line arguments.

    Keys are the options' names, with ``-`` or ``_``, at the top or in tables with the names of the groups of
    ``--help``; relative paths start from the current directory, as on the command line.

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of str
        To be put before the arguments of the command line, which then override them.

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or has an unknown key or a value that does not suit it.
    """
    try:
        # Some editors begin a file with a byte-order mark.
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: there is no such file; --print-config prints one to begin with.") from None
    except IsADirectoryError:
        raise InputError(f"--config {path}: is a directory; name a TOML file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path}: is no TOML: {error}. Text stands in quotes, lists in brackets.") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"
        raise InputError(f"--config {path}: cannot be read, for {reason}. Correct it.") from None
    groups = _groups(parser())
    actions = {action.dest: action for members in groups.values() for action in members}
    arguments: list[str] = []
    keys: dict[str, str] = {}
    for where, key, value in _entries(content, groups, path):
        name = key.replace("-", "_")
        action = actions.get(name)
        if action is None:
            known = [*actions, *(dest.replace("_", "-") for dest in actions)]
            raise InputError(f"--config {path}: {where}{key} is no option.{_hint(key, known)}")
        owner = next(group for group, members in groups.items() if action in members)
        if where and where != f"{owner}.":
            raise InputError(f"--config {path}: {where}{key} belongs in the table [{owner}], or at the top.")
        arguments += _arguments(action, value, f"--config {path}: {where}{key}")
        keys[action.option_strings[0]] = f"{where}{key}"
    try:
        parser().parse_args(arguments)
    except InputError as error:
        flag, _, reason = str(error).removeprefix("argument ").partition(": ")
        problem = f"{keys[flag]}: {reason}" if flag in keys else str(error)
        raise InputError(f"--config {path}: {problem}") from None
    return arguments


@contextlib.contextmanager
def errors_name_file(path: Path, from_file: Sequence[str], typed: Sequence[str]) -> Iterator[None]:
    """Add to errors raised inside which keys of the TOML file they are about.

    Parameters
    ----------
    path : Path
        Of the TOML file.
    from_file : sequence of str
        Its settings, as `read_config` returned them.
    typed : sequence of str
        Arguments of the command line, which override them.

    Raises
    ------
    InputError
        The one raised inside, with one more sentence if it names an option that the file sets.
    """
    try:
        yield
    except InputError as error:
        overridden, set_by_file = _values(typed), _values(from_file)
        keys = [
            name
            for name, values in set_by_file.items()
            if name not in overridden and _mentions(str(error), name, values)
        ]
        if not keys:
            raise
        raise InputError(f"{error} From --config {path}: {', '.join(keys)}.") from error


def _values(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return option -> values of command-line arguments; options are named as in a file."""
    options: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = re.sub("^--(no-)?", "", flag).replace("-", "_")
            options[name] = [value] if equals else []
        elif name:
            options[name].append(argument)
    return options


def _mentions(message: str, name: str, values: Sequence[str]) -> bool:
    """Return whether a message names an option: its flag, its words, or the file or model that is its value."""
    words = name.replace("_", "[-_ ]")
    patterns = [rf"--{name.replace('_', '-')}(?![\w-])"]
    # A single word, such as "test", may mean anything else, except at the beginning of a message.
    patterns += [rf"\b{words}s?\b" if "_" in name else rf"^(?:the )?{words}\b"]
    if name.startswith("lora_"):
        patterns.append(rf"^LoRA's {name.removeprefix('lora_')}\b")
    if name in INPUT_OPTIONS:
        patterns += [rf"^{re.escape(value.removesuffix('+lora'))}(?![\w.-])" for value in values]
    return any(re.search(pattern, message) for pattern in patterns)


def _entries(
    content: Mapping[str, Any], groups: Mapping[str, Sequence[argparse.Action]], path: Path
) -> list[tuple[str, str, Any]]:
    """Return (table name and a dot, or "", key, value) of each setting in a file; keys must not repeat."""
    entries: list[tuple[str, str, Any]] = []
    for key, value in content.items():
        # Two groups have the name of one of their options: a table is always the group.
        if not isinstance(value, dict):
            entries.append(("", key, value))
            continue
        if key not in groups:
            raise InputError(f"--config {path}: there is no table [{key}].{_hint(key, groups)}")
        entries += [(f"{key}.", inner, setting) for inner, setting in value.items()]
    seen: set[str] = set()
    for where, key, _ in entries:
        name = key.replace("-", "_")
        if name in seen:
            raise InputError(f"--config {path}: {where}{key} is there twice; keep one of them.")
        seen.add(name)
    return entries


def _hint(word: str, known: Any) -> str:
    """Return a guess at what an unknown word means, or where to look, as a sentence after a space."""
    return did_you_mean(word, known) or f" See python -m {PROGRAM} --print-config."


def _arguments(action: argparse.Action, value: Any, what: str) -> list[str]:
    """Return a setting as command-line arguments; `what` names it in messages."""
    flag = action.option_strings[0]
    if _is_switch(action):
        if not isinstance(value, bool):
            raise InputError(f"{what} is {value!r}; it must be true or false.")
        off = [f for f in action.option_strings if f.startswith("--no-")]
        return [flag] if value else off
    several = action.nargs == "+"
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not (several and value):
        remedy = "it must be one value" if not several else "it must hold at least one value"
        raise InputError(f"{what} is {value!r}; {remedy}.")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int | float | str):
            raise InputError(f"{what} is {item!r}; it must be text or a number.")
    texts = [item if isinstance(item, str) else repr(item) for item in values]
    # With "=", a value may begin with a dash.
    return [flag, *texts] if several else [f"{flag}={texts[0]}"]


def _is_switch(action: argparse.Action) -> bool:
    """Return whether an option takes no value."""
    return action.nargs == 0


def _groups(p: Parser) -> dict[str, list[argparse.Action]]:
    """Return the options that a file may hold, by the titles of their groups."""
    groups = {}
    for title, options in p.options_by_group.items():
        members = [a for a in options if a.option_strings and a.dest not in COMMAND_LINE_ONLY]
        if members:
            groups[title] = members
    return groups


def print_config(given: argparse.Namespace, *, lasting: bool = False) -> str:
    """Return all options, given ones and defaults, as a TOML file that `read_config` reads.

    Parameters
    ----------
    given : argparse.Namespace
    lasting : bool
        Leave out options that are for one call only, such as where reports go.

    Returns
    -------
    str
        An option that has neither value nor fixed default is a comment.
    """
    demo = _demo_defaults(given)
    chosen = _defaults(given) | {name: value for name, value in vars(given).items() if value is not None}
    unsuited = FINE_TUNING_ONLY if given.losses is not None else ("losses", *LOSSES_ONLY)
    lines = [f"# Options of python -m {PROGRAM}; read by --config FILE.", ""]
    for group, members in _groups(parser()).items():
        left_out = (*unsuited, *(OUTPUT_OPTIONS if lasting else ()))
        shown = [action for action in members if action.dest not in left_out]
        if not shown:
            continue
        lines.append(f"[{group}]")
        for action in shown:
            help_text = " ".join((action.help or "").replace("%%", "%").split())
            lines += textwrap.wrap(help_text, 116, initial_indent="# ", subsequent_indent="# ")
            value = chosen.get(action.dest, False if _is_switch(action) else None)
            if value is None:
                # A comment only: it must not stay in force when the user replaces the demo's task or models.
                known = f" {_toml(demo[action.dest])}  # in the demo" if action.dest in demo else ""
                lines.append(f"# {action.dest} ={known}")
            else:
                lines.append(f"{action.dest} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _defaults(given: argparse.Namespace) -> dict[str, Any]:
    """Return the defaults that do not depend on the data."""
    from lensjax.jobs.defaults import ADAPTED
    from lensjax.models import Lora
    from lensjax.select.request import SMALLEST, Request

    plan, search = plan_of(given, demo=False)
    request = dataclasses.asdict(Request())
    options = {name: request[name] for name in ("validation", "test", "seed", "max_length", "method", "gamma", "tau")}
    options["loss_unit"] = request["loss_unit"]
    if given.figures is not None:
        options["figure_format"] = list(FORMATS[:1])
    options |= {name: getattr(plan, name) for name in PLAN_OPTIONS}
    if given.models:
        options |= {"learning_rate": list(search.learning_rates) or [plan.learning_rate]}
    options |= {"batch_size": list(search.batch_sizes) or [plan.batch_size]}
    if given.task is not None:
        options["smallest"] = SMALLEST
    if any(model.endswith(ADAPTED) for model in given.models or ()):
        # They are refused unless a candidate has adapters.
        options |= {f"lora_{name}": getattr(Lora(), name) for name in ("rank", "alpha", "dropout")}
    return options


def _demo_defaults(given: argparse.Namespace) -> dict[str, Any]:
    """Return the defaults that hold only for the demo's task and models, if these are used."""
    from lensjax.jobs.defaults import DEMO_FIELDS, DEMO_LEARNING_RATE
    from lensjax.select.request import DEMO_SMALLEST

    options: dict[str, Any] = {} if given.models else {"learning_rate": [DEMO_LEARNING_RATE]}
    if given.task is None:
        options["smallest"] = DEMO_SMALLEST
        if given.text_field is None:
            options |= dict(zip(("input_field", "target_field"), DEMO_FIELDS, strict=True))
    return options


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML string, except that TOML wants DEL escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
