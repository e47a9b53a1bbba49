"""Which job starts next.

All decisions are made in the trio thread, so nothing here needs a lock; threads only move bytes.
Demand has priority over prefetching, for slots and for room in memory. Blocks that can be fetched
again are dropped for demand: unused ones, the last prefetched ones first. A block that is being
pushed or waits for the disk cannot be dropped, but these are few (`pagecache/block_pusher.py`,
`cache/block_writer.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import trio

from lazyfs.blocks import BlockId, Span, block_length
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory
from lazyfs.faults import report_fault
from lazyfs.fetch.block_getter import BlockGetter
from lazyfs.fetch.disk_window import DiskWindow
from lazyfs.fetch.jobs import Jobs
from lazyfs.fetch.shard_headers import ShardHeaders
from lazyfs.fetch.tiers import Job
from lazyfs.listed_object import File
from lazyfs.observe.events import Activity
from lazyfs.observe.recorder import Recorder
from lazyfs.pagecache.block_pusher import BlockPusher
from lazyfs.prefetch.prefetcher import Prefetcher

# Blocks that are read from the disk concurrently, ahead of readers, at least: one for each mover.
LOADERS = 3
# Requests of waiting readers that may be in flight beyond the adaptive limit.
URGENT_EXTRA = 8
# All requests share the link evenly. So while a reader waits for the end of the first file of a
# load, requests for other files bring those in flight to this share of the limit that filled the
# link. In modelled time, with 1, 7/8 and 2/3, IndexTTS-2's first file takes 0.93, 0.90 and 0.90 s
# instead of 1.03, and the whole load 4.33, 4.34 and 4.36 s.
BESIDE_FIRST = 7 / 8
# Pause of prefetching after a fault; demand continues.
AHEAD_REST_S = 30.0


class Scheduler:
    """Starts the jobs of one mount. It has many collaborators because it decides for all of them.

    Args:
        files: of the mount, by inode.
        jobs: run.
        memory: has room for jobs, or not.
        prefetcher: says what is wanted next.
        pusher: pushes what is in memory into the page cache.
        getter: says how many requests may be in flight.
        heads: fetches headers beside the blocks.
        window: makes room on the disk; None without a disk.
        block_size: the mount's, in bytes.
        recorder: is told what prefetching does.
        movers: how many processes may read from the disk.

    Attributes:
        paused: prefetching is paused.
        disk_hangs: what is on the disk comes from S3 now, as many blocks at a time as from there.
    """

    def __init__(
        self,
        files: Mapping[int, File],
        jobs: Jobs,
        memory: BlockMemory,
        prefetcher: Prefetcher,
        pusher: BlockPusher,
        getter: BlockGetter,
        heads: ShardHeaders,
        window: DiskWindow | None,
        block_size: int,
        recorder: Recorder,
        movers: int = 0,
    ) -> None:
        self._loaders = max(LOADERS, movers)
        self._files = files
        self._jobs = jobs
        self._memory = memory
        self._prefetcher = prefetcher
        self._pusher = pusher
        self._getter = getter
        self._heads = heads
        self._window = window
        self._block_size = block_size
        self._recorder = recorder
        self._urgent: deque[Job] = deque()
        self._ahead_rests_until_s = 0.0
        self._nursery: trio.Nursery | None = None
        self.paused = False
        self.disk_hangs = False

    def begin(self, nursery: trio.Nursery) -> None:
        """Start jobs in tasks of a nursery from now on."""
        self._nursery = nursery
        self.pump()

    @property
    def is_saturated(self) -> bool:
        """Whether as many requests are in flight as S3 answers at once."""
        full = self._getter.limit - self._getter.together
        return bool(self._urgent) or self._busy > full

    def demand(self, block: BlockId, span: Span) -> Job:
        """The job that brings a block for a reader, which waits for `span`. `pump` starts it."""
        job = self._jobs.get(block) or self._new_job(block)
        if not job.waiting and not job.started:
            self._urgent.append(job)
        self._jobs.wait(job, span)
        return job

    def leave(self, job: Job, span: Span) -> None:
        """A reader that waits for a job goes away."""
        if job.held is not None:
            job.held.users -= 1
            return
        self._jobs.leave(job, span)
        if not job.waiting and not job.started:
            self._urgent.remove(job)

    def pump(self) -> None:
        """Start all jobs that may start now. Called after every change that may allow one."""
        if self._nursery is None or self._nursery.cancel_scope.cancel_called:
            return  # not begun, or ended: threads may come back after that
        while (job := self._next_urgent()) is not None:
            if not self._make_room(job.length, urgent=True):
                break
            self._urgent.remove(job)
            self._jobs.start(self._nursery, job)
        if self._ahead_rests_until_s <= trio.current_time():
            try:
                self._work_ahead(self._nursery)
            except Exception as error:
                # A fault in the work ahead of readers must not fail the read that caused it.
                report_fault("fetching ahead", error)
                self._ahead_rests_until_s = trio.current_time() + AHEAD_REST_S

    def _next_urgent(self) -> Job | None:
        """The job to start next of those that readers wait for, if one may start.

        Within the limit it is the first one. Requests that pause take places, but not from objects
        of which none pauses: these may be well.
        """
        most = self._getter.limit + URGENT_EXTRA
        if self._jobs.fetching < most:
            return self._urgent[0] if self._urgent else None
        return self._first_unhindered() if self._busy < most else None

    def _first_unhindered(self) -> Job | None:
        """The first job that a reader waits for, and whose object S3 is not refusing now."""
        return next((job for job in self._urgent if not self._jobs.is_pausing(job.file.key)), None)

    @property
    def _busy(self) -> int:
        return self._jobs.busy(self._getter.limit + URGENT_EXTRA)

    def _work_ahead(self, nursery: trio.Nursery) -> None:
        """Start prefetch jobs, as far as there is room."""
        pushes_lag = self._push_ahead(nursery, from_disk=not self._urgent and not self.paused)
        if self._window:
            self._window.slide(nursery)
        if self._first_unhindered() is not None:
            self._recorder.prefetch_is(Activity.DEMAND)
        elif self.paused:
            self._recorder.prefetch_is(Activity.PAUSED)
        else:
            self._recorder.prefetch_is(self._fetch_ahead(nursery, pushes_lag=pushes_lag))
            self._heads.pump(nursery, self._files)

    def _push_ahead(self, nursery: trio.Nursery, *, from_disk: bool) -> bool:
        """Push what is on this machine into the page cache, in the order in which it is wanted.

        A block that has just come waits for blocks before it that must be loaded from the disk.

        Returns:
            Whether as many blocks wait to be pushed as may.
        """
        while self._pusher.is_ready:
            block = self._prefetcher.next_load(self._pusher.allowance)
            if block is None:
                return False
            held = self._memory.get(block)
            if held is not None:
                self._pusher.put(block, held)
            elif (
                from_disk
                and self._jobs.loading < (self._getter.limit if self.disk_hangs else self._loaders)
                and self._make_room(self._length(block), urgent=False, soon=True)
            ):
                self._jobs.start(nursery, self._new_job(block), from_disk=True)
            else:
                return False
        return not self._pusher.has_room

    def _fetch_ahead(self, nursery: trio.Nursery, *, pushes_lag: bool) -> Activity:
        """Fetch absent blocks, in the order in which they are wanted.

        Args:
            pushes_lag: blocks wait to be pushed. They keep their room, even if they are on the
                disk: to load them from there takes longer than to wait for their push.
        """
        batch: list[Job] = []
        try:
            return self._begin_ahead(nursery, batch, pushes_lag=pushes_lag)
        finally:
            if batch:
                self._jobs.run(nursery, batch)

    def _begin_ahead(
        self, nursery: trio.Nursery, batch: list[Job], *, pushes_lag: bool
    ) -> Activity:
        """Begin jobs as `_fetch_ahead`, and run them in batches; the last batch is left to run."""
        together = self._getter.together
        waits = self._busy >= together > 1
        while self._busy < self._getter.limit:
            block = self._prefetcher.next_fetch()
            if block is None:
                return Activity.DONE
            if self._can_wait(block) or self._is_refused(block):
                return Activity.FETCHING
            if self._memory.peek(block) is not None:
                # The kernel forgot its pages, and nobody has needed its room since.
                self._prefetcher.blocks.moved(block, Place.LOCAL)
                self._push_ahead(nursery, from_disk=False)
                continue
            if batch and (len(batch) == together or batch[0].block.inode != block.inode):
                self._jobs.run(nursery, [*batch])
                batch.clear()
            room = self._length(block)
            if waits:
                # While others are on their way, a batch waits until all of it can begin.
                waits = False
                if self._busy + together > self._getter.limit:
                    return Activity.FETCHING
                room = together * self._block_size
            if not self._make_room(room, urgent=False, keep_local=pushes_lag):
                # Blocks on their way take room too; with enough of them, room is not what lacks.
                enough = 2 * self._busy >= self._getter.limit
                return Activity.FETCHING if enough else Activity.NO_ROOM
            self._jobs.begin(job := self._new_job(block))
            batch.append(job)
        return Activity.FETCHING

    def _is_refused(self, block: BlockId) -> bool:
        """Whether enough requests are under way for an object that S3 is refusing now."""
        key = self._files[block.inode].key
        return self._jobs.fetching >= self._getter.limit and self._jobs.is_pausing(key)

    def _can_wait(self, block: BlockId) -> bool:
        """Whether a block would only take bandwidth from the first file of a load."""
        enough = BESIDE_FIRST * self._getter.proven_limit
        return (
            self._busy >= enough
            and self._jobs.reader_waits
            and self._prefetcher.can_wait(block)
            and self._prefetcher.blocks.ordered_blocks(Place.ABSENT) >= enough
        )

    def _make_room(
        self, length: int, *, urgent: bool, soon: bool = False, keep_local: bool = False
    ) -> bool:
        is_served = self._jobs.demanded >= URGENT_EXTRA
        return self._memory.make_room(
            length, urgent=urgent, soon=soon, is_served=is_served, keep_local=keep_local
        )

    def _new_job(self, block: BlockId) -> Job:
        return self._jobs.new(self._files[block.inode], block, self._length(block))

    def _length(self, block: BlockId) -> int:
        return block_length(self._files[block.inode].size_bytes, self._block_size, block.number)
