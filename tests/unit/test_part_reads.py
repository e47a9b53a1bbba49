"""Reads that get a part of a block from the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import trio
from test_scheduler import BLOCK, MODEL, ON_DISK, Machine, play, until

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.file_blocks import Place
from lazyfs.cache import block_format
from lazyfs.errors import AccessDeniedError
from lazyfs.fetch import part_reads
from lazyfs.fetch.part_reads import MOST_PARTS, RECENT
from lazyfs.listed_object import File
from lazyfs.observe.events import Purpose
from lazyfs.observe.recorder import Tier

# More than half of a block is no part of it.
HALF = BLOCK // 2
PIECE = 4096
SHARD = dataclasses.replace(ON_DISK, name="g.safetensors")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of `Machine` have the size of a piece."""
    monkeypatch.setattr(block_format, "PIECE", PIECE)
    monkeypatch.setattr(part_reads, "PIECE", PIECE)


def near(machine: Machine, scenario: Callable[[trio.Nursery], object]) -> None:
    """Run a scenario with `ON_DISK` in the page cache, and out of memory."""

    async def played(nursery: trio.Nursery) -> None:
        await ready(machine)
        await scenario(nursery)  # type: ignore[misc]

    play(machine, played)


async def ready(machine: Machine) -> None:
    machine.order(ON_DISK)
    await machine.fetcher.scan([ON_DISK])
    machine.fetcher.set_known(ON_DISK, True)
    blocks = machine.prefetcher.blocks
    await until(lambda: blocks.files[ON_DISK.inode].counts[Place.NEAR] == 4)
    forget(machine, ON_DISK)


def forget(machine: Machine, file: File) -> None:
    """Memory is needed for other blocks."""
    memory = machine.fetcher._memory
    for number in range(4):
        if (held := memory.peek(BlockId(file.inode, number))) is not None:
            assert not held.users
            memory._drop(BlockId(file.inode, number))


async def read(machine: Machine, span: Span, file: File = ON_DISK) -> None:
    assert len(await machine.fetcher.read(file, span)) == span.stop - span.start


def test_a_missing_page_comes_without_its_block() -> None:
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        loaded, pushed = [*machine.disk.loaded], len(machine.pages.parts)
        used = machine.fetcher.memory_bytes
        await read(machine, Span(2, 4096, 8192))
        assert machine.disk.read_in_part == [Span(2, 4096, 8192)]
        assert machine.disk.loaded == loaded
        assert len(machine.pages.parts) == pushed
        assert machine.fetcher.memory_bytes == used, "its room is free again"
        recorder = machine.fetcher._recorder
        assert recorder.read_bytes == {Tier.DISK: 4096}
        assert recorder.loaded_bytes[Purpose.DEMAND] == 4096
        assert recorder.loaded_blocks[Purpose.DEMAND] == 0
        assert not recorder.waits

    near(machine, scenario)


def test_the_header_of_a_file_in_the_page_cache_comes_without_its_block() -> None:
    """After a resume, when a file is opened again."""
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        machine.disk.loaded.clear()
        assert await machine.fetcher.header(SHARD) == bytes(8), "zeros"
        assert machine.disk.loaded == []
        assert machine.disk.read_in_part == 2 * [Span(0, 0, 8)], "the length of the header, and all"
        machine.disk.gives_parts = False
        assert await machine.fetcher.header(SHARD) == bytes(8)
        assert machine.disk.loaded == [0]
        machine.disk.read_in_part.clear()
        assert await machine.fetcher.header(SHARD) == bytes(8)
        assert machine.disk.read_in_part == [], "it is in memory"

    near(machine, scenario)


