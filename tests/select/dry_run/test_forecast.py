"""What a forecast shows: text for a terminal, short numbers."""

import dataclasses
import shutil

import pytest

from lensjax.select.dry_run.forecast import (
    format_bytes,
    format_weights,
    rough_duration,
)
from support.dry_runs import GIB, HERE


def test_the_text_can_be_read_in_a_terminal(dry_run_of, wide_model, tiny_models):
    long = wide_model.parent / ("a-model-with-a-name-that-is-much-too-long-for-any-table-of-this-width")
    shutil.copytree(wide_model, long)
    forecast = dry_run_of(str(long), str(tiny_models[0]), verify=True, machine=dataclasses.replace(HERE, memory=2**29))
    text = forecast.render()
    # Paths are as long as they are, and have lines of their own.
    assert max(len(line) for line in text.splitlines() if not line.startswith("    /")) <= 100
    assert text.splitlines()[0].startswith("2 of 2 candidates do NOT FIT on this machine.")
    assert "a-model-with-...-of-this-width" in text  # in the table
    flat = " ".join(text.split())
    assert f"{long.name} does NOT FIT: it needs about" in flat
    assert "nothing was fine-tuned, and no weights were fetched" in flat
    assert "Task parity: 100 samples to train on;" in flat
    assert "to verify the choice" in flat
    assert "at most 2 passes each, and the losses tell which will be best on 100." in flat


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_bytes, 0, "0 B"),
        (format_bytes, 5 * 2**20, "5 MiB"),
        (format_bytes, int(5.26 * GIB), "5.3 GiB"),
        (format_bytes, int(37.4 * GIB), "37 GiB"),
        (format_bytes, 1023 * GIB, "1023 GiB"),
        (format_weights, 999, "999"),
        (format_weights, 999_499, "999K"),
        (format_weights, 999_500, "1M"),
        (format_weights, 999_960_000, "1B"),
        (format_weights, 124_439_808, "124M"),
        (format_weights, 6_700_000_000, "6.7B"),
        (rough_duration, 0.2, "1 s"),
        (rough_duration, 61, "61 s"),
        (rough_duration, 91, "2 min"),
        (rough_duration, 5400, "1 h 30 min"),
        (rough_duration, 36001, "10 h"),
        (rough_duration, 5 * 86400, "5.0 days"),
    ],
)
def test_numbers_are_short(function, value, text):
    assert function(value) == text
