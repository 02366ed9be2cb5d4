"""Shell completion of the commands' options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lensjax.commands.options import Parser, add_completion
from lensjax.selectors.methods import NAMES

FILE_OPTIONS = frozenset({"config", "losses", "html", "json", "task", "model", "models"})
"""Options whose values are files, or may be."""


def completion(p: Parser, script: str, shell: str) -> str:
    """Return a script that makes a shell complete a command's options.

    Parameters
    ----------
    p : Parser
        Of the command. It is changed and cannot parse arguments afterwards.
    script : str
        What the command is called in the shell.
    shell : str
        One of `lensjax.commands.options.SHELLS`.
    """
    import shtab

    p.prog = script
    for action in p.options:
        if action.dest in FILE_OPTIONS or action.type is Path:
            action.complete = shtab.FILE if action.dest in FILE_OPTIONS else shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest == "method":
            action.choices = NAMES
    return shtab.complete(p, shell=shell)


def write_completion(p: Parser, script: str, arguments: Sequence[str], out: TextIO) -> bool:
    """If the arguments hold ``--completion``, write what `completion` returns; return whether they do.

    Options that the command requires may be missing then.

    Raises
    ------
    InputError
        If there is no such shell.
    """
    completion_only = Parser(prog=p.prog, add_help=False, allow_abbrev=False)
    add_completion(completion_only, script)
    shell = completion_only.parse_known_args(arguments)[0].completion
    if shell is not None:
        out.write(completion(p, script, shell))
    return shell is not None
