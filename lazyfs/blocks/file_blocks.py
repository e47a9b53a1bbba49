"""The blocks of one file: where each of them is, and the pieces that are read as a unit."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum

from lazyfs.blocks import block_count
from lazyfs.blocks.block_bytes import zero_bytes

# Blocks in one piece, if the tensors are not known.
PIECE_BLOCKS = 8


class Place(IntEnum):
    """The place of a block.

    ABSENT: only in S3. COMING: requested from S3. LOCAL: on this node's disk or in the worker's
    memory. LOADING: the same, and on its way from there into the page cache or to a reader. NEAR:
    in the kernel's page cache, where a reader gets it without a request to us. USED: only in S3
    again, after it was read or the kernel dropped it; a load reads each block once. PASSED: only in
    S3, and part of tensors that this loader skips. LEFT: only in S3, and only fetched on demand: it
    was not wanted, or could not be fetched. Blocks that are not LOCAL or LOADING may still be in
    the worker's memory, until their room is needed.
    """

    ABSENT = 0
    COMING = 1
    LOCAL = 2
    NEAR = 3
    USED = 4
    PASSED = 5
    LEFT = 6
    LOADING = 7


AWAY = frozenset((Place.ABSENT, Place.COMING, Place.PASSED, Place.LEFT))
# A reader may find these in the page cache.
PAGES = frozenset((Place.NEAR, Place.USED))


class FileBlocks:
    """The blocks of one file.

    A *piece* is what a loader reads as a unit: a tensor, or a run of blocks if the tensors are not
    known. Pieces may share blocks.

    Args:
        size_bytes: of the file.
        block_size: of the mount.

    Attributes:
        places: a `Place` for each block; only `move` changes it.
        counts: the number of blocks at each place.
        known: the kernel knows the inode, so that blocks can be put into the page cache.
        reads_pages: opened without O_DIRECT, so that its readers use the page cache. None: not
            opened.
        stored: 1 for each block that is on the disk.
        failed: 1 for each block that could not be fetched and was not requested since.
        has_head: the file's header is or was here, without its first block.
        rank: the file's position in the loading order; -1: none.
        roles: the role of each piece's tensor (`role_of`); empty if the tensors are not known.
        touched: 1 for each piece of which some bytes were read.
        last_read: the block that was read last, and how often that changed.
    """

    def __init__(self, size_bytes: int, block_size: int) -> None:
        count = block_count(size_bytes, block_size)
        self.size_bytes = size_bytes
        self.places = zero_bytes(count)
        self.counts = [count, *[0] * (len(Place) - 1)]
        self.known = False
        self.reads_pages: bool | None = None
        self.stored = zero_bytes(count)
        self.failed = zero_bytes(count)
        self.has_head = False
        self.rank = -1
        self.roles: Sequence[str] = ()
        self.last_read = -1
        self.blocks_read = 0
        self._block_size = block_size
        self._starts: Sequence[int] = range(0, size_bytes, PIECE_BLOCKS * block_size)
        self._wanted: bytearray | None = None
        self.touched = zero_bytes(len(self._starts))

    @property
    def is_touched_at_all(self) -> bool:
        """Whether bytes were read of any piece."""
        return self.touched.find(1) >= 0

    @property
    def header_bytes(self) -> int:
        """The length of the header before all tensors; 0 if the tensors are not known."""
        return self._starts[0] if self.roles else 0

    def all_at(self, place: Place, start: int = 0) -> Iterator[int]:
        """The blocks at a place, from one on; they may be moved meanwhile."""
        number = self.find(place, start, len(self.places))
        while number >= 0:
            yield number
            number = self.find(place, number + 1, len(self.places))

    @property
    def takes_pages(self) -> bool:
        """Whether blocks in the page cache stay there, and readers find them."""
        return self.known and self.reads_pages is not False

    def set_pieces(self, starts: Sequence[int], roles: Sequence[str]) -> None:
        """Set where the tensors begin, in ascending order of bytes, and their roles."""
        self._starts = starts
        self.roles = roles
        self.touched = zero_bytes(len(starts))

    def want(self, ranges: Iterable[tuple[int, int]] | None) -> None:
        """Allow only these blocks to become ABSENT, from their next move on; None: all."""
        wanted = bytearray(len(self.places))
        for first, stop in ranges or ():
            wanted[first:stop] = b"\1" * (stop - first)
        self._wanted = None if ranges is None else wanted

    def piece_at(self, offset: int) -> int:
        """The piece that holds a byte; -1 for the header before all tensors."""
        return bisect_right(self._starts, offset) - 1

    def blocks_of(self, piece: int) -> tuple[int, int]:
        """The blocks of a piece: the first one and the one after the last."""
        is_last = piece + 1 == len(self._starts)
        end = self.size_bytes if is_last else self._starts[piece + 1]
        return self._starts[piece] // self._block_size, -(-end // self._block_size)

    def pieces_in(self, number: int) -> range:
        """The pieces that have bytes in a block."""
        begin = number * self._block_size
        return range(
            max(0, self.piece_at(begin)), bisect_left(self._starts, begin + self._block_size)
        )

    def is_touched(self, number: int) -> bool:
        """Whether bytes were read of a piece that has bytes in a block."""
        pieces = self.pieces_in(number)
        return self.touched.find(1, pieces.start, pieces.stop) >= 0

    @property
    def wanted_bytes(self) -> int:
        """How many bytes of the file are to be prefetched, including blocks that failed."""
        if not self.counts[Place.LEFT]:
            return self.size_bytes
        count = len(self.places)
        unwanted = self.counts[Place.LEFT] - self.failed.count(1)
        if self.places[-1] == Place.LEFT and not self.failed[-1]:
            last = self.size_bytes - (count - 1) * self._block_size
            return self.size_bytes - (unwanted - 1) * self._block_size - last
        return self.size_bytes - unwanted * self._block_size

    def find(self, place: Place, start: int, stop: int) -> int:
        """The first block of a range that is at a place; -1 if none is."""
        return self.places.find(place, start, stop) if self.counts[place] else -1

    def move(self, number: int, place: Place) -> Place:
        """Move a block; returns where it was. Unwanted and failed blocks never become ABSENT."""
        before = Place(self.places[number])
        is_left = self.failed[number] or (self._wanted is not None and not self._wanted[number])
        if place == Place.ABSENT and is_left:
            place = Place.LEFT
        elif place == Place.LOCAL:
            self.failed[number] = 0
        self.counts[before] -= 1
        self.counts[place] += 1
        self.places[number] = place
        return before
