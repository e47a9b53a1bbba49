"""Threads that move bytes give way to the one that answers the kernel.

A load keeps all processors busy with many threads. If they were the equals of the thread in which
all decisions are made, each of its steps would wait for a turn among them, and a request for a name
takes several. The bytes do not come later: what is decided sooner begins sooner.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# A third of the weight (sched(7), "The nice value").
NICER = 5

_this_thread = threading.local()


def in_bulk(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a worker thread, which gives way from now on."""
    if not getattr(_this_thread, "gives_way", False):
        _this_thread.gives_way = True
        try:
            os.nice(NICER)  # on Linux of the calling thread alone (nice(2)); everybody may do that
        except OSError as error:
            log.debug("threads do not give way: %s", error)  # a sandbox that allows little
    return function(*arguments)
