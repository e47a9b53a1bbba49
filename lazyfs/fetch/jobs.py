"""Running jobs: one block each, from its start until its readers are answered.

A job reserves memory, gets the bytes from a tier in a thread (`tiers.py`), and *holds* the block in
memory. Then the parts that no reader waits for are pushed into the page cache, and after that the
readers are answered, so that they find the rest in place. Tiers above the one that had the block
are given it; no reader waits for that. Afterwards the block stays in memory until its room is
needed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Sequence

import trio

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory, Held, all_unread
from lazyfs.errors import FaultError, SourceError
from lazyfs.faults import contained, report_fault
from lazyfs.fetch.attempt import Got
from lazyfs.fetch.tiers import Batch, Came, Job, Tiers
from lazyfs.listed_object import File
from lazyfs.observe.events import Purpose
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.pagecache.block_pusher import BlockPusher

log = logging.getLogger(__name__)


# After a wait, a reader counts as waiting for this long. It reads at the speed of the link, because
# otherwise it would not have waited; between two waits the disk must not slow it down.
WAITING_S = 1.0
# A read that waited for `--io-timeout` in vain fails, and then the kernel asks for its first page
# once more. That request fails as well, if it comes within this time, instead of waiting as long.
FAILED_S = 1.0


class Jobs:
    """The jobs of one mount, at most one for each block.

    Args:
        tiers: have the blocks.
        memory: holds them.
        blocks: is told where they are.
        pusher: pushes them into the page cache.
        recorder: is told of each block.
        on_end: called after a job.

    Attributes:
        fetching: how many started jobs ask all tiers.
        loading: how many started jobs load a block from the disk ahead of readers.
    """

    def __init__(
        self,
        tiers: Tiers,
        memory: BlockMemory,
        blocks: BlockMap,
        pusher: BlockPusher,
        recorder: Recorder,
        on_end: Callable[[], None],
    ) -> None:
        self._tiers = tiers
        self._memory = memory
        self._map = blocks
        self._pusher = pusher
        self._recorder = recorder
        self._on_end = on_end
        self._jobs: dict[BlockId, Job] = {}
        # Those that readers wait for: few, where hundreds may be running.
        self._waited_for: set[BlockId] = set()
        # By key: how many jobs pause.
        self._pausing: Counter[str] = Counter()
        # Blocks for which a reader waited in vain: the error, and when that was over. Not the
        # exception, because its traceback refers to the buffer of the block.
        self._failed: dict[BlockId, tuple[type[SourceError], str, float]] = {}
        # When a reader waited last.
        self._waited_s = -math.inf
        self.fetching = 0
        self.loading = 0

    def __contains__(self, block: BlockId) -> bool:
        return block in self._jobs

    def get(self, block: BlockId) -> Job | None:
        """The job of a block, if there is one."""
        return self._jobs.get(block)

    def failure(self, block: BlockId) -> SourceError | None:
        """Why a reader has just waited for a block in vain, if one has: see `FAILED_S`."""
        kind, message, failed_s = self._failed.get(block, (SourceError, "", -math.inf))
        return kind(message) if trio.current_time() < failed_s + FAILED_S else None

    @property
    def demanded(self) -> int:
        """How many started jobs, none of which pauses, have readers that wait for them."""
        waited_for = (self._jobs[block] for block in self._waited_for)
        return sum(job.started and not job.is_pausing for job in waited_for)

    @property
    def reader_waits(self) -> bool:
        """Whether a reader waits, or waited for one of the last blocks: see `WAITING_S`."""
        return bool(self._waited_for) or trio.current_time() - self._waited_s < WAITING_S

    def new(self, file: File, block: BlockId, length: int) -> Job:
        """A job that may be started later."""
        job = self._jobs[block] = Job(file, block, length)
        return job

    def wait(self, job: Job, span: Span) -> None:
        """A reader waits for a job."""
        if not job.waiting:
            job.waits_since_s = trio.current_time()
        job.waiting.append(span)
        self._waited_for.add(job.block)
        if job.batch is not None:
            job.batch.hurry()

    def leave(self, job: Job, span: Span) -> None:
        """A reader that waited for a job goes away; without readers, it is forgotten or goes on."""
        job.waiting.remove(span)
        if not job.waiting:
            self._waited_for.discard(job.block)
            if not job.started:
                del self._jobs[job.block]

    def abandon(self, inodes: Container[int]) -> None:
        """End the requests for blocks of these files that no reader waits for."""
        for job in self._jobs.values():
            if job.started and not job.waiting and job.block.inode in inodes:
                job.scope.cancel()
                if job.batch and not any(other.waiting for other in job.batch.jobs):
                    job.batch.stop()

    def start(self, nursery: trio.Nursery, job: Job, *, from_disk: bool = False) -> None:
        """Run a job in a task of a nursery. There must be room in memory.

        Args:
            from_disk: the block is loaded from the disk ahead of readers.
        """
        self.begin(job, from_disk=from_disk)
        self.run(nursery, [job], from_disk=from_disk)

    def begin(self, job: Job, *, from_disk: bool = False) -> None:
        """A job is about to `run`. There must be room in memory, which it takes from now on."""
        job.started = True
        job.is_stored = from_disk or self._map.is_stored(job.block)
        self._tiers.begin(job)
        self._memory.reserve(job.length)
        self._map.moved(job.block, Place.LOADING if job.is_stored else Place.COMING)
        if from_disk:
            self.loading += 1
        else:
            self.fetching += 1

    def run(self, nursery: trio.Nursery, jobs: Sequence[Job], *, from_disk: bool = False) -> None:
        """Run jobs that have begun in a task of a nursery; several of one file as a batch."""
        if len(jobs) == 1:
            nursery.start_soon(contained, "bringing a block", self._run, jobs[0], from_disk)
        else:
            batch = Batch([*jobs])
            for job in jobs:
                job.batch = batch
            nursery.start_soon(contained, "bringing blocks", self._run_batch, nursery, batch)

    async def _run_batch(self, nursery: trio.Nursery, batch: Batch) -> None:
        """Run the jobs of a batch. Those whose block does not come with it run by themselves."""
        began_s = {job.block: self._recorder.begun(job.block) for job in batch.jobs}

        def leave(job: Job) -> None:
            # Otherwise the bytes of its block would be freed only with the batch, or even later.
            batch.jobs.remove(job)
            job.batch = None

        def runs_alone(job: Job, asked: object = None) -> None:
            leave(job)
            job.asked = asked
            self.run(nursery, [job])

        def came(found: Sequence[Came]) -> None:
            for job, got in found:
                if not isinstance(got, Got):
                    runs_alone(job, got)
                elif job.scope.cancel_called and not job.waiting:
                    runs_alone(job)  # it ends at once
                else:
                    leave(job)
                    job.tier = got.tier
                    self._landed(job, got.data, began_s[job.block])
                    self._is_over(job)
                    if job.waiting:
                        nursery.start_soon(contained, "answering readers", self._answer, job)
                    else:
                        job.held = None
                        job.done.set()
            self._on_end()

        try:
            await self._tiers.get_each(batch, came)
        except Exception as error:
            report_fault("bringing blocks", error)
        finally:
            for job in [*batch.jobs]:
                runs_alone(job)

    async def _run(self, job: Job, from_disk: bool) -> None:
        """Run one job until its readers are answered, whatever happens."""
        try:
            await self._obtain(job)
        except BaseException:
            job.done.set()
            raise
        finally:
            self._is_over(job, from_disk=from_disk)
        await self._answer(job)
        self._on_end()

    def _is_over(self, job: Job, *, from_disk: bool = False) -> None:
        """A job has its block, or has failed."""
        if from_disk:
            self.loading -= 1
        else:
            self.fetching -= 1
        self.pauses(job, False)
        del self._jobs[job.block]
        self._waited_for.discard(job.block)

    def pauses(self, job: Job, pauses: bool) -> None:
        """The request of a job begins to pause before another attempt, or goes on."""
        if pauses == job.is_pausing:
            return
        job.is_pausing = pauses
        self._pausing[job.file.key] += 1 if pauses else -1
        if not self._pausing[job.file.key]:
            del self._pausing[job.file.key]
        if pauses:
            try:
                self._on_end()  # another job may start
            except Exception as error:
                report_fault("starting other jobs", error)

    def is_pausing(self, key: str) -> bool:
        """Whether a request for an object pauses."""
        return key in self._pausing

    def busy(self, most_pausing: int) -> int:
        """How many jobs that ask all tiers count against a limit of requests.

        Those that pause do not, because S3 has nothing to do for them. But if it refuses several
        objects, it most likely wants fewer requests: then `most_pausing` of them do not count.
        """
        pausing = sum(self._pausing.values())
        return self.fetching - (pausing if len(self._pausing) == 1 else min(pausing, most_pausing))

    async def _answer(self, job: Job) -> None:
        """Have the readers of a job answered, but first push what they do not wait for."""
        try:
            if job.held and job.waiting and self._pusher.takes(job.block, job.length):
                await self._pusher.push_around(job.block, job.held, job.waiting)
        finally:
            job.done.set()

    async def _obtain(self, job: Job) -> None:
        """Get the block of a job, and hold it."""
        began_s = self._recorder.begun(job.block)
        try:
            data = await self._tiers.get(job)
        except SourceError as error:
            self._fail(job, error)
            return
        except Exception as error:
            report_fault("bringing a block", error)
            self._fail(job, FaultError(f"{job.file.key}: a fault of lazyfs; its log has more"))
            return
        if data is None:
            self._memory.release(job.length)
            if job.scope.cancelled_caught:
                self._map.moved(job.block, Place.ABSENT)
            return
        self._landed(job, data, began_s)

    def _landed(self, job: Job, data: memoryview, began_s: float) -> None:
        """A block has come: hold it, and give it to the tiers above the one that had it."""
        try:
            self._hold(job, data, began_s)
        except Exception as error:
            report_fault("bringing a block", error)
            if job.held is None:
                self._tiers.give_up(job)
                self._fail(job, FaultError(f"{job.file.key}: a fault of lazyfs; its log has more"))

    def _hold(self, job: Job, data: memoryview, began_s: float) -> None:
        purpose = Purpose.DEMAND if job.waiting else Purpose.AHEAD
        came = job.length - job.headed_bytes
        self._recorder.landed(job.file, job.block, came, job.tier, purpose, began_s)
        job.held = Held(
            job.file,
            data,
            users=len(job.waiting),
            unread=all_unread(job.length),
            demanded=bool(job.waiting),
            on_disk=job.tier is Tier.DISK,
        )
        self._memory.hold(job.block, job.held)
        self._map.moved(job.block, Place.LOCAL)
        if self._waited_for:
            self._waited_s = trio.current_time()
        self._tiers.put(job, job.held, reader_waits=self.reader_waits)

    def _fail(self, job: Job, error: SourceError) -> None:
        self._memory.release(job.length)
        self._map.failed(job.block)
        self._recorder.failed(job.file, job.block, error)
        level = logging.ERROR if job.waiting else logging.WARNING
        log.log(level, "block %d of %s: %s", job.block.number, job.file.key, error)
        job.error = error
        # The planner waits for no bytes of its own.
        if error.transient and any(span.stop > span.start for span in job.waiting):
            now_s = trio.current_time()
            self._failed = {
                block: failed
                for block, failed in self._failed.items()
                if now_s < failed[-1] + FAILED_S
            }
            self._failed[job.block] = type(error), str(error), now_s
