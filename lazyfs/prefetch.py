"""Which block to bring next. Pure: no I/O, no clock, no threads.

Theory of operation. The prefetcher knows the files in the order in which a loader reads them, and
for each block where it is:

    ABSENT   only in S3
    COMING   asked for
    LOCAL    on this node's disk (or in the daemon's memory)
    NEAR     in the kernel's page cache: a reader gets it without asking us
    USED     it was read and let go, and is only in S3 again; a load reads each block once

It is told what was read and what landed, and answers two questions. `next_fetch`: which absent
block to bring from S3. `next_load`: which local block to bring nearer. Both walk the files in one
order, the *plan*: from where the readers are to the end, then what was passed over. Demand does not
come through here; a block that a reader waits for is fetched at once by the caller.

Reads inside one tensor come interleaved and backwards, because every thread of the loader copies a
part of its own. So a read does not move the focus to its own
block but to the first absent block of the tensor that it touches: the tensor is one thing.

A file that is not in the loading order (or every file, with the policy `sequential`) is prefetched
only ahead of a reader, and twice as far as was read of it so far: a look at the end of a large
file costs little, a copy of it runs at full speed.

How far ahead of the readers all this runs is the caller's to say: he knows what memory and disk
can hold until it is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from lazyfs.blocks import BlockId, block_count, block_length

# Readers in so many files at once are followed one after another in turns; more are a crowd.
FOLLOWED_FILES = 32
# Without tensors to go by, a read this far before the focus belongs to the same stream.
NEIGHBOURHOOD = 8


class Place(IntEnum):
    """Where a block is."""

    ABSENT = 0
    COMING = 1
    LOCAL = 2
    NEAR = 3
    USED = 4


@dataclass(slots=True)
class _Progress:
    """What is known of one file's blocks."""

    size_bytes: int
    places: bytearray
    known: bool = False
    # Opened, and not with O_DIRECT: its readers find what is in the page cache. None: not opened.
    reads_pages: bool | None = None
    ordered: bool = False
    blocks_read: int = 0
    last_read: int = -1
    tensor_starts: Sequence[int] = ()
    # No block before these is ABSENT (LOCAL): where a walk over the file begins.
    first_absent: int = 0
    first_local: int = 0
    failed: set[int] = field(default_factory=set)


