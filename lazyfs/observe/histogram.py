"""Counts of durations in buckets, as Prometheus has them. Pure; not for several threads."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# From a slice of memory to a wait of minutes.
LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip


class Histogram:
    """Durations by bucket.

    Args:
        bounds_s: upper bounds of the buckets, ascending; one without bound follows them.
    """

    def __init__(self, bounds_s: tuple[float, ...] = LATENCY_BOUNDS_S) -> None:
        self.bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def cumulative(self) -> list[int]:
        """How many were at most each bound, and at the end, how many there were."""
        return list(accumulate(self._counts))
