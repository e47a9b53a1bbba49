"""Decides which calls may wait: a pod with many volumes must not occupy all threads of the plugin.

A call that may not wait is answered soon. Its work continues (`csi/start.py`), and kubelet calls
again. So there are always threads for Probe, for unpublishing, and for other namespaces' volumes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

# The most waiting calls, of the `THREADS` in `csi/server.py`: in total, and for one namespace.
MOST, MOST_OF_ONE = 32, 8
# How long a call that may not wait takes at most.
SHORT_S = 0.5


class WaitingCalls:
    """Counts the calls that wait."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def one_of(self, whose: str) -> Iterator[float]:
        """The maximum time for which a call may wait, in seconds.

        Args:
            whose: a namespace, or a volume if the namespace is unknown.
        """
        with self._lock:
            may_wait = self._waiting.total() < MOST and self._waiting[whose] < MOST_OF_ONE
            if may_wait:
                self._waiting[whose] += 1
        try:
            yield float("inf") if may_wait else SHORT_S
        finally:
            if may_wait:
                with self._lock:
                    self._waiting[whose] -= 1
                    self._waiting += Counter()  # removes zero counts
