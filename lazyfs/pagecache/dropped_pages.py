"""Finds further dropped pages, when a reader misses a block that was in the page cache.

A read request for a block that was put into the page cache shows that the kernel has dropped pages,
and rarely just these: the model was unused for long, or memory is short. The following blocks would
still count as near, and would be fetched one by one when the reader gets to them. So this module
checks which of them are still there, in loading order, and has the others prefetched again. It does
so at most once in `AGAIN_S` for each block: if memory is so short that the kernel drops unread
pages, repeated prefetching would only cost more.

Some kernels also drop single pages that nobody used, long before memory is short (DAMON,
https://docs.kernel.org/admin-guide/mm/damon/reclaim.html): of 160 MiB, some hundred pages within
seconds. A block on the disk counts as there if only a few pieces of it have such pages
(`PageWishes.most_broken`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Protocol

import trio

from lazyfs.blocks import BlockId, block_length
from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File

log = logging.getLogger(__name__)

# Blocks that are checked at once; if any of them were dropped, as many after them.
LOOK_BLOCKS = 512
# Pause between two checks; after a slow one, this many times its duration, up to a limit.
PAUSE_S = 1.0
PAUSE_SHARE = 20
LONGEST_PAUSE_S = 10.0
AGAIN_S = 300.0


class PageWishes(Protocol):
    """What is asked of the blocks of a mount (`lazyfs/fetch/missed_pages.py`)."""

    @property
    def block_size(self) -> int:
        """The block size in bytes."""

    async def missed(self) -> BlockId:
        """A block that was in the page cache and that a reader missed since the last call."""

    def near_after(self, block: BlockId, count: int) -> list[BlockId]:
        """The next blocks that should be in the page cache, in loading order."""

    def most_broken(self, block: BlockId) -> int:
        """Of how many pieces of a block pages may be missing, to be read when a reader asks."""

    def wish_again(self, blocks: Iterable[BlockId]) -> None:
        """Record that these blocks are no longer in the page cache."""

    def file(self, inode: int) -> File:
        """The file of an inode."""


class DroppedPages:
    """Looks for dropped pages.

    Args:
        path: returns the path of a file below the mountpoint.
        helpers: starts the helper processes.
        pages: knows missed and near blocks, and is told which were dropped.
    """

    def __init__(
        self, path: Callable[[File], str], helpers: HelperProcesses, pages: PageWishes
    ) -> None:
        self._path = path
        self._helpers = helpers
        self._pages = pages
        # When each block was last prefetched again.
        self._wished_s: dict[BlockId, float] = {}

    async def run(self) -> None:
        """Check whenever a reader has missed a block, until cancelled."""
        while True:
            missed = await self._pages.missed()
            began_s = trio.current_time()
            after: BlockId | None = missed
            while after is not None:
                blocks = self._pages.near_after(after, LOOK_BLOCKS)
                gone = await self._dropped(blocks)
                self._wish_again(gone)
                after = blocks[-1] if gone and len(blocks) == LOOK_BLOCKS else None
            took_s = trio.current_time() - began_s
            await trio.sleep(min(max(PAUSE_S, PAUSE_SHARE * took_s), LONGEST_PAUSE_S))

    def _wish_again(self, blocks: Sequence[BlockId]) -> None:
        now_s = trio.current_time()
        late = [at for at in blocks if now_s - self._wished_s.get(at, -math.inf) >= AGAIN_S]
        self._wished_s.update(dict.fromkeys(late, now_s))
        log.debug("%d blocks that were in the page cache were dropped by the kernel", len(late))
        self._pages.wish_again(late)

    async def _dropped(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        """The blocks of these of which much has left the page cache."""
        if not blocks:
            return []
        pages, size = self._pages, self._pages.block_size
        of_files = [(pages.file(i), list(group)) for i, group in groupby(blocks, _inode)]
        wanted = [
            [
                self._path(file),
                file.inode,
                [
                    (
                        at.number * size,
                        block_length(file.size_bytes, size, at.number),
                        pages.most_broken(at),
                    )
                    for at in of_file
                ],
            ]
            for file, of_file in of_files
        ]
        try:
            found = json.loads(await self._helpers.run("dropped", json.dumps(wanted).encode()))
        except (OSError, ValueError) as error:
            log.debug("could not look for dropped pages: %s", error)
            return []
        gone = zip(of_files, found, strict=True)
        return [of_file[at] for (_, of_file), positions in gone for at in positions]


def _inode(block: BlockId) -> int:
    return block.inode
