"""A cache smaller than the model keeps a window of it.

Blocks that all readers have consumed are removed from the disk, and the blocks that are read next
take their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import trio

from lazyfs.blocks import BlockId
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.faults import contained
from lazyfs.fetch.disks import Disks
from lazyfs.listed_object import File
from lazyfs.prefetch.prefetcher import Prefetcher

# How many blocks are removed at a time.
SLIDE_BLOCKS = 8


class DiskWindow:
    """The part of a load that is on the disk.

    Args:
        disks: know the blocks for which there was no room.
        prefetcher: knows the blocks that all readers have consumed.
        memory: the mount's.
        files: the mount's, by inode.
    """

    def __init__(
        self,
        disks: Disks,
        prefetcher: Prefetcher,
        memory: BlockMemory,
        files: Mapping[int, File],
    ) -> None:
        self._disks = disks
        self._prefetcher = prefetcher
        self._memory = memory
        self._files = files
        self._sliding = False

    def slide(self, nursery: trio.Nursery) -> None:
        """If the cache had no room for a block, remove consumed blocks to make room."""
        if self._sliding or not self._disks.has_refused:
            return
        spent = self._prefetcher.take_spent(SLIDE_BLOCKS)
        if spent:
            self._sliding = True
            nursery.start_soon(contained, "making room on the disk", self._exchange, spent)

    async def _exchange(self, spent: list[BlockId]) -> None:
        try:
            for inode, blocks in groupby(spent, lambda block: block.inode):
                numbers = [block.number for block in blocks]
                if await self._disks.give_up_read(self._files[inode], numbers):
                    for number in numbers:
                        self._left(BlockId(inode, number))
        finally:
            self._sliding = False
            self._disks.retry(self._kept)

    def _left(self, block: BlockId) -> None:
        """A block has left the disk, which no reader needs any more."""
        held = self._memory.get(block)
        if held is not None:
            held.on_disk, held.unread = False, 0
        elif self._prefetcher.blocks.place(block) == Place.LOCAL:
            self._prefetcher.blocks.moved(block, Place.USED)

    def _kept(self, block: BlockId) -> Held | None:
        """A block that is only in memory, and that a reader still needs."""
        held = self._memory.get(block)
        is_alone = self._prefetcher.blocks.place(block) == Place.LOCAL
        return held if held and held.unread and not held.on_disk and is_alone else None
