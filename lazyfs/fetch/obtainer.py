"""Gets the bytes of a block: from the disk, another daemon of this node, the fleet's cache, or S3.

A block that is not on disk is claimed there before it is fetched, so that only one daemon of a node
fetches it. If another daemon has claimed a block, a demand job waits for it, and a prefetch leaves
it to that daemon, for at most `LEASE_S`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.cache import BlockCache, Claim
from lazyfs.cache.other_daemons import OtherDaemons
from lazyfs.errors import SourceError
from lazyfs.fetch.read_access import ReadAccess
from lazyfs.fetch.request import PREFETCH_PATIENCE_S, BlockGetter
from lazyfs.objects import File
from lazyfs.observe.recorder import Recorder, Tier


@dataclass(slots=True)
class Job:
    """A block that is being brought, or is to be.

    Attributes:
        waiting: the spans that readers wait for; empty: a prefetch.
        lease_until: how long it is left to another daemon that has claimed it.
    """

    file: File
    block: BlockId
    length: int
    waiting: list[Span] = field(default_factory=list)
    started: bool = False
    lease_until: float = 0.0
    done: trio.Event = field(default_factory=trio.Event)
    held: Held | None = None
    tier: Tier = Tier.S3
    error: SourceError | None = None


class Obtainer:
    """Gets the blocks of one mount from wherever they are.

    Args:
        getter: gets them from the fleet's cache or S3.
        memory: where parts of blocks reserve room.
        recorder: is told of parts; of blocks by whoever wanted them.
        cache: the disk, or None.
        elsewhere: what is left to other daemons; None without a disk.
        access: says whether the mount may have what is on the disk.
        block_size: of the mount.
        io_timeout_s: how long readers wait for S3.
        run: runs a blocking call in a worker thread.
        saturated: whether as much is asked for as S3 takes at once.
    """

    def __init__(
        self,
        getter: BlockGetter,
        memory: BlockMemory,
        recorder: Recorder,
        cache: BlockCache | None,
        elsewhere: OtherDaemons | None,
        access: ReadAccess,
        block_size: int,
        io_timeout_s: float,
        run: Callable[..., Awaitable[memoryview | Claim]],
        saturated: Callable[[], bool],
    ) -> None:
        self._getter = getter
        self._memory = memory
        self._recorder = recorder
        self._cache = cache
        self._elsewhere = elsewhere
        self._access = access
        self._block_size = block_size
        self._io_timeout_s = io_timeout_s
        self._run = run
        self._saturated = saturated

    async def obtain(self, job: Job) -> tuple[memoryview, Tier] | None:
        """The bytes of a job's block, and where they came from.

        None: another daemon brings it, and nobody waits for it here.

        Raises:
            SourceError: they cannot be read.
        """
        if self._cache and self._elsewhere:
            found = await self._look_on_disk(self._cache, self._elsewhere, job)
            if found is Claim.THEIRS:
                self._elsewhere.leave(job.file, job.block, job.lease_until)
                return None
            if isinstance(found, memoryview):
                await self._access.check(job.file, lambda: self.get_a_byte(job.file, job))
                return found, Tier.DISK
        try:
            return await self._getter.get(
                job.file,
                job.block.number * self._block_size,
                job.length,
                patience_s=lambda: self._io_timeout_s if job.waiting else PREFETCH_PATIENCE_S,
                saturated=self._saturated,
            )
        except SourceError:
            if self._cache is not None:
                self._cache.release(job.file, job.block.number)
            raise

    async def get_a_byte(self, file: File, job: Job | None = None) -> None:
        """Have S3 show that the mount may read an object, which is not empty. Raises SourceError.

        Args:
            job: of whoever needs to know.
        """
        await self._getter.get(
            file, 0, 1,
            patience_s=lambda: (
                self._io_timeout_s if job is not None and job.waiting else PREFETCH_PATIENCE_S
            ),
            saturated=lambda: False, is_block=False,
        )  # fmt: skip

    async def _look_on_disk(
        self, cache: BlockCache, elsewhere: OtherDaemons, job: Job
    ) -> memoryview | Claim:
        """A block from the disk, or who is to fetch it; waits for others if a reader does."""
        while True:
            found = await self._run(cache.load_or_claim, job.file, job.block.number)
            if found is not Claim.THEIRS:
                return found
            if trio.current_time() >= job.lease_until:
                return Claim.OURS
            if not job.waiting:
                return found
            await elsewhere.wait_for(job.file, job.block.number, job.lease_until)
