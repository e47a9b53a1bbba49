"""Groups reads into streams, one for each position at which a reader seems to be.

A request does not identify its reader, and many threads and processes may read one file through one
descriptor. But a reader goes on from where it was, mostly forwards. So a read of a piece belongs to
the stream that is at that piece, or at most `REACH` pieces before it. Otherwise it starts a new
stream. Reads of pages in the page cache are not seen at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

# Most streams that are followed; beyond that the least recently active one is dropped.
FOLLOWED = 32
REACH = 256
# A stream ends when all streams together moved this often, times their number, since its last read.
SILENCE = 4


class Streams:
    """All streams. Each is an inode and the piece that the stream is at."""

    def __init__(self) -> None:
        # Number of moves of all streams at its last read; the most recently active one comes last.
        self._seen: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._moves = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Inode and piece of each stream, most recently active first."""
        return reversed(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def read(self, inode: int, piece: int) -> range | None:
        """A piece was read.

        Returns:
            The pieces that the stream has skipped since; None if it was at this piece already.
        """
        stream = inode, piece
        if stream in self._seen:
            self._seen[stream] = self._moves
            self._seen.move_to_end(stream)
            return None
        before = max(
            (at for other, at in self._seen if other == inode and piece - REACH <= at < piece),
            default=None,
        )
        if before is not None:
            del self._seen[inode, before]
        self._moves += 1
        self._seen[stream] = self._moves
        self._let_go()
        return range(before + 1, piece) if before is not None else range(0)

    def forget(self, inode: int) -> None:
        """Drop the streams of a file, because its division into pieces has changed."""
        for stream in [stream for stream in self._seen if stream[0] == inode]:
            del self._seen[stream]

    def _let_go(self) -> None:
        oldest, seen = next(iter(self._seen.items()))
        count = len(self._seen)
        if count > FOLLOWED or self._moves - seen > SILENCE * count:
            del self._seen[oldest]
