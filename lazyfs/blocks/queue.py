"""A queue of blocks that wait to be processed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import trio

from lazyfs.blocks import BlockId
from lazyfs.blocks.memory import Held


class BlockQueue:
    """Blocks in the order in which they were added; any block can be removed."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[BlockId, Held] = OrderedDict()
        self._news = trio.Event()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[tuple[BlockId, Held]]:
        return iter(self._blocks.items())

    def put(self, block: BlockId, held: Held) -> None:
        """Add a block at the end."""
        self._blocks[block] = held
        self._news.set()

    def discard(self, block: BlockId) -> bool:
        """Remove a block; returns whether it was queued."""
        return self._blocks.pop(block, None) is not None

    async def wait(self) -> None:
        """Wait until there is a block."""
        # All tasks are woken: where one was, the policy `tensor` requested more blocks out of order
        # (`tests/unit/test_loads.py`, 32 threads).
        while not self._blocks:
            if self._news.is_set():  # otherwise other tasks wait for it already
                self._news = trio.Event()
            await self._news.wait()

    def first(self) -> BlockId:
        """The first block; there must be one."""
        return next(iter(self._blocks))

    def take(self) -> tuple[BlockId, Held]:
        """Remove the first block and return it; there must be one."""
        return self._blocks.popitem(last=False)
