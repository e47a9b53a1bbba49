"""Reads that get a part of a block from the disk, without the rest of it.

The kernel drops pages when it likes, also single ones of a block. All of a block for one page would
be 8 MiB from the disk, and into the page cache again. So the first reads of such a block get only
the pieces that they ask for (`cache/block_format.py`). If there are more, or if one goes on where
another ended, much of the block is missing: then all of it is loaded and pushed, and counting
begins anew. The same holds if the block before is in memory: its reader goes on.

Where nothing is loaded ahead of readers (`--prefetch off`), the first reads of any block are served
so, because they say nothing about the rest of it.
"""

from __future__ import annotations

from collections import OrderedDict

from lazyfs.blocks import BlockId, Span, block_length
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory
from lazyfs.cache.block_format import PIECE, bytes_of_pieces
from lazyfs.fetch.disks import Disks
from lazyfs.fetch.jobs import Jobs
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder, Tier

# Reads of a block that get a part of it.
MOST_PARTS = 4
# Blocks of which a part was read, and that are remembered for the next read.
RECENT = 1024


class PartReads:
    """Such reads of one mount.

    Args:
        disks: have the blocks.
        memory: has room for the parts, or not.
        blocks: says where blocks are.
        jobs: bring whole blocks.
        recorder: is told of each part.
        ahead: whether blocks on the disk are loaded ahead of readers.
    """

    def __init__(
        self, disks: Disks, memory: BlockMemory, blocks: BlockMap, jobs: Jobs, recorder: Recorder,
        *, ahead: bool,
    ) -> None:  # fmt: skip
        self._disks = disks
        self._memory = memory
        self._map = blocks
        blocks.on_move.append(self._has_moved)
        self._jobs = jobs
        self._recorder = recorder
        self._ahead = ahead
        # What was read of each block since all of it came.
        self._recent: OrderedDict[BlockId, list[Span]] = OrderedDict()

    async def read(self, file: File, span: Span, *, reader: bool = True) -> memoryview | None:
        """A part of a block that is not in memory; None: a job must bring the block.

        Where nothing is loaded ahead, it is not known whether the block is on the disk.

        Args:
            reader: whether a reader wants it, or only the planner.
        """
        block = BlockId(file.inode, span.number)
        size = bytes_of_pieces(span.start, span.stop)
        if not self._suits(file, block, span):
            return None
        if not self._memory.make_room(size, urgent=False, soon=True):
            return None
        self._remember(block, span)
        self._memory.reserve(size)
        wait = self._recorder.begin_wait(file, span, coming=False) if reader else None
        try:
            part = await self._disks.get_part(file, span)
        finally:
            if wait is not None:
                self._recorder.end_wait(wait, Tier.DISK)
            self._memory.release(size)
        if part is not None:
            self._recorder.part_loaded(len(part))
        return part

    def _suits(self, file: File, block: BlockId, span: Span) -> bool:
        if not self._disks.tiers or block in self._jobs:
            return False
        if self._ahead and not (self._map.is_missed(block) and self._map.is_stored(block)):
            return False
        length = block_length(file.size_bytes, self._map.block_size, block.number)
        if length <= PIECE or 2 * (span.stop - span.start) > length:
            return False
        parts = self._recent.get(block, ())
        if len(parts) >= MOST_PARTS or any(span.start == part.stop for part in parts):
            return False
        return self._memory.peek(block._replace(number=block.number - 1)) is None

    def _remember(self, block: BlockId, span: Span) -> None:
        self._recent.setdefault(block, []).append(span)
        self._recent.move_to_end(block)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def _has_moved(self, block: BlockId, before: Place, now: Place) -> None:
        """All of a block came: what was read of it before need not be read again."""
        if block in self._recent and now == Place.LOCAL:
            held = self._memory.peek(block)
            if held is not None:
                for part in self._recent.pop(block):
                    held.was_read(part)