def test_with_many_missing_pages_all_of_the_block_comes() -> None:
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        machine.disk.loaded.clear()
        parts = [Span(2, 8192 * at, 8192 * at + 4096) for at in reversed(range(MOST_PARTS))]
        for part in parts:
            await read(machine, part)
        assert (machine.disk.read_in_part, machine.disk.loaded) == (parts, [])
        await read(machine, Span(2, 8192 * MOST_PARTS, 8192 * MOST_PARTS + 4096))
        assert machine.disk.read_in_part == parts
        assert machine.disk.loaded == [2]
        await read(machine, Span(3, 0, 10))  # its reader comes from block 2, which is in memory
        assert machine.disk.loaded == [2, 3]
        await read(machine, Span(0, 0, 10))
        assert machine.disk.loaded == [2, 3]

    near(machine, scenario)


def test_a_reader_that_goes_on_gets_all_of_the_block() -> None:
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        machine.disk.loaded.clear()
        for start in (0, 20480, 4096):
            await read(machine, Span(2, start, start + 4096))
        assert machine.disk.read_in_part == [Span(2, 0, 4096), Span(2, 20480, 24576)]
        assert machine.disk.loaded == [2]

    near(machine, scenario)


def test_half_of_a_block_is_a_part_and_more_is_not() -> None:
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        await read(machine, Span(0, HALF, BLOCK))
        await read(machine, Span(2, HALF - 1, BLOCK))
        assert machine.disk.read_in_part == [Span(0, HALF, BLOCK)]

    near(machine, scenario)


def test_what_the_disk_lost_comes_from_s3() -> None:
    machine = Machine()
    machine.disk.gives_parts = False

    async def scenario(_: trio.Nursery) -> None:
        machine.disk.loaded.clear()
        await read(machine, Span(2, 0, 10))
        assert machine.disk.loaded == [2], "as a whole"
        assert machine.fetcher._recorder.read_bytes == {Tier.DISK: 10}

    near(machine, scenario)


def test_a_block_that_came_meanwhile_is_not_asked_for_again() -> None:
    machine = Machine()

    async def scenario(nursery: trio.Nursery) -> None:
        async def get_part(file: File, span: Span) -> None:
            # Another read of the block comes, and all of it is loaded.
            await read(machine, Span(2, 10, 20))

        machine.disk.loaded.clear()
        machine.fetcher._disks.get_part = get_part  # type: ignore[method-assign]
        await read(machine, Span(2, 0, 10))
        assert machine.disk.loaded == [2]
        assert machine.fetcher.memory_bytes == BLOCK

    near(machine, scenario)


def test_before_s3_has_shown_that_an_object_may_be_read_a_job_asks() -> None:
    machine = Machine(**{"access-check": "1s"})

    async def scenario(_: trio.Nursery) -> None:
        machine.fetcher._origin._access._shown_at_s.clear()
        machine.source.error = AccessDeniedError("no")
        machine.source.asked.clear()
        for _ in range(2):
            with pytest.raises(AccessDeniedError):
                await read(machine, Span(2, 0, 10))
        assert machine.source.asked == [0, 0], "once for each read"
        machine.source.error = None
        await read(machine, Span(2, 0, 10))
        assert machine.disk.read_in_part == []
        forget(machine, ON_DISK)
        await read(machine, Span(2, 20, 30))
        assert machine.disk.read_in_part == [Span(2, 20, 30)]

    near(machine, scenario)


def test_parts_take_no_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for its pieces, the read is one of a block, which waits for room."""
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        memory, parts = machine.fetcher._memory, machine.fetcher._parts
        used: list[int] = []

        async def get_part(file: File, span: Span) -> None:
            used.append(memory.used_bytes)

        monkeypatch.setattr(machine.fetcher._disks, "get_part", get_part)
        for span in (Span(0, 0, 10), Span(2, PIECE - 1, PIECE + 1), Span(0, PIECE, 2 * PIECE)):
            before = memory.used_bytes
            assert await parts.read(ON_DISK, span) is None
            assert memory.used_bytes == before
        assert used == [PIECE, 2 * PIECE, PIECE]
        memory.reserve(memory.unused_bytes)
        assert await parts.read(ON_DISK, Span(0, 4 * PIECE, 5 * PIECE)) is None
        assert len(used) == 3

    near(machine, scenario)


def test_reads_at_the_same_time_are_counted() -> None:
    """The kernel's read-ahead sends several. They begin where others end, before these do."""
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        machine.disk.loaded.clear()
        async with trio.open_nursery() as readers:
            for at in range(8):
                readers.start_soon(read, machine, Span(2, at * PIECE, (at + 1) * PIECE))
        assert len(machine.disk.read_in_part) <= 4
        assert machine.disk.loaded == [2]

    near(machine, scenario)


