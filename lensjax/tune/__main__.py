"""Entry point of ``python -m lensjax.tune``."""

import sys

from lensjax.tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
