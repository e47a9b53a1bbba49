"""Gets blocks from memory, disk or S3, each once, however many readers wait for it.

The life of a block. A reader or the prefetcher requests it: a *job* starts, or the request joins a
running job. The job takes a slot and room in the memory budget, and one worker thread gets the
bytes, from the cache directory or with one ranged GET (`fetch/obtainer.py`). Now the block is
*held* in memory: the parts that no reader waits for are pushed into the page cache, and then the
readers are answered, so that they find the rest in place. Another task writes the block to the
disk; no reader waits for that. Afterwards it stays in memory until its room is needed.

All decisions are made in the trio thread, so nothing here needs a lock; worker threads only move
bytes. Demand has priority over prefetching for slots and for room. Blocks that can be fetched again
are dropped for demand: unused ones, the last prefetched ones first. A block that is being pushed or
waits for the disk cannot be dropped, but these are few (`pusher.py`, `block_writer.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import trio

from lazyfs.blocks import BlockId, Span, block_length
from lazyfs.blocks.file_blocks import AWAY, PAGES, Place
from lazyfs.blocks.memory import BlockMemory, Held, all_unread
from lazyfs.cache import CARE_S, BlockCache
from lazyfs.cache.block_writer import BlockWriter
from lazyfs.cache.other_daemons import OtherDaemons
from lazyfs.errors import FaultError, SourceError
from lazyfs.faults import contained, keep_running, report_fault
from lazyfs.fetch.disk_window import DiskWindow
from lazyfs.fetch.fleet import Fleet
from lazyfs.fetch.obtainer import Job, Obtainer
from lazyfs.fetch.read_access import ReadAccess
from lazyfs.fetch.request import BlockGetter
from lazyfs.fetch.shard_headers import ShardHeaders, heads_limit
from lazyfs.fetch.threads import in_bulk
from lazyfs.model.safetensors import LENGTH_BYTES, has_head, header_size
from lazyfs.namespace.tree import Tree
from lazyfs.objects import File
from lazyfs.observe.events import Activity, Purpose
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.pagecache.page_map import PageMap
from lazyfs.pagecache.pusher import BlockPusher
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.protocol import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

# Blocks that are read from the disk concurrently, ahead of readers.
LOADERS = 3
# Requests of waiting readers that may be in flight beyond the adaptive limit.
URGENT_EXTRA = 8
# How often idle connections are closed.
IDLE_S = 30.0
# After a fault nothing is prefetched for so long; demand continues.
AHEAD_REST_S = 30.0


class BlockFetcher:
    """All blocks of one mount.

    Args:
        source: the object store.
        cache: the disk, or None.
        page_cache: the page cache, filled ahead of readers.
        prefetcher: decides which block is next.
        options: limits.
        recorder: is told of events.
    """

    def __init__(
        self,
        source: Store,
        cache: BlockCache | None,
        page_cache: PageCache,
        prefetcher: Prefetcher,
        options: MountOptions,
        recorder: Recorder,
    ) -> None:
        self._source = source
        self._recorder = recorder
        self._paused = False
        # What a reader did not find in the page cache first, since somebody asked for that.
        self._missed: BlockId | None = None
        self._miss = trio.Event()
        # Since the last `pump`, so that more may be wished for now, or put into the page cache.
        self._reader_moved = False
        self._ahead_rests_until_s = 0.0
        self._cache = cache
        self._page_cache = page_cache
        self._prefetcher = prefetcher
        self._map = prefetcher.blocks
        self._options = options
        self._block_size = options.block_size
        self._files: dict[int, File] = {}
        for_heads = heads_limit(options.memory_limit, options.block_size)
        for_blocks = options.memory_limit - for_heads
        self._memory = BlockMemory(
            for_blocks, options.block_size, self._map, lambda: prefetcher.readers
        )
        self._map.is_held = lambda block: self._memory.peek(block) is not None
        self._jobs: dict[BlockId, Job] = {}
        self._urgent: deque[Job] = deque()
        self._fetching = 0
        self._loading = 0
        # Threads are bounded by slots; trio's own limit of 40 must not stand in the way.
        self._threads = trio.CapacityLimiter(4 * options.max_concurrency + 64)
        self._access = ReadAccess(options.access_check)
        self._getter = BlockGetter(
            source, self._memory, options, self._threads, self.pump, recorder, self._access.shown
        )
        self._pusher = BlockPusher(
            page_cache,
            self._map,
            prefetcher,
            self._memory,
            self._block_size,
            self._thread,
            recorder,
            self.pump,
        )
        self._heads = ShardHeaders(
            self._getter, for_heads, page_cache, prefetcher, self._thread, recorder
        )
        self._elsewhere: OtherDaemons | None = None
        self._writer: BlockWriter | None = None
        self._window: DiskWindow | None = None
        if cache is not None:
            self._elsewhere = OtherDaemons(cache, self._thread, self._found)
            self._writer = BlockWriter(
                cache,
                options.memory_limit,
                self._thread,
                recorder,
                self._written,
                self._memory.peek,
            )
            self._window = DiskWindow(
                cache, self._writer, prefetcher, self._memory, self._files, self._thread
            )
        self._obtainer = Obtainer(
            self._getter, self._memory, recorder, cache, self._elsewhere, self._access,
            self._block_size, options.io_timeout, self._thread, self._saturated,
        )  # fmt: skip
        self._nursery: trio.Nursery | None = None

    def carry(self, near: PageMap, tree: Tree) -> None:
        """Go on from what former workers put into the page cache, and write down what is put there.

        Args:
            near: what is known of it.
            tree: as it was restored.
        """
        for file, block, place in near.read(tree):
            self.add_file(file)
            self._map.moved(block, place)
            self._access.shown(file)  # to a former worker, which put it into the page cache

        def note(block: BlockId, before: Place, now: Place) -> None:
            if now != before and (now in PAGES or before in PAGES):
                near.write(self._files[block.inode], block.number, now)

        self._map.on_move.append(note)

    def start(self, nursery: trio.Nursery) -> None:
        """Serve in the tasks of a nursery until it is cancelled.

        Args:
            nursery: of all that asks for blocks. One that ended before them, being cancelled too,
                would take no more tasks while they are still at their last steps.
        """
        self._pusher.start(nursery)
        nursery.start_soon(keep_running, "closing idle connections", self._close_idle)
        if self._cache and self._writer and self._elsewhere:
            nursery.start_soon(self._writer.run)
            nursery.start_soon(keep_running, "following other daemons", self._elsewhere.follow)
            nursery.start_soon(keep_running, "cache care", self._care_for_cache, self._cache)
        self._nursery = nursery
        self.pump()

    async def finish_writing(self) -> None:
        """Write the blocks that wait for the disk, so that the next mount finds them."""
        if self._cache and self._writer:
            await self._writer.finish()
            await self._thread(self._cache.care, self._plan())

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self._block_size

    @property
    def shed_blocks(self) -> int:
        """How many blocks were not written because the disk was slow (see `BlockWriter`)."""
        return self._writer.skipped_blocks if self._writer else 0

    @property
    def dropped_bytes(self) -> int:
        """What was fetched and let go before anybody read it."""
        return self._memory.dropped_bytes

    def wish_again(self, blocks: Iterable[BlockId]) -> None:
        """Blocks have left the page cache: they are on the disk, or only in S3 again."""
        for block in blocks:
            if self._map.place(block) == Place.NEAR:
                is_stored = self._map.is_stored(block)
                self._map.moved(block, Place.LOCAL if is_stored else Place.ABSENT)
        self.pump()

    async def missed(self) -> BlockId:
        """Wait until a reader misses a block that was put into the page cache; which one."""
        self._missed = None
        self._miss = trio.Event()
        await self._miss.wait()
        assert self._missed is not None
        return self._missed

    def near_after(self, block: BlockId, count: int) -> list[BlockId]:
        """The next blocks after one that are taken to be in the page cache; at most so many."""
        return list(islice(self._map.near_after(block), count))

    def file(self, inode: int) -> File:
        """A file that was added."""
        return self._files[inode]

    @property
    def memory_bytes(self) -> int:
        """Blocks and heads in memory and on their way there."""
        return self._memory.used_bytes + self._heads.used_bytes

    @property
    def in_flight(self) -> int:
        """How many jobs are running."""
        return self._fetching + self._loading

    @property
    def requests_limit(self) -> int:
        """How many requests should be in flight now."""
        return self._getter.limit

    @property
    def fleet(self) -> Fleet | None:
        """What is known of the fleet's cache; None: there is none."""
        return self._getter.fleet

    @property
    def trouble(self) -> str | None:
        """What is wrong with S3, in words; None if all requests succeeded."""
        troubles = list(self._getter.troubles.values())
        if not troubles:
            return None
        more = f" (and {len(troubles) - 1} more objects)" if len(troubles) > 1 else ""
        return troubles[-1] + more

    def add_file(self, file: File) -> None:
        """A file of the mount that is known from now on; adding it again changes nothing."""
        if file.inode not in self._files:
            self._files[file.inode] = file
            self._map.add_file(file.inode, file.size_bytes)

    async def scan(self, files: Sequence[File]) -> None:
        """Find which blocks of files are on disk already, so that they are not prefetched."""
        for file in files:
            self.add_file(file)
        if self._cache is None:
            return
        present = await self._thread(_find_present, self._cache, files)
        if present and self._nursery is not None:
            there = [file for file, _ in present]
            self._nursery.start_soon(
                contained, "asking what may be read", self._access.check_ahead, there,
                self._obtainer.get_a_byte,
            )  # fmt: skip
        for file in files:
            self._cache.set_loading(file)
        for file, numbers in present:
            for number in numbers:
                block = BlockId(file.inode, number)
                self._map.stored(block)
                if self._map.place(block) in AWAY - {Place.COMING} | {Place.USED}:
                    self._map.moved(block, Place.LOCAL)

    def was_read(self, file: File, offset: int, size: int) -> None:
        """Handle a reader's request for `size` bytes at `offset` of a file."""
        self.add_file(file)
        try:
            self._reader_moved |= self._prefetcher.was_read(file.inode, offset, size)
        except Exception as error:
            report_fault("following a reader", error)  # which is answered all the same

    def set_known(self, file: File, known: bool) -> None:
        """The kernel looked a file up, or forgot it."""
        self.add_file(file)
        self._map.set_known(file.inode, known)
        if known and self._nursery:
            self._heads.set_known(self._nursery, file.inode)
        self.pump()

    async def cached_bytes(self, file: File) -> int:
        """How many bytes of a file are on disk."""
        if self._cache is None:
            return 0
        numbers = await self._thread(self._cache.present, file)
        return sum(block_length(file.size_bytes, self._block_size, number) for number in numbers)

    def opened(self, file: File, *, direct: bool) -> None:
        """A file was opened; `direct`: with O_DIRECT, which passes by the page cache."""
        self.add_file(file)
        if self._cache:
            self._cache.set_loading(file)
        self._map.opened(file.inode, direct=direct)

    async def header(self, file: File) -> memoryview | None:
        """The header of a safetensors file, without bringing a block for it if it has many.

        None: it is too long, see `LONGEST_HEADER`.

        Raises:
            SourceError: it cannot be read.
            MalformedHeaderError: its length is not valid.
        """
        self.add_file(file)
        if self._has_first(file) or not has_head(file):
            whole = block_length(file.size_bytes, self._block_size, 0)
            data = await self.read(file, Span(0, 0, min(LENGTH_BYTES, whole)), reader=False)
            length = header_size(data, file.size_bytes)
            if length <= whole:
                return await self.read(file, Span(0, 0, length), reader=False)
        return await self._heads.header(file)

    def has_header(self, file: File) -> bool:
        """Whether the header of a file can be had without S3."""
        return bool(self._heads.get(file.inode)) or self._has_first(file)

    def _has_first(self, file: File) -> bool:
        first = BlockId(file.inode, 0)
        is_local = self._map.place(first) == Place.LOCAL
        return is_local or self._map.is_stored(first) or self._memory.get(first) is not None

    def head(self, file: File) -> memoryview:
        """As much of the beginning of a file as came by itself and is in memory."""
        return self._heads.get(file.inode)

    def is_coming(self, file: File) -> bool:
        """Whether the first block of a file is on its way."""
        return BlockId(file.inode, 0) in self._jobs

    async def read(self, file: File, span: Span, *, reader: bool = True) -> memoryview:
        """The bytes of a part of a block, fetched if necessary.

        Args:
            reader: it is for a reader, not for our own planning.

        Raises:
            SourceError: they cannot be read within `--io-timeout`.
        """
        self.add_file(file)
        began_s = self._recorder.clock()
        block = BlockId(file.inode, span.number)
        held = self._memory.get(block)
        tier = Tier.MEMORY
        head = self._heads.get(file.inode)
        if held is None and span.number == 0 and span.stop <= len(head):
            if reader:
                self._recorder.read(file, span, tier, began_s)
            return head[span.start : span.stop]
        if held is None:
            held, tier = await self._wait_for(file, span, reader)
            held.users -= 1
        elif self._pusher.withdraw(block, held):
            held.users += 1
            try:
                await self._pusher.push_around(block, held, [span])
            finally:
                held.users -= 1
        data = held.data[span.start : span.stop]  # from here on the block may be dropped
        if reader and held.unread:
            held.was_read(span)
            if not held.unread or self._reader_moved:
                self.pump()  # its room can be used, or more can be put into the page cache
        if reader:
            self._recorder.read(file, span, tier, began_s)
        return data

    async def _wait_for(self, file: File, span: Span, reader: bool) -> tuple[Held, Tier]:
        """A block that somebody waits for, and where it came from; its `users` count the waiter."""
        block = BlockId(file.inode, span.number)
        wait = self._recorder.begin_wait(file, span, coming=block in self._jobs) if reader else None
        # While blocks are on their way, he may have asked just before this one came.
        is_sure = reader and not self.in_flight
        if is_sure and self._missed is None and self._map.is_missed(block):
            self._missed = block
            self._miss.set()
        job = self._jobs.get(block) or self._new_job(block)
        try:
            if not job.waiting and not job.started:
                self._urgent.append(job)
            job.waiting.append(span)
            self.pump()
            await job.done.wait()
        except trio.Cancelled:
            self._leave(job, span)
            raise
        finally:
            if wait is not None:
                self._recorder.end_wait(wait, job.tier)
        if job.error is not None:
            raise job.error
        assert job.held is not None  # it is left to another daemon only while no reader waits
        return job.held, job.tier

    def _leave(self, job: Job, span: Span) -> None:
        """A reader who waited for a job is let go."""
        if job.held is not None:
            job.held.users -= 1
            return
        job.waiting.remove(span)
        if not job.waiting and not job.started:
            self._urgent.remove(job)
            del self._jobs[job.block]

    def pause(self, paused: bool) -> None:
        """Pause or resume prefetching; demand always continues."""
        self._paused = paused
        self.pump()

    def tune(self, options: MountOptions) -> None:
        """Use other limits of requests and bandwidth from now on."""
        self._getter.tune(options)
        self.pump()

    def pump(self) -> None:
        """Start all jobs that may start now. Called after every change that may allow one."""
        if self._nursery is None or self._nursery.cancel_scope.cancel_called:
            return  # not begun, or ended: threads may come back after that
        self._reader_moved = False
        while self._urgent and self._fetching < self._getter.limit + URGENT_EXTRA:
            if not self._make_room(self._urgent[0].length, urgent=True):
                break
            self._start(self._urgent.popleft())
        if self._ahead_rests_until_s <= trio.current_time():
            try:
                self._work_ahead(self._nursery)
            except Exception as error:
                # Readers must not get an error because of what was to be done ahead of them.
                report_fault("fetching ahead", error)
                self._ahead_rests_until_s = trio.current_time() + AHEAD_REST_S

    def _work_ahead(self, nursery: trio.Nursery) -> None:
        """Start prefetch jobs, as far as there is room."""
        self._push_ahead(from_disk=not self._urgent and not self._paused)
        if self._window:
            self._window.slide(nursery)
        if self._urgent:
            self._recorder.prefetch_is(Activity.DEMAND)
        elif self._paused:
            self._recorder.prefetch_is(Activity.PAUSED)
        else:
            self._recorder.prefetch_is(self._prefetch_from_s3())
            self._heads.pump(nursery, self._files)

    def _prefetch_from_s3(self) -> Activity:
        while self._fetching < self._getter.limit:
            block = self._prefetcher.next_fetch()
            if block is None:
                return Activity.DONE
            if not self._make_room(self._length(block), urgent=False):
                # What is on its way takes room too; that is no lack of it.
                enough = 2 * self._fetching >= self._getter.limit
                return Activity.FETCHING if enough else Activity.NO_ROOM
            self._start(self._new_job(block))
        return Activity.FETCHING

    def _push_ahead(self, *, from_disk: bool) -> None:
        """Put what is on this machine into the page cache, in the order in which it is wanted.

        So what has just come waits for what came before it and had to go to the disk.
        """
        while self._page_cache.supported and self._pusher.has_room:
            block = self._prefetcher.next_load(self._pusher.allowance)
            if block is None:
                return
            held = self._memory.get(block)
            if held is not None:
                self._pusher.put(block, held)
            elif (
                from_disk
                and self._loading < LOADERS
                and self._make_room(self._length(block), urgent=False, soon=True)
            ):
                self._start(self._new_job(block), from_disk=True)
            else:
                return

    def _written(self, block: BlockId, stored: bool) -> None:
        """A block need not be kept for the disk any more; whether it is there."""
        if stored:
            self._map.stored(block)
        self.pump()

    def _new_job(self, block: BlockId) -> Job:
        job = Job(self._files[block.inode], block, self._length(block))
        self._jobs[block] = job
        return job

    def _start(self, job: Job, *, from_disk: bool = False) -> None:
        assert self._nursery is not None
        job.started = True
        if self._elsewhere:
            job.lease_until = self._elsewhere.take_back(job.file, job.block)
        self._memory.reserve(job.length)
        is_here = from_disk or self._map.is_stored(job.block)
        self._map.moved(job.block, Place.LOADING if is_here else Place.COMING)
        if from_disk:
            self._loading += 1
        else:
            self._fetching += 1
        self._nursery.start_soon(contained, "bringing a block", self._bring, job, from_disk)

    async def _bring(self, job: Job, from_disk: bool) -> None:
        """Run one job, from its start until its waiters are answered, whatever happens."""
        try:
            try:
                await self._obtain(job)
            finally:
                if from_disk:
                    self._loading -= 1
                else:
                    self._fetching -= 1
                del self._jobs[job.block]
            if job.held and job.waiting and self._pusher.takes(job.block, job.length):
                await self._pusher.push_around(job.block, job.held, job.waiting)
        finally:
            job.done.set()
        self.pump()

    async def _obtain(self, job: Job) -> None:
        """Have the block of a job brought, and hold it."""
        began_s = self._recorder.begun(job.block)
        try:
            obtained = await self._obtainer.obtain(job)
        except SourceError as error:
            self._fail(job, error)
            return
        except Exception as error:
            report_fault("bringing a block", error)
            self._fail(job, FaultError(f"{job.file.key}: a fault of lazyfs; its log has more"))
            return
        if obtained is None:
            self._memory.release(job.length)
            return
        data, job.tier = obtained
        self._recorder.landed(
            job.file, job.block, job.length, job.tier,
            Purpose.DEMAND if job.waiting else Purpose.AHEAD, began_s,
        )  # fmt: skip
        self._land(job, data)

    def _fail(self, job: Job, error: SourceError) -> None:
        self._memory.release(job.length)
        self._map.failed(job.block)
        self._recorder.failed(job.file, job.block, error)
        level = logging.ERROR if job.waiting else logging.WARNING
        log.log(level, "block %d of %s: %s", job.block.number, job.file.key, error)
        job.error = error

    def _found(self, block: BlockId, there: bool) -> None:
        """A block that was left to another daemon came to the disk, or is not going to."""
        self._map.moved(block, Place.LOCAL if there else Place.ABSENT)
        self.pump()

    async def _close_idle(self) -> None:
        while True:
            await trio.sleep(IDLE_S)
            await self._thread(self._source.close_idle)
            if self.fleet:
                await self._thread(self.fleet.cache.close_idle)

    async def _care_for_cache(self, cache: BlockCache) -> None:
        while True:
            await self._thread(cache.care, self._plan())
            await trio.sleep(CARE_S)

    def _plan(self) -> list[File]:
        return [self._files[inode] for inode in self._map.order]

    def _saturated(self) -> bool:
        return bool(self._urgent) or self._fetching >= self._getter.limit

    def _land(self, job: Job, data: memoryview) -> None:
        """A block is here: hold it, and have it written to the disk if it is new there."""
        held = Held(
            job.file,
            data,
            users=len(job.waiting),
            unread=all_unread(job.length),
            demanded=bool(job.waiting),
            on_disk=job.tier is Tier.DISK,
        )
        self._memory.hold(job.block, held)
        job.held = held
        self._map.moved(job.block, Place.LOCAL)
        if job.tier is not Tier.DISK and self._writer:
            reader_waits = any(job.waiting for job in self._jobs.values())
            self._writer.put(job.block, held, reader_waits=reader_waits)

    def _make_room(self, length: int, *, urgent: bool, soon: bool = False) -> bool:
        demanded = sum(job.started and bool(job.waiting) for job in self._jobs.values())
        return self._memory.make_room(
            length, urgent=urgent, soon=soon, is_served=demanded >= URGENT_EXTRA
        )

    def _length(self, block: BlockId) -> int:
        return block_length(self._files[block.inode].size_bytes, self._block_size, block.number)

    async def _thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(
            in_bulk, function, *arguments, abandon_on_cancel=True, limiter=self._threads
        )


def _find_present(cache: BlockCache, files: Sequence[File]) -> list[tuple[File, list[int]]]:
    """The files of which blocks are on disk, and which; the cache is told that they are needed."""
    present = [(file, numbers) for file in files if (numbers := cache.present(file))]
    if present:
        cache.announce([file for file, _ in present])
    return present
