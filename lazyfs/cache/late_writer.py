"""Blocks that a load had no time to write are written after it, out of the page cache.

While a load leaves the processors no time, blocks are not written to the disk; those that memory
cannot keep until later are dropped (*shed*), since their bytes are in the kernel's page cache. When
the load is over, or before the mount ends in an orderly way, they are read back from there through
the mount, by a process of its own: a daemon must not read what it serves. That process asks the
kernel first which pages are there (mincore(2)), and so never causes a fetch. After a load it has
the lowest priority, and holds a file open for milliseconds only, so that an unmount does not find
the mount in use; before an unmount somebody waits for it.

A block of which the kernel has dropped pages meanwhile is wished for again, once: else the next
reader would wait for it, and the next mount would not find it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.blocks import BlockId, block_length
from lazyfs.blocks.buffers import take_buffer
from lazyfs.cache import BlockCache
from lazyfs.helper_process import ask_helper
from lazyfs.objects import File
from lazyfs.pagecache.mincore import all_resident, open_known

if TYPE_CHECKING:
    from lazyfs.fetch.scheduler import BlockFetcher

log = logging.getLogger(__name__)

# A load that made no request for so long is over, or has what it needs.
QUIET_S = 1.0
CHECK_S = 0.25
# One reads while another writes, when somebody waits for it.
THREADS = 2


class LateWriter:
    """Has the shed blocks of one mount written whenever it is quiet, and when it is about to end.

    Args:
        mountpoint: of the mount.
        prefix: what the keys of its files begin with.
        cache: where the blocks belong.
        fetcher: knows what was shed.
    """

    def __init__(
        self, mountpoint: Path, prefix: str, cache: BlockCache, fetcher: BlockFetcher
    ) -> None:
        self._mountpoint = mountpoint
        self._prefix = prefix
        self._cache = cache
        self._fetcher = fetcher
        # Shed, and not tried yet to the end.
        self._unsaved: dict[BlockId, File] = {}
        self._wished_again: set[BlockId] = set()
        self._one_at_a_time = trio.Lock()
        self._in_peace: trio.CancelScope | None = None

    async def run(self) -> None:
        """Save after each load, until cancelled."""
        quiet_since_s = trio.current_time()
        while True:
            await trio.sleep(CHECK_S)
            if self._fetcher.is_at_work:
                quiet_since_s = trio.current_time()
            elif trio.current_time() - quiet_since_s >= QUIET_S:
                async with self._one_at_a_time:
                    with trio.CancelScope() as self._in_peace:
                        await self._save_shed(in_peace=True)
                    self._in_peace = None

    def unsaved_bytes(self) -> int:
        """What would be lost if the mount ended now, and no more were written."""
        unsaved = sum(self._length(file, block) for block, file in self._unsaved.items())
        return unsaved + self._fetcher.unwritten_bytes()

    def give_way(self) -> None:
        """Have what is being saved after a load left for later; its files are closed soon."""
        if self._in_peace is not None:
            self._in_peace.cancel()

    async def save(self) -> None:
        """Write all that is not on the disk yet, at once. If it is cancelled, the rest stays."""
        self.give_way()
        async with self._one_at_a_time:
            await self._fetcher.finish_writing()
            await self._save_shed(in_peace=False)

    async def _save_shed(self, *, in_peace: bool) -> None:
        self._unsaved |= {block: file for file, block in self._fetcher.take_shed()}
        if not self._unsaved:
            return
        blocks = [(file, block) for block, file in self._unsaved.items()]
        saved = await self._have_saved(blocks, in_peace=in_peace)
        for _, block in blocks:
            del self._unsaved[block]
        if saved is None:
            return
        log.debug("wrote %d of %d blocks out of the page cache", saved.written, len(blocks))
        if not saved.refused:
            gone = {blocks[at][1] for at in saved.gone} - self._wished_again
            self._wished_again |= gone
            self._fetcher.wish_again(gone)

    async def _have_saved(
        self, blocks: Sequence[tuple[File, BlockId]], *, in_peace: bool
    ) -> Saved | None:
        """Start the process, and wait for it; None: it failed."""
        wanted = {
            "mountpoint": str(self._mountpoint),
            "cache": self._cache.description(),
            "in_peace": in_peace,
            "blocks": [
                [file.key[len(self._prefix) :], asdict(file), block.number]
                for file, block in blocks
            ],
        }
        try:
            said = await ask_helper("lazyfs.cache.late_writer", wanted)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("could not write blocks out of the page cache: %s", error)
            return None
        return Saved(**said)

    def _length(self, file: File, block: BlockId) -> int:
        return block_length(file.size_bytes, self._cache.block_size, block.number)


@dataclass(slots=True)
class Saved:
    """What became of the blocks that were to be saved.

    Attributes:
        written: how many came to the disk.
        refused: how many the cache had no room for.
        gone: those that were not whole in the page cache any more, by their position.
    """

    written: int = 0
    refused: int = 0
    gone: list[int] = field(default_factory=list)


def save(
    mountpoint: Path, cache: BlockCache, blocks: Iterable[tuple[str, File, int]], threads: int = 1
) -> Saved:
    """Write those blocks that are whole in the page cache, and not on disk yet.

    Args:
        mountpoint: must not be served by this process.
        cache: where they belong.
        blocks: path below the mountpoint, file and number of each.
        threads: so many blocks at once.
    """
    with ThreadPoolExecutor(threads) as pool:
        outcomes = list(pool.map(lambda block: _save_one(mountpoint, cache, *block), blocks))
    return Saved(
        outcomes.count(Outcome.WRITTEN),
        outcomes.count(Outcome.REFUSED),
        [at for at, outcome in enumerate(outcomes) if outcome is Outcome.GONE],
    )


class Outcome(Enum):
    """What became of a block that was to be saved."""

    WRITTEN = "written"
    REFUSED = "refused"
    GONE = "gone"
    NOTHING_TO_DO = "nothing to do"


def _save_one(mountpoint: Path, cache: BlockCache, path: str, file: File, number: int) -> Outcome:
    length = block_length(file.size_bytes, cache.block_size, number)
    if cache.holds(file, number):
        return Outcome.NOTHING_TO_DO
    try:
        data = resident(mountpoint / path, file.inode, number * cache.block_size, length)
    except OSError:
        return Outcome.NOTHING_TO_DO  # the file is gone, or the mount is
    if data is None:
        return Outcome.GONE
    return Outcome.WRITTEN if cache.put(file, number, data) else Outcome.REFUSED


def resident(path: Path, inode: int, offset: int, length: int) -> memoryview | None:
    """A part of a file, if all of its pages are in memory and it is that inode; else None.

    Raises:
        OSError: it cannot be opened or read.
    """
    descriptor = open_known(path, inode)
    if descriptor is None:
        return None
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        if not all_resident(descriptor, offset, length):
            return None
        data = take_buffer(length)
        return data if os.preadv(descriptor, [data], offset) == length else None
    finally:
        os.close(descriptor)


def _yield_to_everybody() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(wanted: Mapping[str, Any]) -> None:
    """The process: what to save on standard input, what became of it on standard output."""
    if wanted["in_peace"]:
        _yield_to_everybody()
    cache = BlockCache.described(wanted["cache"])
    blocks = [(path, File(**file), number) for path, file, number in wanted["blocks"]]
    threads = 1 if wanted["in_peace"] else THREADS
    print(json.dumps(asdict(save(Path(wanted["mountpoint"]), cache, blocks, threads))))


if __name__ == "__main__":
    main(json.load(sys.stdin))
