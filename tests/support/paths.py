"""Where things of the repository are, for tests that read or run them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "models" / "golden"
SUPPORT = ROOT / "tests" / "support"
SOURCES = (ROOT, ROOT / "kernels")
"""What a new Python process needs on its path to import the library from here."""
