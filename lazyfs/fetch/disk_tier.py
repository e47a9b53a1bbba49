"""The node's disk as a tier: shared with other daemons, and written while a load runs.

A block that is not on disk is claimed there before it is fetched, so that only one daemon of a node
fetches it. If another daemon has claimed a block, a demand job waits for it, and a prefetch leaves
it to that daemon, for at most `LEASE_S`.

A worker that was killed is gone only when its last thread is, which may wait in the kernel for what
the next worker answers. Until then its claims look like another daemon's. So after a resume, a
reader waits only `FORMER_LEASE_S` for a claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import trio

from lazyfs.blocks import BlockId
from lazyfs.blocks.memory import Held
from lazyfs.cache import CARE_S, BlockCache, Claim
from lazyfs.cache.block_writer import BlockWriter
from lazyfs.cache.other_daemons import OtherDaemons
from lazyfs.faults import contained, keep_running
from lazyfs.fetch.tiers import Job, OriginTier
from lazyfs.objects import File
from lazyfs.observe.recorder import Tier
from lazyfs.threads import Threads

# After a resume: how long a reader waits for a claim, and for how long that holds.
FORMER_LEASE_S = 2.0
FORMER_S = 60.0


class DiskTier:
    """The blocks of one mount on the disk.

    Args:
        cache: the disk.
        writer: writes blocks to it.
        others: the blocks that are left to other daemons.
        origin: says whether the mount may read an object.
        threads: run the blocking calls.
    """

    kind = Tier.DISK

    def __init__(
        self,
        cache: BlockCache,
        writer: BlockWriter,
        others: OtherDaemons,
        origin: OriginTier,
        threads: Threads,
    ) -> None:
        self._cache = cache
        self._writer = writer
        self._others = others
        self._origin = origin
        self._threads = threads
        self._nursery: trio.Nursery | None = None
        self._former_until_s = -math.inf

    def resumed(self) -> None:
        """A former worker of this mount has ended, or is about to."""
        self._former_until_s = trio.current_time() + FORMER_S

    def start(self, nursery: trio.Nursery, plan: Callable[[], Iterable[File]]) -> None:
        """Write, follow other daemons and maintain the cache in tasks of a nursery.

        Args:
            plan: returns the files that a load will need, in order.
        """
        self._nursery = nursery
        nursery.start_soon(self._writer.run)
        nursery.start_soon(keep_running, "following other daemons", self._others.follow)
        nursery.start_soon(keep_running, "cache care", self._care, plan)

    async def finish(self, plan: Iterable[File]) -> None:
        """Write the blocks that wait for the disk, so that the next mount finds them."""
        await self._writer.finish()
        await self._threads.run(self._cache.care, plan)

    async def present(self, files: Sequence[File]) -> list[tuple[File, list[int]]]:
        """The files that have blocks on disk, with the numbers of these blocks.

        The cache records that they are needed, and S3 is asked whether the mount may read them.
        """
        present = await self._threads.run(_find_present, self._cache, files)
        if present and self._nursery is not None:
            there = [file for file, _ in present]
            self._nursery.start_soon(
                contained, "asking what may be read", self._origin.check_access_ahead, there
            )
        for file in files:
            self._cache.set_loading(file)
        return present

    async def numbers(self, file: File) -> list[int]:
        """Which blocks of a file are on disk."""
        return await self._threads.run(self._cache.present, file)

    def opened(self, file: File) -> None:
        """A reader opened a file. Does not block."""
        self._cache.set_loading(file)

    def begin(self, job: Job) -> None:
        """See `CacheTier`. The block is no longer left to another daemon."""
        job.lease_until = self._others.take_back(job.file, job.block)

    async def get(self, job: Job) -> memoryview | Claim:
        """See `CacheTier`."""
        found = await self._load_or_claim(job)
        if found is Claim.THEIRS:
            self._others.leave(job.file, job.block, job.lease_until)
        elif isinstance(found, memoryview):
            await self._origin.check_access(job)
        return found

    async def claim(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """See `CacheTier`."""
        numbers = [job.block.number for job in jobs]
        ours = await self._threads.run(self._cache.claim_absent, jobs[0].file, numbers)
        return [job for job in jobs if job.block.number in ours]

    async def _load_or_claim(self, job: Job) -> memoryview | Claim:
        """A block, or which daemon fetches it; waits for other daemons if a reader does."""
        lease_until = math.inf
        while True:
            found = await self._threads.run(self._cache.load_or_claim, job.file, job.block.number)
            if found is not Claim.THEIRS:
                return found
            now_s = trio.current_time()
            if job.waiting and now_s < self._former_until_s:
                lease_until = min(lease_until, now_s + FORMER_LEASE_S)
            lease_until = min(lease_until, job.lease_until)
            if now_s >= lease_until:
                return Claim.OURS
            if not job.waiting:
                return found
            await self._others.wait_for(job.file, job.block.number, lease_until)

    def put(self, block: BlockId, held: Held, *, reader_waits: bool) -> None:
        """See `CacheTier`."""
        self._writer.put(block, held, reader_waits=reader_waits)

    def give_up(self, job: Job) -> None:
        """See `CacheTier`."""
        self._cache.release(job.file, job.block.number)

    async def _care(self, plan: Callable[[], Iterable[File]]) -> None:
        while True:
            await self._threads.run(self._cache.care, plan())
            await trio.sleep(CARE_S)


def _find_present(cache: BlockCache, files: Sequence[File]) -> list[tuple[File, list[int]]]:
    """The files that have blocks on disk, with their numbers; the cache keeps them."""
    present = [(file, numbers) for file in files if (numbers := cache.present(file))]
    if present:
        cache.announce([file for file, _ in present])
    return present
