"""Which calls may wait: a pod with many volumes must not hold all threads of the plugin.

A call that may not is answered soon, and what it asked for goes on (`csi/start.py`): kubelet calls
again. So there is always a thread for Probe, for what ends and for the volumes of others.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

# Of `THREADS` of `csi/server.py`: all calls together, and those for one namespace.
MOST, MOST_OF_ONE = 32, 8
# How long a call takes that may not wait.
SHORT_S = 0.5


class WaitingCalls:
    """Counts the calls that wait."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def one_of(self, whose: str) -> Iterator[float]:
        """For how many seconds a call may wait, at most.

        Args:
            whose: a namespace, or a volume where that is not known.
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
                    self._waiting += Counter()  # forgets who has none
