"""Reads that get a part of a block from the disk, without the rest of it.

The kernel drops pages when it likes, also single ones of a block. All of a block for one page would
be 8 MiB from the disk, and into the page cache again. So the first reads of such a block get only
the pieces that they ask for (`cache/block_format.py`). If there are more, or if one goes on where
another ended, much of the block is missing: then all of it is loaded, and pushed. So is the block
of a reader that comes from the block before. Where nothing is loaded ahead of readers (`--prefetch
off`), any block on the disk is read in this way, because a read says nothing about the rest of its
block.
"""

from __future__ import annotations

from collections import OrderedDict

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import SourceError
from lazyfs.fetch.disks import Disks
from lazyfs.fetch.jobs import Jobs
from lazyfs.listed_object import File
from lazyfs.observe.events import Purpose
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
        self._jobs = jobs
        self._recorder = recorder
        self._ahead = ahead
        # Where the parts end that were read of each block.
        self._recent: OrderedDict[BlockId, list[int]] = OrderedDict()

    async def read(self, file: File, span: Span) -> memoryview | None:
        """A part of a block that is not in memory; None: a job must bring the block.

        Where nothing is loaded ahead, it is not known whether the block is on the disk.
        """
        block = BlockId(file.inode, span.number)
        size = span.stop - span.start
        if not self._suits(block, span):
            return None
        if not self._memory.make_room(size, urgent=False, soon=True):
            return None
        self._remember(block, span.stop)
        self._memory.reserve(size)
        wait = self._recorder.begin_wait(file, span, coming=False)
        try:
            part = await self._disks.get_part(file, span)
        except SourceError:
            return None  # the job ends with the same error, and logs it
        finally:
            self._recorder.end_wait(wait, Tier.DISK)
            self._memory.release(size)
        if part is not None:
            self._recorder.landed(file, block, size, Tier.DISK, Purpose.DEMAND, wait.since_s)
        return part

    def _suits(self, block: BlockId, span: Span) -> bool:
        if self._ahead and not (self._map.is_missed(block) and self._map.is_stored(block)):
            return False
        if 2 * (span.stop - span.start) > self._map.block_size or block in self._jobs:
            return False
        ends = self._recent.get(block, ())
        if len(ends) == MOST_PARTS or span.start in ends:
            return False
        return self._memory.peek(block._replace(number=block.number - 1)) is None

    def _remember(self, block: BlockId, stop: int) -> None:
        self._recent.setdefault(block, []).append(stop)
        self._recent.move_to_end(block)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
