"""Pushes blocks that are in memory into the kernel's page cache.

A push waits in the kernel for every page in its way that is locked, and a page is locked from the
moment when a read of it is *queued* until that read is answered (`fuse_notify_store`,
`fuse_readahead` in Linux). The kernel sends only a limited number of reads at a time, so a
push may wait for a read that is sent only when reads of other blocks are answered. Hence this rule,
without which they would deadlock:

    An answer never waits for a push. A push may wait for answers.

So all pushes together hold at most a fixed part of the memory (`most_blocks`) and of the threads;
everything else is for demand. Blocks beyond that are pushed later or not at all. A stuck push does
not hide its bytes from readers: the block stays in memory, and reads of it are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from lazyfs.blocks import BlockId, Span, gaps
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.blocks.queue import BlockQueue
from lazyfs.faults import contained, keep_running
from lazyfs.observe.recorder import Recorder
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.threads import Threads

# Blocks that are pushed concurrently ahead of readers, at least: one for each mover.
PUSHERS = 2
# The share of the blocks in memory that pushes may hold, and the most that they need to keep the
# page cache supplied. The other two thirds are for demand and for writing.
SHARE = 1 / 3
MOST_BLOCKS_OF_PUSHER = 4
# Blocks that one call of a mover pushes, at most.
MOST_TOGETHER = 8
# Longest time that a reader waits for the rest of its block to be pushed.
LONGEST_PUSH_S = 0.05


class PagePolicy(Protocol):
    """The prefetch policy's decisions about the page cache."""

    @property
    def near_ahead_bytes(self) -> int:
        """Roughly how many unread bytes are in the page cache."""

    def takes_pages(self, block: BlockId) -> bool:
        """Whether a block can and should be put into the page cache."""


class BlockPusher:
    """Pushes the blocks of one mount.

    Args:
        page_cache: the page cache.
        blocks: knows where blocks are, and is told of pushed ones.
        policy: decides which blocks belong into the page cache.
        memory: the page cache must leave room for its unused part.
        block_size: the mount's.
        threads: run the pushes.
        recorder: is told of pushed blocks.
        on_change: called when another job may be started.
        movers: how many processes may push.

    Attributes:
        most_blocks: how many blocks may be pushed or wait for it at once.
    """

    def __init__(
        self,
        page_cache: PageCache,
        blocks: BlockMap,
        policy: PagePolicy,
        memory: BlockMemory,
        block_size: int,
        threads: Threads,
        recorder: Recorder,
        on_change: Callable[[], None],
        movers: int = 0,
    ) -> None:
        self._has_movers = movers > 0
        self._pushers = max(PUSHERS, movers)
        self._page_cache = page_cache
        self._map = blocks
        self._policy = policy
        self._memory = memory
        self._block_size = block_size
        self._threads = threads
        self._recorder = recorder
        self._on_change = on_change
        self.most_blocks = max(
            1, min(MOST_BLOCKS_OF_PUSHER * self._pushers, int(memory.most_blocks * SHARE))
        )
        self._blocks = 0
        self._queue = BlockQueue()
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Push in tasks of this nursery."""
        self._nursery = nursery
        for _ in range(self._pushers):
            nursery.start_soon(keep_running, "pushing blocks", self._push_forever)

    @property
    def allowance(self) -> int:
        """How many more bytes may be put into the page cache ahead of readers; may be negative."""
        budget = self._page_cache.budget(self._map.planned_bytes, self._memory.unused_bytes)
        return budget - self._policy.near_ahead_bytes

    @property
    def has_room(self) -> bool:
        """Whether one more block may be pushed, or wait for it."""
        return self._blocks < self.most_blocks

    @property
    def is_ready(self) -> bool:
        """Whether the page cache takes blocks at all, and one more may be pushed."""
        return self._page_cache.supported and self.has_room

    def takes(self, block: BlockId, length: int) -> bool:
        """Whether a block of that length may be put into the page cache now."""
        return self.has_room and length <= self.allowance and self._policy.takes_pages(block)

    def put(self, block: BlockId, held: Held) -> None:
        """Queue a block to be pushed; it counts as in use until then.

        There must be room (`has_room`).
        """
        self._hold(held)
        self._map.moved(block, Place.LOADING)
        self._queue.put(block, held)

    def withdraw(self, block: BlockId, held: Held) -> bool:
        """Remove a block from the queue; returns whether it was queued."""
        waited = self._queue.discard(block)
        if waited:
            self._let_go(held)
        return waited

    async def push_around(self, block: BlockId, held: Held, waiting: Sequence[Span]) -> None:
        """Push the parts that no reader waits for, so that readers find the rest in place.

        Without this they would request the rest piece by piece while it is being pushed. Parts that
        readers wait for are left out: their pages are locked until the answer. The kernel may lock
        pages beyond a request's range, so this ends after a time limit. There must be room
        (`has_room`).
        """
        assert self._nursery is not None
        self._hold(held)
        self._map.moved(block, Place.LOADING)
        pushed = trio.Event()
        begin = block.number * self._block_size
        rest = [
            (begin + span.start, held.data[span.start : span.stop])
            for span in gaps(waiting, len(held.data))
        ]
        self._nursery.start_soon(
            contained, "pushing a block", self._push, [(block, held)], rest, pushed
        )  # fmt: skip
        self._on_change()
        with trio.move_on_after(LONGEST_PUSH_S):
            await pushed.wait()

    async def _push_forever(self) -> None:
        while True:
            await self._queue.wait()
            blocks = self._next()
            whole = [(block.number * self._block_size, held.data) for block, held in blocks]
            await self._push(blocks, whole)

    def _next(self) -> list[tuple[BlockId, Held]]:
        """The next blocks to push, of one file: several if more wait than there are pushers."""
        most = 1
        if self._has_movers:
            most = min(MOST_TOGETHER, -(-len(self._queue) // self._pushers))
        blocks = [self._queue.take()]
        while len(blocks) < most and self._queue.first().inode == blocks[0][0].inode:
            blocks.append(self._queue.take())
        return blocks

    async def _push(
        self,
        blocks: Sequence[tuple[BlockId, Held]],
        parts: Sequence[tuple[int, memoryview]],
        pushed: trio.Event | None = None,
    ) -> None:
        """Put blocks of a file, which count a user for this, into the page cache.

        Args:
            parts: what is put there: offset in the file and bytes of each part.
            pushed: is set in the end.
        """
        began_s = self._recorder.clock()
        inode = blocks[0][0].inode
        try:
            if await self._stored(inode, parts):
                whole = len(blocks) > 1
                began_s += (self._recorder.clock() - began_s) * (1 - 1 / len(blocks))
                for block, held in blocks:
                    self._map.moved(block, Place.NEAR)
                    size = len(held.data) if whole else sum(len(data) for _, data in parts)
                    self._recorder.pushed(held.file, block, size, began_s)
            else:
                self._map.set_known(inode, False)
                for block, _ in blocks:
                    self._map.moved(block, Place.LOCAL)
        finally:
            for _, held in blocks:
                self._let_go(held)
            if pushed is not None:
                pushed.set()
        self._on_change()

    async def _stored(self, inode: int, parts: Sequence[tuple[int, memoryview]]) -> bool:
        stored = await self._page_cache.push_elsewhere(inode, parts)
        if stored is not None:
            return stored
        for offset, data in parts:
            if not await self._threads.run(self._page_cache.push, inode, offset, data):
                return False
        return True

    def _hold(self, held: Held) -> None:
        held.users += 1
        self._blocks += 1

    def _let_go(self, held: Held) -> None:
        held.users -= 1
        self._blocks -= 1
