"""Writes blocks to the disk as they arrive; no reader waits for a write.

Fetched bytes cost money and time, and memory and page cache lose them sooner or later. So every
fetched block is queued for the disk as soon as it arrives, and stays in memory until it is written.
With a disk as fast as the link this costs a load only processor time: 0.2 s per GiB.

A slower disk must not slow readers down. The queue may fill `SHARE` of the memory. Beyond that,
while a reader waits, new blocks are *skipped*: readers get them, the disk does not, unless they are
still in memory when the queue is shorter again. Otherwise a later mount fetches them again. The
queue may be longer while another daemon of this node waits for blocks. While no reader waits here
nothing is skipped: memory fills up, and prefetching keeps pace with the disk.

While the disk hangs (`disk_calls.py`) everything is skipped. Only what is being written then stays
in memory until the disk answers, because the write still reads it: `WRITING_SHARE` of the memory at
most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import trio

from lazyfs.blocks import BlockId
from lazyfs.blocks.memory import Held
from lazyfs.blocks.queue import BlockQueue
from lazyfs.cache import BlockCache
from lazyfs.cache.disk_calls import DiskCalls, DiskHangsError
from lazyfs.faults import keep_running, report_fault
from lazyfs.observe.recorder import Recorder

# Each writer takes what waits, so fewer of them change the index less often, for more blocks at
# once. With eight a load of 1 GiB that keeps two processors busy took 1.23 times as long as without
# a cache, with three 1.19; two left a tenth of the blocks unwritten.
WRITERS = 3
# With many movers one writer for so many of them: each hands its blocks to one mover.
MOVERS_OF_WRITER = 4
# Share of the memory limit that may wait for the disk while a reader waits for S3.
SHARE = 1 / 4
# The same, while another daemon waits for blocks of this one. Demand and pushes need the rest.
SHARE_FOR_OTHERS = 1 / 2
# Share of the memory limit that a writer takes at once, to change the index only once for it.
BATCH_SHARE = 1 / 8
MOST_AT_ONCE = 32
# Share of the memory limit that all writers take at once; a block at least.
WRITING_SHARE = 3 / 8


class BlockWriter:
    """Writes the blocks of one mount to its cache.

    Args:
        cache: the cache.
        memory_limit: the mount's, in bytes.
        calls: make the writes.
        recorder: records written blocks.
        on_written: called with the blocks that the disk no longer needs, and whether each was
            stored.
        held: returns a block, if it is still in memory.
        movers: how many processes may write.
    """

    def __init__(
        self,
        cache: BlockCache,
        memory_limit: int,
        calls: DiskCalls,
        recorder: Recorder,
        on_written: Callable[[Mapping[BlockId, bool]], None],
        held: Callable[[BlockId], Held | None],
        movers: int = 0,
    ) -> None:
        self._writers = max(WRITERS, movers // MOVERS_OF_WRITER)
        self._cache = cache
        self._memory_limit = memory_limit
        self._batch_bytes = int(memory_limit * BATCH_SHARE)
        self._calls = calls
        calls.on_change.append(self._disk_changed)
        self._recorder = recorder
        self._on_written = on_written
        self._held = held
        self._queue = BlockQueue()
        # Blocks that wait or are being written, and their bytes.
        self._coming: set[BlockId] = set()
        self._bytes = 0
        # Of them, those that are being written, and writers that wait for their room.
        self._writing_bytes = 0
        self._full = trio.lowlevel.ParkingLot()
        # Unread blocks for which the cache had no room.
        self._refused: list[BlockId] = []
        # Skipped blocks that may still be in memory, and the number of those that are not.
        self._skipped: deque[BlockId] = deque()
        self._lost_blocks = 0

    def put(self, block: BlockId, held: Held, *, reader_waits: bool = False) -> None:
        """Queue a block for writing, in use until then; or skip it, see above.

        Args:
            reader_waits: a reader waits for S3.
        """
        if block in self._coming:
            return  # skipped, dropped, fetched again, and queued since
        if self._calls.hangs or (
            reader_waits and self._bytes + len(held.data) > self._most_bytes()
        ):
            self._cache.release(held.file, block.number)
            self._skipped.append(block)
            return
        held.users += 1
        self._bytes += len(held.data)
        self._coming.add(block)
        self._queue.put(block, held)

    def _most_bytes(self) -> int:
        """The most bytes that may wait for the disk while a reader waits."""
        share = SHARE_FOR_OTHERS if self._cache.others_wait() else SHARE
        return int(self._memory_limit * share)

    @property
    def skipped_blocks(self) -> int:
        """How many blocks were not written because the disk was slower than the link."""
        return self._lost_blocks + len(self._skipped)

    def _catch_up(self) -> None:
        """Queue skipped blocks that are still in memory, as far as the queue has room."""
        while self._skipped and not self._calls.hangs:
            block = self._skipped[0]
            held = self._held(block)
            if held is None:
                self._lost_blocks += 1
            elif self._bytes + len(held.data) > self._most_bytes():
                return
            elif not held.on_disk:
                self.put(block, held)
            self._skipped.popleft()

    @property
    def has_refused(self) -> bool:
        """Whether the cache had no room for blocks that are not read yet."""
        return bool(self._refused)

    def retry(self, kept: Callable[[BlockId], Held | None]) -> None:
        """Write blocks for which the cache had no room, if they are still kept for a reader."""
        refused, self._refused = self._refused, []
        for block in refused:
            if (held := kept(block)) is not None:
                self.put(block, held)

    async def run(self) -> None:
        """Write until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._writers):
                nursery.start_soon(keep_running, "writing blocks", self._write_forever)

    async def finish(self) -> None:
        """Wait until all blocks are written, unless the disk hangs."""
        while self._bytes and not self._calls.hangs:
            await trio.sleep(0.01)

    async def _write_forever(self) -> None:
        while True:
            await self._queue.wait()
            if batch := self._batch():
                await self._write(batch)
                del batch  # with the buffers of its blocks
            else:
                await self._full.park()

    def _batch(self) -> list[tuple[BlockId, Held]]:
        """The next blocks to write; none if they have to wait for what is being written."""
        batch: list[tuple[BlockId, Held]] = []
        size = 0
        room = int(self._memory_limit * WRITING_SHARE) - self._writing_bytes
        while len(self._queue) and len(batch) < MOST_AT_ONCE:
            _, following = next(iter(self._queue))
            size += len(following.data)
            if size > room and (batch or self._writing_bytes):
                break
            if size > self._batch_bytes and batch:
                break
            batch.append(self._queue.take())
        return batch

    def _disk_changed(self) -> None:
        """The disk begins to hang, or answers again."""
        if not self._calls.hangs:
            self._catch_up()
        else:
            self._skip([self._queue.take() for _ in range(len(self._queue))])

    def _skip(self, batch: Sequence[tuple[BlockId, Held]]) -> None:
        """Do without writing blocks that were queued."""
        for block, held in batch:
            self._cache.release(held.file, block.number)
            self._skipped.append(block)
        self._end(batch, [False] * len(batch))

    async def _write(self, batch: Sequence[tuple[BlockId, Held]]) -> None:
        blocks = [(held.file, block.number, held.data) for block, held in batch]
        size = sum(len(held.data) for _, held in batch)
        self._writing_bytes += size
        try:
            stored = await self._calls.run_to_end(self._cache.put_all, blocks)
        except DiskHangsError:
            self._skip(batch)
            return
        except Exception as error:
            report_fault("writing blocks", error)
            stored = [False] * len(batch)  # so that memory can drop them
        finally:
            self._writing_bytes -= size
            self._full.unpark_all()
        self._refused += [
            block
            for (block, held), is_stored in zip(batch, stored, strict=True)
            if not is_stored and held.unread
        ]
        self._end(batch, stored)
        self._catch_up()

    def _end(self, batch: Sequence[tuple[BlockId, Held]], stored: Sequence[bool]) -> None:
        """The disk does not need these blocks any more."""
        for (block, held), is_stored in zip(batch, stored, strict=True):
            held.on_disk = is_stored
            held.users -= 1
            self._coming.remove(block)
            self._bytes -= len(held.data)
            self._recorder.written(len(held.data) if is_stored else 0)
        self._on_written({block: there for (block, _), there in zip(batch, stored, strict=True)})
