"""Misses of blocks that should be in the page cache, and what is fetched again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.fetch.missed_pages import MissedPages
from lazyfs.fetch.part_reads import MOST_PARTS
from lazyfs.listed_object import File

FILE = File(2, 1, "f", "f", 60, "e", 0)


class Desk:
    """A file whose blocks 0 to 4 are in the page cache."""

    def __init__(self) -> None:
        self.blocks = BlockMap(10)
        self.blocks.add_file(2, 60)
        self.blocks.opened(2, direct=False)
        self.changes = 0
        for number in range(5):
            self.blocks.moved(BlockId(2, number), Place.NEAR)
        self.pages = MissedPages(self.blocks, {2: FILE}, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    def request(self, number: int) -> None:
        self.pages.requested(BlockId(2, number))

    async def missed(self) -> int | None:
        """The block that was missed, if there was one."""
        with trio.move_on_after(1):
            return (await self.pages.missed()).number
        return None


def play(scenario: Callable[[Desk], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Desk())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_miss_wakes_its_waiter() -> None:
    async def scenario(desk: Desk) -> None:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                assert await desk.missed() == 3

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            desk.request(5)
            desk.request(3)
        assert await desk.missed() is None

    play(scenario)


def test_a_miss_between_two_looks_is_not_forgotten() -> None:
    async def scenario(desk: Desk) -> None:
        desk.request(1)
        assert await desk.missed() == 1
        desk.request(2)
        desk.request(4)
        assert await desk.missed() == 2, "the first of several"
        assert await desk.missed() is None

    play(scenario)


def test_only_blocks_in_the_page_cache_can_be_missed() -> None:
    async def scenario(desk: Desk) -> None:
        desk.request(5)
        desk.blocks.opened(2, direct=True)
        desk.request(1)
        assert await desk.missed() is None

    play(scenario)


def test_dropped_blocks_are_wanted_again_from_where_they_are() -> None:
    async def scenario(desk: Desk) -> None:
        following = desk.pages.near_after(BlockId(2, 0), 3)
        assert [block.number for block in following] == [1, 2, 3]
        desk.blocks.stored(BlockId(2, 2))
        desk.blocks.moved(BlockId(2, 3), Place.USED)
        desk.pages.wish_again(following)
        places = [desk.blocks.place(block) for block in following]
        assert places == [Place.ABSENT, Place.LOCAL, Place.USED]
        assert desk.changes == 1
        assert (desk.pages.block_size, desk.pages.file(2)) == (10, FILE)

    play(scenario)


def test_dropped_blocks_that_wait_for_the_disk_are_still_here() -> None:
    """The kernel may drop a page sooner than the disk has the block. S3 is not asked again."""

    async def scenario(desk: Desk) -> None:
        desk.blocks.is_held = lambda block: block.number == 2
        desk.pages.wish_again([BlockId(2, 1), BlockId(2, 2)])
        places = [desk.blocks.place(BlockId(2, number)) for number in (1, 2)]
        assert places == [Place.ABSENT, Place.LOCAL]

    play(scenario)


def test_only_of_what_is_on_the_disk_pages_may_be_missing() -> None:
    async def scenario(desk: Desk) -> None:
        desk.blocks.stored(BlockId(2, 1))
        assert [desk.pages.most_broken(BlockId(2, number)) for number in (1, 2)] == [MOST_PARTS, 0]

    play(scenario)
