"""Where the bytes of a block come from: the tiers below memory, asked in turn.

A *tier* is a place that may have a block: the disk (`disk_tier.py`), then the origin. All but the
last are caches with the same few methods (`CacheTier`). The origin has every block or says why not:
it is S3, or the fleet's cache in front of it. To add a tier, write a class with these methods, and
name it in `BlockFetcher.__init__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.buffers import LEAST_SHARED, take_buffer
from lazyfs.blocks.memory import Held
from lazyfs.cache import Claim
from lazyfs.errors import SourceError
from lazyfs.fetch.attempt import Got
from lazyfs.fetch.block_getter import PREFETCH_PATIENCE_S, BlockGetter
from lazyfs.fetch.read_access import ReadAccess
from lazyfs.listed_object import File
from lazyfs.model.safetensors import HEAD_BYTES
from lazyfs.movers.call import Nudge
from lazyfs.observe.recorder import Tier
from lazyfs.store.protocol import EACH, STOP

_NO_BYTES = memoryview(b"")


@dataclass(slots=True, eq=False)
class Job:
    """A block to get.

    Attributes:
        waiting: the spans that readers wait for; empty: a prefetch.
        waits_since_s: since when readers have waited without a break.
        lease_until: how long it is left to another daemon that has claimed it.
        tier: where it came from.
        headed_bytes: how much of it was not asked for, because it came before, as a header.
        batch: the batch in which it is fetched now.
        is_stored: it is on the disk, as far as this mount knows.
        is_claimed: no cache has it, and it is ours to fetch.
        is_pausing: its request pauses before another attempt.
        asked: the answer to the request of its batch, if that is not simply the block.
        scope: its request; cancelled if nobody wants the block any more.
    """

    file: File
    block: BlockId
    length: int
    waiting: list[Span] = field(default_factory=list)
    started: bool = False
    waits_since_s: float = 0.0
    lease_until: float = 0.0
    done: trio.Event = field(default_factory=trio.Event)
    held: Held | None = None
    tier: Tier = Tier.S3
    headed_bytes: int = 0
    batch: Batch | None = None
    is_stored: bool = False
    is_claimed: bool = False
    asked: Any = None
    is_pausing: bool = False
    error: SourceError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(slots=True, eq=False)
class Batch:
    """Blocks of one file that one call of a mover fetches ahead of readers.

    What a call costs the worker is shared by all of them. A block that does not come this way is
    fetched by itself, beginning with what came of it.

    Attributes:
        jobs: those of the blocks that have not come.
    """

    jobs: list[Job]
    nudge: Nudge = field(default_factory=Nudge)
    _sent: set[bytes] = field(default_factory=set)

    def hurry(self) -> None:
        """A reader waits for one of the blocks: hand each one over as it comes."""
        self._send(EACH)

    def stop(self) -> None:
        """End the requests."""
        self._send(STOP)

    def _send(self, word: bytes) -> None:
        if word not in self._sent:
            self._sent.add(word)
            self.nudge.send(word)


# What came of a job's request: the block, or `Job.asked`, or None if it was not made.
Came = tuple["Job", Got | Any]


class CacheTier(Protocol):
    """A tier that may have a block, or may be given it."""

    @property
    def kind(self) -> Tier:
        """The name in events and metrics."""

    def begin(self, job: Job) -> None:
        """A job starts. Does not block."""

    async def get(self, job: Job) -> memoryview | Claim:
        """The bytes of a block.

        A tier that several mounts share must call `OriginTier.check_access` before it returns
        bytes: another mount may have brought them, with credentials that this one does not have.

        Returns:
            `Claim.OURS` if the block is not here: the next tier is asked.
            `Claim.THEIRS` if another daemon brings it, and no reader waits for it here.

        Raises:
            SourceError: the mount may not read the object.
        """

    async def claim(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """The jobs of a file whose blocks are not here, and are ours to fetch."""

    def put(self, block: BlockId, held: Held, *, reader_waits: bool) -> None:
        """Take a block that came from a tier below. Does not block.

        Args:
            reader_waits: whether a reader waits for any block.
        """

    def give_up(self, job: Job) -> None:
        """The tiers below could not deliver a block. Does not block."""


class OriginTier:
    """The last tier: S3, directly or through the fleet's cache (`block_getter.py`).

    Args:
        getter: makes the requests.
        access_check_s: how long S3's permission to read an object counts; 0: it is not asked for.
        block_size: the mount's, in bytes.
        io_timeout_s: how long readers wait for S3.
        saturated: whether as many requests are in flight as S3 answers at once.
        head: the beginning of a file as far as it is in memory, by inode.
        pauses: called with a job when its request begins to pause before another attempt (true),
            and when it goes on.
    """

    def __init__(
        self,
        getter: BlockGetter,
        access_check_s: float,
        block_size: int,
        io_timeout_s: float,
        saturated: Callable[[], bool],
        head: Callable[[int], memoryview],
        pauses: Callable[[Job, bool], None] = lambda job, pauses: None,
    ) -> None:
        self._pauses = pauses
        self._getter = getter
        self._access = ReadAccess(access_check_s)
        self._block_size = block_size
        self._io_timeout_s = io_timeout_s
        self._saturated = saturated
        self._head = head

    async def get(self, job: Job) -> Got:
        """The bytes of a block. Raises SourceError.

        Of a long header, what came by itself is not fetched again with the block.
        """
        start = job.block.number * self._block_size
        # A request that was made already is for all of the block.
        have = self._headed(job) if job.asked is None else _NO_BYTES
        job.headed_bytes = len(have)
        asked, job.asked = job.asked, None
        if len(have) == job.length:
            return Got(_joined(have, have[:0]), Tier.S3)
        got = await self._getter.get(
            job.file,
            start + len(have),
            job.length - len(have),
            patience_s=self._patience_of(job),
            saturated=self._saturated,
            is_block=not have,
            has_time=lambda: not job.waiting,
            asked=asked,
            pauses=lambda pauses: self._pauses(job, pauses),
        )
        self._access.shown(job.file)
        return got._replace(data=_joined(have, got.data)) if have else got

    def takes_together(self, job: Job) -> bool:
        """Whether a block can be requested together with others."""
        return job.length >= LEAST_SHARED and not self._headed(job)

    async def get_each(
        self, batch: Batch, jobs: Sequence[Job], came: Callable[[Sequence[Came]], None]
    ) -> None:
        """Request blocks of a batch (`takes_together`); see `Tiers.get_each`.

        Raises:
            OSError: out of memory.
        """
        file = jobs[0].file
        # By part. Not longer than until it is told of, because it may hold its block.
        left = dict(enumerate(jobs))

        def tell(found: Sequence[tuple[int, Got | Any]]) -> None:
            if any(isinstance(got, Got) for _, got in found):
                self._access.shown(file)
            came([(left.pop(which), got) for which, got in found])

        parts = [(job.block.number * self._block_size, job.length) for job in jobs]
        del jobs
        await self._getter.get_each(file, parts, batch.nudge, tell, self._saturated)

    def _headed(self, job: Job) -> memoryview:
        """What came of a block with a long header."""
        start = job.block.number * self._block_size
        head = self._head(job.file.inode)
        return head[start : start + job.length] if len(head) > HEAD_BYTES else _NO_BYTES

    async def get_part(
        self, file: File, start: int, length: int, patience_s: Callable[[], float]
    ) -> Got:
        """`length` bytes of a file from `start`; fewer than a block. Raises SourceError."""
        got = await self._getter.get(
            file, start, length, patience_s=patience_s, saturated=lambda: False, is_block=False
        )
        self._access.shown(file)
        return got

    async def check_access(self, job: Job) -> None:
        """Return when S3 has shown that the mount may read the object. Raises SourceError."""
        patience_s = self._patience_of(job)
        await self._access.check(job.file, lambda: self.get_part(job.file, 0, 1, patience_s))

    def may_read(self, file: File) -> bool:
        """Whether S3 has shown it, and need not be asked again now."""
        return self._access.is_fresh(file)

    async def check_access_ahead(self, files: Iterable[File]) -> None:
        """Ask S3 about files, none of them empty, before a reader needs them."""
        await self._access.check_ahead(
            files,
            lambda file: self.get_part(file, 0, 1, lambda: PREFETCH_PATIENCE_S),
            self._getter.most,
        )

    def shown(self, file: File) -> None:
        """S3 gave bytes of a file to this mount, or to its former worker."""
        self._access.shown(file)

    def _patience_of(self, job: Job) -> Callable[[], float]:
        """How long to retry from now on; longer as soon as a reader waits, from then on."""
        began_s = trio.current_time()

        def patience_s() -> float:
            if not job.waiting:
                return PREFETCH_PATIENCE_S
            return job.waits_since_s - began_s + self._io_timeout_s

        return patience_s


class Tiers:
    """All tiers of one mount.

    Args:
        caches: asked in this order.
        origin: asked last.
    """

    def __init__(self, caches: Sequence[CacheTier], origin: OriginTier) -> None:
        self._caches = caches
        self._origin = origin

    def begin(self, job: Job) -> None:
        """A job starts."""
        for cache in self._caches:
            cache.begin(job)

    async def get(self, job: Job) -> memoryview | None:
        """The bytes of a block; `job.tier` says where they came from.

        None: no reader waits for it here, and another daemon brings it, or `job.scope` was
        cancelled.

        Raises:
            SourceError: no tier can give it to this mount.
        """
        try:
            for cache in () if job.is_claimed else self._caches:
                found = await cache.get(job)
                if found is Claim.THEIRS:
                    return None
                if isinstance(found, memoryview):
                    job.tier = cache.kind
                    return found
            data = await self._from_origin(job)
        except SourceError:
            self.give_up(job)
            raise
        if data is None:
            self.give_up(job)
        return data

    async def get_each(self, batch: Batch, came: Callable[[Sequence[Came]], None]) -> None:
        """Request the blocks of a batch from the origin, except for those that a cache has.

        Args:
            came: called with what came, of some of the jobs at a time; first with those that are
                not requested. With some it may never be called.

        Raises:
            OSError: out of memory.
        """
        jobs: Sequence[Job] = [job for job in batch.jobs if self._origin.takes_together(job)]
        for cache in self._caches:
            if jobs:
                jobs = await cache.claim(jobs)
        for job in jobs:
            job.is_claimed = True
        others = [(job, None) for job in batch.jobs if not any(job is each for each in jobs)]
        if others:
            came(others)
        if jobs:
            getting = self._origin.get_each(batch, jobs, came)
            del jobs, others
            await getting

    async def _from_origin(self, job: Job) -> memoryview | None:
        """None: the request was cancelled, and no reader waits. Raises SourceError."""
        while True:
            with job.scope:
                data, job.tier = await self._origin.get(job)
                return data
            if not job.waiting:
                return None
            job.scope = trio.CancelScope()

    def give_up(self, job: Job) -> None:
        """The block of a job does not come."""
        for cache in self._caches:
            cache.give_up(job)

    def put(self, job: Job, held: Held, *, reader_waits: bool) -> None:
        """Give a block to the tiers above the one that it came from."""
        for cache in self._caches:
            if cache.kind is job.tier:
                return
            cache.put(job.block, held, reader_waits=reader_waits)


def _joined(first: memoryview, rest: memoryview) -> memoryview:
    """Both in one buffer that can be written to the disk."""
    data = take_buffer(len(first) + len(rest))
    data[: len(first)] = first
    data[len(first) :] = rest
    return data
