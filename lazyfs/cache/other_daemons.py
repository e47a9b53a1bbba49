"""Blocks that other daemons of this node bring, which share the cache with this one.

Whoever fetches a block has claimed it. Another daemon that wants it ahead of readers leaves it to
him, and looks from time to time whether it has come. A reader is not kept waiting for long: when
the lease is over, his daemon fetches for itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import trio

from lazyfs.blocks import BlockId
from lazyfs.cache import BlockCache
from lazyfs.objects import File

# How long a block is left to another daemon that claimed it, and how often it is looked for.
LEASE_S = 10.0
LOOK_S = 0.02


class OtherDaemons:
    """What is left to others, and until when.

    Args:
        cache: where they put it.
        run: runs a blocking call in a worker thread.
        on_found: told of a block that need not be waited for any more, and whether it came.
    """

    def __init__(
        self,
        cache: BlockCache,
        run: Callable[..., Awaitable[bool]],
        on_found: Callable[[BlockId, bool], None],
    ) -> None:
        self._cache = cache
        self._run = run
        self._on_found = on_found
        self._left: dict[BlockId, tuple[File, float]] = {}
        self._news = trio.Event()
        self._lease_over: set[BlockId] = set()

    def leave(self, file: File, block: BlockId, lease_until: float) -> None:
        """Another daemon brings this block."""
        self._left[block] = file, lease_until
        self._cache.set_waiting(file, block.number, True)
        self._news.set()

    def take_back(self, file: File, block: BlockId) -> float:
        """A block is wanted now that may have been left to another; until when he may have it."""
        now_s = trio.current_time()
        lease_until = now_s if block in self._lease_over else now_s + LEASE_S
        self._lease_over.discard(block)
        if block in self._left:
            _, lease_until = self._left.pop(block)
            self._cache.set_waiting(file, block.number, False)
        return lease_until

    async def wait_for(self, file: File, number: int, lease_until: float) -> None:
        """Until another daemon gives up its claim to a block, having stored it or not."""
        self._cache.set_waiting(file, number, True)
        with trio.move_on_at(lease_until):
            while self._cache.is_claimed(file, number):
                await trio.sleep(LOOK_S)
        self._cache.set_waiting(file, number, False)

    async def follow(self) -> None:
        """See when blocks that were left to others have come, or are not going to; for ever."""
        while True:
            await self._news.wait()
            await trio.sleep(LOOK_S)
            for block, file, lease_until in self._ended():
                there = await self._run(self._cache.holds, file, block.number)
                if self._left.pop(block, None) is None:
                    continue  # a reader asked for it meanwhile
                self._cache.set_waiting(file, block.number, False)
                if not there and trio.current_time() >= lease_until:
                    self._lease_over.add(block)
                self._on_found(block, there)
            if not self._left:
                self._news = trio.Event()

    def _ended(self) -> Iterator[tuple[BlockId, File, float]]:
        """Blocks that nobody brings any more, or for too long already."""
        for block, (file, lease_until) in list(self._left.items()):
            over = trio.current_time() >= lease_until
            if over or not self._cache.is_claimed(file, block.number):
                yield block, file, lease_until
