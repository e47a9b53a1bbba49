"""A cache smaller than the model: what makes room there, and for what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.fetch.disk_window import SLIDE_BLOCKS, DiskWindow
from lazyfs.fetch.disks import Disks
from lazyfs.listed_object import File
from lazyfs.prefetch.prefetcher import Prefetcher

SIZE = 10
FILES = {inode: File(inode, 1, f"f{inode}", f"f{inode}", 6 * SIZE, "e", 0) for inode in (2, 3)}


class Desk:
    """A window between a disk, a writer and a policy."""

    def __init__(self) -> None:
        self.blocks = BlockMap(SIZE)
        for inode in FILES:
            self.blocks.add_file(inode, 6 * SIZE)
        self.memory = BlockMemory(1000, SIZE, self.blocks, lambda: 1)
        self.has_refused = True
        self.consumed: list[BlockId] = []
        self.asked: list[int] = []
        self.gives_up = True
        self.given_up: list[tuple[int, list[int]]] = []
        self.kept: Callable[[BlockId], Held | None] | None = None
        self.gate = trio.Event()
        self.gate.set()
        self.window = DiskWindow(
            cast(Disks, self), cast(Prefetcher, self), self.memory, FILES,
        )  # fmt: skip

    def take_spent(self, count: int) -> list[BlockId]:
        self.asked.append(count)
        return self.consumed

    async def give_up_read(self, file: File, numbers: list[int]) -> bool:
        await self.gate.wait()
        self.given_up.append((file.inode, numbers))
        return self.gives_up

    def retry(self, kept: Callable[[BlockId], Held | None]) -> None:
        self.kept = kept

    def hold(self, number: int, *, unread: int = 1, on_disk: bool = True) -> Held:
        held = Held(FILES[2], memoryview(bytes(SIZE)), unread=unread, on_disk=on_disk)
        self.memory.hold(BlockId(2, number), held)
        return held

    async def slide(self) -> None:
        async with trio.open_nursery() as nursery:
            self.window.slide(nursery)


def play(scenario: Callable[[Desk], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Desk())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_nothing_makes_room_while_the_disk_takes_blocks() -> None:
    async def scenario(desk: Desk) -> None:
        desk.has_refused = False
        desk.consumed = [BlockId(2, 0)]
        await desk.slide()
        assert (desk.asked, desk.given_up) == ([], [])

    play(scenario)


def test_blocks_that_were_read_make_room_file_by_file() -> None:
    async def scenario(desk: Desk) -> None:
        desk.consumed = [BlockId(2, 0), BlockId(2, 1), BlockId(3, 5)]
        desk.blocks.moved(BlockId(2, 0), Place.LOCAL)
        desk.blocks.moved(BlockId(2, 1), Place.NEAR)
        held = desk.hold(1)
        await desk.slide()
        assert desk.asked == [SLIDE_BLOCKS]
        assert desk.given_up == [(2, [0, 1]), (3, [5])]
        assert desk.blocks.place(BlockId(2, 0)) == Place.USED, "it is nowhere any more"
        assert desk.blocks.place(BlockId(2, 1)) == Place.NEAR
        assert (held.on_disk, held.unread) == (False, 0), "memory may drop it"
        assert desk.kept is not None

    play(scenario)


def test_blocks_that_another_daemon_loads_stay() -> None:
    async def scenario(desk: Desk) -> None:
        desk.gives_up = False
        desk.consumed = [BlockId(2, 0)]
        desk.blocks.moved(BlockId(2, 0), Place.LOCAL)
        held = desk.hold(1)
        await desk.slide()
        assert desk.blocks.place(BlockId(2, 0)) == Place.LOCAL
        assert held.on_disk
        assert desk.kept is not None, "blocks for which there was no room are tried all the same"

    play(scenario)


def test_with_nothing_consumed_nothing_happens() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.slide()
        assert (desk.asked, desk.given_up, desk.kept) == ([SLIDE_BLOCKS], [], None)

    play(scenario)


def test_one_exchange_at_a_time() -> None:
    async def scenario(desk: Desk) -> None:
        desk.consumed = [BlockId(2, 0)]
        desk.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            desk.window.slide(nursery)
            await trio.testing.wait_all_tasks_blocked()
            desk.window.slide(nursery)
            assert desk.asked == [SLIDE_BLOCKS]
            desk.gate.set()
        await desk.slide()
        assert desk.asked == [SLIDE_BLOCKS] * 2

    play(scenario)


def test_a_fault_does_not_end_making_room_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(desk: Desk) -> None:
        desk.consumed = [BlockId(2, 0)]
        with monkeypatch.context() as patch:
            patch.setattr(desk, "give_up_read", lambda *_: 1 // 0)
            await desk.slide()
        assert desk.kept is not None
        await desk.slide()
        assert desk.given_up == [(2, [0])]

    play(scenario)


def test_unread_local_blocks_are_written_after_an_exchange() -> None:
    async def scenario(desk: Desk) -> None:
        desk.consumed = [BlockId(2, 0)]
        await desk.slide()
        assert desk.kept is not None
        wanted = desk.hold(1, on_disk=False)
        desk.hold(2, on_disk=False, unread=0)
        desk.hold(3)
        desk.hold(4, on_disk=False)
        for number, place in enumerate([Place.LOCAL] * 3 + [Place.NEAR], 1):
            desk.blocks.moved(BlockId(2, number), place)
        assert [desk.kept(BlockId(2, number)) for number in range(6)] == [
            None, wanted, None, None, None, None
        ]  # fmt: skip

    play(scenario)
