"""A disk that hangs: nobody waits for it, and it is used again when it answers."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory
from lazyfs.cache import BlockCache, Claim
from lazyfs.cache.block_writer import BlockWriter
from lazyfs.cache.disk_calls import (
    AGAIN_S,
    DISK_PATIENCE_S,
    FIRST_REST_S,
    LONGEST_REST_S,
    LONGEST_S,
    LOOK_S,
    MOST_OTHERS,
    WRITE_PATIENCE_S,
    DiskCalls,
    DiskHangsError,
)
from lazyfs.cache.other_daemons import OtherDaemons
from lazyfs.errors import LazyfsError
from lazyfs.faults import FAULTS
from lazyfs.fetch.disk_tier import DiskTier
from lazyfs.fetch.tiers import Job, OriginTier
from lazyfs.listed_object import File
from lazyfs.threads import Threads

SIZE = 10
FILE = File(2, 1, "f", "f", 100 * SIZE, "e", 0)
BLOCKS = 16  # that fit into memory; a quarter of them may be loaded at once
DATA = memoryview(b"0123456789")


class Disk:
    """A disk with all blocks but those that are claimed, which hangs when it is told to."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.absent: set[int] = set()
        self.theirs: set[int] = set()
        self.ours: set[int] = set()
        self.asked: list[int] = []

    def load_or_claim(self, file: File, number: int) -> memoryview | Claim:
        self.asked.append(number)
        assert self.answers.wait(60)
        if number in self.theirs:
            return Claim.THEIRS
        if number in self.absent:
            self.ours.add(number)
            return Claim.OURS
        return DATA

    def claim_absent(self, file: File, numbers: Iterable[int]) -> set[int]:
        return {number for number in numbers if self.load_or_claim(file, number) is Claim.OURS}

    def release(self, file: File, number: int) -> None:
        self.ours.discard(number)

    def present(self, file: File) -> list[int]:
        assert self.answers.wait(60)
        return [0]

    def holds(self, file: File, number: int) -> bool:
        assert self.answers.wait(60)
        return True

    def is_claimed(self, file: File, number: int) -> bool:
        return number in self.theirs

    def set_waiting(self, file: File, number: int, waiting: bool) -> None:
        pass

    def has_place_for(self, file: File, number: int) -> bool:
        return True

    def set_loading(self, file: File) -> None:
        pass


class Origin:
    """Allows everything."""

    async def check_access(self, job: Job) -> None:
        pass


class Desk:
    """A mount's disk, under a clock that only the test moves; threads are real."""

    def __init__(self, nursery: trio.Nursery, clock: trio.testing.MockClock) -> None:
        self.clock, self.nursery = clock, nursery
        self.disk = Disk()
        self.memory = BlockMemory(BLOCKS * SIZE, SIZE, BlockMap(SIZE), lambda: 1)
        self.threads = Threads(1)
        self.calls = DiskCalls(self.threads, self.memory, "/cache")
        self.changes: list[bool] = []
        self.calls.on_change.append(lambda: self.changes.append(self.calls.hangs))
        cache = cast(BlockCache, self.disk)
        self.others = OtherDaemons(cache, self.calls, lambda block, there: None)
        self.tier = DiskTier(
            cache, cast(BlockWriter, None), self.others, cast(OriginTier, Origin()), self.calls
        )
        self.got: dict[int, memoryview | Claim] = {}
        nursery.start_soon(self.calls.watch)

    async def hang(self) -> None:
        """Have the disk hang, and one reader notice it."""
        self.disk.answers.clear()
        await self.ask(99)
        await self.passes(DISK_PATIENCE_S + 2 * LOOK_S)
        assert self.calls.hangs

    async def ask(self, number: int) -> None:
        """Ask the disk for a block, and wait until a thread does that."""
        before = len(self.disk.asked)
        self.get(number)
        while len(self.disk.asked) == before:
            await trio.lowlevel.checkpoint()

    async def answer(self) -> None:
        """The disk answers; its threads come back."""
        self.disk.answers.set()
        while self.calls._hung:
            await trio.lowlevel.checkpoint()
        await self.passes(LOOK_S)

    async def passes(self, seconds: float) -> None:
        """Let time pass in small steps, as it does."""
        for _ in range(round(seconds / LOOK_S)):
            await trio.testing.wait_all_tasks_blocked(0.01)
            self.clock.jump(LOOK_S)
        await trio.testing.wait_all_tasks_blocked(0.01)

    async def come(self, *numbers: int) -> None:
        """Wait until threads have brought these blocks."""
        with trio.fail_after(1e9):
            while not set(numbers) <= set(self.got):
                await trio.lowlevel.checkpoint()

    def get(self, number: int, *, waiting: bool = True) -> None:
        spans = [Span(number, 0, 1)] if waiting else []
        self.nursery.start_soon(self._get, Job(FILE, BlockId(2, number), SIZE, spans))

    async def _get(self, job: Job) -> None:
        self.tier.begin(job)
        self.got[job.block.number] = await self.tier.get(job)


