"""The command ``python -m lensjax.tune``: fine-tunes one model and keeps it."""
