"""Fetches the headers of shards before their first blocks.

A loader opens all shards long before it reads the last one. With thousands of shards, a block of
each would be gigabytes, so only the header is fetched. A *head* is the beginning of a file with its
header. It is pushed into the page cache as soon as the kernel knows the file: then opening a shard
and reading its header makes no request. It also stays in memory while there is room, for readers
that bypass the page cache and for the planner, which parses it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from lazyfs.errors import SourceError
from lazyfs.faults import contained
from lazyfs.fetch.block_getter import PREFETCH_PATIENCE_S
from lazyfs.fetch.tiers import OriginTier
from lazyfs.listed_object import File
from lazyfs.model.safetensors import (
    HEAD_BYTES,
    LENGTH_BYTES,
    LONGEST_HEADER,
    MalformedHeaderError,
    header_size,
)
from lazyfs.observe.events import Purpose
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.threads import Threads

log = logging.getLogger(__name__)

# Concurrent requests.
AT_ONCE = 16
# The share of the memory limit for heads, and of that for one of them: one that is dropped before
# its block comes is fetched twice.
SHARE = 1 / 16
SHARE_OF_ONE = 1 / 4
# Concurrent pushes of heads. Each may be stuck and holds a thread (`pagecache/block_pusher.py`).
PUSHERS = 2


def heads_limit(memory_bytes: int, least_bytes: int) -> int:
    """Bytes of memory for heads; none if blocks need all of it, of which they get the least."""
    return max(0, min(int(memory_bytes * SHARE), memory_bytes - least_bytes))


@dataclass(slots=True)
class _Head:
    """The first bytes of a file; `pushed`: they are in the page cache."""

    file: File
    data: memoryview
    pushed: bool = False


class ShardHeaders:
    """All heads of one mount.

    Args:
        origin: where they are fetched from.
        limit_bytes: the memory that they may take.
        page_cache: where they are pushed.
        prefetcher: says which are wanted, and is told which arrived.
        threads: run the pushes.
        recorder: is told what was fetched.

    Attributes:
        used_bytes: the size of the heads in memory and on their way.
    """

    def __init__(
        self,
        origin: OriginTier,
        limit_bytes: int,
        page_cache: PageCache,
        prefetcher: Prefetcher,
        threads: Threads,
        recorder: Recorder,
    ) -> None:
        self._origin = origin
        self._limit_bytes = limit_bytes
        self._page_cache = page_cache
        self._prefetcher = prefetcher
        self._threads = threads
        self._recorder = recorder
        self._heads: OrderedDict[int, _Head] = OrderedDict()
        self._pushers = trio.Semaphore(PUSHERS)
        self._coming = 0
        self.used_bytes = 0

    def get(self, inode: int) -> memoryview:
        """The head of a file; empty if it is not in memory."""
        head = self._heads.get(inode)
        return head.data if head else memoryview(b"")

    def pump(self, nursery: trio.Nursery, files: Mapping[int, File]) -> None:
        """Fetch wanted heads, as far as there is room."""
        while self._coming < AT_ONCE and self._make_room(HEAD_BYTES):
            inode = self._prefetcher.next_head()
            if inode is None:
                return
            self._coming += 1
            self.used_bytes += HEAD_BYTES  # until `_bring` begins, which counts what it fetches
            nursery.start_soon(
                contained, "fetching a header", self._bring, nursery, files, files[inode]
            )

    def set_known(self, nursery: trio.Nursery, inode: int) -> None:
        """The kernel looked a file up: its head can be pushed."""
        head = self._heads.get(inode)
        if head and not head.pushed:
            nursery.start_soon(contained, "pushing a header", self._push, head)

    async def header(self, file: File, *, ahead: bool = False) -> memoryview | None:
        """The header of a file, with the 8 bytes of its length; None: it is too long.

        Only the part that is not in memory is fetched.

        Args:
            ahead: nobody needs it yet. If it is long, and the first block is on its way, that
                brings it: None.

        Raises:
            SourceError: it cannot be fetched.
            MalformedHeaderError: its length is not valid.
        """
        data = self.get(file.inode)
        if not data:
            data = await self._fetch(file, data, min(HEAD_BYTES, file.size_bytes))
        length = header_size(data[:LENGTH_BYTES], file.size_bytes)
        if length > max(HEAD_BYTES, min(LONGEST_HEADER, self._limit_bytes * SHARE_OF_ONE)):
            return None
        if length > len(data):
            if ahead and not self._prefetcher.needs_head(file.inode):
                return None
            data = await self._fetch(file, data, length)
        return data[:length]

    async def _fetch(self, file: File, have: memoryview, length: int) -> memoryview:
        """The first bytes of a file, rounded up to whole heads; `have` is not fetched again."""
        end = min(file.size_bytes, -(-length // HEAD_BYTES) * HEAD_BYTES)
        self.used_bytes += end - len(have)
        try:
            rest, tier = await self._origin.get_part(
                file, len(have), end - len(have), lambda: PREFETCH_PATIENCE_S
            )
        except SourceError as error:
            log.warning("the header of %s cannot be fetched: %s", file.key, error)
            raise
        finally:
            self.used_bytes -= end - len(have)
        recorder = self._recorder
        arrived = recorder.shared_bytes if tier is Tier.FLEET else recorder.fetched_bytes
        arrived[Purpose.AHEAD] += len(rest)
        data = memoryview(bytes(have) + bytes(rest)) if have else rest
        self._keep(file, data)
        return data

    async def _bring(self, nursery: trio.Nursery, files: Mapping[int, File], file: File) -> None:
        self.used_bytes -= HEAD_BYTES
        try:
            await self.header(file, ahead=True)
        except (SourceError, MalformedHeaderError) as error:
            # The planner says so when it needs the tensors; readers get the block.
            log.debug("%s: %s", file.key, error)
        finally:
            self._coming -= 1
        if file.inode in self._heads:
            self._prefetcher.head_came(file.inode)
            if self._prefetcher.takes_head(file.inode):
                await self._push(self._heads[file.inode])
        self.pump(nursery, files)

    async def _push(self, head: _Head) -> None:
        if self._page_cache.supported:
            async with self._pushers:
                head.pushed = await self._threads.run(
                    self._page_cache.push, head.file.inode, 0, head.data
                )

    def _keep(self, file: File, data: memoryview) -> None:
        former = self._heads.pop(file.inode, None)
        if former is not None:
            self.used_bytes -= len(former.data)
        if self._make_room(len(data)):
            self._heads[file.inode] = _Head(file, data)
            self.used_bytes += len(data)

    def _make_room(self, size_bytes: int) -> bool:
        """Drop heads that are in the page cache until there is room; returns whether there is."""
        while self.used_bytes + size_bytes > self._limit_bytes:
            pushed = (inode for inode, head in self._heads.items() if head.pushed)
            if (inode := next(pushed, None)) is None:
                return False
            self.used_bytes -= len(self._heads.pop(inode).data)
        return True