def play(scenario: Callable[[Desk], Awaitable[None]]) -> None:
    clock = trio.testing.MockClock()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            desk = Desk(nursery, clock)
            try:
                await scenario(desk)
            finally:
                desk.disk.answers.set()
                nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_block_on_a_disk_that_hangs_is_ours_to_fetch(waiting: bool) -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()
        desk.get(1, waiting=waiting)
        await desk.passes(DISK_PATIENCE_S - LOOK_S)
        assert (desk.got, desk.calls.hangs) == ({}, False)
        await desk.passes(2 * LOOK_S)
        assert desk.got == {1: Claim.OURS}
        assert desk.calls.hangs

    play(scenario)


def test_nobody_waits_again_for_a_disk_that_hangs() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.hang()
        desk.disk.asked.clear()
        desk.get(1)
        desk.get(2, waiting=False)
        job = Job(FILE, BlockId(2, 3), SIZE)
        await trio.testing.wait_all_tasks_blocked()
        assert (desk.got[1], desk.got[2]) == (Claim.OURS, Claim.OURS)
        assert await desk.tier.claim([job]) == [job]
        assert await desk.tier.numbers([FILE]) == {}
        assert desk.disk.asked == [], "it has no thread"

    play(scenario)


def test_a_batch_does_not_wait_for_a_disk_that_hangs_and_its_claims_end() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()
        desk.disk.absent = {1, 2}
        jobs = [Job(FILE, BlockId(2, number), SIZE) for number in (1, 2)]
        ours: list[object] = []

        async def claim() -> None:
            ours.extend(await desk.tier.claim(jobs))

        desk.nursery.start_soon(claim)
        await desk.passes(DISK_PATIENCE_S + LOOK_S)
        assert ours == jobs
        await desk.answer()
        assert (desk.disk.asked, desk.disk.ours) == ([1, 2], set())

    play(scenario)


def test_a_disk_that_answers_again_is_used_again() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.hang()
        await desk.answer()
        assert desk.changes == [True, False]
        desk.get(1)
        await desk.come(1)
        assert desk.got[1] == DATA

    play(scenario)


def test_a_claim_that_comes_too_late_is_released_before_the_disk_is_used_again() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.absent = {99}
        await desk.hang()
        assert desk.got == {99: Claim.OURS}, "without a claim"
        desk.disk.answers.set()
        while desk.calls._hung:
            assert desk.calls.hangs
            await trio.lowlevel.checkpoint()
        assert (desk.disk.asked, desk.disk.ours) == ([99], set())

    play(scenario)


def test_the_buffers_of_loads_that_hang_count_as_memory() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()
        for number in range(BLOCKS):
            desk.get(number)
        await desk.passes(DISK_PATIENCE_S + LOOK_S)
        assert len(desk.got) == BLOCKS
        assert len(desk.disk.asked) == BLOCKS // 4, "demand has the rest of the memory"
        assert desk.memory.used_bytes == BLOCKS // 4 * SIZE
        await desk.answer()
        assert desk.memory.used_bytes == 0
        desk.disk.asked.clear()
        desk.disk.answers.clear()
        for number in range(BLOCKS):
            desk.get(number)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(desk.disk.asked) == BLOCKS // 4, "as many as before can be loaded"

    play(scenario)


