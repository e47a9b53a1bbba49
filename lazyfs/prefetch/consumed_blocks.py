"""Finds blocks on disk that a load no longer needs, so that they can be evicted for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lazyfs.blocks import BlockId
from lazyfs.blocks.file_blocks import FileBlocks, Place
from lazyfs.prefetch.pages_ahead import PagesAhead

# The rearmost reader may still ask for this many blocks just behind it.
BEHIND_BLOCKS = 4


class ConsumedBlocks:
    """Finds the blocks on disk that all readers have consumed.

    Args:
        files: all files by inode; files may be added later.
        ahead: knows the position of the rearmost reader.
    """

    def __init__(self, files: Mapping[int, FileBlocks], ahead: PagesAhead) -> None:
        self._files = files
        self._ahead = ahead
        # No file before this rank has blocks on disk.
        self._first = 0

    def stored(self, block: BlockId) -> None:
        """A block was written to disk."""
        self._first = min(self._first, max(0, self._files[block.inode].rank))

    def reorder(self) -> None:
        """The loading order has changed."""
        self._first = 0

    def take(self, order: Sequence[int], count: int) -> list[BlockId]:
        """Blocks that all readers have consumed, in loading order. Each is returned once.

        Args:
            order: inodes in the order in which a loader reads.
            count: the most blocks to return.
        """
        spent: list[BlockId] = []
        for rank in range(self._first, len(order)):
            blocks = self._files[order[rank]]
            number = blocks.stored.find(1)
            if number < 0 and rank == self._first:
                self._first += 1
            while number >= 0 and len(spent) < count:
                if not self._ahead.is_behind(rank, number + BEHIND_BLOCKS):
                    return spent
                if _was_consumed(blocks, number):
                    blocks.stored[number] = 0
                    spent.append(BlockId(order[rank], number))
                number = blocks.stored.find(1, number + 1)
        return spent


def _was_consumed(blocks: FileBlocks, number: int) -> bool:
    """Whether a block behind all readers was read, or could be read in the page cache."""
    place = blocks.places[number]
    is_moving = place in (Place.COMING, Place.LOADING)
    return place == Place.NEAR or (not is_moving and blocks.is_touched(number))
