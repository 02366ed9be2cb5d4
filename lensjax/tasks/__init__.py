"""Tasks: samples from files and data sets, split once, and token batches of few shapes for a given tokenizer."""

from lensjax.tasks.cache import cached
from lensjax.tasks.encoding import IGNORED, Batch, Encoded, batches, bucket_lengths, encode
from lensjax.tasks.example import CHAT, PROMPT, Example
from lensjax.tasks.presets import PRESETS, Preset
from lensjax.tasks.task import Task, load_task

__all__ = [
    "CHAT",
    "IGNORED",
    "PRESETS",
    "PROMPT",
    "Batch",
    "Encoded",
    "Example",
    "Preset",
    "Task",
    "batches",
    "bucket_lengths",
    "cached",
    "encode",
    "load_task",
]
