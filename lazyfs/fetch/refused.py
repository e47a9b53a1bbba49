"""Blocks that S3 refuses: they wait until they are asked for again, and hold nothing meanwhile.

A request that fails, and may succeed later, is over: its place among the requests, its memory and
its thread are free. Its job waits here, with its readers. Three rules keep requests that S3 refuses
from standing in the way of others, however many there are:

1. While S3 refuses an object, one request of it is made at a time. Blocks that were not asked for
   before come first, because it may be one block that S3 cannot give. Nothing more of the object is
   prefetched.
2. Blocks that were refused are asked for in turn, after pauses that grow (`Pauses`). When one of
   them comes, all others are asked for at once.
3. At most `AT_ONCE` such requests are made at a time, of all objects together: S3 may be silent
   instead of refusing them, and then they last.

A block is given up `--io-timeout` after a reader began to wait for it; without a reader, as long
after its first request.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import trio

from lazyfs.blocks.block_map import BlockMap
from lazyfs.errors import SourceError
from lazyfs.faults import contained
from lazyfs.fetch.tiers import Job
from lazyfs.store.retry import LOOK_S, Pauses

# Requests for refused objects that are under way at once.
AT_ONCE = 4
# When S3 has refused this many objects since it gave something last, it most likely refuses all.
ALL = 8


@dataclass(slots=True, eq=False)
class _Object:
    """An object of which S3 refuses blocks.

    Attributes:
        error: the last refusal.
        refused: the jobs that were refused, in the order in which they are asked for again; and
            those that no reader waits for.
        fresh: those that were not asked for yet.
        asks: the one that is asked for, or is about to be.
        again_s: when the pause ends.
        gives: something else of the object came since the last refusal.
        is_withheld: S3 has not shown that the mount may read what is on the disk.
        news: set when the others may have to be looked at.
    """

    inode: int
    pauses: Pauses
    error: SourceError
    refused: dict[Job, None] = field(default_factory=dict)
    fresh: dict[Job, None] = field(default_factory=dict)
    asks: Job | None = None
    again_s: float = -math.inf
    gives: bool = False
    is_withheld: bool = False
    news: trio.Event = field(default_factory=trio.Event)


class RefusedBlocks:
    """The jobs of a mount whose blocks S3 refuses.

    Args:
        blocks: is told of which files nothing is prefetched.
        name: the name of an object for the log, from its key.
        io_timeout_s: how long a block is asked for.
        on_end: called after a pause.
        ready: called with a job that is to be started again.
        fail: called with a job that is given up, and why.
    """

    def __init__(
        self,
        blocks: BlockMap,
        name: Callable[[str], str],
        io_timeout_s: float,
        on_end: Callable[[], None],
        *,
        ready: Callable[[Job], None],
        fail: Callable[[Job, SourceError], None],
    ) -> None:
        self._map = blocks
        self._name = name
        self._io_timeout_s = io_timeout_s
        self._on_end = on_end
        self._ready = ready
        self._fail = fail
        # By inode.
        self._objects: dict[int, _Object] = {}
        # All jobs that wait.
        self._waiting: dict[Job, None] = {}
        # Of refused objects: the jobs that are asked for, and those that are to be, in turn.
        self._asking: set[Job] = set()
        self._due: deque[Job] = deque()
        self._since_answer: set[int] = set()
        self._nursery: trio.Nursery | None = None

    def begin(self, nursery: trio.Nursery) -> None:
        """Pause in tasks of a nursery from now on."""
        self._nursery = nursery

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def __contains__(self, job: Job) -> bool:
        return job in self._waiting

    @property
    def is_all(self) -> bool:
        """Whether S3 most likely refuses all objects."""
        return bool(self._objects) and len(self._since_answer) >= ALL

    def ahead_of(self, inodes: Container[int]) -> list[Job]:
        """The jobs of these files that no reader waits for."""
        return [job for job in self._waiting if job.block.inode in inodes and not job.waiting]

    def is_news(self, job: Job) -> bool:
        """Whether nothing was known of S3 refusing the object of a job."""
        return job.pauses is None and not self._map.files[job.block.inode].is_refused

    def may_try(self, job: Job) -> bool:
        """Whether a job whose request failed is to be asked for again."""
        return trio.current_time() < self._until_s(job)

    def keeps(self, job: Job) -> bool:
        """Whether a job that is about to start waits instead, because its object is refused."""
        found = self._objects.get(job.block.inode)
        if found is None or found.gives or job.pauses is not None or job in self._asking:
            return False
        if self._map.is_stored(job.block) and not found.is_withheld:
            return False  # it does not need S3
        job.began_s = job.began_s or trio.current_time()
        kept = found.fresh if job.waiting else found.refused
        self._waiting[job] = kept[job] = None
        self._next(found)
        return True

    def refused(self, job: Job, error: SourceError, *, is_here: bool = False) -> None:
        """A job was refused, and `may_try`: it waits.

        Args:
            is_here: its block is on the disk.
        """
        inode = job.block.inode
        self._since_answer.add(inode)
        found = self._objects.get(inode)
        if found is None:
            pauses = job.pauses or Pauses(self._name(job.file.key), job.began_s)
            found = self._objects[inode] = _Object(inode, pauses, error)
            assert self._nursery is not None
            self._nursery.start_soon(contained, "asking again", self._look_after, found)
        job.pauses = found.pauses
        # Its frames would keep the memory of the request.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        found.error = error
        found.is_withheld |= is_here
        self._set_gives(found, False)
        self._give_up_late(found)
        self._waiting[job] = found.refused[job] = None
        if found.again_s <= trio.current_time():  # those that were under way together pause once
            found.again_s = found.pauses.until_s(error)
        self._let_go(found, job)

    def over(self, job: Job, *, is_answer: bool) -> None:
        """A job is over.

        Args:
            is_answer: whether S3 gave its block, or refused it for good.
        """
        self._waiting.pop(job, None)
        if is_answer:
            self._since_answer.clear()
            if job.pauses is not None:
                job.pauses.end()
        found = self._objects.get(job.block.inode)
        if found is None:
            self._asking.discard(job)
            return
        found.refused.pop(job, None)
        found.fresh.pop(job, None)
        if is_answer:
            self._set_gives(found, True)
            if job.pauses is not None:
                found.again_s = -math.inf
        elif job.error is not None:
            self._give_up_late(found)
        self._let_go(found, job)

    def _set_gives(self, found: _Object, gives: bool) -> None:
        found.gives = gives
        self._map.files[found.inode].is_refused = not gives

    def _let_go(self, found: _Object, job: Job) -> None:
        """A job is not asked for any more: the next one may be."""
        if found.asks is job:
            found.asks = None
        found.news.set()
        if job in self._asking:
            self._asking.remove(job)
            self._ask_due()
        self._next(found)

    def _ask_due(self) -> None:
        """Have asked for what is due, as far as it may be and is still waited for."""
        while self._due and len(self._asking) < AT_ONCE:
            job = self._due.popleft()
            found = self._objects.get(job.block.inode)
            if found is not None and found.asks is job and job in self._waiting:
                self._asking.add(job)
                self._ask(found, job)

    async def _look_after(self, found: _Object) -> None:
        """Have the jobs of an object asked for again, until there are none."""
        while found.refused or found.fresh or found.asks:
            found.news = trio.Event()
            with trio.move_on_after(self._left_s(found)):
                await found.news.wait()
            if self._next(found):
                self._on_end()
        self._set_gives(found, True)
        del self._objects[found.inode]

    def _left_s(self, found: _Object) -> float:
        """How long nothing is to be done for an object, at most."""
        if not found.refused or (found.asks is not None and not found.gives):
            return LOOK_S
        next_s = min(found.again_s, *map(self._until_s, found.refused))
        return max(0.0, min(LOOK_S, next_s - trio.current_time()))

    def _next(self, found: _Object) -> bool:
        """Have asked for what may be asked for now. Returns whether there was something."""
        now_s = trio.current_time()
        is_time = found.again_s <= now_s or any(
            self._until_s(job) <= now_s for job in found.refused
        )
        if found.gives:
            asked = [*found.fresh, *(found.refused if is_time else ())]
            for job in asked:
                self._ask(found, job)
            return bool(asked)
        if found.asks is not None or not (found.fresh or (found.refused and is_time)):
            return False
        found.asks = next(iter(found.fresh or found.refused))
        self._due.append(found.asks)
        self._ask_due()
        return True

    def _ask(self, found: _Object, job: Job) -> None:
        found.refused.pop(job, None)
        found.fresh.pop(job, None)
        del self._waiting[job]
        if found.asks is job and job not in self._asking:
            found.asks = None  # it is one of many now
        self._ready(job)

    def _give_up_late(self, found: _Object) -> None:
        now_s = trio.current_time()
        for job in [job for job in (*found.refused, *found.fresh) if self._until_s(job) <= now_s]:
            found.refused.pop(job, None)
            found.fresh.pop(job, None)
            del self._waiting[job]
            if found.asks is job:
                found.asks = None
            self._fail(job, found.error)

    def _until_s(self, job: Job) -> float:
        """Until when a job is asked for."""
        began_s = job.waits_since_s if job.waiting else job.began_s
        return began_s + self._io_timeout_s
