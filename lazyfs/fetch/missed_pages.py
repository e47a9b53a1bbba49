"""Blocks that a reader missed in the page cache, where they should have been.

`pagecache/dropped_pages.py` waits for such a miss, looks which of the following blocks the kernel
has dropped as well, and has them fetched again ahead of the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import trio

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.fetch.part_reads import MOST_PARTS
from lazyfs.listed_object import File


class MissedPages:
    """Misses of one mount.

    Args:
        blocks: where blocks are.
        files: the mount's, by inode.
        on_change: called when blocks may be fetched again.
    """

    def __init__(
        self, blocks: BlockMap, files: Mapping[int, File], on_change: Callable[[], None]
    ) -> None:
        self._map = blocks
        self._files = files
        self._on_change = on_change
        # The first block that was missed since `missed` returned.
        self._missed: BlockId | None = None
        self._miss = trio.Event()

    @property
    def block_size(self) -> int:
        """The block size in bytes."""
        return self._map.block_size

    def file(self, inode: int) -> File:
        """The file of an inode."""
        return self._files[inode]

    def requested(self, block: BlockId) -> None:
        """A reader requests a block; it is missed if it should be in the page cache."""
        if self._missed is None and self._map.is_missed(block):
            self._missed = block
            self._miss.set()

    async def missed(self) -> BlockId:
        """The first block that was missed since the last call; waits until there is one."""
        await self._miss.wait()
        missed, self._missed = self._missed, None
        self._miss = trio.Event()
        assert missed is not None
        return missed

    def near_after(self, block: BlockId, count: int) -> list[BlockId]:
        """The next blocks after one, at most `count`, that should be in the page cache."""
        return list(islice(self._map.near_after(block), count))

    def most_broken(self, block: BlockId) -> int:
        """Of how many pieces of a block pages may be missing, because `PartReads` reads them."""
        return MOST_PARTS if self._map.is_stored(block) else 0

    def wish_again(self, blocks: Iterable[BlockId]) -> None:
        """Blocks have left the page cache."""
        for block in blocks:
            if self._map.place(block) == Place.NEAR:
                is_here = self._map.is_here(block)
                self._map.moved(block, Place.LOCAL if is_here else Place.ABSENT)
        self._on_change()
