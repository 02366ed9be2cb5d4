"""How the commands end: one message on the standard error stream, and an exit status, for every kind of error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lensjax._display import printable_lines
from lensjax._files import NO_ROOM
from lensjax.errors import InputError, SelectionError, UnsupportedBackendError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def guarded(program: str, work: Callable[[], int], *, interrupted: str) -> int:
    """Do a command's work and return its exit status; an expected error becomes a message.

    Parameters
    ----------
    program : str
        Name of the command, at the beginning of the message.
    work : callable () -> int
    interrupted : str
        What to say after an interrupt: what is kept, and how to go on.

    Returns
    -------
    int
        That of `work`; `BAD_INPUT` where something given cannot be used, `FAILED` where the selection failed or the
        disk is full, `INTERRUPTED`.
    """
    try:
        return work()
    except (InputError, UnsupportedBackendError) as error:
        message, status = str(error), BAD_INPUT
    except SelectionError as error:
        message, status = str(error), FAILED
    except OSError as error:
        what = error.filename or "a file"
        if error.errno in NO_ROOM:
            message, status = f"{what}: {error.strerror}. Make room and give the same command again.", FAILED
        else:
            message, status = f"{what}: {error.strerror or error}. Check that it exists and may be used.", BAD_INPUT
    except KeyboardInterrupt:
        # What was written before the interrupt may not have ended its line.
        sys.stderr.write("\n")
        message, status = f"interrupted. {interrupted}", INTERRUPTED
    sys.stderr.write(printable_lines(f"{program}: {message}") + "\n")
    return status
