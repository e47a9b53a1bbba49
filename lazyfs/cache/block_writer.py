"""Writes blocks to the disk, behind the back of readers: nobody waits for it.

While a load leaves the processors no time, nothing is written, if the page cache keeps the bytes
until there is time. A block that memory cannot keep so long is *shed*: its bytes are read back from
there when the load is over (`lazyfs/cache/late_writer.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from lazyfs.blocks import BlockId
from lazyfs.blocks.memory import Held
from lazyfs.blocks.queue import BlockQueue
from lazyfs.cache import BlockCache
from lazyfs.cache.processors import Processors
from lazyfs.objects import File
from lazyfs.observe.recorder import Recorder

WRITERS = 2
# How often it is looked whether writing, put off while the processors are busy, can go on.
CHECK_S = 0.05


class BlockWriter:
    """All that one mount writes to its cache.

    Args:
        cache: where to.
        run: runs a blocking call in a worker thread.
        is_loading: whether a load is under way whose pages the page cache keeps.
        processors: say whether there is time for what need not be done now.
        recorder: is told of what was written.
        on_written: told of a block that need not be kept for the disk now, and whether it is there.
    """

    def __init__(
        self,
        cache: BlockCache,
        run: Callable[..., Awaitable[bool]],
        is_loading: Callable[[], bool],
        processors: Processors,
        recorder: Recorder,
        on_written: Callable[[BlockId, bool], None],
    ) -> None:
        self._cache = cache
        self._run = run
        self._is_loading = is_loading
        self._processors = processors
        self._recorder = recorder
        self._on_written = on_written
        self._queue = BlockQueue()
        self._writing = 0
        # Somebody waits for all to be written: nothing is put off.
        self._finishing = 0
        self._shed: dict[BlockId, File] = {}
        # What the cache had no room for, though nobody has read it yet.
        self._refused: list[BlockId] = []

    def put(self, block: BlockId, held: Held) -> None:
        """Write a block when there is time; it is used until then, or until it is shed."""
        held.to_write = True
        held.users += 1
        self._queue.put(block, held)

    @property
    def has_refused(self) -> bool:
        """Whether the cache had no room for blocks that are still to be read."""
        return bool(self._refused)

    def retry(self, kept: Callable[[BlockId], Held | None]) -> None:
        """Write what the cache had no room for, as far as it is still kept for a reader."""
        refused, self._refused = self._refused, []
        for block in refused:
            if (held := kept(block)) is not None:
                self.put(block, held)

    @property
    def is_at_work(self) -> bool:
        """Whether a block waits to be written, or is being written."""
        return bool(self._queue or self._writing)

    @property
    def is_put_off(self) -> bool:
        """Whether a load would have to do without the time that writing takes."""
        can_wait = not (self._finishing or self._cache.others_wait())
        return can_wait and self._is_loading() and self._processors.busy

    def unwritten(self) -> dict[BlockId, File]:
        """What waits to be written, or was shed."""
        return self._shed | {block: held.file for block, held in self._queue}

    def shed(self, block: BlockId, file: File) -> None:
        """A block of which only the page cache has the bytes."""
        self._cache.release(file, block.number)
        self._shed[block] = file

    def recall(self, block: BlockId, file: File) -> None:
        """A block that a former worker put into the page cache, and had perhaps not written."""
        self._shed[block] = file

    def found(self, block: BlockId) -> None:
        """A block is on the disk."""
        self._shed.pop(block, None)

    def take_shed(self) -> dict[BlockId, File]:
        """Which blocks were shed; each is told once."""
        shed, self._shed = self._shed, {}
        return shed

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(WRITERS):
                nursery.start_soon(self._write_forever)

    async def finish(self) -> None:
        """Until all is written, or known as shed, even if a load needs the time."""
        self._finishing += 1
        try:
            while self.is_at_work:
                await trio.sleep(0.01)
        finally:
            self._finishing -= 1

    async def _write_forever(self) -> None:
        while True:
            await self._queue.wait()
            while self.is_put_off:
                await trio.sleep(CHECK_S)
            if not self._queue:
                continue
            block, held = self._queue.take()
            if not held.to_write:
                self.shed(block, held.file)
                continue
            held.to_write = False
            self._writing += 1
            held.on_disk = await self._run(self._cache.put, held.file, block.number, held.data)
            self._writing -= 1
            self._recorder.written(len(held.data) if held.on_disk else 0)
            held.users -= 1
            if not held.on_disk and held.unread:
                self._refused.append(block)
            self._on_written(block, held.on_disk)
