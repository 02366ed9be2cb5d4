"""The settings of fine-tuning that are one of a few names; nothing is imported here, for the options need them too."""

from __future__ import annotations

SCHEDULES = ("constant", "linear", "cosine")
"""Of the learning rate after its warm-up."""
PRECISIONS = ("auto", "float32", "bfloat16")
"""Of the computation."""
SHARDINGS = ("auto", "none", "data", "full")
"""Of a run over several devices."""
