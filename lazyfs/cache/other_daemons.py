"""Blocks that other daemons of this node fetch into the shared cache.

A daemon claims a block before it fetches it. Another daemon that wants to prefetch the block leaves
it to the first one, and checks from time to time whether it has arrived. A reader waits only for
the lease: then its daemon fetches the block itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from lazyfs.blocks import BlockId
from lazyfs.cache import BlockCache
from lazyfs.cache.disk_calls import DiskCalls, DiskHangsError
from lazyfs.listed_object import File

# How long a block is left to the daemon that claimed it, and how often the disk is checked.
LEASE_S = 10.0
LOOK_S = 0.02


class OtherDaemons:
    """The blocks that are left to other daemons, and until when.

    Args:
        cache: the shared cache.
        calls: make the calls that block.
        on_found: called with a block that is no longer left to others, and whether it arrived.
    """

    def __init__(
        self,
        cache: BlockCache,
        calls: DiskCalls,
        on_found: Callable[[BlockId, bool], None],
    ) -> None:
        self._cache = cache
        self._calls = calls
        self._on_found = on_found
        self._left: dict[BlockId, tuple[File, float]] = {}
        self._news = trio.Event()
        self._lease_over: set[BlockId] = set()

    def leave(self, file: File, block: BlockId, lease_until: float) -> None:
        """Leave a block to another daemon, which fetches it."""
        self._left[block] = file, lease_until
        self._cache.set_waiting(file, block.number, True)
        self._news.set()

    def take_back(self, file: File, block: BlockId) -> float:
        """Take back a block that a reader needs now; returns until when another may fetch it."""
        now_s = trio.current_time()
        lease_until = now_s if block in self._lease_over else now_s + LEASE_S
        self._lease_over.discard(block)
        if block in self._left:
            _, lease_until = self._left.pop(block)
            self._cache.set_waiting(file, block.number, False)
        return lease_until

    async def wait_for(self, file: File, number: int, lease_until: float) -> None:
        """Wait until another daemon releases its claim to a block, whether it stored it or not.

        While the disk hangs it can store none.
        """
        self._cache.set_waiting(file, number, True)
        with trio.move_on_at(lease_until):
            while not self._calls.hangs and self._cache.is_claimed(file, number):
                await trio.sleep(LOOK_S)
        self._cache.set_waiting(file, number, False)

    async def follow(self) -> None:
        """Check, until cancelled, whether blocks left to others have arrived, or never will."""
        while True:
            await self._news.wait()
            await trio.sleep(LOOK_S)
            for block, file, lease_until in self._ended():
                there = await self._holds(file, block)
                if self._left.pop(block, None) is None:
                    continue  # a reader requested it meanwhile
                self._cache.set_waiting(file, block.number, False)
                if not there and trio.current_time() >= lease_until:
                    self._lease_over.add(block)
                self._on_found(block, there)
            if not self._left:
                self._news = trio.Event()

    async def _holds(self, file: File, block: BlockId) -> bool:
        try:
            return await self._calls.run(self._cache.holds, file, block.number)
        except DiskHangsError:
            return False

    def _ended(self) -> Iterator[tuple[BlockId, File, float]]:
        """Blocks that no daemon fetches any more, or one for too long."""
        for block, (file, lease_until) in list(self._left.items()):
            over = trio.current_time() >= lease_until
            if over or not self._cache.is_claimed(file, block.number):
                yield block, file, lease_until