def test_when_all_of_a_block_came_counting_begins_anew() -> None:
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        machine.disk.loaded.clear()
        for at in range(3 * (MOST_PARTS + 1)):
            await read(machine, Span(2, 2 * at * PIECE, (2 * at + 1) * PIECE))
            forget(machine, ON_DISK)
        assert machine.disk.loaded == [2] * 3
        assert len(machine.disk.read_in_part) == 3 * MOST_PARTS

    near(machine, scenario)


def test_what_was_read_in_part_counts_as_read_when_the_block_comes() -> None:
    machine = Machine(prefetch="off")

    async def scenario(_: trio.Nursery) -> None:
        await read(machine, Span(1, 0, HALF))
        await read(machine, Span(1, HALF, BLOCK))
        held = machine.fetcher._memory.peek(BlockId(ON_DISK.inode, 1))
        assert held is not None and held.unread == 0

    play(machine, scenario)


def test_a_block_that_is_no_longer_than_a_piece_comes_as_a_whole() -> None:
    machine = Machine(prefetch="off")
    file = dataclasses.replace(ON_DISK, size_bytes=BLOCK + PIECE)

    async def scenario(_: trio.Nursery) -> None:
        await read(machine, Span(1, 0, 10), file)
        await read(machine, Span(0, 0, 10), dataclasses.replace(file, inode=9, size_bytes=20))
        assert machine.disk.read_in_part == []

    play(machine, scenario)


def test_only_the_last_parts_are_remembered() -> None:
    machine = Machine()

    async def scenario(_: trio.Nursery) -> None:
        parts = machine.fetcher._parts
        for number in range(RECENT + 1):
            parts._remember(BlockId(9, number), Span(number, 0, 10))
        assert len(parts._recent) == RECENT
        assert BlockId(9, 0) not in parts._recent

    near(machine, scenario)


@pytest.mark.parametrize(
    ("policy", "in_part"),
    [("off", True), ("headers", True), ("sequential", False), ("tensor", False), ("model", False)],
)
def test_where_nothing_is_loaded_ahead_any_block_is_read_so(policy: str, in_part: bool) -> None:
    machine = Machine(prefetch=policy)

    async def scenario(_: trio.Nursery) -> None:
        await read(machine, Span(1, 0, 10))
        assert machine.disk.read_in_part == ([Span(1, 0, 10)] if in_part else [])
        assert machine.disk.loaded == ([] if in_part else [1])
        await read(machine, Span(1, 10, 30))
        await read(machine, Span(2, 0, 10))
        assert machine.disk.loaded == [1, 2], "its reader goes on"

    play(machine, scenario)


@pytest.mark.parametrize("has_disk", [True, False])
def test_what_is_not_on_the_disk_comes_as_a_whole(has_disk: bool) -> None:
    machine = Machine(prefetch="off", has_disk=has_disk)

    async def scenario(_: trio.Nursery) -> None:
        await read(machine, Span(1, 0, 10), MODEL)
        await read(machine, Span(1, 20, 30), MODEL)
        assert machine.disk.read_in_part == ([Span(1, 0, 10)] if has_disk else [])
        assert machine.source.asked == [1]
        assert machine.fetcher._recorder.read_bytes[Tier.S3] == 10
        assert machine.fetcher._recorder.reads[Tier.DISK].count == 0

    play(machine, scenario)
