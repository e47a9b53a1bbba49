"""Blocks that other daemons of the node fetch: how long they are left to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import trio
import trio.testing
from inline_threads import InlineThreads

from lazyfs.blocks import BlockId
from lazyfs.cache import BlockCache
from lazyfs.cache.other_daemons import LEASE_S, LOOK_S, OtherDaemons
from lazyfs.listed_object import File

FILE = File(2, 1, "f", "f", 100, "e", 0)
BLOCK = BlockId(2, 3)


class Disk:
    """What other daemons claim and store."""

    def __init__(self) -> None:
        self.claimed: set[int] = {3}
        self.stored: set[int] = set()
        self.waiting: set[int] = set()
        self.looks = 0

    def is_claimed(self, file: File, number: int) -> bool:
        assert file is FILE
        self.looks += 1
        return number in self.claimed

    def holds(self, file: File, number: int) -> bool:
        assert file is FILE
        return number in self.stored

    def set_waiting(self, file: File, number: int, waiting: bool) -> None:
        assert file is FILE
        (self.waiting.add if waiting else self.waiting.discard)(number)


class Node:
    """A daemon beside another one."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.found: list[tuple[int, bool]] = []
        self.calls = InlineThreads().calls
        self.others = OtherDaemons(
            cast(BlockCache, self.disk), self.calls,
            lambda block, there: self.found.append((block.number, there)),
        )  # fmt: skip

    def leave(self, *numbers: int) -> None:
        for number in numbers or (3,):
            block = BlockId(2, number)
            self.others.leave(FILE, block, self.others.take_back(FILE, block))


def play(scenario: Callable[[Node], Awaitable[None]]) -> None:
    async def main() -> None:
        node = Node()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.others.follow)
            await scenario(node)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_block_that_arrives_is_found() -> None:
    async def scenario(node: Node) -> None:
        node.leave()
        await trio.sleep(1)
        assert (node.found, node.disk.waiting) == ([], {3})
        node.disk.stored.add(3)
        node.disk.claimed.clear()
        await trio.sleep(2 * LOOK_S)
        assert (node.found, node.disk.waiting) == ([(3, True)], set())

    play(scenario)


def test_a_block_that_its_daemon_gives_up_is_left_to_another_one_again() -> None:
    async def scenario(node: Node) -> None:
        node.leave()
        node.disk.claimed.clear()
        await trio.sleep(2 * LOOK_S)
        assert node.found == [(3, False)]
        assert node.others.take_back(FILE, BLOCK) == trio.current_time() + LEASE_S

    play(scenario)


def test_a_daemon_that_takes_too_long_is_not_waited_for_again() -> None:
    async def scenario(node: Node) -> None:
        node.leave()
        await trio.sleep(LEASE_S + 2 * LOOK_S)
        assert (node.found, node.disk.waiting) == ([(3, False)], set())
        assert node.others.take_back(FILE, BLOCK) == trio.current_time()
        # But only once: after that, another daemon may have claimed the block.
        assert node.others.take_back(FILE, BLOCK) == trio.current_time() + LEASE_S

    play(scenario)


def test_a_lease_is_over_in_the_moment_in_which_it_ends() -> None:
    async def scenario(node: Node) -> None:
        lease_until = trio.current_time() + LOOK_S
        node.others.leave(FILE, BLOCK, lease_until)
        await trio.sleep(1.5 * LOOK_S)
        assert node.found == [(3, False)]

    play(scenario)


def test_a_block_that_arrives_as_the_lease_ends_is_found() -> None:
    async def scenario(node: Node) -> None:
        node.leave()
        await trio.sleep(LEASE_S)
        node.disk.stored.add(3)
        await trio.sleep(2 * LOOK_S)
        assert node.found == [(3, True)]
        assert node.others.take_back(FILE, BLOCK) == trio.current_time() + LEASE_S

    play(scenario)


def test_a_block_that_a_reader_requests_is_taken_back_with_the_rest_of_its_lease() -> None:
    async def scenario(node: Node) -> None:
        node.leave()
        lease_until = trio.current_time() + LEASE_S
        await trio.sleep(4)
        assert node.others.take_back(FILE, BLOCK) == lease_until
        assert node.disk.waiting == set()
        node.disk.stored.add(3)
        node.disk.claimed.clear()
        await trio.sleep(1)
        assert node.found == [], "it is the reader's job now"

    play(scenario)


