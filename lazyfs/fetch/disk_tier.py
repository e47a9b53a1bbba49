"""The node's disk as a tier: shared with other daemons, and written while a load runs.

A block that is not on disk is claimed there before it is fetched, so that only one daemon of a node
fetches it. If another daemon has claimed a block, a demand job waits for it, and a prefetch leaves
it to that daemon, for at most `LEASE_S`.

A call of the disk costs more time than all other decisions about a block. So what was seen there of
a file counts for `SEEN_S`, if no other process may have stored blocks of it since: a block that is
absent then is claimed without such a call.

A worker that was killed is gone only when its last thread is, which may wait in the kernel for what
the next worker answers. Until then its claims look like another daemon's. So after a resume, a
reader waits only `FORMER_LEASE_S` for a claim.

While the disk hangs (`cache/disk_calls.py`), it has no blocks and takes none: all of them come from
S3, also those that are loaded ahead of readers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial

import trio

from lazyfs.blocks import BlockId
from lazyfs.blocks.memory import Held
from lazyfs.cache import CARE_S, BlockCache, Claim
from lazyfs.cache.block_writer import BlockWriter
from lazyfs.cache.disk_calls import DISK_PATIENCE_S, DiskCalls, DiskHangsError
from lazyfs.cache.other_daemons import OtherDaemons
from lazyfs.faults import contained, keep_running
from lazyfs.fetch.tiers import Job, OriginTier
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Tier

# After a resume: how long a reader waits for a claim, and for how long that holds.
FORMER_LEASE_S = 2.0
FORMER_S = 60.0
# How long it counts which blocks of a file the disk had.
SEEN_S = 1.0
_ANY = range(1 << 62)


class DiskTier:
    """The blocks of one mount on the disk.

    Args:
        cache: the disk.
        writer: writes blocks to it.
        others: the blocks that are left to other daemons.
        origin: says whether the mount may read an object.
        calls: make the blocking calls.
    """

    kind = Tier.DISK

    def __init__(
        self,
        cache: BlockCache,
        writer: BlockWriter,
        others: OtherDaemons,
        origin: OriginTier,
        calls: DiskCalls,
    ) -> None:
        self._cache = cache
        self._writer = writer
        self._others = others
        self._origin = origin
        self._calls = calls
        self._nursery: trio.Nursery | None = None
        self._former_until_s = -math.inf
        # By inode, for the files of the plan: the blocks that the disk had, and when it was asked.
        self._looks: dict[int, tuple[Container[int], float]] = {}

    @property
    def hangs(self) -> bool:
        """Whether the disk does not answer."""
        return self._calls.hangs

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
        with contextlib.suppress(DiskHangsError):
            await self._writer.finish()
            await self._calls.run(self._cache.care, plan)

    async def present(self, files: Sequence[File]) -> list[tuple[File, list[int]]]:
        """The files that have blocks on disk, with the numbers of these blocks.

        The cache records that they are needed, and S3 is asked whether the mount may read them.
        If the disk hangs there are none; each block is looked for again when it is wanted.
        """
        began_s = trio.current_time()
        try:
            present = await self._calls.run(_find_present, self._cache, files)
        except DiskHangsError:
            present = []
        else:
            self._looks |= {file.inode: ((), began_s) for file in files}
            self._looks |= {file.inode: (frozenset(there), began_s) for file, there in present}
        if present and self._nursery is not None:
            there = [file for file, _ in present]
            self._nursery.start_soon(
                contained, "asking what may be read", self._origin.check_access_ahead, there
            )
        for file in files:
            self._cache.set_loading(file)
        return present

    async def numbers(self, file: File) -> list[int]:
        """Which blocks of a file are on disk; none if it hangs."""
        try:
            return await self._calls.run(self._cache.present, file)
        except DiskHangsError:
            return []

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
        file = jobs[0].file
        absent = {job.block for job in jobs if await self._is_absent(job)}
        numbers = [job.block.number for job in jobs if job.block not in absent]
        if not numbers:
            return jobs
        try:
            ours = await self._calls.run(
                self._cache.claim_absent, file, numbers,
                patience_s=DISK_PATIENCE_S, late=partial(self._release, file),
            )  # fmt: skip
        except DiskHangsError:
            return jobs
        return [job for job in jobs if job.block in absent or job.block.number in ours]

    async def _is_absent(self, job: Job) -> bool:
        """Claim a block that is certainly not on the disk; False: it may be there."""
        if job.is_stored or job.file.inode not in self._looks:
            return False
        there, looked_s = self._looks[job.file.inode]
        now_s = trio.current_time()
        if now_s >= looked_s + SEEN_S:
            self._looks[job.file.inode] = _ANY, now_s  # meanwhile, for other jobs
            try:
                there = frozenset(await self._calls.run(self._cache.present, job.file))
            except DiskHangsError:
                return False
            self._looks[job.file.inode] = there, now_s
        if job.block.number in there:
            return False
        if self._cache.claim_alone(job.file, job.block.number):
            return True
        self._looks[job.file.inode] = _ANY, now_s
        return False

    async def _load_or_claim(self, job: Job) -> memoryview | Claim:
        """A block, or which daemon fetches it; waits for other daemons if a reader does.

        A block on a disk that hangs is ours to fetch.
        """
        if await self._is_absent(job):
            return Claim.OURS
        lease_until = math.inf
        while True:
            try:
                found: memoryview | Claim = await self._calls.run(
                    self._cache.load_or_claim, job.file, job.block.number,
                    patience_s=DISK_PATIENCE_S, size_bytes=job.length,
                    late=partial(self._came_late, job.file, job.block.number),
                )  # fmt: skip
            except DiskHangsError:
                return Claim.OURS
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

    def _came_late(self, file: File, number: int, found: memoryview | Claim) -> None:
        if found is Claim.OURS:
            self._release(file, [number])

    def _release(self, file: File, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._cache.release(file, number)

    def put(self, block: BlockId, held: Held, *, reader_waits: bool) -> None:
        """See `CacheTier`."""
        self._writer.put(block, held, reader_waits=reader_waits)

    def give_up(self, job: Job) -> None:
        """See `CacheTier`."""
        self._cache.release(job.file, job.block.number)

    async def _care(self, plan: Callable[[], Iterable[File]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_running, "watching the disk", self._calls.watch)
            while True:
                with contextlib.suppress(DiskHangsError):
                    await self._calls.run(self._cache.care, plan(), patience_s=math.inf)
                await trio.sleep(CARE_S)


def _find_present(cache: BlockCache, files: Sequence[File]) -> list[tuple[File, list[int]]]:
    """The files that have blocks on disk, with their numbers; the cache keeps them."""
    present = [(file, numbers) for file in files if (numbers := cache.present(file))]
    if present:
        cache.announce([file for file, _ in present])
    return present
