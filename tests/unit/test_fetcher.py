"""What the other packages ask of the blocks of a mount; what it takes from a former worker."""

from __future__ import annotations

import threading

import pytest
import trio
from test_page_map import files_of, known, tree_of
from test_scheduler import BLOCK, MODEL, ON_DISK, Machine, for_a_while, play, read, until

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.file_blocks import Place
from lazyfs.errors import AccessDeniedError
from lazyfs.fetch import fetcher
from lazyfs.handover.handover import new_near
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.page_map import PageMap


def test_blocks_that_former_workers_put_into_the_page_cache_are_not_fetched() -> None:
    machine = Machine(**{"access-check": "60s"})
    tree = tree_of({"f": 4 * BLOCK})
    file = files_of(tree)["f"]
    pages = new_near()
    former = PageMap(pages, BLOCK)
    former.write(file, 1, Place.NEAR)
    former.write(file, 2, Place.USED)

    async def scenario(nursery: trio.Nursery) -> None:
        machine.fetcher.carry(PageMap(pages, BLOCK), tree)
        machine.order(file)
        machine.fetcher.set_known(file, True)
        blocks = machine.prefetcher.blocks
        await until(lambda: blocks.files[file.inode].counts[Place.NEAR] == 3)
        assert sorted(machine.source.asked) == [0, 3]
        # What happens from now on is for the next one.
        there = {0: Place.NEAR, 1: Place.NEAR, 2: Place.USED, 3: Place.NEAR}
        assert known(pages, tree, BLOCK) == {("f", number): there[number] for number in there}
        machine.fetcher.missed_pages.wish_again([BlockId(file.inode, 1)])
        await until(lambda: blocks.place(BlockId(file.inode, 1)) is Place.NEAR)
        assert sorted(machine.source.asked) == [0, 1, 3]
        blocks.moved(BlockId(file.inode, 3), Place.ABSENT)
        assert ("f", 3) not in known(pages, tree, BLOCK)

    play(machine, scenario)


def test_a_mount_may_read_what_its_former_worker_read() -> None:
    """S3 is not asked again, which may just be what is out of order."""
    machine = Machine(**{"access-check": "60s", "prefetch": "off"})
    tree = tree_of({"f": 4 * BLOCK})
    file = files_of(tree)["f"]
    pages = new_near()
    PageMap(pages, BLOCK).write(file, 1, Place.NEAR)
    machine.disk.load_or_claim = lambda file, number: memoryview(bytes(BLOCK))  # type: ignore[method-assign]

    async def scenario(nursery: trio.Nursery) -> None:
        machine.fetcher.carry(PageMap(pages, BLOCK), tree)
        await machine.fetcher.read(file, Span(2, 0, 10))
        assert machine.source.asked == []

    play(machine, scenario)


@pytest.mark.parametrize("is_read", [False, True])
def test_files_that_are_planned_no_more_are_not_fetched_on_unless_they_are_read(
    is_read: bool,
) -> None:
    machine = Machine(**{"max-concurrency": "4"})
    machine.source.open.clear()

    async def scenario(nursery: trio.Nursery) -> None:
        machine.order(MODEL)
        async with trio.open_nursery() as readers:
            if is_read:
                readers.start_soon(read, machine, 0)
            machine.fetcher.pump()
            await until(lambda: len(machine.source.asked) == 4)
            machine.prefetcher.set_order((), [])
            machine.fetcher.abandon([ON_DISK])
            await for_a_while()
            assert machine.fetcher.in_flight == 4
            machine.fetcher.abandon([MODEL])
            await until(lambda: machine.fetcher.in_flight == is_read)
            machine.source.open.set()
        assert len(machine.source.asked) == 4

    play(machine, scenario)


def test_limits_can_be_changed_while_a_mount_runs() -> None:
    machine = Machine(has_disk=False, **{"max-concurrency": "4"})
    machine.source.open.clear()

    async def scenario(nursery: trio.Nursery) -> None:
        machine.order(MODEL)
        machine.fetcher.pump()
        await until(lambda: len(machine.source.asked) == 4)
        assert machine.fetcher.requests_limit == 4
        machine.fetcher.tune(MountOptions(max_concurrency=10))
        await until(lambda: len(machine.source.asked) == 10)
        assert machine.fetcher.requests_limit == machine.fetcher.in_flight == 10

    play(machine, scenario)


@pytest.mark.parametrize("by_reading", [False, True])
def test_nothing_is_pushed_for_a_reader_that_bypasses_the_page_cache(by_reading: bool) -> None:
    machine = Machine()
    machine.order(MODEL)

    async def scenario(nursery: trio.Nursery) -> None:
        machine.fetcher.opened(MODEL, direct=not by_reading)
        if by_reading:
            machine.fetcher.is_read_directly(MODEL)
        machine.fetcher.set_known(MODEL, True)
        await until(lambda: len(machine.disk.stored) == 20)
        await read(machine, 3)
        await for_a_while()
        assert machine.pages.pushed == []
        machine.fetcher.opened(MODEL, direct=False)
        machine.fetcher.pump()
        await until(lambda: len(machine.pages.pushed) == 20)

    play(machine, scenario)


