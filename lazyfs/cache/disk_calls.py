"""Calls of the cache in threads, and what becomes of them when its disk hangs.

A disk that fails gives an error, and `guarded_index.py` leaves it alone. A disk that *hangs* gives
nothing: the thread waits in the kernel, for minutes perhaps, and nothing can end it. No reader may
wait for that, because S3 has every block. So each call is watched. When one is overdue, the disk
counts as hung: all calls are *left* at once, and further ones are refused (`DiskHangsError`), until
every thread has come back. Then the disk is used again; at once, unless it hangs again and again.

- What a call did that was left is undone when its thread comes back (`late`): nobody knows of it.
- A left call that loads a block still has its buffer. The buffer counts as memory until then, and
  loads may have `LOADS_SHARE` of the memory at once, so that demand always has some.
- While the disk hangs no call begins. So no more threads hang than may be at work at once: one for
  each block that is asked for, of the four that `threads.py` has for a request, and `MOST_OTHERS`.

A disk that is only slow answers all the time. While it does, a load may take `LONGEST_S`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, TypeVarTuple, cast

import trio

from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import LazyfsError
from lazyfs.faults import report_fault
from lazyfs.patience import PATIENCE_S
from lazyfs.threads import Threads

log = logging.getLogger(__name__)

# How long a reader waits for a disk that answers nobody. S3 answers in a tenth of a second, so less
# would do; but a disk whose cache is being flushed, or that recovers from an error, answers again
# within 1 or 2 s, and each block that is fetched instead costs money.
DISK_PATIENCE_S = PATIENCE_S
# The same for a disk that answers others, and for calls that no reader waits for.
LONGEST_S = 10.0
# Writes, of hundreds of MiB on a large machine, may take any time on a slow disk. It counts as hung
# only if neither a load nor a write has ended for so long.
WRITE_PATIENCE_S = 120.0
# How often that is looked at.
LOOK_S = 0.5
# Share of the memory that loads may fill at once.
LOADS_SHARE = 1 / 4
# How many other calls may be made at once.
MOST_OTHERS = 32
# A disk that hung before within this time rests after it, for longer each time.
AGAIN_S = 60.0
FIRST_REST_S, LONGEST_REST_S = 2.0, 30.0

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DiskHangsError(Exception):
    """The disk does not answer. The mount does without it."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call. Its thread sets `has_begun`, `has_ended`, `result` and `error`; the rest is ours.

    Attributes:
        stays: it is waited for even if the disk hangs.
        limit: it takes one of the calls that this allows.
        is_left: nobody waits for it any more.
        counts: its buffer was added to the memory in use.
        is_over: all of that was given back.
    """

    began_s: float
    patience_s: float
    size_bytes: int = 0
    late: Callable[[Any], None] | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    stays: bool = False
    limit: trio.CapacityLimiter | None = None
    is_left: bool = False
    counts: bool = False
    is_over: bool = False
    has_begun: bool = False
    has_ended: bool = False
    result: Any = None
    error: Exception | None = None


class DiskCalls:
    """Makes the calls of one mount to one directory of its cache.

    Args:
        threads: run them.
        memory: the mount's.
        directory: named in the log.
        directories: how many the cache has; each may fill its part of the memory.

    Attributes:
        hangs: the disk hangs, or rests after that.
        on_change: called when `hangs` has changed.
    """

    def __init__(
        self, threads: Threads, memory: BlockMemory, directory: str, directories: int = 1
    ) -> None:
        self._threads = threads
        self._memory = memory
        self._directory = directory
        loads = int(memory.most_blocks * LOADS_SHARE / directories)
        self._loads = trio.CapacityLimiter(max(1, loads))
        self._others = trio.CapacityLimiter(MOST_OTHERS)
        self._calls: set[_Call] = set()
        # Those whose threads have not come back since the disk hung.
        self._hung: set[_Call] = set()
        # When a block was loaded or written last: what is in the index may come from memory.
        self._answered_s = 0.0
        self._token: trio.lowlevel.TrioToken | None = None
        # When it began to hang, when it answered again, and how long it rested after that.
        self._began_s, self._over_s, self._rest_s = 0.0, -AGAIN_S, 0.0
        self.hangs = False
        self.on_change: list[Callable[[], None]] = []

    async def run(
        self,
        function: Callable[[*Ts], T],
        *arguments: *Ts,
        patience_s: float = LONGEST_S,
        size_bytes: int = 0,
        late: Callable[[T], None] | None = None,
    ) -> T:
        """Call a function in a thread.

        Args:
            patience_s: how long it may take; that is noticed within `LOOK_S`.
            size_bytes: of the block that it loads, if it loads one.
            late: called with the result if nobody waits for it any more.

        Raises:
            DiskHangsError: the disk hangs; the call may still be made.
        """
        if self.hangs:
            raise DiskHangsError
        call = _Call(trio.current_time(), patience_s, size_bytes, late)
        self._calls.add(call)
        try:
            with call.scope:
                try:
                    limit = self._loads if size_bytes else self._others
                    try:
                        limit.acquire_on_behalf_of_nowait(call)
                    except trio.WouldBlock:
                        await limit.acquire_on_behalf_of(call)
                    call.limit = limit
                    call.began_s = trio.current_time()  # before that it waited for others
                    result = await self._threads.run(self._made, call, function, *arguments)
                except trio.Cancelled:
                    self._leave(call)
                    raise
                if isinstance(result, memoryview):
                    self._answered_s = trio.current_time()
                return cast(T, result)
        finally:
            self._calls.discard(call)
            if not call.is_left:
                self._is_over(call)
        raise DiskHangsError

    async def run_to_end(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Write in a thread (`Threads.run_first`), and wait even for a disk that hangs.

        Raises:
            DiskHangsError: the disk hung before; the call is not made.
        """
        if self.hangs:
            raise DiskHangsError
        call = _Call(trio.current_time(), WRITE_PATIENCE_S, stays=True)
        self._calls.add(call)
        try:
            result = await self._threads.run_first(function, *arguments)
            self._answered_s = trio.current_time()
            return result
        finally:
            self._calls.discard(call)
            self._hung.discard(call)

    async def watch(self) -> None:
        """Notice when the disk hangs, and when it answers again; until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        while True:
            if not self.hangs:
                self._began_s = await self._begins_to_hang()
                self._changed(hangs=True)
                log.warning(
                    "the disk of the cache %s does not answer; continuing without it, from S3, "
                    "until it does", self._directory,
                )  # fmt: skip
            while self._hung:
                await trio.sleep(LOOK_S)
            now_s = trio.current_time()
            is_again = self._began_s - self._over_s < AGAIN_S
            self._rest_s = (
                min(max(FIRST_REST_S, 2 * self._rest_s), LONGEST_REST_S) if is_again else 0.0
            )
            await trio.sleep(self._rest_s)
            self._over_s = trio.current_time()
            self._changed(hangs=False)
            log.warning(
                "the disk of the cache %s answers again, after %.0f s",
                self._directory, now_s - self._began_s,
            )  # fmt: skip

    async def _begins_to_hang(self) -> float:
        """Wait until a call is overdue, and leave all; returns since when the disk hangs."""
        while True:
            before_s = trio.current_time()
            await trio.sleep(LOOK_S)
            now_s = trio.current_time()
            stopped_s = now_s - before_s - LOOK_S
            if stopped_s > LOOK_S:  # this process was, and the disk need not have been
                self._answered_s += stopped_s
                for call in self._calls:
                    call.began_s += stopped_s
                continue
            overdue = [call for call in self._calls if self._is_overdue(call, now_s)]
            if overdue:
                self._hung.update(overdue)
                for call in self._calls:
                    if not call.stays:
                        self._hung.add(call)
                        call.scope.cancel()
                return min(call.began_s for call in overdue)

    def _is_overdue(self, call: _Call, now_s: float) -> bool:
        waits_s = now_s - call.began_s
        is_silent = min(waits_s, now_s - self._answered_s) > call.patience_s
        return is_silent or (waits_s > max(LONGEST_S, call.patience_s) and not call.stays)

    def _changed(self, *, hangs: bool) -> None:
        self.hangs = hangs
        for tell in self.on_change:
            tell()

    def _made(self, call: _Call, function: Callable[[*Ts], T], *arguments: *Ts) -> T | None:
        """Make a call, in a thread. The trio thread may leave it at any moment."""
        call.has_begun = True
        try:
            if call.is_left:
                return None
            result = call.result = function(*arguments)
            return result
        except Exception as error:
            call.error = error
            raise
        finally:
            call.has_ended = True
            if call.is_left and self._token is not None:
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._is_over, call)

    def _leave(self, call: _Call) -> None:
        """Nobody waits for a call any more; its thread may have to be waited for."""
        call.is_left = True
        if call.has_begun:
            self._memory.reserve(call.size_bytes)
            call.counts = True
        if call.has_ended or not call.has_begun:
            self._is_over(call)

    def _is_over(self, call: _Call) -> None:
        """The thread of a call has come back. Of one that was left, this may be told twice."""
        if call.is_over:
            return
        call.is_over = True
        self._hung.discard(call)
        if call.limit is not None:
            call.limit.release_on_behalf_of(call)
        if call.counts:
            self._memory.release(call.size_bytes)
        if call.is_left and isinstance(call.error, LazyfsError):
            log.warning("%s", call.error)
        elif call.is_left and call.error is not None:
            report_fault("a call of the disk", call.error)
        elif call.is_left and call.late is not None and call.result is not None:
            call.late(call.result)
