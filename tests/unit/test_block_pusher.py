"""Which blocks are pushed into the page cache, and what a push that is stuck may hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import pytest
import trio
import trio.testing
from inline_threads import InlineThreads

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder
from lazyfs.pagecache.block_pusher import (
    LONGEST_PUSH_S,
    MOST_BLOCKS_OF_PUSHER,
    PUSHERS,
    BlockPusher,
)
from lazyfs.pagecache.page_cache import PageCache

SIZE = 100
MOST = MOST_BLOCKS_OF_PUSHER * PUSHERS
FILE = File(2, 1, "f", "f", 50 * SIZE, "e", 0)


class Pages:
    """The page cache, with what was pushed."""

    def __init__(self) -> None:
        self.supported = True
        self.takes = True
        self.room = 1000
        self.movers_take: bool | None = None
        self.movers_may = trio.Event()
        self.calls: list[list[tuple[int, int]]] = []
        self.pushed: list[tuple[int, bytes]] = []
        self.asked: list[tuple[int, int]] = []

    def budget(self, planned_bytes: Callable[[], int], unused_bytes: int) -> int:
        self.asked.append((planned_bytes(), unused_bytes))
        return self.room

    async def push_elsewhere(
        self, inode: int, parts: Sequence[tuple[int, memoryview]]
    ) -> bool | None:
        """None: there are no movers."""
        if self.movers_take is None:
            return None
        await self.movers_may.wait()
        self.calls.append([(offset // SIZE, len(data)) for offset, data in parts])
        return self.movers_take

    def push(self, inode: int, offset: int, data: memoryview) -> bool:
        self.pushed.append((offset, bytes(data)))
        return self.takes


class Policy:
    """What the prefetch policy says."""

    near_ahead_bytes = 0
    takes = True

    def takes_pages(self, block: BlockId) -> bool:
        return self.takes


class Desk:
    """A pusher with memory for some blocks."""

    def __init__(self, blocks: int = 30, movers: int = 0) -> None:
        self.pages, self.policy, self.threads = Pages(), Policy(), InlineThreads()
        self.blocks = BlockMap(SIZE)
        self.blocks.add_file(2, FILE.size_bytes)
        self.blocks.set_known(2, True)
        self.memory = BlockMemory(blocks * SIZE, SIZE, self.blocks, lambda: 1)
        self.recorder = Recorder()
        self.changes = 0
        self.pusher = BlockPusher(
            cast(PageCache, self.pages), self.blocks, self.policy, self.memory, SIZE,
            self.threads.threads, self.recorder, self._changed, movers,
        )  # fmt: skip

    def _changed(self) -> None:
        self.changes += 1

    def hold(self, number: int) -> Held:
        held = Held(FILE, memoryview(bytes([number]) * SIZE))
        self.memory.hold(BlockId(2, number), held)
        return held

    def put(self, number: int) -> Held:
        held = self.hold(number)
        self.pusher.put(BlockId(2, number), held)
        return held

    def place(self, number: int) -> Place:
        return self.blocks.place(BlockId(2, number))


def play(scenario: Callable[[Desk], Awaitable[None]], *blocks: int) -> None:
    async def main() -> None:
        desk = Desk(*blocks)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                desk.pusher.start(nursery)
                await scenario(desk)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


settled = trio.testing.wait_all_tasks_blocked


def test_blocks_are_pushed_in_their_turn() -> None:
    async def scenario(desk: Desk) -> None:
        held = [desk.put(number) for number in (3, 1, 2)]
        assert [desk.place(number) for number in (1, 2, 3)] == [Place.LOADING] * 3
        assert [each.users for each in held] == [1, 1, 1]
        await settled()
        assert desk.pages.pushed[2] == (200, bytes([2]) * SIZE)
        first = [(100, bytes([1]) * SIZE), (300, bytes([3]) * SIZE)]
        assert sorted(desk.pages.pushed[:PUSHERS]) == first, "pushed at once, in any order"
        assert [desk.place(number) for number in (1, 2, 3)] == [Place.NEAR] * 3
        assert [each.users for each in held] == [0, 0, 0]
        assert (desk.changes, desk.recorder.pushed_blocks) == (3, 3)

    play(scenario)


def test_few_blocks_are_pushed_at_once_and_few_wait_for_it() -> None:
    async def scenario(desk: Desk) -> None:
        desk.threads.hold()
        count = 0
        while desk.pusher.has_room:
            desk.put(count)
            count += 1
            await settled()
        assert (count, desk.threads.running) == (desk.pusher.most_blocks, PUSHERS)
        assert not desk.pusher.is_ready
        assert not desk.pusher.takes(BlockId(2, 40), SIZE)
        desk.threads.gate.set()
        await settled()
        assert desk.pusher.is_ready
        assert desk.pusher.takes(BlockId(2, 40), SIZE)
        assert desk.threads.most == PUSHERS
        desk.threads.hold()
        for number in range(desk.pusher.most_blocks):
            assert desk.pusher.has_room, "that of all blocks that were pushed"
            desk.put(number)
        assert not desk.pusher.has_room

    play(scenario)


@pytest.mark.parametrize("blocks, most", [(1, 1), (4, 1), (6, 2), (3 * MOST, MOST), (300, MOST)])
def test_how_many_blocks_pushes_may_hold(blocks: int, most: int) -> None:
    async def scenario(desk: Desk) -> None:
        assert desk.pusher.most_blocks == most

    play(scenario, blocks)


def test_blocks_of_unknown_inodes_stay_in_memory() -> None:
    async def scenario(desk: Desk) -> None:
        desk.pages.takes = False
        held = desk.put(1)
        await settled()
        assert (desk.place(1), held.users, desk.pusher.has_room) == (Place.LOCAL, 0, True)
        assert not desk.blocks.files[2].known
        assert (desk.recorder.pushed_blocks, desk.changes) == (0, 1)

    play(scenario)


def test_a_block_that_waits_for_its_turn_can_be_taken_back() -> None:
    async def scenario(desk: Desk) -> None:
        desk.threads.hold()
        held = [desk.put(number) for number in range(PUSHERS + 1)]
        await settled()
        last = BlockId(2, PUSHERS)
        assert desk.pusher.withdraw(last, held[-1])
        assert held[-1].users == 0
        assert not desk.pusher.withdraw(last, held[-1]), "it waits no longer"
        assert not desk.pusher.withdraw(BlockId(2, 0), held[0]), "it is being pushed"
        assert held[0].users == 1
        desk.threads.gate.set()
        await settled()
        assert len(desk.pages.pushed) == PUSHERS

    play(scenario)


def test_around_a_reader_the_rest_of_its_block_is_pushed_before_the_answer() -> None:
    async def scenario(desk: Desk) -> None:
        held = desk.hold(1)
        waiting = [Span(1, 20, 30), Span(1, 70, 100)]
        began_s = trio.current_time()
        await desk.pusher.push_around(BlockId(2, 1), held, waiting)
        assert trio.current_time() == began_s
        assert [(at, len(data)) for at, data in desk.pages.pushed] == [(100, 20), (130, 40)]
        assert (desk.place(1), held.users, desk.changes) == (Place.NEAR, 0, 2)
        assert desk.pusher.has_room

    play(scenario)


def test_a_reader_waits_for_a_stuck_push_only_a_moment() -> None:
    async def scenario(desk: Desk) -> None:
        desk.threads.hold()
        held = desk.hold(1)
        began_s = trio.current_time()
        await desk.pusher.push_around(BlockId(2, 1), held, [Span(1, 0, 10)])
        assert trio.current_time() == pytest.approx(began_s + LONGEST_PUSH_S)
        assert (desk.place(1), held.users) == (Place.LOADING, 1)
        desk.threads.gate.set()
        await settled()
        assert (desk.place(1), held.users) == (Place.NEAR, 0)

    play(scenario)


def test_how_far_the_page_cache_is_filled_ahead_of_readers() -> None:
    async def scenario(desk: Desk) -> None:
        desk.blocks.opened(2, direct=False)
        desk.memory.reserve(300)
        desk.policy.near_ahead_bytes = 850
        assert desk.pusher.allowance == 150
        assert desk.pages.asked == [(FILE.size_bytes, 2700)]
        block = BlockId(2, 1)
        assert desk.pusher.takes(block, 150)
        assert not desk.pusher.takes(block, 151)
        desk.policy.takes = False
        assert not desk.pusher.takes(block, 100)
        assert desk.pusher.is_ready
        desk.pages.supported = False
        assert not desk.pusher.is_ready

    play(scenario)


def test_a_mover_pushes_several_blocks_of_a_file_if_many_wait() -> None:
    async def scenario(desk: Desk) -> None:
        desk.pages.movers_take = True
        other = File(3, 1, "g", "g", SIZE, "e", 0)
        desk.blocks.add_file(3, SIZE)
        held = [desk.put(number) for number in range(7)]
        desk.pusher.put(BlockId(3, 0), another := Held(other, memoryview(bytes(SIZE))))
        await settled()
        assert desk.pages.calls == [], "both pushers are busy"
        assert [each.users for each in held] == [1] * 7
        desk.pages.movers_may.set()
        await settled()
        calls = sorted(call[0][0] for call in desk.pages.calls)
        assert calls == [0, 0, 4, 6], "a half of what waits, then a half of the rest, of one file"
        assert sum(map(len, desk.pages.calls)) == 8
        assert [desk.place(number) for number in range(7)] == [Place.NEAR] * 7
        assert [each.users for each in (*held, another)] == [0] * 8
        assert desk.recorder.pushed_blocks == 8
        assert desk.pusher.has_room

    play(scenario, 30, 2)


def test_blocks_that_a_mover_could_not_push_stay_here() -> None:
    async def scenario(desk: Desk) -> None:
        desk.pages.movers_take = False
        desk.pages.movers_may.set()
        held = [desk.put(number) for number in range(4)]
        await settled()
        assert [desk.place(number) for number in range(4)] == [Place.LOCAL] * 4
        assert not desk.blocks.files[2].known
        assert [each.users for each in held] == [0] * 4
        assert desk.recorder.pushed_blocks == 0

    play(scenario, 30, 2)
