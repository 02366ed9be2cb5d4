"""How long a selection will still take."""

from __future__ import annotations

from lensjax.report.progress import duration
from lensjax.select.prepare import Prepared


class Clock:
    """Estimates the time left from the speed of the runs so far.

    Work is counted in weights x samples, all sizes of all candidates; Algorithm 1 may need less.
    """

    def __init__(self, prepared: Prepared) -> None:
        sizes = [*prepared.sizes, *([prepared.target] if prepared.request.verify else [])]
        self.left = {(c.name, s): float(c.parameters) * s for c in prepared.candidates for s in sizes}
        self.done = self.seconds = self.running = 0.0

    def progress(self, name: str, size: int, share: float) -> None:
        """Note how far the present run is at least."""
        self.running = self.left.get((name, size), 0.0) * share

    def finished(self, name: str, size: int, seconds: float) -> None:
        """Note that a run took so long; zero-shot evaluations are no measure of training."""
        work = self.left.pop((name, size), 0.0)
        self.running = 0.0
        if work:
            self.done += work
            self.seconds += seconds

    def skip(self, name: str, size: int) -> None:
        """Note that a run is not needed."""
        self.left.pop((name, size), None)

    def __str__(self) -> str:
        if not self.done:
            return "time left not known yet"
        left = max(sum(self.left.values()) - self.running, 0.0)
        return f"at most about {duration(left * self.seconds / self.done)} left"
