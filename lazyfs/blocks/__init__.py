"""Block arithmetic. Pure.

A file is divided into blocks of one size; the last one may be shorter. Offsets and sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class BlockId(NamedTuple):
    """One block of one file."""

    inode: int
    number: int


class Span(NamedTuple):
    """The part of a read within one block: bytes `start` to `stop` of the block."""

    number: int
    start: int
    stop: int


def block_count(size_bytes: int, block_size: int) -> int:
    """The number of blocks of a file of that size; 0 for an empty file."""
    return -(-size_bytes // block_size)


def block_length(size_bytes: int, block_size: int, number: int) -> int:
    """The length of block `number` in bytes."""
    return min(block_size, size_bytes - number * block_size)


def spans(offset: int, length: int, size_bytes: int, block_size: int) -> Iterator[Span]:
    """The parts of blocks that a read of `length` at `offset` covers, up to the end of file."""
    end = min(offset + length, size_bytes)
    while offset < end:
        number, start = divmod(offset, block_size)
        stop = min(block_size, start + end - offset)
        yield Span(number, start, stop)
        offset += stop - start


def gaps(taken: Iterable[Span], length: int) -> Iterator[Span]:
    """The parts of a block of that length that none of the spans covers."""
    begin = 0
    number = 0
    for number, start, stop in sorted(taken, key=lambda span: span.start):
        if start > begin:
            yield Span(number, begin, start)
        begin = max(begin, stop)
    if begin < length:
        yield Span(number, begin, length)
