"""When a block is written to the disk, and when it is not."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId
from lazyfs.blocks.memory import Held
from lazyfs.cache import BlockCache, block_writer
from lazyfs.cache.block_writer import (
    MOST_AT_ONCE,
    MOVERS_OF_WRITER,
    WRITERS,
    WRITING_SHARE,
    BlockWriter,
)
from lazyfs.cache.disk_calls import DiskCalls, DiskHangsError
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder

FILE = File(2, 1, "f", "f", 1000, "e", 0)
LIMIT = 128  # bytes of memory: 32 of them for the queue, 16 for a batch


class Disk:
    """In the place of a cache: stores when it may, and what it may."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.released: list[int] = []
        self.ready = trio.Semaphore(0)
        self.full = False
        self.waited_for = False
        self.error: Exception | None = None

    def others_wait(self) -> bool:
        return self.waited_for

    def release(self, file: File, number: int) -> None:
        self.released.append(number)

    def put_all(self, blocks: Sequence[tuple[File, int, memoryview]]) -> list[bool]:
        self.batches.append([number for _, number, _ in blocks])
        if self.error is not None:
            raise self.error
        return [not self.full] * len(blocks)


class Desk:
    """A writer whose disk is told when to get on.

    Attributes:
        refuses: the disk begins to hang with each call.
    """

    nursery: trio.Nursery

    def __init__(self, movers: int = 0, limit_bytes: int = LIMIT) -> None:
        self.disk = Disk()
        self.hangs = False
        self.refuses = False
        self.on_change: list[Callable[[], None]] = []
        self.recorder = Recorder("model")
        self.written: dict[int, bool] = {}
        self.memory: dict[BlockId, Held] = {}
        self.writer = BlockWriter(
            cast(BlockCache, self.disk), limit_bytes, cast(DiskCalls, self), self.recorder,
            self.note, self.memory.get, movers,
        )  # fmt: skip

    def note(self, blocks: Mapping[BlockId, bool]) -> None:
        self.written |= {block.number: stored for block, stored in blocks.items()}

    async def run_to_end(self, function: Callable[..., list[bool]], blocks: object) -> list[bool]:
        """In the place of `DiskCalls.run_to_end`."""
        if self.refuses:
            self.hangs = True
            raise DiskHangsError
        await self.disk.ready.acquire()
        return function(blocks)

    def tell(self, *, hangs: bool) -> None:
        """The disk begins to hang, or answers again."""
        self.hangs = hangs
        for tell in self.on_change:
            tell()

    async def release_after(self, seconds: float) -> None:
        """Let the disk get on after some time."""
        await trio.sleep(seconds)
        self.disk.ready.release()

    def put(self, number: int, *, reader_waits: bool = False) -> Held:
        held = Held(FILE, memoryview(bytes(4)), unread=1)
        self.writer.put(BlockId(2, number), held, reader_waits=reader_waits)
        return held


Scenario = Callable[[Desk], Awaitable[None]]


def play(scenario: Scenario, desk: Desk | None = None) -> Desk:
    """Run a scenario beside a writer that is at work."""
    desk = desk or Desk()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            desk.nursery = nursery
            nursery.start_soon(desk.writer.run)
            await scenario(desk)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return desk


def test_a_block_is_used_until_it_is_on_the_disk() -> None:
    async def scenario(desk: Desk) -> None:
        held = desk.put(0)
        await trio.testing.wait_all_tasks_blocked()
        assert (held.users, held.on_disk) == (1, False)
        desk.disk.ready.release()
        await desk.writer.finish()
        assert (held.users, held.on_disk) == (0, True)

    desk = play(scenario)
    assert desk.written == {0: True}
    assert desk.recorder.written_bytes == 4


def test_blocks_that_wait_are_written_together_within_a_share_of_the_memory() -> None:
    async def scenario(desk: Desk) -> None:
        for number in range(WRITERS + 5):
            desk.put(number)
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(2 * WRITERS):
            desk.disk.ready.release()
        await desk.writer.finish()

    desk = play(scenario)
    assert sorted(map(len, desk.disk.batches)) == [1] * (WRITERS + 1) + [4]
    assert sorted(itertools.chain(*desk.disk.batches)) == list(range(WRITERS + 5))


def test_a_slow_disk_does_not_take_more_than_its_share_from_a_reader() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number, reader_waits=True) for number in range(10)]
        assert [each.users for each in held] == [1] * 8 + [0, 0]
        for _ in range(8):
            desk.disk.ready.release()
        await desk.writer.finish()
        assert desk.put(10, reader_waits=True).users == 1, "there is room again"

    desk = play(scenario)
    assert desk.writer.skipped_blocks == 2
    assert desk.disk.released == [8, 9], "another daemon may bring them"


def test_more_may_wait_for_a_slow_disk_while_another_daemon_waits_for_it() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.waited_for = True
        for number in range(18):
            desk.put(number, reader_waits=True)

    assert play(scenario).disk.released == [16, 17]


