"""When the kernel is asked what it dropped, and what is prefetched again."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId
from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File
from lazyfs.pagecache.dropped_pages import (
    AGAIN_S,
    LONGEST_PAUSE_S,
    LOOK_BLOCKS,
    PAUSE_S,
    PAUSE_SHARE,
    DroppedPages,
)  # fmt: skip

BLOCK = 10
COUNT = 3 * LOOK_BLOCKS


class Kernel:
    """A page cache that holds files 2 and 3, and the helper process that looks at it.

    Attributes:
        gone: the blocks that it has dropped.
        takes_s: how long a look takes.
        looks: the number of blocks of each look.
        asked: what the helper was asked.
        wished: the blocks that are wanted again, for each look.
        error: raised by the helper.
    """

    block_size = BLOCK

    def __init__(self) -> None:
        self.gone: set[BlockId] = set()
        self.takes_s = 0.0
        self.asked: list[list[tuple[str, int, list[list[int]]]]] = []
        self.wished: list[list[BlockId]] = []
        self.error: Exception | None = None
        self.answer: bytes | None = None
        self._send, self._missed = trio.open_memory_channel[BlockId](9)

    def miss(self, number: int) -> None:
        self._send.send_nowait(BlockId(2, number))

    async def missed(self) -> BlockId:
        return await self._missed.receive()

    def near_after(self, block: BlockId, count: int) -> list[BlockId]:
        all_blocks = [BlockId(inode, number) for inode in (2, 3) for number in range(COUNT)]
        after = [each for each in all_blocks if each > block]
        return after[:count]

    def most_broken(self, block: BlockId) -> int:
        return block.number % 3

    def wish_again(self, blocks: Iterable[BlockId]) -> None:
        self.wished.append(list(blocks))

    def file(self, inode: int) -> File:
        return File(inode, 1, f"f{inode}", f"f{inode}", COUNT * BLOCK - 3, "e", 0)

    async def run(self, what: str, given: bytes) -> bytes:
        assert what == "dropped"
        await trio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        wanted = json.loads(given)
        self.asked.append(wanted)
        found = [
            [at for at, (begin, *_) in enumerate(parts) if (inode, begin // BLOCK) in self.gone]
            for _, inode, parts in wanted
        ]
        return self.answer or json.dumps(found).encode()


def play(steps: Callable[[Kernel], Awaitable[None]]) -> None:
    async def main() -> None:
        kernel = Kernel()
        made = DroppedPages(lambda file: f"m/{file.name}", cast(HelperProcesses, kernel), kernel)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            await steps(kernel)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_blocks_after_a_missed_one_are_looked_at_and_wanted_again() -> None:
    async def steps(kernel: Kernel) -> None:
        kernel.gone = {BlockId(2, COUNT - 1), BlockId(3, 0), BlockId(3, 7)}
        kernel.miss(COUNT - 3)
        await trio.sleep(PAUSE_S / 2)
        assert kernel.wished == [[BlockId(2, COUNT - 1), BlockId(3, 0), BlockId(3, 7)], []]
        (path, inode, parts), (other, _, rest) = kernel.asked[0]
        assert (path, inode, other) == ("m/f2", 2, "m/f3")
        last = COUNT - 1
        assert parts == [[(last - 1) * BLOCK, BLOCK, 1], [last * BLOCK, BLOCK - 3, 2]]
        assert rest == [[number * BLOCK, BLOCK, number % 3] for number in range(LOOK_BLOCKS - 2)]

    play(steps)


def test_it_looks_on_as_long_as_it_finds_something() -> None:
    async def steps(kernel: Kernel) -> None:
        kernel.miss(0)
        await trio.sleep(PAUSE_S / 2)
        assert len(kernel.asked) == 1, "all of it is there"
        await trio.sleep(PAUSE_S)
        kernel.gone = {BlockId(2, LOOK_BLOCKS), BlockId(2, LOOK_BLOCKS + 1)}
        kernel.miss(0)
        await trio.sleep(PAUSE_S / 2)
        firsts = [look[0][2][0][0] // BLOCK for look in kernel.asked]
        assert firsts == [1, 1, LOOK_BLOCKS + 1, 2 * LOOK_BLOCKS + 1], "the last ones are there"

    play(steps)


def test_the_end_of_the_model_ends_it() -> None:
    async def steps(kernel: Kernel) -> None:
        kernel.gone = {BlockId(3, COUNT - 1)}
        kernel._send.send_nowait(BlockId(3, COUNT - 2))
        kernel._send.send_nowait(BlockId(3, COUNT - 1))
        await trio.sleep(3 * PAUSE_S)
        assert kernel.wished == [[BlockId(3, COUNT - 1)], []]
        assert len(kernel.asked) == 1, "behind the last block there is nothing to look at"

    play(steps)


def test_a_block_is_wanted_again_once_in_a_while() -> None:
    async def steps(kernel: Kernel) -> None:
        kernel.gone = {BlockId(2, 1)}
        for _ in range(2):
            kernel.miss(0)
            await trio.sleep(2 * PAUSE_S)
        kernel.gone = {BlockId(2, 1), BlockId(2, 2)}
        kernel.miss(0)
        await trio.sleep(AGAIN_S)
        kernel.miss(0)
        await trio.sleep(PAUSE_S)
        wished = [blocks for blocks in kernel.wished if blocks]
        assert wished == [[BlockId(2, 1)], [BlockId(2, 2)], [BlockId(2, 1), BlockId(2, 2)]]

    play(steps)


@pytest.mark.parametrize(
    ("takes_s", "pause_s"),
    [
        (0.0, PAUSE_S),
        (2 * PAUSE_S / PAUSE_SHARE, 2 * PAUSE_S),
        (LONGEST_PAUSE_S, LONGEST_PAUSE_S),
    ],
)
def test_between_two_looks_is_a_pause(takes_s: float, pause_s: float) -> None:
    async def steps(kernel: Kernel) -> None:
        kernel.takes_s = takes_s
        kernel.miss(0)
        kernel.miss(1)
        await trio.sleep(2 * takes_s + pause_s - 0.01)
        assert len(kernel.asked) == 1
        await trio.sleep(0.02)
        assert len(kernel.asked) == 2

    play(steps)


@pytest.mark.parametrize("answer", [OSError("no process"), b"no json"], ids=["error", "text"])
def test_a_look_that_fails_is_no_more_than_that(answer: Exception | bytes) -> None:
    async def steps(kernel: Kernel) -> None:
        kernel.gone = {BlockId(2, 1)}
        kernel.error = answer if isinstance(answer, Exception) else None
        kernel.answer = answer if isinstance(answer, bytes) else None
        kernel.miss(0)
        await trio.sleep(2 * PAUSE_S)
        assert kernel.wished == [[]]
        kernel.error = kernel.answer = None
        kernel.miss(0)
        await trio.sleep(2 * PAUSE_S)
        assert [BlockId(2, 1)] in kernel.wished

    play(steps)
