"""How much lies in the page cache that nobody has read yet.

Reads of pages that are there make no request, so nobody tells how far a reader is. A request does:
whoever makes one has used up what lay before it. So what counts is ahead of the rearmost reader, in
the order in which a loader reads. One who went on to another file, and has left behind nothing but
pages in the page cache, is taken to have read those: he would have been seen otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import FileBlocks, Place


class PagesAhead:
    """Counts them.

    Args:
        files: all files by inode; what is added later counts as well.

    Attributes:
        blocks: how many lie there.
    """

    def __init__(self, files: Mapping[int, FileBlocks]) -> None:
        self._files = files
        # The rearmost reader of files in the order: their rank and block. Readers of other files.
        self._rear = (0, 0)
        self._elsewhere: dict[int, int] = {}
        self.blocks = 0

    def moved(self, block: BlockId, before: Place, place: Place) -> None:
        """A block is at another place now."""
        if before != place and Place.NEAR in (before, place) and self._counts(block):
            self.blocks += 1 if place == Place.NEAR else -1

    def locate(self, order: Sequence[int], streams: Iterable[tuple[int, int]]) -> None:
        """Count anew.

        Args:
            order: inodes in the order in which a loader reads.
            streams: inode and piece of each reader, the one seen last first.
        """
        self._elsewhere.clear()
        positions = []
        for number, (inode, piece) in enumerate(streams):
            blocks = self._files[inode]
            first, _ = blocks.blocks_of(piece)
            if blocks.rank < 0:
                self._elsewhere[inode] = min(first, self._elsewhere.get(inode, first))
            elif not number or blocks.places.count(Place.NEAR, first) < len(blocks.places) - first:
                positions.append((blocks.rank, first))
        self._rear = min(positions, default=(0, 0))
        rank, first = self._rear
        self.blocks = 0
        for inode in order[rank:]:
            self.blocks += self._near(inode, first)
            first = 0
        for inode, first in self._elsewhere.items():
            self.blocks += self._near(inode, first)

    def is_behind(self, rank: int, number: int) -> bool:
        """Whether a block of a file in the order lies before all readers."""
        return (rank, number) < self._rear

    def _near(self, inode: int, first: int) -> int:
        blocks = self._files[inode]
        return blocks.places.count(Place.NEAR, first) if first else blocks.counts[Place.NEAR]

    def _counts(self, block: BlockId) -> bool:
        blocks = self._files[block.inode]
        if blocks.rank >= 0:
            return (blocks.rank, block.number) >= self._rear
        return block.number >= self._elsewhere.get(block.inode, len(blocks.places))
