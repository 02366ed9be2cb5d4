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
from lensjax.select.options import FIGURE_FORMATS, LIVE_ONLY, LOSSES_ONLY, PROGRAM, parser

NOT_IN_FILES = ("config", "print_config", "completion", "help", "dry_run", "resume")
"""Options that say what to do now, not what to choose from."""
THIS_TIME = ("out", "quiet", "verbose", "html", "json", "figures", "figure_format")
"""Options that a file may hold, but one left by a selection does not."""


def read_config(path: Path) -> list[str]:
    """Return the command-line arguments that say what a TOML file says.

    Keys are the options' names, with ``-`` or ``_``, at the top or in tables with the names of the groups of
    ``--help``; paths are meant from the current directory, as on the command line.

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of str
        To be put before those of the command line, which then win.

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or has an unknown key or a value that does not suit it.
    """
    try:
        # Some editors put a mark at the beginning.
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
            raise InputError(f"--config {path}: {where}{key} is no option.{_meant(key, known)}")
        owner = next(group for group, members in groups.items() if action in members)
        if where and where != f"{owner}.":
            raise InputError(f"--config {path}: {where}{key} belongs in the table [{owner}], or at the top.")
        arguments += _arguments(action, value, f"--config {path}: {where}{key}")
        keys[action.option_strings[0]] = f"{where}{key}"
    try:
        parser().parse_args(arguments)
    except InputError as error:
        flag, _, reason = str(error).removeprefix("argument ").partition(": ")
        said = f"{keys[flag]}: {reason}" if flag in keys else str(error)
        raise InputError(f"--config {path}: {said}") from None
    return arguments


INPUTS = ("task", "models", "losses")
"""Options whose values a message may begin with instead of their names."""


@contextlib.contextmanager
def naming(path: Path, before: Sequence[str], now: Sequence[str]) -> Iterator[None]:
    """Let what is refused later name the TOML file, and the keys in it that the message is about.

    Parameters
    ----------
    path : Path
    before, now : sequence of str
        What `read_config` made of it; the arguments that come after and win.

    Raises
    ------
    InputError
        The one raised inside, with a sentence more if it names an option that the file sets.
    """
    try:
        yield
    except InputError as error:
        overridden, found = _values(now), _values(before)
        keys = [name for name in found if name not in overridden and _names(str(error), name, found[name])]
        if not keys:
            raise
        raise InputError(f"{error} From --config {path}: {', '.join(keys)}.") from error