def test_a_disk_that_hangs_leaves_threads_for_everything_else() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()
        for number in range(100):
            desk.get(number)
            desk.nursery.start_soon(desk.tier.claim, [Job(FILE, BlockId(2, number), SIZE)])
        for _ in range(3):
            await desk.passes(DISK_PATIENCE_S + LOOK_S)
        free = desk.threads._limit.available_tokens
        await desk.passes(10 * LONGEST_S)
        for number in range(100):
            desk.get(number)
        await desk.passes(10 * LONGEST_S)
        assert desk.threads._limit.available_tokens == free > 0, "no call is made any more"
        assert await desk.threads.run(lambda: 1) == 1

    play(scenario)


def test_a_disk_that_answers_others_may_take_longer() -> None:
    async def scenario(desk: Desk) -> None:
        stuck = threading.Event()
        asked = desk.calls.run(stuck.wait, 60, patience_s=DISK_PATIENCE_S)
        left: list[float] = []

        async def wait() -> None:
            with pytest.raises(DiskHangsError):
                await asked
            left.append(trio.current_time() - began_s)

        began_s = trio.current_time()
        desk.nursery.start_soon(wait)
        for number in range(round((LONGEST_S + 2 * LOOK_S) / LOOK_S)):
            if not desk.calls.hangs:
                desk.get(number)
                await desk.come(number)
            await desk.passes(LOOK_S)
        stuck.set()
        assert left and LONGEST_S < left[0] <= LONGEST_S + 2 * LOOK_S

    play(scenario)