def test_a_reader_that_misses_pages_is_noticed_if_nothing_else_explains_it() -> None:
    machine = Machine()
    machine.order(MODEL)
    machine.fetcher.set_known(MODEL, True)

    async def scenario(nursery: trio.Nursery) -> None:
        blocks = machine.prefetcher.blocks
        await until(lambda: blocks.files[MODEL.inode].counts[Place.NEAR] == 20)
        machine.disk.stored.clear()
        for number in (4, 5):
            held = machine.fetcher._memory._held.pop(BlockId(MODEL.inode, number))
            machine.fetcher._memory.release(len(held.data))
        machine.source.open.clear()
        async with trio.open_nursery() as readers:
            readers.start_soon(read, machine, 4)
            with trio.fail_after(20):
                assert await machine.fetcher.missed_pages.missed() == BlockId(MODEL.inode, 4)
            await until(lambda: machine.fetcher.in_flight == 1)
            # Another block is on its way: this one may have been, too, when the reader asked.
            readers.start_soon(read, machine, 5)
            await until(lambda: machine.fetcher.in_flight == 2)
            machine.source.open.set()
        with trio.move_on_after(0.1) as waited:
            await machine.fetcher.missed_pages.missed()
        assert waited.cancelled_caught

    play(machine, scenario)


def test_the_end_of_a_mount_waits_until_what_came_is_on_the_disk() -> None:
    machine = Machine()
    may_write = threading.Event()
    planned: list[list[int]] = []
    put = machine.disk.put_all

    def put_slowly(blocks: object) -> list[bool]:
        may_write.wait(20)
        return put(blocks)  # type: ignore[arg-type]

    machine.disk.put_all = put_slowly  # type: ignore[method-assign, assignment]
    machine.disk.care = lambda plan: planned.append([file.inode for file in plan])  # type: ignore[method-assign]

    async def scenario(nursery: trio.Nursery) -> None:
        machine.order(MODEL, ON_DISK)
        machine.fetcher.pump()
        await until(lambda: len(machine.source.asked) == 20 and not machine.fetcher.in_flight)
        ended = trio.Event()

        async def end() -> None:
            await machine.fetcher.finish_writing()
            ended.set()

        nursery.start_soon(end)
        await for_a_while()
        assert not ended.is_set()
        may_write.set()
        await ended.wait()
        assert len(machine.disk.stored) == 20
        assert planned[-1] == [MODEL.inode, ON_DISK.inode], "the cache knows what is needed next"

    play(machine, scenario)


def test_a_place_in_a_file_is_brought_with_its_block() -> None:
    machine = Machine(prefetch="off")

    async def scenario(nursery: trio.Nursery) -> None:
        for offset in (0, BLOCK - 1, 3 * BLOCK, MODEL.size_bytes - 1):
            await machine.fetcher.fetch(MODEL, offset)
        assert machine.source.asked == [0, 3, 19]
        assert machine.fetcher.memory_bytes == 3 * BLOCK
        machine.source.error = AccessDeniedError("no")
        with pytest.raises(AccessDeniedError):
            await machine.fetcher.fetch(MODEL, 7 * BLOCK)

    play(machine, scenario)


def test_idle_connections_are_closed_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "IDLE_S", 0.01)
    machine = Machine(prefetch="off")
    closed: list[float] = []
    machine.source.close_idle = closed.append  # type: ignore[attr-defined]

    async def scenario(nursery: trio.Nursery) -> None:
        await until(lambda: len(closed) > 2)
        assert closed[0] == 0.01

    play(machine, scenario)


def test_whether_the_beginning_of_a_file_is_here_or_coming() -> None:
    machine = Machine(prefetch="off")
    machine.source.open.clear()
    other = File(9, 1, "o", "o", 2 * BLOCK, "e", 0)

    async def scenario(nursery: trio.Nursery) -> None:
        for file in (MODEL, ON_DISK, other):
            machine.fetcher.add_file(file)
        assert not machine.fetcher.has_header(MODEL)
        async with trio.open_nursery() as readers:
            readers.start_soon(read, machine, 1)
            await until(lambda: machine.source.asked == [1])
            assert not machine.fetcher.is_coming(MODEL)
            readers.start_soon(read, machine, 0)
            await until(lambda: machine.source.asked == [1, 0])
            assert machine.fetcher.is_coming(MODEL)
            assert not machine.fetcher.has_header(MODEL)
            machine.source.open.set()
        assert machine.fetcher.has_header(MODEL)
        assert not machine.fetcher.is_coming(MODEL)
        assert not machine.fetcher.has_header(other)
        await machine.fetcher.scan([ON_DISK])
        assert machine.fetcher.has_header(ON_DISK)

    play(machine, scenario)


def test_a_fault_in_following_a_reader_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(prefetch="off")

    def fail(*_: object) -> bool:
        raise LookupError

    monkeypatch.setattr(machine.prefetcher, "was_read", fail)

    async def scenario(nursery: trio.Nursery) -> None:
        machine.fetcher.was_read(MODEL, 0, 10)
        await read(machine, 0)
        assert machine.source.asked == [0]

    play(machine, scenario)


def test_what_readers_get_is_counted_by_where_it_came_from() -> None:
    machine = Machine(prefetch="off")
    counted = machine.fetcher._recorder.read_bytes
    shard = File(9, 1, "s.safetensors", "s", 10 * BLOCK, "e", 0)
    machine.source.contents["s"] = (100).to_bytes(8, "little") + b"{}".ljust(100)

    async def scenario(nursery: trio.Nursery) -> None:
        await machine.fetcher.read(MODEL, Span(0, 0, 10))
        await machine.fetcher.read(MODEL, Span(0, 10, 100))
        await machine.fetcher.read(ON_DISK, Span(0, 0, 1000))
        await machine.fetcher.header(shard)  # for the planner
        await machine.fetcher.read(shard, Span(0, 0, 20))
        await machine.fetcher.read(MODEL, Span(1, 0, 10), reader=False)
        assert {tier: size for tier, size in counted.items() if size} == {
            Tier.S3: 10, Tier.MEMORY: 90 + 20, Tier.DISK: 1000,
        }  # fmt: skip

    play(machine, scenario)
