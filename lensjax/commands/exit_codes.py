"""How the commands end: with an exit status, and on the standard error stream what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lensjax._display import printable_lines
from lensjax.errors import InputError, SelectionError, UnsupportedBackendError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def guarded(program: str, work: Callable[[], int], *, interrupted: str) -> int:
    """Do a command's work and return its exit status; an error that it raises becomes a message.

    Parameters
    ----------
    program : str
        Begins the message.
    work : callable () -> int
    interrupted : str
        Said after an interrupt: what is kept, and how to go on.
    """
    try:
        return work()
    except (InputError, UnsupportedBackendError) as error:
        message, status = str(error), BAD_INPUT
    except SelectionError as error:
        message, status = str(error), FAILED
    except OSError as error:
        what = error.filename or "a file"
        message, status = f"{what}: {error.strerror or error}. Check that it exists and may be used.", BAD_INPUT
    except KeyboardInterrupt:
        # What was written before the interrupt may not have ended its line.
        sys.stderr.write("\n")
        message, status = f"interrupted. {interrupted}", INTERRUPTED
    sys.stderr.write(printable_lines(f"{program}: {message}") + "\n")
    return status
