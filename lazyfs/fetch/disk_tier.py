"""A directory of the cache as a tier: shared with other daemons, written while a load runs.

It has the blocks that belong there (`disks.py`), and passes over others. A block that is not on
disk is claimed there before it is fetched, so that only one daemon of a node fetches it. If another
daemon has claimed a block, a demand job waits for it, and a prefetch leaves it to that daemon, for
at most `LEASE_S`.

A call of the disk costs more time than all other decisions about a block. So what was seen there of
a file counts for `SEEN_S` while no other process shows that it may store blocks of it: a block that
is absent then is claimed without such a call. If a process begins, stores a block and ends within
that time, the block is fetched a second time.

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
from concurrent.futures import Future
from functools import partial

import trio

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.memory import Held
from lazyfs.cache import CARE_S, BlockCache, Claim
from lazyfs.cache.block_format import bytes_of_pieces
from lazyfs.cache.block_writer import BlockWriter
from lazyfs.cache.disk_calls import DISK_PATIENCE_S, DiskCalls, DiskHangsError
from lazyfs.cache.other_daemons import OtherDaemons
from lazyfs.faults import keep_running
from lazyfs.fetch.tiers import Job, OriginTier
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Tier

# After a resume: how long a reader waits for a claim, and for how long that holds.
FORMER_LEASE_S = 2.0
FORMER_S = 60.0
# How long it counts which blocks of a file the disk had.
SEEN_S = 1.0
_ANY = range(1 << 62)
# How many files are looked for in one call.
AT_ONCE = 100


class DiskTier:
    """The blocks of one mount in a directory.

    Args:
        cache: the part of the cache that is the directory.
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
        self.writer = writer
        self._cache = cache
        self._others = others
        self._origin = origin
        self._calls = calls
        self._former_until_s = -math.inf
        # By inode, for the files of the plan: the blocks that the disk had, and when it was asked.
        self._looks: dict[int, tuple[Container[int], float]] = {}

    @property
    def name(self) -> str:
        """The directory."""
        return self._cache.name

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
        nursery.start_soon(self.writer.run)
        nursery.start_soon(keep_running, "following other daemons", self._others.follow)
        nursery.start_soon(keep_running, "cache care", self._care, plan)

    async def finish(self, plan: Iterable[File]) -> None:
        """Write the blocks that wait for the disk, so that the next mount finds them."""
        with contextlib.suppress(DiskHangsError):
            await self.writer.finish()
            await self._calls.run(self._cache.care, plan)

    async def watch(self) -> None:
        """Notice when the disk hangs, and when it answers again; until cancelled."""
        await self._calls.watch()

    async def open(self, opening: Future[None]) -> None:
        """Wait until the directory is open, unless the disk hangs. Raises CacheError."""
        with contextlib.suppress(DiskHangsError):
            await self._calls.run(opening.result, patience_s=DISK_PATIENCE_S)

    async def numbers(self, files: Sequence[File]) -> dict[int, list[int]]:
        """The numbers of the blocks that are here, by inodes; none if the disk hangs."""
        found: dict[int, list[int]] = {}
        with contextlib.suppress(DiskHangsError):
            for some in (files[at : at + AT_ONCE] for at in range(0, len(files), AT_ONCE)):
                began_s = trio.current_time()
                found |= await self._calls.run(
                    _numbers, self._cache, some, patience_s=DISK_PATIENCE_S
                )
                for file in some:
                    self._looks[file.inode] = frozenset(found.get(file.inode, ())), began_s
        return found

    async def announce(self, files: Sequence[File]) -> None:
        """See `BlockCache.announce`."""
        with contextlib.suppress(DiskHangsError):
            await self._calls.run(self._cache.announce, files)

    async def give_up_read(self, file: File, numbers: Sequence[int]) -> bool:
        """See `BlockCache.give_up`; False if the disk hangs."""
        try:
            return await self._calls.run(self._cache.give_up, file, numbers)
        except DiskHangsError:
            return False

    def opened(self, file: File) -> None:
        """A reader opened a file. Does not block."""
        self._cache.set_loading(file)

    def begin(self, job: Job) -> None:
        """See `CacheTier`. The block is no longer left to another daemon."""
        if self._has_place_for(job):
            job.lease_until = self._others.take_back(job.file, job.block)

    async def get(self, job: Job) -> memoryview | Claim:
        """See `CacheTier`."""
        if not self._has_place_for(job):
            return Claim.OURS
        found = await self._load_or_claim(job)
        if found is Claim.THEIRS:
            self._others.leave(job.file, job.block, job.lease_until)
        elif isinstance(found, memoryview):
            await self._origin.check_access(job)
        return found

    async def get_part(self, file: File, span: Span) -> memoryview | None:
        """A part of a block; None if `get` must bring the block.

        That is so if it is not here, or can only be read whole, or if S3 must be asked whether the
        mount may read the object.
        """
        if not self._cache.has_place_for(file, span.number) or not self._origin.may_read(file):
            return None
        try:
            return await self._calls.run(
                self._cache.load_part, file, span, patience_s=DISK_PATIENCE_S,
                size_bytes=bytes_of_pieces(span.start, span.stop),
            )  # fmt: skip
        except DiskHangsError:
            return None

    async def claim(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """See `CacheTier`."""
        file = jobs[0].file
        ours = [job for job in jobs if self._has_place_for(job)]
        absent = {job.block for job in ours if await self._is_absent(job)}
        numbers = [job.block.number for job in ours if job.block not in absent]
        if not numbers:
            return jobs
        try:
            claimed = await self._calls.run(
                self._cache.claim_absent, file, numbers,
                patience_s=DISK_PATIENCE_S, late=partial(self._release, file),
            )  # fmt: skip
        except DiskHangsError:
            return jobs
        here = set(numbers) - claimed
        return [job for job in jobs if job.block.number not in here]

    async def _is_absent(self, job: Job) -> bool:
        """Claim a block that is certainly not on the disk; False: it may be there."""
        if job.is_stored or job.file.inode not in self._looks:
            return False
        there, looked_s = self._looks[job.file.inode]
        now_s = trio.current_time()
        if now_s >= looked_s + SEEN_S:
            self._looks[job.file.inode] = _ANY, now_s  # meanwhile, for other jobs
            try:
                there = frozenset(
                    await self._calls.run(self._cache.present, job.file, patience_s=DISK_PATIENCE_S)
                )
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
        if self._cache.has_place_for(held.file, block.number):
            self.writer.put(block, held, reader_waits=reader_waits)

    def give_up(self, job: Job) -> None:
        """See `CacheTier`."""
        if self._has_place_for(job):
            self._cache.release(job.file, job.block.number)

    def _has_place_for(self, job: Job) -> bool:
        return self._cache.has_place_for(job.file, job.block.number)

    async def _care(self, plan: Callable[[], Iterable[File]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_running, "watching the disk", self.watch)
            while True:
                with contextlib.suppress(DiskHangsError):
                    await self._calls.run(self._cache.care, plan(), patience_s=math.inf)
                await trio.sleep(CARE_S)


def _numbers(cache: BlockCache, files: Sequence[File]) -> dict[int, list[int]]:
    """The numbers of the blocks on disk, by the inodes of files that have some."""
    return {file.inode: numbers for file in files if (numbers := cache.present(file))}
