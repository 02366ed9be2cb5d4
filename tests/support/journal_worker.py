"""Kills a selection's journal again and again, at random places, and says what became of it.

Run as a program, with an empty directory: it forks workers that each go on with the same list of runs, and kills each
at another line of the journal's code or in the middle of a write. It is a program of its own because pytest's process
has JAX's threads, which do not survive a fork. It prints a JSON object.
"""

import json
import os
import pathlib
import random
import signal
import stat
import sys
from functools import partial

from lensjax import _files
from lensjax import journal as journal_module

KILLS = 60
SIZES = (200, 400, 800, 1600)
CANDIDATES = ("a", "b", "c", "d", "e", "f")
SPECIFICATION = {"task": "t", "sizes": SIZES}


def work(directory, report):
    """Make the runs that are not there yet; `report` is told of each run begun and each that is safe."""
    journal = journal_module.Journal(directory, SPECIFICATION)
    for candidate in CANDIDATES:
        for size in SIZES:
            key = journal_module.key_of({"candidate": candidate, "size": size})
            if journal.get(key) is None:
                report("begun", key)
                loss = 3.0 + len(candidate) / size + ord(candidate) / 100
                journal.append(
                    journal_module.Run(key, candidate, size, loss, steps=size // 32, facts={"long": "x" * 3000})
                )
                report("safe", key)
    journal.close()


def kill_at_line(number):
    """Kill this process before it runs so many more lines of the journal's code and of what it writes by."""
    left = [number]

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (journal_module.__file__, _files.__file__):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def kill_in_write(number, share):
    """Kill this process in the middle of so manieth write to a file; only a part of it reaches the file."""
    left, whole = [number], os.write

    def torn(handle, content):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            left[0] -= 1
            if left[0] <= 0:
                whole(handle, content[: int(len(content) * share)])
                os.kill(os.getpid(), signal.SIGKILL)
        return whole(handle, content)

    os.write = torn


def attempt(directory, prepare):
    """Fork a worker; return (whether it was killed, what it reported)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        prepare()
        work(directory, lambda what, key: os.write(write, f"{what} {key}\n".encode()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        reported = [line.split() for line in pipe.read().splitlines()]
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a worker failed by itself")
    return os.WIFSIGNALED(status), reported


def main():
    directory = pathlib.Path(sys.argv[1])
    rng = random.Random(0)
    kills = torn = 0
    safe, begun = [], []
    while kills < KILLS:
        if kills % 3 == 0:
            killed, reported = attempt(directory, partial(kill_in_write, rng.randint(1, 3), rng.random()))
        else:
            killed, reported = attempt(directory, partial(kill_at_line, rng.randint(1, 250)))
        if not killed:
            # All is done: begin anew, so that the kills fall on every stage of a selection.
            if len(safe) != len(set(safe)):
                raise SystemExit("a finished run was repeated")
            for file in directory.iterdir():
                file.unlink()
            safe, begun = [], []
            continue
        kills += 1
        safe += [key for what, key in reported if what == "safe"]
        begun += [key for what, key in reported if what == "begun"]
        # What was reported safe must be there, and nothing that was never begun; the worker's lock is gone.
        if any(directory.iterdir()):
            journal = journal_module.Journal(directory, SPECIFICATION)
            torn += bool(journal.notices)
            missing = [key for key in safe if journal.get(key) is None]
            if missing or len(journal) > len(set(begun)):
                raise SystemExit(f"after kill {kills}: {missing} lost, or a run that was never made")
            journal.close()
    work(directory, lambda what, key: begun.append(key) if what == "begun" else safe.append(key))
    lines = (directory / journal_module.JOURNAL).read_text().splitlines()
    repeated = len(safe) - len(set(safe))
    print(json.dumps({"kills": kills, "torn": torn, "repeated": repeated, "runs": [json.loads(x) for x in lines]}))


if __name__ == "__main__":
    main()
