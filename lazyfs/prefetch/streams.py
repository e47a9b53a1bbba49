"""Who reads where, as far as reads show it.

Requests carry no reader: one file is read by many threads and processes through one descriptor. But
a reader goes on where it was, mostly forwards. So a read of a piece belongs to the stream that is
at that piece or, at most `REACH` pieces, before it; otherwise somebody new has begun. What reads
pages that are in the page cache is not seen at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

# More streams at once are a crowd; the one that was seen longest ago is not followed any more.
FOLLOWED = 32
REACH = 256
# A stream has ended when others went on so often since it was seen last, for each stream there is.
SILENCE = 4


class Streams:
    """All streams; each is a file's inode and the piece that it is at."""

    def __init__(self) -> None:
        # When it was seen last, in moves of all streams; the stream seen last is at the end.
        self._seen: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._moves = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Inode and piece of each stream, the one seen last first."""
        return reversed(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def read(self, inode: int, piece: int) -> range | None:
        """A piece was read.

        Returns:
            The pieces that the stream has passed since; None if it is at this piece already.
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
        """The pieces of a file are others from now on."""
        for stream in [stream for stream in self._seen if stream[0] == inode]:
            del self._seen[stream]

    def _let_go(self) -> None:
        oldest, seen = next(iter(self._seen.items()))
        count = len(self._seen)
        if count > FOLLOWED or self._moves - seen > SILENCE * count:
            del self._seen[oldest]
