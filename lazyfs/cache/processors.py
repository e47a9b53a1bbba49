"""Whether the machine's processors have time to spare.

What need not be done now (writing blocks to the disk) is left for later while they have none: it
would only take their time away from the reader.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

# How old an answer may be, and over how long idle time is measured at least.
SAMPLE_S = 0.1
# With less than this share of one core idle there is no time to spare.
LEAST_IDLE_CORES = 0.5

_STAT = Path("/proc/stat")


def idle_core_seconds() -> float:
    """How long all cores together have been idle since boot, waiting for the disk included.

    The first line of `/proc/stat`, in ticks of 10 ms (proc(5)).

    Raises:
        OSError: it cannot be read.
    """
    with _STAT.open() as lines:
        fields = lines.readline().split()
    return (int(fields[4]) + int(fields[5])) / 100


class Processors:
    """The load of all cores, sampled when asked.

    Args:
        idle_s: how long all cores together have been idle; grows.
        clock: seconds; grows.
    """

    def __init__(
        self,
        idle_s: Callable[[], float] = idle_core_seconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._sampled_at_s = clock()
        self._sampled_idle_s = idle_s()
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether less than half a core was idle lately."""
        now_s = self._clock()
        elapsed_s = now_s - self._sampled_at_s
        if elapsed_s >= SAMPLE_S:
            idle_s = self._idle_s()
            self._busy = (idle_s - self._sampled_idle_s) / elapsed_s < LEAST_IDLE_CORES
            self._sampled_at_s, self._sampled_idle_s = now_s, idle_s
        return self._busy
