"""Files that survive crashes and belong to one process, and JSON that is read within bounds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lensjax.errors import InputError

PARTIAL = ".part"  # ends the name of a file that is being written
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

JSON_BYTES = 1 << 28
"""Size of the largest JSON file that is read."""
JSON_DEPTH = 100
"""Lists and objects that may stand inside each other."""
JSON_DIGITS = 308
"""Digits of an integer: a longer one may be no float64 number."""
TOO_DEEP = f"it is nested more than {JSON_DEPTH} deep"


def write_all(handle: int, content: bytes) -> None:
    """Write bytes to a file descriptor: all of them, however few the system takes at once.

    Raises
    ------
    OSError
        If they cannot be written; some of them may have been.
    """
    rest = memoryview(content)
    while rest:
        written = os.write(handle, rest)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[written:]


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace a file's content so that a crash leaves either the old or the new one.

    What is no regular file (a device, a pipe) is written to, not replaced. A link is followed, but not one that has
    the name of the temporary file: somebody else may have put it there.

    Raises
    ------
    OSError
        If it cannot be written; its `filename` is the path. The old content is still there.
    """
    named, path = path, path.resolve()
    content = text.encode() if isinstance(text, str) else text
    temporary = path.with_name(path.name + PARTIAL)
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        temporary.unlink(missing_ok=True)  # left by a crash
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            write_all(handle, content)
            os.fsync(handle)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(named), None
        raise


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, whole or not at all; when this returns, it survives a crash.

    Parameters
    ----------
    path : Path
        Made if it is not there. If its last line has no end, that is put first.
    line : bytes
        Without its end.

    Raises
    ------
    OSError
        If it cannot be written; the file is then as it was.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(handle).st_size
        separator = b"\n" if before and os.pread(handle, 1, before - 1) != b"\n" else b""
        content = separator + line + b"\n"
        try:
            write_all(handle, content)
            os.fsync(handle)
        except BaseException as error:
            # An interrupt after the last byte takes nothing back.
            if isinstance(error, OSError) or os.fstat(handle).st_size != before + len(content):
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)
    sync_directory(path.parent)


def lock_directory(directory: Path, owner: object, program: str) -> Callable[[], object]:
    """Make a directory if it is not there, and keep other processes out of it for as long as an object lives.

    The lock dies with the process.

    Parameters
    ----------
    directory : Path
    owner : object
    program : str
        What the others would be, for the message.

    Returns
    -------
    callable () -> object
        Drops the lock now.

    Raises
    ------
    InputError
        If another process has it, or the file system knows no locks.
    OSError
        If the directory cannot be made or opened.
    """
    for _ in range(100):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # removed by a process that made it and has just ended
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
        # It may have been removed, and made anew by others, between opening and locking.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(directory)):
                return release
        release()
    raise InputError(f"--out {directory}: is removed again and again by another process. Name a new directory.")


def sync_directory(directory: Path) -> None:
    """Make sure that the names of new files in a directory survive a crash."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(error: BaseException) -> OSError | None:
    """Return the operating system's error that an exception is, or is about; None for all others.

    Libraries written in Rust, safetensors among them, report a full disk by an exception of their own.
    """
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def parse_json(content: str | bytes, *, surrogates: bool = True) -> Any:
    """Return what JSON text says; of equal keys the last counts.

    Parameters
    ----------
    content : str or bytes
    surrogates : bool
        Whether texts may hold lone surrogates, which no text file can.

    Raises
    ------
    ValueError
        If it is no JSON in UTF-8, or beyond `JSON_BYTES`, `JSON_DEPTH` or `JSON_DIGITS`; nothing else is raised. Its
        message is the reason.
    """
    if len(content) > JSON_BYTES:
        raise ValueError(f"it has more than {JSON_BYTES >> 20} MiB")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    # Hardly any text has so many brackets, and in most that do they stand beside each other.
    if text.count("[") + text.count("{") > JSON_DEPTH and _is_too_deep(value):
        raise ValueError(TOO_DEEP)
    if not surrogates:
        try:
            # An escaped pair has become one character by now.
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it has half a character (\\u{ord(error.object[error.start]):04x})") from None
    return value


def _integer(digits: str) -> int:
    if len(digits.removeprefix("-")) > JSON_DIGITS:
        raise ValueError(f"it has an integer of {len(digits.removeprefix('-'))} digits")
    return int(digits)


def _is_too_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level := [container for container in level if isinstance(container, dict | list)]:
        depth += 1
        if depth > JSON_DEPTH:
            return True
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return False


def read_json(path: Path, remedy: str = "make it again") -> Any:
    """Read a JSON file, see `parse_json`.

    Parameters
    ----------
    path : Path
    remedy : str
        Ends the message.

    Raises
    ------
    InputError
        If it holds no JSON that is read; the message names the file.
    OSError
        If it cannot be opened.
    """
    with path.open("rb") as file:
        content = file.read(JSON_BYTES + 1)
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}); {remedy}.") from error
