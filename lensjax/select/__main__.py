"""Entry point of ``python -m lensjax.select``."""

import sys

from lensjax.select.cli import main

if __name__ == "__main__":
    sys.exit(main())
