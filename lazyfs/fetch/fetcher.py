"""What the other packages ask of the blocks of a mount.

A reader's bytes come from memory at once, or from a job that may already run. `scheduler.py`
decides which job starts next, `jobs.py` runs jobs, and `tiers.py` gets the bytes. Each block is
fetched once, however many readers wait for it. This module is long because it is the whole
interface of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future

import trio

from lazyfs.blocks import BlockId, Span, block_length
from lazyfs.blocks.file_blocks import AWAY, PAGES, Place
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.cache import BlockCache
from lazyfs.faults import keep_running, report_fault
from lazyfs.fetch.block_getter import BlockGetter
from lazyfs.fetch.disk_window import DiskWindow
from lazyfs.fetch.disks import Disks
from lazyfs.fetch.fleet_policy import Fleet
from lazyfs.fetch.jobs import Jobs
from lazyfs.fetch.missed_pages import MissedPages
from lazyfs.fetch.part_reads import PartReads
from lazyfs.fetch.scheduler import Scheduler
from lazyfs.fetch.shard_headers import ShardHeaders, heads_limit
from lazyfs.fetch.tiers import OriginTier, Tiers
from lazyfs.listed_object import File
from lazyfs.model.safetensors import LENGTH_BYTES, has_head, header_size
from lazyfs.namespace.tree import Tree
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.block_pusher import BlockPusher
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.pagecache.page_map import PageMap
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.protocol import Store
from lazyfs.threads import Threads

# How often idle connections are closed.
IDLE_S = 30.0


class BlockFetcher:
    """All blocks of one mount. Here its parts are made, so that each gets only what it needs.

    Args:
        source: the object store.
        cache: the disk, or None.
        page_cache: the page cache, filled ahead of readers.
        prefetcher: decides which block is next.
        options: limits.
        recorder: is told of events.

    Attributes:
        missed_pages: blocks that readers missed in the page cache.
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
        self._prefetcher = prefetcher
        self._map = prefetcher.blocks
        self._block_size = options.block_size
        self._files: dict[int, File] = {}
        self.missed_pages = MissedPages(self._map, self._files, self.pump)
        # Whether, since the last `pump`, more blocks may be wanted, or pushed into the page cache.
        self._reader_moved = False
        self._nursery: trio.Nursery | None = None
        self._threads = Threads(options.max_concurrency)
        for_heads = heads_limit(options.memory_limit, options.least_blocks * options.block_size)
        for_blocks = options.memory_limit - for_heads
        self._memory = BlockMemory(
            for_blocks, options.block_size, self._map, lambda: prefetcher.readers,
            has_disk=cache is not None,
        )  # fmt: skip
        self._map.is_held = lambda block: self._memory.peek(block) is not None
        self._getter = BlockGetter(
            source, self._memory, options, self._threads, self.pump, recorder
        )
        self._origin = OriginTier(
            self._getter, options.access_check, options.block_size, options.io_timeout,
            lambda: self._scheduler.is_saturated, lambda inode: self._heads.get(inode),
            lambda job, pauses: self._jobs.pauses(job, pauses),
        )  # fmt: skip
        self._heads = ShardHeaders(
            self._origin, for_heads, page_cache, prefetcher, self._threads, recorder
        )
        self._pusher = BlockPusher(
            page_cache, self._map, prefetcher, self._memory, options.block_size, self._threads,
            recorder, self.pump, options.movers,
        )  # fmt: skip
        self._disks = Disks(
            cache, options, self._threads, self._memory, self._origin, recorder, self._written,
            self._found, self._disk_changed,
        )  # fmt: skip
        window = None
        if cache is not None:
            window = DiskWindow(self._disks, prefetcher, self._memory, self._files)
        tiers = Tiers(self._disks.tiers, self._origin)
        self._jobs = Jobs(tiers, self._memory, self._map, self._pusher, recorder, self.pump)
        self._parts = PartReads(
            self._disks, self._memory, self._map, self._jobs, recorder,
            ahead=prefetcher.loads_ahead,
        )  # fmt: skip
        self._scheduler = Scheduler(
            self._files, self._jobs, self._memory, prefetcher, self._pusher, self._getter,
            self._heads, window, options.block_size, recorder,
            options.movers,
        )  # fmt: skip

    def carry(self, near: PageMap, tree: Tree) -> None:
        """Continue with the pages that former workers put into the page cache.

        Args:
            near: the record of these pages, which is kept up to date from now on.
            tree: the restored tree.
        """
        for file, block, place in near.read(tree):
            self.add_file(file)
            self._map.moved(block, place)
            self._origin.shown(file)  # to a former worker, which put it into the page cache

        def note(block: BlockId, before: Place, now: Place) -> None:
            if now != before and (now in PAGES or before in PAGES):
                near.write(self._files[block.inode], block.number, now)

        self._map.on_move.append(note)

    def resumed(self) -> None:
        """A former worker of this mount has ended, or is about to."""
        self._disks.resumed()

    async def open_cache(self, openings: Sequence[Future[None]]) -> None:
        """Wait until the directories of the cache are open, but not for disks that hang.

        Raises:
            CacheError: a directory cannot be used.
        """
        await self._disks.open(openings)

    def start(self, nursery: trio.Nursery) -> None:
        """Serve in the tasks of a nursery until it is cancelled.

        Args:
            nursery: the one in which all readers of blocks run. A separate nursery could end before
                them on cancellation, and take no more tasks while they still need some.
        """
        self._nursery = nursery
        self._pusher.start(nursery)
        nursery.start_soon(keep_running, "closing idle connections", self._close_idle)
        self._disks.start(nursery, self._plan)
        self._scheduler.begin(nursery)

    async def finish_writing(self) -> None:
        """Write the blocks that wait for the disk, so that the next mount finds them."""
        await self._disks.finish(self._plan())

    def pump(self) -> None:
        """Start all jobs that may start now. Called after every change that may allow one."""
        self._reader_moved = False
        self._scheduler.pump()

    def pause(self, paused: bool) -> None:
        """Pause or resume prefetching; demand always continues."""
        self._scheduler.paused = paused
        self.pump()

    def tune(self, options: MountOptions) -> None:
        """Use other limits of requests and bandwidth from now on."""
        self._threads.allow(options.max_concurrency)
        self._getter.tune(options)
        self.pump()

    # What readers do.

    def add_file(self, file: File) -> None:
        """Add a file of the mount. Adding it again changes nothing."""
        if file.inode not in self._files:
            self._files[file.inode] = file
            self._map.add_file(file.inode, file.size_bytes)

    def set_known(self, file: File, known: bool) -> None:
        """The kernel looked a file up, or forgot it."""
        self.add_file(file)
        self._map.set_known(file.inode, known)
        if known and self._nursery:
            self._heads.set_known(self._nursery, file.inode)
        self.pump()

    def opened(self, file: File, *, direct: bool) -> None:
        """A file was opened; `direct`: its reads bypass the page cache."""
        self.add_file(file)
        self._disks.opened(file)
        self._map.opened(file.inode, direct=direct)

    def was_read(self, file: File, offset: int, size: int) -> None:
        """Handle a reader's request for `size` bytes at `offset` of a file."""
        try:
            self.add_file(file)
            self._reader_moved |= self._prefetcher.was_read(file.inode, offset, size)
        except Exception as error:
            report_fault("following a reader", error)  # which is answered all the same

    def is_read_directly(self, file: File) -> None:
        """A read of a file bypassed the page cache: nothing more is pushed for its readers."""
        self._map.opened(file.inode, direct=True)

    def abandon(self, files: Iterable[File]) -> None:
        """These files are no longer in the plan: end the requests that no reader waits for."""
        self._jobs.abandon({file.inode for file in files})

    async def fetch(self, file: File, offset: int) -> None:
        """Wait until the block at an offset of a file is in memory. Raises SourceError."""
        number, at = divmod(offset, self._block_size)
        await self.read(file, Span(number, at, at + 1), reader=False)

    async def read(self, file: File, span: Span, *, reader: bool = True) -> memoryview:
        """The bytes of a part of a block, fetched if necessary.

        Args:
            reader: whether a reader wants it, or only the planner.

        Raises:
            SourceError: they cannot be read within `--io-timeout`.
        """
        self.add_file(file)
        began_s = self._recorder.clock()
        block = BlockId(file.inode, span.number)
        # Pages that a reader waits for are locked, and not pushed. Those of our own reads are:
        # otherwise the push would begin within a page, which stays incomplete.
        locked = span if reader else Span(span.number, 0, 0)
        held = self._memory.get(block)
        tier = Tier.MEMORY
        head = self._heads.get(file.inode)
        if held is None and span.number == 0 and span.stop <= len(head):
            if reader:
                self._recorder.read(file, span, tier, began_s)
            return head[span.start : span.stop]
        if held is None and reader:
            # If other blocks are on their way, the reader may have asked just before it arrived.
            if not self.in_flight:
                self.missed_pages.requested(block)
            part = await self._parts.read(file, span)
            if part is not None:
                if self._reader_moved:
                    self.pump()
                self._recorder.read(file, span, Tier.DISK, began_s)
                return part
            held = self._memory.get(block)
        if held is None:
            held, tier = await self._wait_for(file, locked, reader)
            held.users -= 1
        elif self._pusher.withdraw(block, held):
            held.users += 1
            try:
                await self._pusher.push_around(block, held, [locked])
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
        """Wait for a block. Returns it, and where it came from; its `users` count the waiter."""
        block = BlockId(file.inode, span.number)
        if reader and (error := self._jobs.failure(block)) is not None:
            raise error
        wait = self._recorder.begin_wait(file, span, coming=block in self._jobs) if reader else None
        job = self._scheduler.demand(block, span)
        try:
            self.pump()
            await job.done.wait()
        except trio.Cancelled:
            self._scheduler.leave(job, span)
            raise
        finally:
            if wait is not None:
                self._recorder.end_wait(wait, job.tier)
        if job.error is not None:
            raise job.error
        assert job.held is not None  # it is left to another daemon only while no reader waits
        return job.held, job.tier

    # Headers of shards.

    async def header(self, file: File) -> memoryview | None:
        """The header of a safetensors file; no block is fetched for it if the file has many.

        None: the header is too long, see `LONGEST_HEADER`.

        Raises:
            SourceError: it cannot be read.
            MalformedHeaderError: its length is not valid.
        """
        self.add_file(file)
        if self._has_first(file) or not has_head(file):
            whole = block_length(file.size_bytes, self._block_size, 0)
            data = await self._beginning(file, min(LENGTH_BYTES, whole))
            length = header_size(data, file.size_bytes)
            if length <= whole:
                return await self._beginning(file, length)
        return await self._heads.header(file)

    async def _beginning(self, file: File, length: int) -> memoryview:
        """The first bytes of a file, without the rest of its block if a former worker pushed it."""
        span = Span(0, 0, length)
        part = None
        if self._memory.peek(BlockId(file.inode, 0)) is None:
            part = await self._parts.read(file, span, reader=False)
        return part if part is not None else await self.read(file, span, reader=False)

    def has_header(self, file: File) -> bool:
        """Whether the header of a file is on this machine."""
        return bool(self._heads.get(file.inode)) or self._has_first(file)

    def _has_first(self, file: File) -> bool:
        first = BlockId(file.inode, 0)
        is_local = self._map.place(first) == Place.LOCAL
        return is_local or self._map.is_stored(first) or self._memory.get(first) is not None

    def head(self, file: File) -> memoryview:
        """The beginning of a file that was fetched for its header and is in memory."""
        return self._heads.get(file.inode)

    def is_coming(self, file: File) -> bool:
        """Whether the first block of a file is on its way."""
        return BlockId(file.inode, 0) in self._jobs

    # What is on the disk and in the page cache.

    async def scan(self, files: Sequence[File]) -> None:
        """Find which blocks of files are on disk already, so that they are not prefetched."""
        for file in files:
            self.add_file(file)
        for inode, numbers in (await self._disks.present(files)).items():
            for number in numbers:
                block = BlockId(inode, number)
                self._map.stored(block)
                if self._map.place(block) in AWAY - {Place.COMING} | {Place.USED}:
                    self._map.moved(block, Place.LOCAL)

    async def cached_bytes(self, file: File) -> int:
        """How many bytes of a file are on disk."""
        numbers = (await self._disks.numbers([file])).get(file.inode, ())
        return sum(block_length(file.size_bytes, self._block_size, number) for number in numbers)

    def _written(self, blocks: Mapping[BlockId, bool]) -> None:
        """Blocks no longer wait for the disk; the values: whether they are there now."""
        for block, is_stored in blocks.items():
            if is_stored:
                self._map.stored(block)
        self.pump()

    def _found(self, block: BlockId, there: bool) -> None:
        """Another daemon stored a block that was left to it, or never will."""
        self._map.moved(block, Place.LOCAL if there else Place.ABSENT)
        self.pump()

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self._block_size

    @property
    def in_flight(self) -> int:
        """How many jobs are running."""
        return self._jobs.fetching + self._jobs.loading

    @property
    def requests_limit(self) -> int:
        """How many requests should be in flight now."""
        return self._getter.limit

    @property
    def fleet(self) -> Fleet | None:
        """The state of the fleet's cache, if there is one."""
        return self._getter.fleet

    @property
    def memory_bytes(self) -> int:
        """Blocks and heads in memory and on their way there."""
        return self._memory.used_bytes + self._heads.used_bytes

    @property
    def dropped_bytes(self) -> int:
        """Bytes that were fetched and dropped before a reader had them."""
        return self._memory.dropped_bytes

    @property
    def shed_blocks(self) -> int:
        """How many blocks were not written because a disk was slow (see `BlockWriter`)."""
        return self._disks.skipped_blocks

    def _disk_changed(self) -> None:
        self._scheduler.disk_hangs = bool(self.hanging_disks)
        self.pump()

    @property
    def hanging_disks(self) -> list[str]:
        """The directories of the cache that the mount does without, as their disks hang."""
        return self._disks.hanging

    @property
    def trouble(self) -> str | None:
        """What is wrong with S3, in words; None if all requests succeeded."""
        return self._getter.trouble

    def _plan(self) -> list[File]:
        return [self._files[inode] for inode in self._map.order]

    async def _close_idle(self) -> None:
        while True:
            await trio.sleep(IDLE_S)
            await self._threads.run(self._source.close_idle, IDLE_S)
            if self.fleet:
                await self._threads.run(self.fleet.cache.close_idle)
