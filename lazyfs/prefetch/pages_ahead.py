"""Estimates how much of the page cache has not been read yet.

A read of a page in the page cache makes no request, so a reader's position is not known. But a
request shows that its reader has used up everything before it. So blocks count as unread if they
are ahead of the rearmost reader, in the order in which a loader reads. A reader may have gone on to
another file and left only pages in the page cache behind. It is taken to have read them, because
otherwise it would have made a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lazyfs.blocks import BlockId
from lazyfs.blocks.file_blocks import FileBlocks, Place


class PagesAhead:
    """Counts the blocks in the page cache that are ahead of the readers.

    Args:
        files: all files by inode; files may be added later.

    Attributes:
        blocks: the count.
    """

    def __init__(self, files: Mapping[int, FileBlocks]) -> None:
        self._files = files
        # The rearmost reader of the ordered files (rank, block), and readers of other files.
        self._rear = (0, 0)
        self._elsewhere: dict[int, int] = {}
        self.blocks = 0

    def moved(self, block: BlockId, before: Place, place: Place) -> None:
        """A block has moved to another place."""
        if before != place and Place.NEAR in (before, place) and self._counts(block):
            self.blocks += 1 if place == Place.NEAR else -1

    def locate(self, order: Sequence[int], streams: Iterable[tuple[int, int]]) -> None:
        """Count again, for new positions of the readers.

        Args:
            order: inodes in the order in which a loader reads.
            streams: inode and piece of each reader, most recently active first.
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
        """Whether a block of an ordered file is behind all readers."""
        return (rank, number) < self._rear

    def _near(self, inode: int, first: int) -> int:
        blocks = self._files[inode]
        return blocks.places.count(Place.NEAR, first) if first else blocks.counts[Place.NEAR]

    def _counts(self, block: BlockId) -> bool:
        blocks = self._files[block.inode]
        if blocks.rank >= 0:
            return (blocks.rank, block.number) >= self._rear
        return block.number >= self._elsewhere.get(block.inode, len(blocks.places))
