"""What a job does with its block, its readers and its room."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory, Held, all_unread
from lazyfs.errors import AccessDeniedError, FaultError, UnavailableError
from lazyfs.fetch.jobs import FAILED_S, WAITING_S, Jobs
from lazyfs.fetch.tiers import Job, Tiers
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.pagecache.block_pusher import BlockPusher

BLOCK = 128 << 10
FILE = File(2, 1, "f", "f", 4 * BLOCK, "e", 0)
PART = Span(1, 0, 10)


class FakeTiers:
    """Gives a block, nothing or an error, when `answer` is set.

    Attributes:
        stored: blocks that were given to the tiers, and whether a reader waited.
    """

    def __init__(self) -> None:
        self.answer: bytes | Exception | None = bytes(BLOCK)
        self.tier = Tier.S3
        self.stored: list[tuple[BlockId, bool]] = []
        self.may_answer = trio.Event()

    def begin(self, job: Job) -> None: ...

    async def get(self, job: Job) -> memoryview | None:
        with job.scope:
            await self.may_answer.wait()
        if job.scope.cancelled_caught:
            return None
        if isinstance(self.answer, Exception):
            raise self.answer
        job.tier = self.tier
        return None if self.answer is None else memoryview(self.answer)

    def put(self, job: Job, held: Held, *, reader_waits: bool) -> None:
        self.stored.append((job.block, reader_waits))


class FakePusher:
    """Pushes what is around the parts that readers wait for, when it may."""

    def __init__(self) -> None:
        self.has_room = True
        self.pushed: list[tuple[BlockId, int]] = []
        self.around: list[list[Span]] = []

    def takes(self, block: BlockId, length: int) -> bool:
        self.pushed.append((block, length))
        return self.has_room

    async def push_around(self, block: BlockId, held: Held, waiting: list[Span]) -> None:
        self.around.append(list(waiting))


T = TypeVar("T")


class JobsOver(Generic[T]):
    """The jobs of a file, over tiers that a test controls."""

    def __init__(self, tiers: T) -> None:
        self.map = BlockMap(BLOCK)
        self.map.add_file(FILE.inode, FILE.size_bytes)
        self.memory = BlockMemory(8 * BLOCK, BLOCK, self.map, lambda: 1)
        self.tiers, self.pusher, self.ended = tiers, FakePusher(), 0
        self.recorder = Recorder()
        self.jobs = Jobs(
            cast(Tiers, self.tiers), self.memory, self.map, cast(BlockPusher, self.pusher),
            self.recorder, self._end,
        )  # fmt: skip

    def _end(self) -> None:
        self.ended += 1


class Machine(JobsOver[FakeTiers]):
    def __init__(self) -> None:
        super().__init__(FakeTiers())

    def place(self, number: int = 1) -> Place:
        return self.map.place(BlockId(FILE.inode, number))

    def start(
        self, nursery: trio.Nursery, *waiting: Span, number: int = 1, from_disk: bool = False
    ) -> Job:
        job = self.jobs.new(FILE, BlockId(FILE.inode, number), BLOCK)
        for span in waiting:
            self.jobs.wait(job, span)
        self.jobs.start(nursery, job, from_disk=from_disk)
        return job

    async def end(self) -> None:
        """All tiers answer, and all jobs end."""
        self.tiers.may_answer.set()
        await trio.testing.wait_all_tasks_blocked()


def play(steps: Callable[[Machine, trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await steps(Machine(), nursery)

    trio.run(main, clock=trio.testing.MockClock())


def test_a_job_has_room_and_a_place_from_its_start() -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.map.stored(BlockId(FILE.inode, 3))
        waiting = machine.jobs.new(FILE, BlockId(FILE.inode, 0), BLOCK)
        machine.jobs.wait(waiting, PART)
        machine.start(nursery, PART)
        machine.start(nursery, number=2, from_disk=True)
        machine.start(nursery, number=3)
        assert [machine.place(number) for number in (1, 2, 3)] == [
            Place.COMING, Place.LOADING, Place.LOADING,
        ]  # fmt: skip
        assert machine.memory.used_bytes == 3 * BLOCK
        assert (machine.jobs.fetching, machine.jobs.loading) == (2, 1)
        assert machine.jobs.demanded == 1, "one is not started, and for two nobody waits"
        machine.jobs.leave(waiting, PART)
        assert waiting.block not in machine.jobs
        await machine.end()
        assert (machine.jobs.fetching, machine.jobs.loading) == (0, 0)
        assert machine.ended == 3

    play(steps)


@pytest.mark.parametrize("tier", [Tier.DISK, Tier.S3])
def test_a_block_that_came_is_held_for_its_readers(tier: Tier) -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.tiers.tier = tier
        job = machine.start(nursery, PART, Span(1, 10, 20))
        ahead = machine.start(nursery, number=2)
        await machine.end()
        assert job.done.is_set()
        assert job.error is None
        held = job.held
        assert held is machine.memory.peek(job.block)
        assert held is not None
        assert (held.users, held.demanded, held.unread) == (2, True, all_unread(BLOCK))
        assert held.on_disk == (tier is Tier.DISK), "then it costs little to drop it"
        assert ahead.held is not None
        assert (ahead.held.users, ahead.held.demanded) == (0, False)
        assert machine.place() == Place.LOCAL
        assert job.block not in machine.jobs
        assert machine.memory.used_bytes == 2 * BLOCK

    play(steps)


def test_what_no_reader_waits_for_is_pushed_before_they_are_answered() -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.start(nursery, PART)
        machine.start(nursery, number=2)
        await machine.end()
        assert machine.pusher.pushed == [(BlockId(FILE.inode, 1), BLOCK)]
        assert machine.pusher.around == [[PART]]
        machine.pusher.has_room = False
        job = machine.start(nursery, PART, number=3)
        await machine.end()
        assert job.done.is_set()
        assert machine.pusher.around == [[PART]]

    play(steps)


def test_the_tiers_are_told_whether_a_reader_waited_a_moment_ago() -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.start(nursery)
        await machine.end()
        machine.start(nursery, PART)
        await machine.end()
        await trio.sleep(WAITING_S / 2)
        machine.start(nursery)
        await machine.end()
        await trio.sleep(WAITING_S / 2)
        machine.start(nursery)
        await machine.end()
        assert [waited for _, waited in machine.tiers.stored] == [False, True, True, False]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await steps(Machine(), nursery)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_block_that_is_left_to_another_daemon_takes_no_room() -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.tiers.answer = None
        job = machine.start(nursery)
        await machine.end()
        assert job.done.is_set()
        assert (job.held, job.error) == (None, None)
        assert machine.memory.used_bytes == 0
        assert machine.tiers.stored == []

    play(steps)


def test_what_is_not_wanted_any_more_is_ended_unless_a_reader_waits() -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.start(nursery, PART)
        ahead = machine.start(nursery, number=2)
        machine.jobs.new(FILE, BlockId(FILE.inode, 3), BLOCK)  # not started
        await trio.testing.wait_all_tasks_blocked()
        machine.jobs.abandon({FILE.inode + 1})
        await trio.testing.wait_all_tasks_blocked()
        assert machine.jobs.fetching == 2
        machine.jobs.abandon({FILE.inode})
        await trio.testing.wait_all_tasks_blocked()
        assert ahead.done.is_set()
        assert (ahead.held, ahead.error) == (None, None)
        assert [machine.place(number) for number in (1, 2, 3)] == [
            Place.COMING, Place.ABSENT, Place.ABSENT,
        ]  # fmt: skip
        assert (machine.jobs.fetching, machine.memory.used_bytes) == (1, BLOCK)
        again = machine.start(nursery, number=2)
        await machine.end()
        assert again.held is not None

    play(steps)


@pytest.mark.parametrize(
    ("waiting", "level"), [((), logging.WARNING), ((PART,), logging.ERROR)], ids=["ahead", "reader"]
)
def test_a_failure_is_told_to_readers_and_leaves_the_block_to_them(
    caplog: pytest.LogCaptureFixture, waiting: tuple[Span, ...], level: int
) -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.tiers.answer = error = AccessDeniedError("denied")
        job = machine.start(nursery, *waiting)
        await machine.end()
        assert job.done.is_set()
        assert job.error is error
        assert job.held is None
        assert machine.memory.used_bytes == 0
        assert machine.place() == Place.LEFT
        assert machine.ended == 1
        (record,) = caplog.records
        assert (record.levelno, record.getMessage()) == (level, "block 1 of f: denied")

    play(steps)


def test_who_asks_again_at_once_after_a_wait_in_vain_does_not_wait_again() -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        ours, planned, ahead, denied = (BlockId(FILE.inode, number) for number in range(4))
        machine.tiers.answer = UnavailableError("no answer")
        machine.start(nursery, PART, number=0)
        machine.start(nursery, Span(1, 0, 0), number=1)
        machine.start(nursery, number=2)
        await machine.end()
        failure = machine.jobs.failure(ours)
        assert (type(failure), str(failure)) == (UnavailableError, "no answer")
        assert machine.jobs.failure(planned) is None, "the planner waited"
        assert machine.jobs.failure(ahead) is None, "nobody waited for it"
        machine.tiers.answer = AccessDeniedError("denied")
        machine.start(nursery, PART, number=3)
        await machine.end()
        assert machine.jobs.failure(denied) is None, "S3 says so again at once"
        await trio.sleep(FAILED_S * 0.9)
        assert machine.jobs.failure(ours) is not None
        await trio.sleep(FAILED_S * 0.2)
        assert machine.jobs.failure(ours) is None

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await steps(Machine(), nursery)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_fault_of_ours_fails_one_block_and_no_more() -> None:
    async def steps(machine: Machine, nursery: trio.Nursery) -> None:
        machine.tiers.answer = ZeroDivisionError()
        job = machine.start(nursery, PART)
        await machine.end()
        assert isinstance(job.error, FaultError)
        assert machine.memory.used_bytes == 0
        machine.tiers.answer = bytes(BLOCK)
        assert machine.jobs.fetching == 0
        again = machine.start(nursery, PART)
        await machine.end()
        assert again.held is not None

    play(steps)
