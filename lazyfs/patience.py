"""Calls that may wait for a disk that hangs: made elsewhere first, and waited for only so long.

A thread that waits for such a disk cannot be ended, and a process with such a thread ends only when
the disk answers. So a command, for whose end somebody waits, has a process make the call; a daemon,
which stays, a thread. Disks of a running mount: see `cache/disk_calls.py`.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

# How long a disk may take to answer. One whose cache is being flushed, or that recovers from an
# error, needs 1 to 2 s.
PATIENCE_S = 3.0

T = TypeVar("T")

# With the time when each began.
_begun: dict[Hashable, tuple[Future[object], float]] = {}


def begin(function: Callable[[], T]) -> Future[T]:
    """Call a function in a thread for which nobody waits when the process ends."""
    from concurrent.futures import Future  # not for commands, which are to begin soon

    future: Future[T] = Future()
    threading.Thread(target=settle, args=[future, function], daemon=True).start()
    return future


def settle(future: Future[T], function: Callable[[], T]) -> None:
    """Call a function, and give a future its result or exception. Keeps neither of them."""
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future, function  # otherwise the traceback of the error has them


def in_thread(disk: Hashable, function: Callable[[], object]) -> bool:
    """Whether a call comes back in time, with a result or an exception; it is made in a thread.

    Args:
        disk: what it waits for. While a call for the same one has not come back, none is made: then
            this says whether that one comes back in time.
    """
    from concurrent.futures import wait

    future, began_s = _begun.get(disk, (None, 0.0))
    if future is None or future.done():
        future, began_s = _begun[disk] = begin(function), time.monotonic()
    wait([future], max(0.0, began_s + PATIENCE_S - time.monotonic()))
    return future.done()


def in_child(function: Callable[[], object]) -> bool:
    """Whether a call comes back in time, with a result or an exception; it is made in a fork.

    No other thread may run.
    """
    child = os.fork()
    if child == 0:
        try:
            os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # somebody may wait for their end
            function()
        finally:
            os._exit(0)
    descriptor = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(PATIENCE_S * 1000):
            os.kill(child, signal.SIGKILL)  # as soon as the disk answers
            return False
    finally:
        os.close(descriptor)
    os.waitpid(child, 0)
    return True
