"""Constants of jobs that the commands' options need too; nothing heavy is imported here."""

from __future__ import annotations

from lensjax.selectors.methods import PRETRAINED_SCORES

TANGENTS = "tangents"
EXTRA_MEASUREMENTS = (TANGENTS, *PRETRAINED_SCORES)
"""Measurements of a candidate that are recorded beside its fine-tuning runs."""

ADAPTED = "+lora"
"""Ends the name of a model that is fine-tuned by low-rank adapters."""

DEMO_TASK = ("demo", "wordnet_definitions.jsonl")
DEMO_FIELDS = ("word", "definition")
DEMO_MODELS = ("demo", "models")
DEMO_LEARNING_RATE = 2e-3  # for models of about a million weights; the default of `Plan` suits larger ones