def test_a_process_that_was_stopped_does_not_blame_the_disk() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()
        desk.get(1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        desk.clock.jump(100)
        await trio.testing.wait_all_tasks_blocked(0.01)
        desk.disk.answers.set()
        await desk.come(1)
        assert desk.got == {1: DATA}
        assert desk.changes == []

    play(scenario)


def test_a_disk_that_hangs_again_and_again_rests_for_longer_and_longer() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.hang()
        await desk.answer()
        for rest_s in (FIRST_REST_S, 2 * FIRST_REST_S):
            desk.disk.asked.clear()
            await desk.hang()
            desk.disk.answers.set()
            while desk.calls._hung:
                await trio.lowlevel.checkpoint()
            await desk.passes(rest_s)
            assert desk.calls.hangs
            await desk.passes(LOOK_S)
            assert not desk.calls.hangs
        await desk.passes(AGAIN_S)
        await desk.hang()
        await desk.answer()
        assert not desk.calls.hangs, "after a while all is forgotten"

    play(scenario)


def test_a_reader_does_not_wait_for_a_daemon_whose_disk_hangs() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.theirs = {1}
        desk.get(1)
        await desk.passes(LOOK_S)
        assert desk.got == {}
        desk.disk.answers.clear()
        desk.get(99)
        await desk.passes(DISK_PATIENCE_S + 2 * LOOK_S)
        assert desk.got == {1: Claim.OURS, 99: Claim.OURS}

    play(scenario)


def test_a_write_may_take_long_but_not_for_ever() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()
        stored: list[bool] = []

        async def write() -> None:
            stored.append(await desk.calls.run_to_end(desk.disk.holds, FILE, 1))

        desk.nursery.start_soon(write)
        await desk.passes(WRITE_PATIENCE_S - LOOK_S)
        assert not desk.calls.hangs
        await desk.passes(2 * LOOK_S)
        assert (desk.calls.hangs, stored) == (True, []), "its bytes are still needed"
        await desk.answer()
        assert (desk.calls.hangs, stored) == (False, [True])

    play(scenario)


def test_a_slow_disk_that_goes_on_writing_does_not_hang() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()

        async def write() -> None:
            await desk.calls.run_to_end(desk.disk.holds, FILE, 1)

        desk.nursery.start_soon(write)
        for _ in range(3):
            await desk.passes(WRITE_PATIENCE_S - 2 * LOOK_S)
            desk.calls._answered_s = trio.current_time()  # another one has ended
        assert not desk.calls.hangs
        await desk.answer()

    play(scenario)


def test_results_and_errors_of_calls_come_back_and_make_room_for_others() -> None:
    async def scenario(desk: Desk) -> None:
        for _ in range(MOST_OTHERS + 1):
            with pytest.raises(ZeroDivisionError):
                await desk.calls.run(divmod, 1, 0)
            assert await desk.calls.run(divmod, 7, 2) == (3, 1)
            assert await desk.calls.run(lambda: DATA, size_bytes=SIZE) == DATA
        assert await desk.calls.run_to_end(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await desk.calls.run_to_end(divmod, 1, 0)
        assert desk.memory.used_bytes == 0
        await desk.passes(2 * LONGEST_S)
        assert desk.changes == [], "none of them is waited for any more"

    play(scenario)


def test_what_comes_in_time_is_not_undone() -> None:
    async def scenario(desk: Desk) -> None:
        late: list[int] = []
        assert await desk.calls.run(int, "7", late=late.append) == 7
        await desk.hang()
        await desk.answer()
        assert late == []

    play(scenario)


class Left:
    """Calls of a disk that hangs, which nobody waits for any more."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._stuck = threading.Event()
        self._begun: list[object] = []
        self.late: list[object] = []

    async def leave(self, *results: object) -> None:
        """Make calls, and have them left; exceptions are raised, later."""
        for result in results:
            self._desk.nursery.start_soon(self._call, result)
        while len(self._begun) < len(results):
            await trio.lowlevel.checkpoint()
        await self._desk.passes(LONGEST_S + 2 * LOOK_S)
        assert self._desk.calls.hangs

    async def come(self) -> None:
        """Have all threads come back."""
        self._stuck.set()
        await self._desk.answer()

    async def _call(self, result: object) -> None:
        def function() -> object:
            self._begun.append(result)
            assert self._stuck.wait(60)
            if isinstance(result, Exception):
                raise result
            return result

        with pytest.raises(DiskHangsError):
            await self._desk.calls.run(function, late=self.late.append)


def test_what_a_call_did_that_was_left_is_undone() -> None:
    async def scenario(desk: Desk) -> None:
        left = Left(desk)
        await left.leave("claimed", None, ZeroDivisionError())
        assert left.late == []
        await left.come()
        assert left.late == ["claimed"], "there is nothing to undo of the others"

    play(scenario)


def test_errors_of_calls_that_were_left_are_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(desk: Desk) -> None:
        left, faults = Left(desk), FAULTS.count
        await left.leave(LazyfsError("the disk is broken"), ZeroDivisionError("a bug"))
        caplog.clear()
        await left.come()
        levels = {record.getMessage(): record.levelname for record in caplog.records}
        assert levels["the disk is broken"] == "WARNING"
        assert FAULTS.count == faults + 1, "only the other one is a fault"

    play(scenario)


def test_how_long_a_disk_hung_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(desk: Desk) -> None:
        desk.clock.jump(1000)
        await desk.passes(LOOK_S)
        await desk.hang()
        assert "the disk of the cache /cache does not answer" in caplog.text
        desk.clock.jump(100 - (DISK_PATIENCE_S + 2 * LOOK_S))
        await desk.answer()
        assert re.search("the disk of the cache /cache answers again, after 10[0-2] s", caplog.text)

    play(scenario)


def test_no_call_begins_while_the_disk_hangs() -> None:
    async def scenario(desk: Desk) -> None:
        made: list[int] = []
        await desk.hang()
        with pytest.raises(DiskHangsError):
            await desk.calls.run(made.append, 1)
        with pytest.raises(DiskHangsError):
            await desk.calls.run(made.append, 2, size_bytes=SIZE)
        with pytest.raises(DiskHangsError):
            await desk.calls.run_to_end(made.append, 3)
        await desk.answer()
        await desk.calls.run_to_end(made.append, 4)
        assert made == [4]

    play(scenario)


@pytest.mark.parametrize(("directories", "most"), [(1, BLOCKS // 4), (2, BLOCKS // 8), (99, 1)])
def test_directories_share_the_memory_for_loads(directories: int, most: int) -> None:
    async def scenario(desk: Desk) -> None:
        calls = DiskCalls(desk.threads, desk.memory, "/cache", directories)
        begun: list[int] = []

        def load(number: int) -> memoryview:
            begun.append(number)
            assert desk.disk.answers.wait(60)
            return DATA

        async def get(number: int) -> None:
            assert await calls.run(load, number, size_bytes=SIZE) == DATA

        desk.disk.answers.clear()
        async with trio.open_nursery() as nursery:
            for number in range(BLOCKS):
                nursery.start_soon(get, number)
            while len(begun) < most:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(begun) == most
            assert await calls.run(divmod, 7, 2) == (3, 1), "other calls need no memory"
            desk.disk.answers.set()
        assert sorted(begun) == list(range(BLOCKS))

    play(scenario)


def test_only_so_many_other_calls_are_made_at_once() -> None:
    async def scenario(desk: Desk) -> None:
        begun: list[int] = []

        def look(number: int) -> None:
            begun.append(number)
            assert desk.disk.answers.wait(60)

        desk.disk.answers.clear()
        async with trio.open_nursery() as nursery:
            for number in range(MOST_OTHERS + 5):
                nursery.start_soon(desk.calls.run, look, number)
            while len(begun) < MOST_OTHERS:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(begun) == MOST_OTHERS
            desk.disk.answers.set()
        assert len(begun) == MOST_OTHERS + 5

    play(scenario)


def test_a_call_may_be_given_more_time_than_others() -> None:
    async def scenario(desk: Desk) -> None:
        stuck, patience_s = threading.Event(), LONGEST_S + 4 * LOOK_S
        desk.nursery.start_soon(partial(desk.calls.run, stuck.wait, 60, patience_s=patience_s))
        await desk.passes(patience_s)
        assert not desk.calls.hangs
        stuck.set()

    play(scenario)


def test_a_disk_rests_for_twice_as_long_each_time_up_to_a_limit() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.hang()
        await desk.answer()
        for rest_s in (2.0, 4.0, 8.0, 16.0, LONGEST_REST_S, LONGEST_REST_S):
            await desk.hang()
            desk.disk.answers.set()
            while desk.calls._hung:
                await trio.lowlevel.checkpoint()
            await desk.passes(LOOK_S)
            desk.clock.jump(rest_s - LOOK_S)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert desk.calls.hangs
            await desk.passes(LOOK_S)
            assert not desk.calls.hangs

    play(scenario)


def test_time_in_which_the_process_was_stopped_counts_for_no_call() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.answers.clear()
        await desk.ask(1)
        await desk.passes(DISK_PATIENCE_S - 2 * LOOK_S)
        desk.clock.jump(1000)
        await desk.passes(LOOK_S)
        assert not desk.calls.hangs
        await desk.passes(3 * LOOK_S)
        assert desk.calls.hangs, "but the time before and after that does"

    play(scenario)


class StuckThreads:
    """In the place of `Threads`: no answer comes.

    Attributes:
        makes: calls are made at once.
        called: what was to be called.
    """

    def __init__(self, *, makes: bool) -> None:
        self.makes = makes
        self.called: list[Callable[[], object]] = []

    async def run(self, function: Callable[..., object], *arguments: object) -> None:
        self.called.append(partial(function, *arguments))
        if self.makes:
            self.called[-1]()
        await trio.sleep_forever()


@pytest.mark.parametrize("makes", [True, False])
def test_a_call_that_has_no_thread_when_it_is_left_is_waited_for_by_nobody(makes: bool) -> None:
    """It has just ended, or has not begun; then it is not made any more."""

    async def main() -> None:
        memory = BlockMemory(BLOCKS * SIZE, SIZE, BlockMap(SIZE), lambda: 1)
        threads = StuckThreads(makes=makes)
        calls = DiskCalls(cast(Threads, threads), memory, "/cache")
        made: list[str] = []
        late: list[memoryview] = []

        def load() -> memoryview:
            made.append("load")
            return DATA

        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.watch)
            for _ in range(BLOCKS):
                with pytest.raises(DiskHangsError):
                    await calls.run(load, size_bytes=SIZE, late=late.append)
                assert memory.used_bytes == 0
                await trio.sleep(2 * AGAIN_S)
                assert not calls.hangs, "no thread has to come back"
            for call in threads.called if not makes else []:
                call()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert made == ["load"] * (BLOCKS if makes else 0)
        assert late == [DATA] * (BLOCKS if makes else 0)
        assert memory.used_bytes == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
