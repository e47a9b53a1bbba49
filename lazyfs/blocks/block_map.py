"""Where each block of each file is. Pure.

The scheduler, the pusher and memory move blocks and record that in the map. The prefetch policy,
memory, the pusher and the status of a mount query it. The map decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lazyfs.blocks import BlockId
from lazyfs.blocks.file_blocks import AWAY, PAGES, FileBlocks, Place


class _Files(dict[int, FileBlocks]):
    """The blocks of each file, by inode; made when they are first asked for.

    Most of a million files are only looked up: then a file takes 100 bytes instead of 700.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self._block_size = block_size
        # Of each file that was only looked up: twice its size, plus one if the kernel knows it.
        self._idle: dict[int, int] = {}

    def add(self, inode: int, size_bytes: int) -> None:
        if inode not in self:
            self._idle.setdefault(inode, 2 * size_bytes)

    def set_known_idle(self, inode: int, known: bool) -> bool:
        """Whether nothing but that is to be done, because the file was only looked up."""
        told = self._idle.get(inode)
        if told is not None:
            self._idle[inode] = told & ~1 | known
        return told is not None

    def __missing__(self, inode: int) -> FileBlocks:
        size_bytes, known = divmod(self._idle.pop(inode), 2)
        made = self[inode] = FileBlocks(size_bytes, self._block_size)
        made.known = bool(known)
        return made


class BlockMap:
    """The blocks of all files of a mount.

    Args:
        block_size: bytes.

    Attributes:
        files: the blocks of each file, by inode. Only `moved` changes places.
        on_move: called with a block, where it was and where it is now, after each move.
        on_stored: called with a block after it was written to the disk.
        is_held: says whether a block is in memory.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.files = _Files(block_size)
        self.on_move: list[Callable[[BlockId, Place, Place], None]] = []
        self.on_stored: list[Callable[[BlockId], None]] = []
        self.is_held: Callable[[BlockId], bool] = lambda block: False
        self._order: list[int] = []
        # Of the files in the order: how many blocks are at each place.
        self._totals = [0] * len(Place)

    def add_file(self, inode: int, size_bytes: int) -> None:
        """Add a file. Adding it again changes nothing."""
        self.files.add(inode, size_bytes)

    @property
    def order(self) -> Sequence[int]:
        """The files in the order in which a loader reads them."""
        return self._order

    def set_order(self, order: Sequence[int]) -> None:
        """Set the order in which a loader reads. All files must have been added."""
        for inode in self._order:
            self.files[inode].rank = -1
        self._order = list(order)
        for rank, inode in enumerate(self._order):
            self.files[inode].rank = rank
        counts = [self.files[inode].counts for inode in self._order]
        self._totals = [sum(each[place] for each in counts) for place in Place]

    def after(self, inode: int) -> Sequence[int]:
        """The files after one in the loading order; none if it has no place there."""
        rank = self.files[inode].rank
        return self._order[rank + 1 :] if rank >= 0 else ()

    def ordered_blocks(self, place: Place) -> int:
        """How many blocks of the files in the loading order are at a place."""
        return self._totals[place]

    def place(self, block: BlockId) -> Place:
        """Where a block is."""
        return Place(self.files[block.inode].places[block.number])

    def moved(self, block: BlockId, place: Place) -> None:
        """Record that a block is now at a place."""
        blocks = self.files[block.inode]
        before = blocks.move(block.number, place)
        now = Place(blocks.places[block.number])
        if blocks.rank >= 0:
            self._totals[before] -= 1
            self._totals[now] += 1
        for tell in self.on_move:
            tell(block, before, now)

    def failed(self, block: BlockId) -> None:
        """A block could not be fetched. From now on it is only fetched on demand."""
        self.files[block.inode].failed[block.number] = 1
        self.moved(block, Place.LEFT)

    def stored(self, block: BlockId) -> None:
        """Record that a block is on the disk, wherever else it is."""
        self.files[block.inode].stored[block.number] = 1
        for tell in self.on_stored:
            tell(block)

    def is_stored(self, block: BlockId) -> bool:
        """Whether a block is known to be on the disk, wherever else it is."""
        return bool(self.files[block.inode].stored[block.number])

    def is_here(self, block: BlockId) -> bool:
        """Whether a block is known to be on the disk, or is in memory."""
        return self.is_stored(block) or self.is_held(block)

    def set_known(self, inode: int, known: bool) -> None:
        """Whether the kernel knows the inode, so that blocks can be put into the page cache.

        The kernel drops the pages of an inode with it. Nobody reads the file then: a block that is
        not on the disk is wanted again when it is read again, and until then memory may drop it.
        """
        if self.files.set_known_idle(inode, known):
            return
        blocks = self.files[inode]
        blocks.known = known
        if known:
            return
        for number in blocks.all_at(Place.NEAR):
            place = Place.LOCAL if blocks.stored[number] else Place.USED
            self.moved(BlockId(inode, number), place)

    def opened(self, inode: int, *, direct: bool) -> None:
        """A file was opened; `direct`: with O_DIRECT, which bypasses the page cache."""
        self.files[inode].reads_pages = not direct

    def progress(self) -> tuple[int, int]:
        """Wanted bytes of the files in the loading order, and how many of them are or were here.

        Blocks that could not be fetched are wanted, and not here.
        """
        wanted = there = 0
        for inode in self._order:
            blocks = self.files[inode]
            wanted += blocks.wanted_bytes
            here = len(blocks.places) - sum(blocks.counts[place] for place in AWAY)
            there += min(here * self.block_size, blocks.size_bytes)
        return wanted, there

    def near_bytes(self) -> int:
        """Bytes of files in the loading order that went into the page cache, or were read."""
        size = 0
        for blocks in (self.files[inode] for inode in self._order):
            count = blocks.counts[Place.NEAR] + blocks.counts[Place.USED]
            size += min(count * self.block_size, blocks.size_bytes)
        return size

    def planned_bytes(self) -> int:
        """Bytes of all files that are in the loading order, or open to readers of pages."""
        files = self.files.values()
        return sum(file.size_bytes for file in files if file.rank >= 0 or file.reads_pages)

    def beginnings_are_here(self) -> bool:
        """Whether the header or the first block of each file in the loading order was here."""
        return all(map(self.has_beginning, self._order))

    def has_beginning(self, inode: int) -> bool:
        """Whether the header of a file, or its first block, is or was here."""
        blocks = self.files[inode]
        return blocks.has_head or not blocks.places or blocks.places[0] not in AWAY

    def is_near(self, inode: int) -> bool:
        """Whether all of a file that is not empty went into the page cache, or was read."""
        blocks = self.files[inode]
        count = sum(blocks.counts[place] for place in PAGES)
        return count > 0 and count == len(blocks.places)

    def may_be_read(self, inode: int) -> bool:
        """Whether a file was opened, and some of it may have been read out of the page cache."""
        blocks = self.files[inode]
        return blocks.reads_pages is True and any(blocks.counts[place] for place in PAGES)

    def is_missed(self, block: BlockId) -> bool:
        """Whether a reader that requests a block should have found it in the page cache."""
        blocks = self.files[block.inode]
        return blocks.places[block.number] == Place.NEAR and blocks.reads_pages is not False

    def near_after(self, block: BlockId) -> Iterator[BlockId]:
        """The blocks after one that are in the page cache, in the order in which a loader reads."""
        first = block.number + 1
        for inode in (block.inode, *self.after(block.inode)):
            places = self.files[inode].places
            while (first := places.find(Place.NEAR, first)) >= 0:
                yield BlockId(inode, first)
                first += 1
            first = 0
