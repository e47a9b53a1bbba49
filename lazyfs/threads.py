"""Threads that move bytes: how many, and at which priority.

A load keeps all processors busy with these threads. With equal priority, each step of the trio
thread would wait for its turn among them, and answering a lookup takes several steps. So these
threads have a lower priority. It does not delay the bytes: the sooner the trio thread decides, the
sooner they start.

Writes of the disk cache are an exception, where there are no movers. They take little time, and
until they are done their blocks stay in memory. With a lower priority they fell behind receiving,
which fills it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

import trio

from lazyfs.patience import settle

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Added to the nice value: a third of the weight (sched(7), "The nice value").
NICER = 5
# For each request: two attempts, a read of the disk, and a push. Beyond them: readers that are in
# a hurry, other calls of the disk, maintenance. The callers bound themselves; this limit must not
# be in their way.
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
        # Calls of `run_first`, and its threads; both change in the trio thread only.
        self._first: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._first_calls = self._first_threads = 0

    def allow(self, requests: int) -> None:
        """Have threads for this many requests from now on."""
        self._limit.total_tokens = FOR_A_REQUEST * requests + FOR_THE_REST

    async def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a function in a thread. If the task is cancelled, the call goes on without it."""
        return await trio.to_thread.run_sync(
            _nicer, function, *arguments, abandon_on_cancel=True, limiter=self._limit
        )

    async def run_first(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """The same for a call that frees memory: its thread has the priority of the trio thread.

        Raises:
            RuntimeError: no thread can be started.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        future: Future[T] = Future()
        done, token = trio.Event(), trio.lowlevel.current_trio_token()

        def ended() -> None:
            self._first_calls -= 1
            done.set()

        def tell(_: object) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(ended)

        future.add_done_callback(tell)
        if self._first_calls == self._first_threads:
            threading.Thread(target=_serve, args=[self._first], name="writes", daemon=True).start()
            self._first_threads += 1
        self._first_calls += 1
        self._first.put((future, partial(function, *arguments)))
        await done.wait()
        try:
            return future.result()
        finally:
            del future  # otherwise its error refers to itself


def _serve(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
    while True:
        settle(*calls.get())


def _nicer(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Call a function after lowering the priority of this thread, once."""
    if not getattr(_this_thread, "is_nicer", False):
        _this_thread.is_nicer = True
        try:
            os.nice(NICER)  # on Linux of the calling thread alone (nice(2)); needs no privilege
        except OSError as error:
            log.debug("the priority of a thread stays as it is: %s", error)  # in a tight sandbox
    return function(*arguments)
