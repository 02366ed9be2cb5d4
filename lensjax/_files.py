"""Files that survive crashes and belong to one process: atomic writes, locks, syncing."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Callable
from pathlib import Path

from lensjax.errors import InputError

PARTIAL = ".part"  # ends the name of a file that is being written


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace a file's content so that a crash leaves either the old or the new one.

    What is no regular file (a device, a pipe) is written to, not replaced; a link is followed.
    """
    path, content = path.resolve(), text.encode() if isinstance(text, str) else text
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + PARTIAL)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def lock_directory(directory: Path, owner: object, program: str, *, by: str = "") -> Callable[[], object]:
    """Keep other processes out of a directory for as long as an object lives; the lock dies with the process.

    Parameters
    ----------
    directory : Path
    owner : object
    program : str
        What the others would be, for the message.
    by : str
        A file in it that is locked in its stead.

    Returns
    -------
    callable () -> object
        Drops the lock now.

    Raises
    ------
    InputError
        If another process has it, or the file system knows no locks.
    OSError
        If the directory cannot be opened.
    """
    handle = os.open(directory / by, os.O_RDONLY)
    release = weakref.finalize(owner, os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        release()
        if isinstance(error, BlockingIOError):
            raise InputError(
                f"--out {directory}: another {program} is running there. Wait for it or name a new directory."
            ) from None
        raise InputError(
            f"--out {directory}: cannot be locked ({error.strerror}). Name a directory on another file system."
        ) from error
    return release


def sync_directory(directory: Path) -> None:
    """Make sure that the names of new files in a directory survive a crash."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
