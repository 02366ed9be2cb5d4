"""Logarithmic scales with round ticks, and short forms of the numbers and names beside them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

# A little below the largest float64 number: who maps positions back to values, as matplotlib does, rounds.
LARGEST = math.log(sys.float_info.max) - 1e-6
SMALLEST = math.ulp(0.0)


def shortened(text: str, length: int) -> str:
    """Cut a text in its middle: the ends of model names tell them apart."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def compact(value: float) -> str:
    """Format a number in a few characters: 200, 1.6k, 3M, 2e12."""
    if value == 0:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1000 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A logarithmic scale: values from `low` to `high` lie between positions `start` and `stop`.

    Both ends are positive and finite, and may be any float64 numbers: ratios are taken as differences of logarithms,
    since those of 1e-300 and 1e300 overflow.
    """

    low: float
    high: float
    start: float = 0.0
    stop: float = 1.0

    @property
    def log_range(self) -> float:
        """Natural logarithm of the ratio of its ends."""
        return math.log(self.high) - math.log(self.low)

    def between(self, start: float, stop: float) -> Scale:
        """Return the same scale between other positions."""
        return dataclasses.replace(self, start=start, stop=stop)

    def __call__(self, value: float) -> float:
        """Return the position of a value; 0, where there is none, lies with the smallest number above it."""
        share = (math.log(max(value, SMALLEST)) - math.log(self.low)) / self.log_range
        return self.start + share * (self.stop - self.start)

    def inside(self, value: float) -> bool:
        """Whether a value lies on the scale."""
        return self.low <= value <= self.high

    def clip(self, value: float) -> float:
        """Return the value on the scale that is nearest to a value."""
        return min(max(value, self.low), self.high)

    def ticks(self, most: int) -> list[float]:
        """Return up to `most` round values on the scale, more than one where there is room for them."""
        decades = self.log_range / math.log(10)
        if decades >= 1.5:
            exponents = range(math.floor(math.log10(self.low)), min(math.ceil(math.log10(self.high)), 308) + 1)
            between = [m * 10.0**e for e in exponents for m in (1, 2, 5) if self.inside(m * 10.0**e)]
            if len(between) <= most:
                return between
            step = max(1, math.ceil(decades / most))
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            return [t for t in (10.0**e for e in range(first, last + 1, step)) if t > 0][:most]
        best: list[float] = []
        base = math.floor(math.log10(self.high - self.low))
        for step_size in (m * 10.0**e for e in (base - 1, base) for m in (1.0, 2.0, 5.0)):
            if not step_size:  # smaller than float64 can hold
                continue
            first = math.ceil(self.low / step_size - 1e-9)
            multiples = range(first, math.floor(self.high / step_size + 1e-9) + 1)
            # To 12 digits: 3 * 0.1 is 0.3.
            rounded = [float(f"{i * step_size:.12g}") for i in multiples]
            if len(best) < len(rounded) <= most:
                best = rounded
        return best


def padded(values: Sequence[float], margin: float = 0.06) -> Scale:
    """Return a scale that holds all values (above 0, finite), with a margin at both ends in shares of its length."""
    low, high = math.log(min(values)), math.log(max(values))
    pad = max((high - low) * margin, math.log(1.01))
    bottom = max(math.exp(low - pad), SMALLEST)
    top = max(math.exp(min(high + pad, LARGEST)), *values)
    # Among the smallest numbers there are, a margin of 1 % is none.
    return Scale(bottom, max(top, math.nextafter(bottom, math.inf)))
