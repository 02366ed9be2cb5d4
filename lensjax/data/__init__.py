"""What lensjax ships: published loss tables, the live benchmark's, and the demo (task sample and small models).

The licences and sources stand beside the files.
"""

from importlib.resources import as_file, files
from pathlib import Path

PUBLISHED = ("flan", "gigaword", "wmt19")
LIVE = ("definitions", "novels", "packages")
TABLES = {"published": PUBLISHED, "live": LIVE}
"""Folder -> names of its tables, which are called "folder:name"."""


def path(*parts: str) -> Path:
    """Return the path of a packaged file or folder, e.g. ``path("published", "flan.csv")``."""
    with as_file(files(__name__).joinpath(*parts)) as found:
        return Path(found)