def _values(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return the options among arguments, called as in a file, and their values."""
    found: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = re.sub("^--(no-)?", "", flag).replace("-", "_")
            found[name] = [value] if equals else []
        elif name:
            found[name].append(argument)
    return found


def _names(message: str, name: str, values: Sequence[str]) -> bool:
    """Return whether a message names an option: by its flag, in words, or by the file or model that is its value."""
    words = name.replace("_", "[-_ ]")
    ways = [rf"--{name.replace('_', '-')}(?![\w-])"]
    # A single word may mean anything, but not where the message begins.
    ways += [rf"\b{words}s?\b" if "_" in name else rf"^(?:the )?{words}\b"]
    if name.startswith("lora_"):
        ways.append(rf"^LoRA's {name.removeprefix('lora_')}\b")
    if name in INPUTS:
        ways += [rf"^{re.escape(value.removesuffix('+lora'))}(?![\w.-])" for value in values]
    return any(re.search(way, message) for way in ways)


def _entries(
    content: Mapping[str, Any], groups: Mapping[str, Sequence[argparse.Action]], path: Path
) -> list[tuple[str, str, Any]]:
    """Return (table with a dot, key, value) of all that a file says, each key once."""
    entries: list[tuple[str, str, Any]] = []
    for key, value in content.items():
        # Two groups are called like one of their options: the table is meant when there is one.
        if not isinstance(value, dict):
            entries.append(("", key, value))
            continue
        if key not in groups:
            raise InputError(f"--config {path}: there is no table [{key}].{_meant(key, groups)}")
        entries += [(f"{key}.", inner, found) for inner, found in value.items()]
    seen: set[str] = set()
    for where, key, _ in entries:
        name = key.replace("-", "_")
        if name in seen:
            raise InputError(f"--config {path}: {where}{key} is there twice; keep one of them.")
        seen.add(name)
    return entries


def _meant(word: str, known: Any) -> str:
    return did_you_mean(word, known) or f" See python -m {PROGRAM} --print-config."


def _arguments(action: argparse.Action, value: Any, what: str) -> list[str]:
    """Return a setting as arguments."""
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
    return action.nargs == 0


def _groups(p: Parser) -> dict[str, list[argparse.Action]]:
    """Return the options that a file may hold, by the titles of their groups."""
    found = {}
    for group in p._action_groups:
        members = [a for a in group._group_actions if a.option_strings and a.dest not in NOT_IN_FILES]
        if members and group.title is not None:
            found[group.title] = members
    return found


def print_config(given: argparse.Namespace, *, lasting: bool = False) -> str:
    """Return all options as a TOML file that `read_config` reads: what was given, else the default.

    Parameters
    ----------
    given : argparse.Namespace
    lasting : bool
        Leave out what is meant for this time only, such as where reports go.

    Returns
    -------
    str
        An option that has neither value nor fixed default is a comment.
    """
    demo = _demo_defaults(given)
    chosen = _defaults(given) | {name: value for name, value in vars(given).items() if value is not None}
    unsuited = LIVE_ONLY if given.losses is not None else ("losses", *LOSSES_ONLY)
    lines = [f"# Options of python -m {PROGRAM}; read by --config FILE.", ""]
    for group, members in _groups(parser()).items():
        left_out = (*unsuited, *(THIS_TIME if lasting else ()))
        shown = [action for action in members if action.dest not in left_out]
        if not shown:
            continue
        lines.append(f"[{group}]")
        for action in shown:
            help_text = " ".join((action.help or "").replace("%%", "%").split())
            lines += textwrap.wrap(help_text, 116, initial_indent="# ", subsequent_indent="# ")
            value = chosen.get(action.dest, False if _is_switch(action) else None)
            if value is None:
                # What suits the demo must not stay behind when its task or models are replaced.
                known = f" {_toml(demo[action.dest])}  # in the demo" if action.dest in demo else ""
                lines.append(f"# {action.dest} ={known}")
            else:
                lines.append(f"{action.dest} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _defaults(given: argparse.Namespace) -> dict[str, Any]:
    """Return what an option is where it is not given, if that does not depend on the data."""
    from lensjax.jobs.defaults import ADAPTED
    from lensjax.models import Lora
    from lensjax.select.request import SMALLEST, Request

    plan, search = plan_of(given, demo=False)
    request = dataclasses.asdict(Request())
    found = {name: request[name] for name in ("validation", "test", "seed", "max_length", "method", "gamma", "tau")}
    found["loss_unit"] = request["loss_unit"]
    if given.figures is not None:
        found["figure_format"] = list(FIGURE_FORMATS[:1])
    found |= {name: getattr(plan, name) for name in PLAN_OPTIONS}
    if given.models:
        found |= {"learning_rate": list(search.learning_rates) or [plan.learning_rate]}
    found |= {"batch_size": list(search.batch_sizes) or [plan.batch_size]}
    if given.task is not None:
        found["smallest"] = SMALLEST
    if any(model.endswith(ADAPTED) for model in given.models or ()):
        # Refused where no candidate has adapters.
        found |= {f"lora_{name}": getattr(Lora(), name) for name in ("rank", "alpha", "dropout")}
    return found


def _demo_defaults(given: argparse.Namespace) -> dict[str, Any]:
    """Return what the demo's task and models bring with them, where they are the ones."""
    from lensjax.jobs.defaults import DEMO_FIELDS, DEMO_LEARNING_RATE
    from lensjax.select.request import DEMO_SMALLEST

    found: dict[str, Any] = {} if given.models else {"learning_rate": [DEMO_LEARNING_RATE]}
    if given.task is None:
        found["smallest"] = DEMO_SMALLEST
        if given.text_field is None:
            found |= dict(zip(("input_field", "target_field"), DEMO_FIELDS, strict=True))
    return found


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # JSON's text is TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