def test_skipped_blocks_are_written_later_if_still_in_memory() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number, reader_waits=True) for number in range(12)]
        desk.memory[BlockId(2, 9)], desk.memory[BlockId(2, 11)] = held[9], held[11]
        assert desk.writer.skipped_blocks == 4
        for _ in range(12):
            desk.disk.ready.release()
        await desk.writer.finish()
        assert [each.on_disk for each in held] == [True] * 8 + [False, True, False, True]

    assert play(scenario).writer.skipped_blocks == 2


def test_a_block_that_was_skipped_twice_is_written_once() -> None:
    """Memory dropped it in between, and it was fetched again."""

    async def scenario(desk: Desk) -> None:
        for number in range(8):
            desk.put(number, reader_waits=True)
        desk.put(8, reader_waits=True)
        held = desk.memory[BlockId(2, 8)] = desk.put(8, reader_waits=True)
        for _ in range(10):
            desk.disk.ready.release()
        with trio.fail_after(10):
            await desk.writer.finish()
        assert (held.users, held.on_disk) == (0, True)

    desk = play(scenario)
    assert sorted(itertools.chain(*desk.disk.batches)) == list(range(9))


def test_nothing_is_skipped_while_no_reader_waits() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number) for number in range(24)]
        assert all(each.users for each in held)

    assert play(scenario).writer.skipped_blocks == 0


def test_blocks_that_a_full_cache_refused_are_offered_again_while_needed() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.full = True
        held = [desk.put(number) for number in range(3)]
        held[1].unread = 0  # a reader has had it meanwhile
        for _ in range(3):
            desk.disk.ready.release()
        await desk.writer.finish()
        assert desk.writer.has_refused
        desk.disk.full = False
        desk.writer.retry(lambda block: held[0] if block.number == 0 else None)
        assert not desk.writer.has_refused
        desk.disk.ready.release()
        await desk.writer.finish()
        assert held[0].on_disk

    desk = play(scenario)
    assert desk.written == {0: True, 1: False, 2: False}
    assert desk.recorder.written_bytes == 4


def test_a_block_larger_than_a_batch_is_written_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_writer, "BATCH_SHARE", 1 / LIMIT)

    async def scenario(desk: Desk) -> None:
        for number in range(3):
            desk.put(number)
        for _ in range(3):
            desk.disk.ready.release()
        await desk.writer.finish()

    assert sorted(map(len, play(scenario).disk.batches)) == [1, 1, 1]


def test_a_fault_while_blocks_are_written_leaves_them_to_memory() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.error = ZeroDivisionError()
        held = desk.put(0)
        desk.disk.ready.release()
        await desk.writer.finish()
        assert (held.users, held.on_disk) == (0, False)
        desk.disk.error = None
        desk.put(1)
        desk.disk.ready.release()
        await desk.writer.finish()

    assert play(scenario).written == {0: False, 1: True}


def test_skipped_blocks_do_not_crowd_the_queue_when_they_are_written_later() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number, reader_waits=True) for number in range(20)]
        desk.memory.update({BlockId(2, number): each for number, each in enumerate(held)})
        desk.disk.ready.release()
        await trio.testing.wait_all_tasks_blocked()
        assert [number for number, each in enumerate(held) if each.users] == list(range(4, 12))
        assert desk.writer.skipped_blocks == 8
        for _ in range(20):
            desk.disk.ready.release()
        await desk.writer.finish()
        assert all(each.on_disk for each in held)

    assert play(scenario).writer.skipped_blocks == 0


def test_while_the_disk_hangs_only_what_is_being_written_stays_in_memory() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number) for number in range(30)]
        await trio.testing.wait_all_tasks_blocked()
        writing = [number for batch in desk.disk.batches for number in batch]
        assert writing == []
        desk.tell(hangs=True)
        late = desk.put(30)
        users = [each.users for each in held]
        in_use = users.count(1)
        assert users == [1] * in_use + [0] * (30 - in_use)
        assert in_use * 4 == LIMIT * WRITING_SHARE
        assert late.users == 0
        assert set(desk.disk.released) == set(range(in_use, 31)), "others may fetch them"
        assert desk.writer.skipped_blocks == 31 - in_use
        assert not desk.writer.has_refused, "the cache has room"
        desk.memory[BlockId(2, 30)] = late
        desk.tell(hangs=False)
        for _ in range(20):
            desk.disk.ready.release()
        await desk.writer.finish()
        assert desk.disk.batches[-1] == [30], "it is still there, and can be written now"
        assert desk.writer.skipped_blocks == 30 - in_use

    play(scenario)


def test_what_waited_as_the_disk_began_to_hang_is_written_when_it_answers() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number) for number in range(20)]
        await trio.testing.wait_all_tasks_blocked()
        desk.tell(hangs=True)
        waiting = [number for number, each in enumerate(held) if not each.users]
        assert waiting
        desk.memory.update({BlockId(2, number): held[number] for number in waiting[1:]})
        for _ in range(20):
            desk.disk.ready.release()
        await trio.testing.wait_all_tasks_blocked()
        assert [each.on_disk for each in held].count(True) == 20 - len(waiting)
        desk.tell(hangs=False)
        await desk.writer.finish()
        assert [number for number, each in enumerate(held) if not each.on_disk] == waiting[:1]

    assert play(scenario).writer.skipped_blocks == 1


