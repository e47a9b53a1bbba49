"""A histogram of durations, with cumulative buckets as in Prometheus. Pure; not thread-safe."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# From a copy out of memory to a wait of minutes.
LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip


class Histogram:
    """Counts durations by bucket.

    Args:
        bounds_s: upper bounds of the buckets, ascending; a last bucket has no upper bound.
    """

    def __init__(self, bounds_s: tuple[float, ...] = LATENCY_BOUNDS_S) -> None:
        self.bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """Number of durations observed."""
        return sum(self._counts)

    def cumulative(self) -> list[int]:
        """For each bound, how many durations were at most that long; last, the count of all."""
        return list(accumulate(self._counts))
