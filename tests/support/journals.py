"""What a run directory's journal holds."""

import json

from lensjax.journal import JOURNAL


def journal(directory):
    return [json.loads(line) for line in (directory / JOURNAL).read_text().splitlines()]