class Prefetcher:
    """The policy of one mount.

    Args:
        policy: `model`, `sequential` or `off`.
        block_size: bytes.
    """

    def __init__(self, policy: str, block_size: int) -> None:
        self._policy = policy
        self._block_size = block_size
        self._files: dict[int, _Progress] = {}
        self._order: list[int] = []
        # The files that are being read, the one read last at the end, and the block they are at.
        self._focus: OrderedDict[int, int] = OrderedDict()

    def add_file(self, inode: int, size_bytes: int) -> None:
        """A file exists. Adding it again changes nothing."""
        if inode not in self._files:
            count = block_count(size_bytes, self._block_size)
            self._files[inode] = _Progress(size_bytes, bytearray(count))

    def set_order(self, inodes: Iterable[int]) -> None:
        """The order in which a loader reads; files that are not named are not fetched whole.

        All of them must have been added.
        """
        self._order = list(inodes)
        for inode in self._order:
            self._files[inode].ordered = self._policy == "model"

    @property
    def order(self) -> Sequence[int]:
        """The files in the order in which a loader reads them."""
        return tuple(self._order)

    def progress(self) -> tuple[int, int]:
        """Bytes of the files in the loading order, and how many of them are or were here."""
        wanted = there = 0
        for inode in self._order:
            progress = self._files[inode]
            wanted += progress.size_bytes
            away = sum(progress.places.count(place) for place in (Place.ABSENT, Place.COMING))
            here = (len(progress.places) - away) * self._block_size
            there += min(here, progress.size_bytes)
        return wanted, there

    def near_bytes(self) -> int:
        """Bytes of files in the loading order that went into the page cache, or were read."""
        size = 0
        for progress in (self._files[inode] for inode in self._order):
            blocks = sum(progress.places.count(place) for place in (Place.NEAR, Place.USED))
            size += min(blocks * self._block_size, progress.size_bytes)
        return size

    def beginnings_are_here(self) -> bool:
        """Whether of each file in the loading order the first block is or was here."""
        return all(
            self._files[inode].places[0] not in (Place.ABSENT, Place.COMING)
            for inode in self._order
            if self._files[inode].places
        )

    def is_ordered(self, inode: int) -> bool:
        """Whether the file has a place in the loading order."""
        return inode in self._files and self._files[inode].ordered

    def set_tensors(self, inode: int, starts: Sequence[int]) -> None:
        """Where the tensors of a file begin, in ascending order of bytes."""
        self._files[inode].tensor_starts = starts

    def set_known(self, inode: int, known: bool) -> None:
        """Whether the kernel knows the inode, so that blocks can be put into the page cache."""
        progress = self._files[inode]
        progress.known = known
        if not known:
            # The kernel dropped the pages with the inode; nobody tells where the bytes are now.
            for number, place in enumerate(progress.places):
                if place == Place.NEAR:
                    self.moved(BlockId(inode, number), Place.LOCAL)

    def opened(self, inode: int, *, direct: bool) -> None:
        """A file was opened; `direct`: with O_DIRECT, which passes by the page cache."""
        self._files[inode].reads_pages = not direct

    def reads_pages(self, inode: int) -> bool:
        """Whether the file is open to someone who finds what is in the page cache."""
        return self._files[inode].reads_pages is True

    def takes_pages(self, inode: int) -> bool:
        """Whether blocks of the file can and should be put into the page cache."""
        progress = self._files[inode]
        return progress.known and progress.reads_pages is not False

    def moved(self, block: BlockId, place: Place) -> None:
        """A block is now there."""
        progress = self._files[block.inode]
        progress.places[block.number] = place
        if place == Place.ABSENT:
            progress.first_absent = min(progress.first_absent, block.number)
        elif place == Place.LOCAL:
            progress.first_local = min(progress.first_local, block.number)

    def place(self, block: BlockId) -> Place:
        """Where a block is."""
        return Place(self._files[block.inode].places[block.number])

    def failed(self, block: BlockId) -> None:
        """The block could not be fetched; it is left to those who read it."""
        self.moved(block, Place.ABSENT)
        self._files[block.inode].failed.add(block.number)

    def was_read(self, inode: int, offset: int) -> None:
        """A reader asked for bytes at `offset`."""
        progress = self._files[inode]
        number = offset // self._block_size
        progress.failed.discard(number)
        if progress.places[number] == Place.USED:
            self._begin_again(progress, number)
        if number != progress.last_read:
            progress.last_read = number
            progress.blocks_read += 1
        self._focus[inode] = self._start_of_stream(progress, offset)
        self._focus.move_to_end(inode)
        if len(self._focus) > FOLLOWED_FILES:
            self._focus.popitem(last=False)

    def next_fetch(self) -> BlockId | None:
        """The absent block to bring from S3 next, or None."""
        for inode, start, stop in self._plan():
            progress = self._files[inode]
            begin = max(start, progress.first_absent)
            number = progress.places.find(Place.ABSENT, begin, stop)
            while number in progress.failed:
                number = progress.places.find(Place.ABSENT, number + 1, stop)
            if number >= 0:
                if begin == progress.first_absent and not progress.failed:
                    progress.first_absent = number
                return BlockId(inode, number)
        return None

    def next_load(self, allowance: int) -> BlockId | None:
        """The local block to put into the page cache next, or None.

        Args:
            allowance: how many bytes may still be put there ahead of the readers.
        """
        for inode, start, stop in self._plan():
            progress = self._files[inode]
            begin = max(start, progress.first_local)
            number = (
                progress.places.find(Place.LOCAL, begin, stop) if self.takes_pages(inode) else -1
            )
            if number >= 0:
                if begin == progress.first_local:
                    progress.first_local = number
                length = block_length(progress.size_bytes, self._block_size, number)
                return BlockId(inode, number) if length <= allowance else None
        return None

    def _plan(self) -> Iterator[tuple[int, int, int]]:
        """Files and the range of blocks that is wanted of each, most wanted first."""
        if self._policy == "off":
            return
        followed = list(reversed(self._focus.items()))
        for inode, start in followed:
            progress = self._files[inode]
            stop = len(progress.places)
            if not progress.ordered:
                stop = min(stop, progress.last_read + 1 + 2 * progress.blocks_read)
            yield inode, start, stop
        if self._policy != "model":
            return
        last = next((inode for inode, _ in followed if self._files[inode].ordered), None)
        position = self._order.index(last) + 1 if last is not None else 0
        for inode in (*self._order[position:], *self._order[:position]):
            yield inode, 0, len(self._files[inode].places)

    def _begin_again(self, progress: _Progress, number: int) -> None:
        """A file is read a second time: what follows is wanted again."""
        again = progress.places[number:].replace(bytes([Place.USED]), bytes([Place.ABSENT]))
        progress.places[number:] = again
        progress.first_absent = min(progress.first_absent, number)

    def _start_of_stream(self, progress: _Progress, offset: int) -> int:
        """The block where the thing begins that a read at `offset` is part of."""
        number = offset // self._block_size
        if progress.tensor_starts:
            tensor = bisect_right(progress.tensor_starts, offset) - 1
            return progress.tensor_starts[max(tensor, 0)] // self._block_size
        return max(0, number - NEIGHBOURHOOD)