def test_the_end_of_a_mount_does_not_wait_for_a_disk_that_hangs() -> None:
    async def scenario(desk: Desk) -> None:
        desk.put(1)
        await trio.testing.wait_all_tasks_blocked()
        desk.hangs = True
        with trio.fail_after(1):
            await desk.writer.finish()
        desk.hangs = False
        desk.disk.ready.release()

    play(scenario)


def test_a_block_that_is_larger_than_the_share_of_writing_is_written_alone() -> None:
    async def scenario(desk: Desk) -> None:
        for number in (1, 2):
            held = Held(FILE, memoryview(bytes(LIMIT // 2)), unread=1)
            desk.writer.put(BlockId(2, number), held)
        await trio.testing.wait_all_tasks_blocked()
        assert desk.disk.ready.statistics().tasks_waiting == 1
        for _ in (1, 2):
            desk.disk.ready.release()
        await desk.writer.finish()
        assert desk.disk.batches == [[1], [2]]

    play(scenario)


def test_the_end_of_a_mount_comes_as_soon_as_all_is_written() -> None:
    async def scenario(desk: Desk) -> None:
        desk.put(1)
        desk.nursery.start_soon(desk.release_after, 0.5)
        began_s = trio.current_time()
        await desk.writer.finish()
        assert 0.5 <= trio.current_time() - began_s < 0.6

    play(scenario)


@pytest.mark.parametrize(
    ("movers", "writers"),
    [(0, WRITERS), (1, WRITERS), (MOVERS_OF_WRITER * (WRITERS + 3) - 1, WRITERS + 2),
     (MOVERS_OF_WRITER * (WRITERS + 3), WRITERS + 3)],
)  # fmt: skip
def test_many_movers_have_more_writers(movers: int, writers: int) -> None:
    async def scenario(desk: Desk) -> None:
        for number in range(WRITERS + 9):
            desk.put(number)
            await trio.testing.wait_all_tasks_blocked()
        assert desk.disk.ready.statistics().tasks_waiting == writers

    play(scenario, Desk(movers, limit_bytes=1000))


def test_a_batch_has_no_more_blocks_than_an_index_changes_at_once() -> None:
    async def scenario(desk: Desk) -> None:
        for number in range(MOST_AT_ONCE + 1):
            desk.put(number)
        for _ in range(2):
            desk.disk.ready.release()
        await desk.writer.finish()

    desk = play(scenario, Desk(limit_bytes=1 << 20))
    assert sorted(map(len, desk.disk.batches)) == [1, MOST_AT_ONCE]


def test_a_skipped_block_that_came_to_the_disk_otherwise_is_not_written() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number, reader_waits=True) for number in range(11)]
        desk.memory.update({BlockId(2, number): held[number] for number in (8, 9, 10)})
        held[9].on_disk = True
        assert desk.writer.skipped_blocks == 3
        for _ in range(12):
            desk.disk.ready.release()
        await desk.writer.finish()
        assert (held[8].on_disk, held[10].on_disk) == (True, True)

    desk = play(scenario)
    assert sorted(itertools.chain(*desk.disk.batches)) == [*range(9), 10]
    assert desk.writer.skipped_blocks == 0


def test_blocks_that_were_refused_are_offered_once() -> None:
    async def scenario(desk: Desk) -> None:
        desk.disk.full = True
        held = desk.put(0)
        assert not desk.writer.has_refused
        for _ in range(2):
            desk.disk.ready.release()
            await desk.writer.finish()
            assert desk.writer.has_refused, "the cache is still full"
            desk.writer.retry(lambda _: held)
            assert not desk.writer.has_refused
        desk.disk.ready.release()
        await desk.writer.finish()
        desk.writer.retry(lambda _: None)
        assert not desk.writer.has_refused

    desk = play(scenario)
    assert desk.disk.batches == [[0]] * 3
    assert desk.recorder.written_bytes == 0


def test_each_block_that_leaves_the_queue_makes_room_for_another() -> None:
    async def scenario(desk: Desk) -> None:
        for number in range(40):
            assert desk.put(number, reader_waits=True).users == 1
            desk.disk.ready.release()
            await desk.writer.finish()
            assert not desk.disk.released

    desk = play(scenario)
    assert desk.written == dict.fromkeys(range(40), True)
    assert desk.recorder.written_bytes == 160


def test_a_disk_that_hangs_as_a_batch_begins_is_done_without() -> None:
    async def scenario(desk: Desk) -> None:
        desk.refuses = True
        held = [desk.put(number) for number in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        assert [each.users for each in held] == [0, 0, 0]
        assert desk.disk.released == [0, 1, 2], "others may fetch them"
        assert desk.writer.skipped_blocks == 3
        assert desk.written == dict.fromkeys(range(3), False)
        assert desk.disk.batches == []
        with trio.fail_after(1):
            await desk.writer.finish()

    play(scenario)
