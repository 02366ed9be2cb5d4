"""Shell completion of the commands' options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lensjax.commands.options import Parser, add_completion
from lensjax.selectors.methods import NAMES

FILES = frozenset({"config", "losses", "html", "json", "task", "model", "models"})
"""Options that take a file, or may."""


def completion(p: Parser, script: str, shell: str) -> str:
    """Return a script that makes a shell complete a command's options.

    Parameters
    ----------
    p : Parser
        Of the command; changed, so not for parsing any more.
    script : str
        What the command is called in the shell.
    shell : str
        One of `lensjax.commands.options.SHELLS`.
    """
    import shtab

    p.prog = script
    for action in p._actions:
        if action.dest in FILES or action.type is Path:
            action.complete = shtab.FILE if action.dest in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest == "method":
            action.choices = NAMES
    return shtab.complete(p, shell=shell)


def write_completion(p: Parser, script: str, arguments: Sequence[str], out: TextIO) -> bool:
    """Write what `completion` returns if the arguments ask for it by ``--completion``; return whether they do.

    Whatever else the command requires, it needs not be there.

    Raises
    ------
    InputError
        If there is no such shell.
    """
    asked = Parser(prog=p.prog, add_help=False, allow_abbrev=False)
    add_completion(asked, script)
    shell = asked.parse_known_args(arguments)[0].completion
    if shell is not None:
        out.write(completion(p, script, shell))
    return shell is not None
