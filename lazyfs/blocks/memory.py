"""The blocks in the worker's memory, and which of them to drop. No I/O, no clock.

Blocks in memory and the room reserved for blocks on their way both count. Their sum always stays
within `--memory-limit`. Dropping a block has one of three costs:

    nothing      it is not in use, and it is on disk or in the page cache, or every byte was read
    the disk     it is on disk, but a reader is reading it part by part
    a fetch      a later reader must fetch it again

A prefetch drops only blocks that cost nothing. Demand drops whatever it must, but no block that
costs a fetch while other fetches keep the link busy, because their readers make room soon.
Blocks in use (waited for, being pushed, or to be written to the disk) are never dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.listed_object import File

# Parts of a block that are tracked: a part counts as read when its last byte was read.
PART = 64 << 10
# At least this many blocks that a reader has begun to read stay in memory.
LEAST_BEGUN = 8
_LOCAL = int(Place.LOCAL), int(Place.LOADING)
# Blocks of room for demand alone.
LEAST_RESERVE = 2


@dataclass(slots=True)
class Held:
    """A block in memory.

    Attributes:
        users: how many tasks need the bytes: waiters, a push, a pending write.
        unread: a bit for each part that was not read yet; at 0 no reader needs the block.
        demanded: a reader waited for it when it came.
        on_disk: it can be loaded again without S3.
    """

    file: File
    data: memoryview
    users: int = 0
    unread: int = 0
    demanded: bool = False
    on_disk: bool = False

    def was_read(self, span: Span) -> None:
        """Mark bytes as read."""
        first = span.start // PART
        stop = -(-span.stop // PART) if span.stop == len(self.data) else span.stop // PART
        self.unread &= ~((1 << stop) - (1 << first)) if stop > first else -1


def all_unread(length: int) -> int:
    """The bits of an unread block of that length."""
    return (1 << -(-length // PART)) - 1


class BlockMemory:
    """All blocks in memory.

    Args:
        limit_bytes: for blocks in memory and on their way together.
        block_size: the mount's, in bytes.
        blocks: the block map, which also records dropped blocks.
        readers: says how many readers there seem to be at once.
        has_disk: blocks may be on disk.
    """

    def __init__(
        self,
        limit_bytes: int,
        block_size: int,
        blocks: BlockMap,
        readers: Callable[[], int],
        *,
        has_disk: bool = True,
    ) -> None:
        self._has_disk = has_disk
        self._limit_bytes = limit_bytes
        self._block_size = block_size
        self._blocks = blocks
        self._readers = readers
        self._held: OrderedDict[BlockId, Held] = OrderedDict()
        self.used_bytes = 0
        self.dropped_bytes = 0

    @property
    def most_blocks(self) -> int:
        """How many whole blocks fit."""
        return self._limit_bytes // self._block_size

    @property
    def unused_bytes(self) -> int:
        """How many more bytes fit."""
        return max(0, self._limit_bytes - self.used_bytes)

    def reserve(self, size_bytes: int) -> None:
        """Reserve room for a block on its way; `make_room` said that it fits."""
        self.used_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Free the room of a block that does not come."""
        self.used_bytes -= size_bytes

    def hold(self, block: BlockId, held: Held) -> None:
        """Add a block, in the room that was reserved for it."""
        self._held[block] = held

    def get(self, block: BlockId) -> Held | None:
        """The block, if it is in memory; counts as a use."""
        held = self._held.get(block)
        if held is not None:
            self._held.move_to_end(block)
        return held

    def peek(self, block: BlockId) -> Held | None:
        """The block, if it is in memory; does not count as a use."""
        return self._held.get(block)

    def make_room(
        self,
        size_bytes: int,
        *,
        urgent: bool,
        soon: bool = False,
        is_served: bool = False,
        keep_local: bool = False,
    ) -> bool:
        """Drop blocks until there is room; False if not enough can be dropped.

        Args:
            urgent: the room is for demand, not for a prefetch.
            is_served: enough blocks are on their way to readers that demand can wait for them.
            soon: the room is for a block that is read before prefetched ones and is on disk, so
                that it needs the room only briefly.
            keep_local: blocks that nobody has read stay even if they are on the disk: they are
                about to be pushed into the page cache.
        """
        least = LEAST_RESERVE * self._block_size
        limit = self._limit_bytes - (0 if urgent else least if soon else self._reserve())
        while self.used_bytes + size_bytes > limit:
            victim = self._costs_nothing(keep_local=keep_local)
            if victim is None and urgent:
                victim = self._costs_the_disk() or (None if is_served else self._costs_a_fetch())
            if victim is None:
                return False
            self._drop(victim)
        return True

    def _reserve(self) -> int:
        """Room for demand alone, so that demand need not wait for a prefetch to arrive.

        Each reader may request a block at any moment, and a block that was fetched for one reader
        must not be dropped for another.
        """
        for_readers = min(self._limit_bytes // 2, self._readers() * self._block_size)
        return max(LEAST_RESERVE * self._block_size, self._limit_bytes // 4, for_readers)

    def _costs_nothing(self, *, keep_local: bool) -> BlockId | None:
        # Called for each block of a load, and most of those in memory are in use then: a thousand
        # on a large machine, which take half of the scheduler's time.
        files = self._blocks.files
        begun: list[BlockId] = []
        not_stored: BlockId | None = None
        for block, held in self._held.items():
            if held.users or (not held.on_disk and not_stored is not None):
                continue
            # Otherwise it is in the page cache, or it was read and left it.
            is_needed = held.unread and files[block[0]].places[block[1]] in _LOCAL
            if is_needed and (keep_local or not held.on_disk):
                continue
            if is_needed and held.demanded:
                begun.append(block)  # its reader is about to ask for the next part
            elif held.on_disk or not self._has_disk:
                return block
            else:
                not_stored = block  # it may still be written
        if not_stored is not None:
            return not_stored
        return begun[0] if len(begun) > max(LEAST_BEGUN, self._readers()) else None

    def _costs_the_disk(self) -> BlockId | None:
        for block, held in self._held.items():
            if held.on_disk and not held.users:
                return block
        return None

    def _costs_a_fetch(self) -> BlockId | None:
        spare = [(block, held) for block, held in self._held.items() if not held.users]
        # A reader that reads a block in parts is about to request the next part.
        begun = [block for block, held in spare if held.demanded]
        if len(begun) > max(LEAST_BEGUN, self._readers()):
            return begun[0]
        # The block that was prefetched last is needed last.
        ahead = [block for block, held in spare if not held.demanded]
        return ahead[-1] if ahead else begun[0] if begun else None

    def _drop(self, block: BlockId) -> None:
        held = self._held.pop(block)
        self.used_bytes -= len(held.data)
        if not held.on_disk and self._blocks.place(block) == Place.LOCAL:
            self._blocks.moved(block, Place.ABSENT if held.unread else Place.USED)
            self.dropped_bytes += held.unread.bit_count() * PART
