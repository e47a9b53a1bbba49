"""Pushes blocks that are in memory into the kernel's page cache.

`notify_store` blocks while a page is locked by a read that waits for our answer. So it is called in
worker threads, and a block that is being pushed cannot be let go: `PUSHERS` blocks, and those that
somebody waits for, can be stuck that way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from lazyfs.blocks import BlockId, Span, gaps
from lazyfs.blocks.block_map import Place
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.blocks.queue import BlockQueue
from lazyfs.observe.recorder import Recorder
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.pagecache.spliced_block import SplicedBlock
from lazyfs.prefetch.prefetcher import Prefetcher

PUSHERS = 2
# Readers are not kept waiting longer than this for the rest of their block to be pushed.
LONGEST_PUSH_S = 0.05


class BlockPusher:
    """All that one mount pushes.

    Args:
        page_cache: where to.
        prefetcher: knows where blocks are, and is told.
        memory: whose unused rest the page cache must leave free.
        block_size: of the mount.
        run: runs a blocking call in a worker thread.
        recorder: is told of what was pushed.
        on_change: called when something else may be started.
    """

    def __init__(
        self,
        page_cache: PageCache,
        prefetcher: Prefetcher,
        memory: BlockMemory,
        block_size: int,
        run: Callable[..., Awaitable[bool]],
        recorder: Recorder,
        on_change: Callable[[], None],
    ) -> None:
        self._page_cache = page_cache
        self._prefetcher = prefetcher
        self._memory = memory
        self._block_size = block_size
        self._run = run
        self._recorder = recorder
        self._on_change = on_change
        self._queue = BlockQueue()
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Push in tasks of this nursery, which is that of all who ask for it."""
        self._nursery = nursery
        for _ in range(PUSHERS):
            nursery.start_soon(self._push_forever)

    @property
    def allowance(self) -> int:
        """How many more bytes may be put into the page cache ahead of readers; may be negative."""
        budget = self._page_cache.budget(self._prefetcher.planned_bytes, self._memory.unused_bytes)
        return budget - self._prefetcher.near_ahead_bytes

    def takes(self, block: BlockId, length: int) -> bool:
        """Whether a block of that length may be put into the page cache now."""
        return length <= self.allowance and self._prefetcher.takes_pages(block)

    def passage(self, block: BlockId, length: int) -> SplicedBlock | None:
        """A way there past our memory, for a block that may be put there now; None: there is none.

        Args:
            length: of the block.
        """
        if self._page_cache.device is None or not self.takes(block, length):
            return None
        return SplicedBlock(self._page_cache, block.inode, block.number * self._block_size, length)

    def put(self, block: BlockId, held: Held) -> None:
        """Push a block as soon as one before it is done; it is used until then."""
        held.users += 1
        self._prefetcher.moved(block, Place.COMING)
        self._queue.put(block, held)

    def withdraw(self, block: BlockId, held: Held) -> bool:
        """Do not push a block that still waits for it; whether it did."""
        waited = self._queue.discard(block)
        held.users -= waited
        return waited

    async def push_around(self, block: BlockId, held: Held, waiting: Sequence[Span]) -> None:
        """Push what nobody waits for, so that whoever is answered then finds the rest in place.

        Without this he would ask for it piece by piece while it is being pushed. What is waited
        for is left out: its pages are locked until the answer. The kernel may lock pages beyond
        a request's range, so this ends after a while whatever happens.
        """
        assert self._nursery is not None
        held.users += 1
        self._prefetcher.moved(block, Place.COMING)
        pushed = trio.Event()
        passed = [Span(block.number, 0, held.passed)] if held.passed else []
        rest = list(gaps([*waiting, *passed], len(held.data)))
        self._nursery.start_soon(self._push, block, held, rest, pushed)
        self._on_change()
        with trio.move_on_after(LONGEST_PUSH_S):
            await pushed.wait()

    async def _push_forever(self) -> None:
        while True:
            await self._queue.wait()
            block, held = self._queue.take()
            await self._push(block, held, [Span(block.number, held.passed, len(held.data))])
            self._on_change()

    async def _push(
        self, block: BlockId, held: Held, spans: Sequence[Span], pushed: trio.Event | None = None
    ) -> None:
        """Put parts of a held block, which has a user for this, into the page cache."""
        began_s = self._recorder.clock()
        offset = block.number * self._block_size
        for span in spans:
            data = held.data[span.start : span.stop]
            if not await self._run(self._page_cache.push, block.inode, offset + span.start, data):
                self._prefetcher.set_known(block.inode, False)
                self._prefetcher.moved(block, Place.LOCAL)
                break
        else:
            self._prefetcher.moved(block, Place.NEAR)
            size = sum(span.stop - span.start for span in spans)
            self._recorder.pushed(held.file, block, size, began_s)
        held.users -= 1
        if pushed is not None:
            pushed.set()
