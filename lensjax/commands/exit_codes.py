"""How the commands end: one line on the standard error stream and an exit status for each kind of failure."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lensjax.errors import InputError, SelectionError, UnsupportedBackendError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def guarded(program: str, work: Callable[[], int], *, interrupted: str) -> int:
    """Do a command's work and return its exit status; an error is written as one line to the standard error stream.

    Parameters
    ----------
    program : str
        Name of the command, which begins the line.
    work : callable () -> int
    interrupted : str
        Sentence after an interrupt that says which results are kept and how to continue.
    """
    try:
        return work()
    except (InputError, UnsupportedBackendError) as error:
        sys.stderr.write(f"{program}: {error}\n")
        return BAD_INPUT
    except SelectionError as error:
        sys.stderr.write(f"{program}: {error}\n")
        return FAILED
    except OSError as error:
        what = error.filename or "a file"
        sys.stderr.write(f"{program}: {what}: {error.strerror or error}. Check that it exists and may be used.\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: interrupted. {interrupted}\n")
        return INTERRUPTED
