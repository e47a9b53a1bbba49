"""Blocks in the order in which they came, and tasks that wait for them."""

from __future__ import annotations

import trio
import trio.testing

from lazyfs.blocks import BlockId
from lazyfs.blocks.memory import Held
from lazyfs.blocks.queue import BlockQueue
from lazyfs.listed_object import File

FILE = File(2, 1, "f", "f", 1000, "e", 0)


def held(content: bytes) -> Held:
    return Held(FILE, memoryview(content))


def test_first_come_first_served() -> None:
    queue = BlockQueue()
    blocks = [(BlockId(2, number), held(bytes([number]))) for number in (5, 3, 4)]
    for block, content in blocks:
        queue.put(block, content)
    assert len(queue) == 3
    assert list(queue) == blocks
    assert [queue.take() for _ in blocks] == blocks
    assert len(queue) == 0


def test_a_block_can_be_taken_out_once() -> None:
    queue = BlockQueue()
    queue.put(BlockId(2, 1), held(b"a"))
    queue.put(BlockId(2, 2), held(b"b"))
    assert queue.discard(BlockId(2, 1)) is True
    assert queue.discard(BlockId(2, 1)) is False
    assert queue.take()[0] == BlockId(2, 2)


async def _see(queue: BlockQueue, seen: list[BlockId]) -> None:
    await queue.wait()
    seen.append(queue.take()[0])


def test_all_waiters_are_woken_as_blocks_arrive() -> None:
    async def run() -> None:
        queue = BlockQueue()
        seen: list[BlockId] = []
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_see, queue, seen)
                nursery.start_soon(_see, queue, seen)
                await trio.testing.wait_all_tasks_blocked()
                assert seen == []
                queue.put(BlockId(2, 1), held(b"a"))
                await trio.testing.wait_all_tasks_blocked()
                assert seen == [BlockId(2, 1)], "one block, for one of them"
                queue.put(BlockId(2, 2), held(b"b"))
        assert seen == [BlockId(2, 1), BlockId(2, 2)]

    trio.run(run)


def test_a_late_waiter_does_not_wait() -> None:
    async def run() -> None:
        queue = BlockQueue()
        queue.put(BlockId(2, 1), held(b"a"))
        with trio.fail_after(30):
            await queue.wait()
        queue.discard(BlockId(2, 1))
        with trio.move_on_after(0) as scope:
            await queue.wait()
        assert scope.cancelled_caught, "what was discarded is not waited for"

    trio.run(run)