def test_a_block_taken_back_during_the_last_look_is_not_found() -> None:
    async def scenario(node: Node) -> None:
        def holds(file: File, number: int) -> bool:
            node.others.take_back(FILE, BLOCK)
            return True

        node.disk.holds = holds  # type: ignore[method-assign]
        node.leave()
        node.disk.claimed.clear()
        await trio.sleep(1)
        assert node.found == []

    play(scenario)


def test_the_disk_is_not_checked_while_no_block_is_left_to_others() -> None:
    async def scenario(node: Node) -> None:
        await trio.sleep(10)
        assert node.disk.looks == 0
        node.leave()
        node.disk.claimed.clear()
        await trio.sleep(1)
        looks = node.disk.looks
        assert looks > 0
        await trio.sleep(10)
        assert node.disk.looks == looks
        node.disk.claimed.add(3)
        node.leave()
        node.disk.claimed.clear()
        await trio.sleep(1)
        assert len(node.found) == 2, "it looks again when another block is left"

    play(scenario)


def test_a_reader_waits_until_the_claim_is_released() -> None:
    async def scenario(node: Node) -> None:
        async with trio.open_nursery() as nursery:
            began_s = trio.current_time()
            nursery.start_soon(node.others.wait_for, FILE, 3, began_s + LEASE_S)
            await trio.sleep(2)
            assert node.disk.waiting == {3}
            node.disk.claimed.clear()
        assert 2 <= trio.current_time() - began_s <= 2 + 2 * LOOK_S
        assert node.disk.waiting == set()

    play(scenario)


def test_a_reader_waits_no_longer_than_the_lease() -> None:
    async def scenario(node: Node) -> None:
        began_s = trio.current_time()
        await node.others.wait_for(FILE, 3, began_s + LEASE_S)
        assert trio.current_time() == began_s + LEASE_S
        assert node.disk.waiting == set()

    play(scenario)


def test_blocks_are_left_to_others_one_by_one() -> None:
    async def scenario(node: Node) -> None:
        node.disk.claimed = {3, 4, 5}
        node.leave(3, 4, 5)
        node.disk.stored, node.disk.claimed = {4}, {3, 5}
        await trio.sleep(2 * LOOK_S)
        assert (node.found, node.disk.waiting) == ([(4, True)], {3, 5})
        node.disk.stored, node.disk.claimed = {3, 4, 5}, set()
        await trio.sleep(2 * LOOK_S)
        assert node.found == [(4, True), (3, True), (5, True)]
        assert node.disk.waiting == set()

    play(scenario)


def test_a_block_that_is_taken_back_keeps_no_other_from_being_found() -> None:
    async def scenario(node: Node) -> None:
        holds = node.disk.holds

        def hold_and_take_back(file: File, number: int) -> bool:
            if number == 3:
                node.others.take_back(FILE, BLOCK)
            return holds(file, number)

        node.disk.holds = hold_and_take_back  # type: ignore[method-assign]
        node.leave(3, 4)
        node.disk.stored, node.disk.claimed = {3, 4}, set()
        await trio.sleep(2 * LOOK_S)
        assert node.found == [(4, True)]

    play(scenario)


def test_what_others_stored_on_a_disk_that_hangs_is_not_there() -> None:
    async def scenario(node: Node) -> None:
        node.leave()
        node.calls.hangs = True
        node.disk.stored, node.disk.claimed = {3}, set()
        await trio.sleep(2 * LOOK_S)
        assert (node.found, node.disk.waiting) == ([(3, False)], set())
        node.calls.hangs = False
        node.leave()
        await trio.sleep(2 * LOOK_S)
        assert node.found[1:] == [(3, True)], "blocks are looked for again"

    play(scenario)


def test_a_reader_waits_for_no_daemon_while_the_disk_hangs() -> None:
    async def scenario(node: Node) -> None:
        node.calls.hangs = True
        began_s = trio.current_time()
        await node.others.wait_for(FILE, 3, began_s + LEASE_S)
        assert trio.current_time() == began_s
        assert node.disk.waiting == set()

    play(scenario)


def test_a_block_is_looked_at_again_and_again_and_not_too_often() -> None:
    async def scenario(node: Node) -> None:
        node.leave()
        await trio.sleep(1)
        assert 0.8 / LOOK_S < node.disk.looks < 1.2 / LOOK_S
        node.disk.looks = 0
        await node.others.wait_for(FILE, 3, trio.current_time() + 1)
        assert 1.6 / LOOK_S < node.disk.looks < 2.4 / LOOK_S, "of the reader as well"

    play(scenario)
