"""Threads that move bytes: how many, and at which priority.

A load keeps all processors busy with these threads. With equal priority, each step of the trio
thread would wait for its turn among them, and answering a lookup takes several steps. So these
threads have a lower priority. It does not delay the bytes: the sooner the trio thread decides, the
sooner they start.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Added to the nice value: a third of the weight (sched(7), "The nice value").
NICER = 5
# For each request: two attempts, a write, and a push. Beyond them: readers that are in a hurry,
# disk reads, maintenance. The callers bound themselves; this limit must not be in their way.
FOR_A_REQUEST = 4
FOR_THE_REST = 64

_this_thread = threading.local()


class Threads:
    """Runs the blocking calls of one mount.

    Args:
        requests: the most requests that are in flight at once.
    """

    def __init__(self, requests: int) -> None:
        self._limit = trio.CapacityLimiter(1)
        self.allow(requests)

    def allow(self, requests: int) -> None:
        """Have threads for this many requests from now on."""
        self._limit.total_tokens = FOR_A_REQUEST * requests + FOR_THE_REST

    async def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a function in a thread. If the task is cancelled, the call goes on without it."""
        return await trio.to_thread.run_sync(
            _nicer, function, *arguments, abandon_on_cancel=True, limiter=self._limit
        )


def _nicer(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Call a function after lowering the priority of this thread, once."""
    if not getattr(_this_thread, "is_nicer", False):
        _this_thread.is_nicer = True
        try:
            os.nice(NICER)  # on Linux of the calling thread alone (nice(2)); needs no privilege
        except OSError as error:
            log.debug("the priority of a thread stays as it is: %s", error)  # in a tight sandbox
    return function(*arguments)
