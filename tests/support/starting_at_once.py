"""Starts two processes at once that open the journal of one new directory, again and again.

Run as a program, with an empty directory and a number of tries. It prints, as JSON, what became of each pair.
"""

import json
import multiprocessing
import os
import pathlib
import sys

from lensjax.errors import InputError
from lensjax.journal import Journal

SPECIFICATION = {"task": "t", "padding": "x" * 2000}


def open_journal(directory, barrier, results, ended):
    """Open the journal at the same moment as the other process, and keep it until both have tried."""
    barrier.wait()
    try:
        journal = Journal(directory, SPECIFICATION)
        result = "owns it"
    except InputError as error:
        journal, result = None, str(error)
    results.put(result)
    ended.wait(20)
    del journal
    os._exit(0)


def main():
    directory, tries = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    context = multiprocessing.get_context("fork")
    pairs = []
    for number in range(tries):
        barrier, results, ended = context.Barrier(2), context.SimpleQueue(), context.Event()
        arguments = (directory / f"{number}" / "run", barrier, results, ended)
        processes = [context.Process(target=open_journal, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        pairs.append([results.get() for _ in processes])
        ended.set()
        for process in processes:
            process.join()
    print(json.dumps(pairs))


if __name__ == "__main__":
    main()
