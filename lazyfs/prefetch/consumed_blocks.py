"""Which blocks on the disk a load needs no more, so that they may make room for what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import FileBlocks, Place
from lazyfs.prefetch.ahead import PagesAhead

# So many blocks just behind the rearmost reader he may still ask for.
BEHIND_BLOCKS = 4


class ConsumedBlocks:
    """Finds them.

    Args:
        files: all files by inode; what is added later counts as well.
        ahead: knows where the rearmost reader is.
    """

    def __init__(self, files: Mapping[int, FileBlocks], ahead: PagesAhead) -> None:
        self._files = files
        self._ahead = ahead
        # No file before this one in the order has blocks on the disk.
        self._first = 0

    def stored(self, block: BlockId) -> None:
        """A block is on the disk, wherever else it is."""
        blocks = self._files[block.inode]
        blocks.stored[block.number] = 1
        self._first = min(self._first, max(0, blocks.rank))

    def reorder(self) -> None:
        """The order is another one from now on."""
        self._first = 0

    def take(self, order: Sequence[int], count: int) -> list[BlockId]:
        """Blocks that all readers have had, the first ones first; each is given once.

        Args:
            order: inodes in the order in which a loader reads.
            count: how many at most.
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
                if _was_had(blocks, number):
                    blocks.stored[number] = 0
                    spent.append(BlockId(order[rank], number))
                number = blocks.stored.find(1, number + 1)
        return spent


def _was_had(blocks: FileBlocks, number: int) -> bool:
    """Whether what is behind all readers was read, if only out of the page cache."""
    place = blocks.places[number]
    return place == Place.NEAR or (place != Place.COMING and blocks.is_touched(number))
