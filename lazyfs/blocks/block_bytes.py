"""One byte for each block of a file, even for a file of 50 TB of which little is read.

Pure. Nearly all files use a `bytearray`. Huge files use `SparseBytes`, which implements the methods
that are needed here, and takes memory only where a byte is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

# Files with more blocks have sparse bytes.
DENSE_BLOCKS = 1 << 14


class SparseBytes:
    """A sequence of bytes, zero at first, in chunks that are created when a byte is set in them.

    Args:
        count: the number of bytes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._chunks: dict[int, bytearray] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> int:
        at = self._checked(at)
        chunk = self._chunks.get(at // DENSE_BLOCKS)
        return chunk[at % DENSE_BLOCKS] if chunk else 0

    def __setitem__(self, at: int, value: int) -> None:
        at = self._checked(at)
        chunk = self._chunks.get(at // DENSE_BLOCKS)
        if chunk is None:
            if not value:
                return
            chunk = self._chunks[at // DENSE_BLOCKS] = bytearray(DENSE_BLOCKS)
        chunk[at % DENSE_BLOCKS] = value

    def find(self, value: int, start: int = 0, stop: int | None = None) -> int:
        """Like `bytearray.find`, for positions that are not negative."""
        for chunk, begin, first, last in self._parts(start, stop):
            if chunk is None:
                if not value:
                    return begin + first
            elif (at := chunk.find(value, first, last)) >= 0:
                return begin + at
        return -1

    def count(self, value: int, start: int = 0) -> int:
        """Like `bytearray.count`, for positions that are not negative."""
        return sum(
            (last - first) * (not value) if chunk is None else chunk.count(value, first, last)
            for chunk, _, first, last in self._parts(start, None)
        )

    def _parts(
        self, start: int, stop: int | None
    ) -> Iterator[tuple[bytearray | None, int, int, int]]:
        """The chunks of a range: the start of each one, and the part of it that is in the range."""
        stop = self._count if stop is None else min(stop, self._count)
        while start < stop:
            number, first = divmod(start, DENSE_BLOCKS)
            begin = number * DENSE_BLOCKS
            last = min(DENSE_BLOCKS, stop - begin)
            yield self._chunks.get(number), begin, first, last
            start = begin + last

    def _checked(self, at: int) -> int:
        at += self._count if at < 0 else 0
        if not 0 <= at < self._count:
            raise IndexError(at)
        return at


BlockBytes: TypeAlias = bytearray | SparseBytes


def zero_bytes(count: int) -> BlockBytes:
    """One byte for each of this many blocks, all zero."""
    return bytearray(count) if count <= DENSE_BLOCKS else SparseBytes(count)
