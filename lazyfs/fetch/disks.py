"""The cache of one mount: a tier for each of its directories.

Each directory may be on a disk of its own. So each has its own calls, writers and part of the
memory, and one whose disk hangs takes nothing from the others. Which directory a block belongs to
follows from the block (`BlockCache.has_place_for`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import trio

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.cache import BlockCache
from lazyfs.cache.block_writer import BlockWriter
from lazyfs.cache.disk_calls import DiskCalls
from lazyfs.cache.other_daemons import OtherDaemons
from lazyfs.faults import contained
from lazyfs.fetch.disk_tier import DiskTier
from lazyfs.fetch.tiers import OriginTier
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder
from lazyfs.threads import Threads

if TYPE_CHECKING:
    from lazyfs.options.mount_options import MountOptions


class Disks:
    """The directories of one mount's cache.

    Args:
        cache: the cache; None: there are no directories.
        options: the mount's.
        threads: run blocking calls.
        memory: the mount's.
        origin: says whether the mount may read an object.
        recorder: records written blocks.
        on_written: see `BlockWriter`.
        on_found: see `OtherDaemons`.
        on_change: called when a disk begins to hang, or answers again.

    Attributes:
        tiers: in the order of the directories.
    """

    def __init__(
        self,
        cache: BlockCache | None,
        options: MountOptions,
        threads: Threads,
        memory: BlockMemory,
        origin: OriginTier,
        recorder: Recorder,
        on_written: Callable[[Mapping[BlockId, bool]], None],
        on_found: Callable[[BlockId, bool], None],
        on_change: Callable[[], None],
    ) -> None:
        self._origin = origin
        self._nursery: trio.Nursery | None = None
        parts = cache.parts() if cache else []
        self.tiers = []
        for part in parts:
            calls = DiskCalls(threads, memory, part.name, len(parts))
            writer = BlockWriter(
                part, options.memory_limit // len(parts), calls, recorder, on_written, memory.peek,
                options.movers,
            )  # fmt: skip
            calls.on_change.append(on_change)
            others = OtherDaemons(part, calls, on_found)
            self.tiers.append(DiskTier(part, writer, others, origin, calls))

    @property
    def hanging(self) -> list[str]:
        """The directories whose disks do not answer."""
        return [tier.name for tier in self.tiers if tier.hangs]

    @property
    def skipped_blocks(self) -> int:
        """How many blocks were not written because a disk was slow (see `BlockWriter`)."""
        return sum(tier.writer.skipped_blocks for tier in self.tiers)

    async def open(self, openings: Sequence[Future[None]]) -> None:
        """Wait until the directories are open, but not for disks that hang.

        Args:
            openings: of the directories.

        Raises:
            CacheError: a directory cannot be used.
        """
        async with trio.open_nursery() as watching:
            for tier in self.tiers:
                watching.start_soon(tier.watch)
            async with trio.open_nursery() as nursery:
                for tier, opening in zip(self.tiers, openings, strict=True):
                    nursery.start_soon(tier.open, opening)
            watching.cancel_scope.cancel()

    def start(self, nursery: trio.Nursery, plan: Callable[[], Iterable[File]]) -> None:
        """Write, follow other daemons and maintain the cache in tasks of a nursery.

        Args:
            plan: returns the files that a load will need, in order.
        """
        self._nursery = nursery
        for tier in self.tiers:
            tier.start(nursery, plan)

    def resumed(self) -> None:
        """A former worker of this mount has ended, or is about to."""
        for tier in self.tiers:
            tier.resumed()

    async def finish(self, plan: Iterable[File]) -> None:
        """Write the blocks that wait for the disks, so that the next mount finds them."""
        await self._each(DiskTier.finish, list(plan))

    async def numbers(self, files: Sequence[File]) -> dict[int, list[int]]:
        """The numbers of the blocks that are on disk, by inodes of the files that have some.

        On a disk that hangs there are none; each block is looked for again when it is wanted.
        """
        found: defaultdict[int, list[int]] = defaultdict(list)

        async def look(tier: DiskTier) -> None:
            for inode, numbers in (await tier.numbers(files)).items():
                found[inode] += numbers

        await self._each(look)
        return found

    async def present(self, files: Sequence[File]) -> dict[int, list[int]]:
        """The same for files that a load will read.

        The cache records that they are needed, and S3 is asked whether the mount may read them.
        """
        found = await self.numbers(files)
        there = [file for file in files if file.inode in found]
        if there:
            await self._each(DiskTier.announce, there)
        if there and self._nursery is not None:
            self._nursery.start_soon(
                contained, "asking what may be read", self._origin.check_access_ahead, there
            )
        for file in files:
            self.opened(file)
        return found

    async def get_part(self, file: File, span: Span) -> memoryview | None:
        """See `DiskTier.get_part`; None if there is no disk."""
        for tier in self.tiers:
            if (found := await tier.get_part(file, span)) is not None:
                return found
        return None

    def opened(self, file: File) -> None:
        """A reader opened a file. Does not block."""
        for tier in self.tiers:
            tier.opened(file)

    @property
    def has_refused(self) -> bool:
        """Whether a directory had no room for blocks that are not read yet."""
        return any(tier.writer.has_refused for tier in self.tiers)

    def retry(self, kept: Callable[[BlockId], Held | None]) -> None:
        """Write blocks for which there was no room, if they are still kept for a reader."""
        for tier in self.tiers:
            tier.writer.retry(kept)

    async def give_up_read(self, file: File, numbers: Sequence[int]) -> bool:
        """Mark blocks as no longer needed in this load; False if others may need them."""
        return all([await tier.give_up_read(file, numbers) for tier in self.tiers])

    async def _each(self, do: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Do something with all directories at once."""
        async with trio.open_nursery() as nursery:
            for tier in self.tiers:
                nursery.start_soon(do, tier, *arguments)
