"""The command ``python -m lensjax.select``."""
