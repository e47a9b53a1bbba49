"""What the scheduler starts, what it leaves alone, and what room it gives back."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import Held
from lazyfs.cache import BlockCache, Claim, other_daemons
from lazyfs.errors import AccessDeniedError, SourceError, UnavailableError
from lazyfs.fetch import hedger, scheduler
from lazyfs.fetch.concurrency import START
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.fetch.scheduler import BESIDE_FIRST, LOADERS, URGENT_EXTRA
from lazyfs.listed_object import File
from lazyfs.observe.events import Activity
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.cancel import Cancel
from lazyfs.store.protocol import Store

BLOCK = 256 << 10
BLOCKS = 20
MODEL = File(2, 1, "f", "f", BLOCKS * BLOCK, "e", 0)
ON_DISK = File(3, 1, "g", "g", 4 * BLOCK, "e", 0)
# More than fits into memory.
LARGE = File(4, 1, "h", "h", 300 * BLOCK, "e", 0)


class Source:
    """Gives zeros, contents, an error, or nothing before it is opened."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.open = threading.Event()
        self.open.set()
        self.error: SourceError | None = None
        self.asked: list[int] = []
        self.keys: set[str] = set()
        self.broken: set[str] = set()

    def name(self, key: str) -> str:
        return key

    @property
    def ranges(self) -> Source:
        return self

    def read(self, pin: File, start: int, length: int, cancel: Cancel) -> memoryview:
        self.asked.append(start // BLOCK)
        self.keys.add(pin.key)
        self.open.wait(20)
        if pin.key in self.broken:
            raise UnavailableError("not now")
        if self.error is not None:
            raise self.error
        content = self.contents.get(pin.key, b"")[start : start + length]
        return memoryview(content.ljust(length, b"\0"))


class Disk:
    """Holds all of one file; of others some blocks may be claimed by another daemon."""

    def __init__(self) -> None:
        self.claimed: set[int] = set()
        self.waiting: set[int] = set()
        self.released: list[int] = []
        self.stored: list[int] = []
        self.loaded: list[int] = []
        self.read_in_part: list[Span] = []
        self.gives_parts = True
        self.keeps = True

    def load_or_claim(self, file: File, number: int) -> memoryview | Claim:
        if file.inode == ON_DISK.inode:
            self.loaded.append(number)
            return memoryview(bytes(BLOCK))
        return Claim.THEIRS if number in self.claimed else Claim.OURS

    def load_part(self, file: File, span: Span) -> memoryview | None:
        self.read_in_part.append(span)
        is_here = self.gives_parts and (file.inode == ON_DISK.inode or span.number in self.stored)
        return memoryview(bytes(span.stop - span.start)) if is_here else None

    def put_all(self, blocks: Sequence[tuple[File, int, memoryview]]) -> list[bool]:
        if self.keeps:
            self.stored += [number for _, number, _ in blocks]
        return [self.keeps] * len(blocks)

    def present(self, file: File) -> list[int]:
        return [0, 1, 2, 3] if file.inode == ON_DISK.inode else []

    def holds(self, file: File, number: int) -> bool:
        return number in self.stored

    def release(self, file: File, number: int) -> None:
        self.released.append(number)

    def is_claimed(self, file: File, number: int) -> bool:
        return number in self.claimed

    def set_waiting(self, file: File, number: int, waiting: bool) -> None:
        self.waiting = self.waiting | {number} if waiting else self.waiting - {number}

    def others_wait(self) -> bool:
        return False

    name = "/cache"

    def parts(self) -> list[Disk]:
        return [self]

    def has_place_for(self, file: File, number: int) -> bool:
        return True

    def set_loading(self, file: File) -> None:
        pass

    def announce(self, files: Iterable[File]) -> None:
        pass

    def care(self, plan: Iterable[File]) -> None:
        pass


class Pages:
    """Takes whatever is pushed."""

    supported = True

    def __init__(self) -> None:
        self.pushed: list[int] = []
        self.parts: list[tuple[int, int]] = []

    def budget(self, planned_bytes: object, unused_bytes: int) -> int:
        return 1 << 40

    async def push_elsewhere(self, inode: int, parts: object) -> None:
        """There are no movers."""

    def push(self, inode: int, offset: int, data: memoryview) -> bool:
        self.pushed.append(inode)
        self.parts.append((offset, len(data)))
        return True


@pytest.fixture(autouse=True)
def _no_second_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, requests may take longer than usual."""
    monkeypatch.setattr(hedger, "HEDGES", 0)


class Machine:
    """A fetcher between these."""

    def __init__(self, *, has_disk: bool = True, **options: str) -> None:
        self.source, self.disk, self.pages = Source(), Disk(), Pages()
        # Requests for one byte are the matter of test_read_access.py.
        texts = {
            "block-size": "256KiB", "memory-limit": "64MiB", "access-check": "0s", **options
        }  # fmt: skip
        parsed = MountOptions.parse(("{name}", texts))
        self.prefetcher = Prefetcher(parsed.prefetch, BlockMap(BLOCK))
        self.fetcher = BlockFetcher(
            cast(Store, self.source), cast(BlockCache, self.disk) if has_disk else None,
            cast(PageCache, self.pages), self.prefetcher, parsed, Recorder(parsed.prefetch),
        )  # fmt: skip

    def order(self, *files: File) -> None:
        for file in files:
            self.fetcher.add_file(file)
        self.prefetcher.set_order((), [file.inode for file in files])


def play(machine: Machine, scenario: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(240):
            async with trio.open_nursery() as nursery:
                machine.fetcher.start(nursery)
                try:
                    await scenario(nursery)
                finally:
                    machine.source.open.set()
                nursery.cancel_scope.cancel()

    trio.run(main)


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await trio.sleep(0.005)


async def for_a_while() -> None:
    """Long enough for what should not happen."""
    await trio.sleep(0.1)


async def read(machine: Machine, number: int) -> None:
    await machine.fetcher.read(MODEL, Span(number, 0, 10))


def test_fetched_blocks_are_stored_once_and_their_room_is_reused() -> None:
    machine = Machine()
    machine.order(MODEL)

    async def scenario(nursery: trio.Nursery) -> None:
        await until(lambda: len(machine.disk.stored) == BLOCKS)
        assert sorted(machine.source.asked) == sorted(machine.disk.stored) == list(range(BLOCKS))

    play(machine, scenario)


@pytest.mark.parametrize(("reader", "pushed"), [(False, (0, BLOCK)), (True, (10, BLOCK - 10))])
def test_only_what_a_reader_waits_for_is_left_out_of_a_push(
    reader: bool, pushed: tuple[int, int]
) -> None:
    """What the planner reads of a header is no part of a page that the kernel locks."""
    machine = Machine(prefetch="off")

    async def scenario(nursery: trio.Nursery) -> None:
        machine.fetcher.set_known(MODEL, True)
        await machine.fetcher.read(MODEL, Span(0, 0, 10), reader=reader)
        await until(lambda: machine.pages.parts == [pushed])

    play(machine, scenario)


def test_blocks_that_another_daemon_fetches_take_no_room() -> None:
    machine = Machine()
    machine.disk.claimed = set(range(BLOCKS))
    machine.order(MODEL)

    async def scenario(nursery: trio.Nursery) -> None:
        await until(lambda: machine.disk.waiting == machine.disk.claimed)
        await until(lambda: machine.fetcher.in_flight == 0)
        assert machine.fetcher.memory_bytes == 0
        assert machine.source.asked == []
        machine.disk.claimed = set()  # it has given up
        await until(lambda: len(machine.disk.stored) == BLOCKS)

    play(machine, scenario)


def test_a_reader_tells_other_daemons_that_it_waits_for_their_block() -> None:
    machine = Machine(prefetch="off")
    machine.disk.claimed = {5}

    async def scenario(nursery: trio.Nursery) -> None:
        async with trio.open_nursery() as readers:
            readers.start_soon(read, machine, 5)
            await until(lambda: machine.disk.waiting == {5})
            assert machine.source.asked == []
            machine.disk.claimed = set()
        assert machine.source.asked == [5]
        assert machine.disk.waiting == set()

    play(machine, scenario)


def test_a_daemon_that_does_not_deliver_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_daemons, "LEASE_S", 0.1)
    machine = Machine()
    machine.disk.claimed = set(range(BLOCKS))  # and stays so
    machine.order(MODEL)

    async def scenario(nursery: trio.Nursery) -> None:
        await until(lambda: len(machine.disk.stored) == BLOCKS)
        assert sorted(machine.source.asked) == list(range(BLOCKS))

    play(machine, scenario)


@pytest.mark.parametrize("place", [Place.ABSENT, Place.USED])
def test_a_block_that_is_found_on_the_disk_is_on_this_machine(place: Place) -> None:
    machine = Machine(prefetch="off")
    machine.fetcher.add_file(ON_DISK)
    block = BlockId(ON_DISK.inode, 1)

    async def scenario(nursery: trio.Nursery) -> None:
        machine.prefetcher.blocks.moved(block, place)
        await machine.fetcher.scan([ON_DISK])
        assert machine.prefetcher.blocks.place(block) is Place.LOCAL

    play(machine, scenario)


def test_blocks_are_not_loaded_from_the_disk_because_pushes_are_slow() -> None:
    """They were in memory. A fast link waits for the page cache instead."""
    machine = Machine()
    machine.fetcher._memory._limit_bytes = 16 * BLOCK  # less than the model
    machine.order(MODEL)
    machine.fetcher.set_known(MODEL, True)
    loads: list[int] = []
    machine.disk.load_or_claim = (  # type: ignore[method-assign]
        lambda file, number: (
            loads.append(number) or memoryview(bytes(BLOCK))  # type: ignore[func-returns-value]
            if number in machine.disk.stored
            else Claim.OURS
        )
    )
    push = machine.pages.push

    def push_slowly(inode: int, offset: int, data: memoryview) -> bool:
        time.sleep(0.01)
        return push(inode, offset, data)

    machine.pages.push = push_slowly  # type: ignore[method-assign]

    async def scenario(nursery: trio.Nursery) -> None:
        near = machine.prefetcher.blocks.files[MODEL.inode].counts
        await until(lambda: near[Place.NEAR] == BLOCKS)
        assert loads == []

    play(machine, scenario)


def test_a_block_that_waits_to_be_pushed_is_pushed_around_its_reader() -> None:
    machine = Machine()
    machine.order(MODEL)
    machine.fetcher.set_known(MODEL, True)
    may_end = threading.Event()
    push = machine.pages.push

    def stuck(inode: int, offset: int, data: memoryview) -> bool:
        pushed = push(inode, offset, data)
        may_end.wait(20)
        return pushed

    machine.pages.push = stuck  # type: ignore[method-assign]

    async def scenario(nursery: trio.Nursery) -> None:
        queue = machine.fetcher._pusher._queue
        try:
            await until(lambda: len(queue) > 0)
            number = next(iter(queue))[0].number
            await read(machine, number)
            await until(lambda: (number * BLOCK + 10, BLOCK - 10) in machine.pages.parts)
            assert machine.source.asked.count(number) == 1
        finally:
            may_end.set()

    play(machine, scenario)


def test_a_block_in_memory_is_not_fetched_again() -> None:
    """The kernel forgot a file that lay in the page cache, and then it is read again."""
    machine = Machine()
    machine.order(MODEL)
    machine.disk.put_all = lambda blocks: [False] * len(blocks)  # type: ignore[method-assign]

    async def scenario(nursery: trio.Nursery) -> None:
        blocks = machine.prefetcher.blocks
        machine.fetcher.set_known(MODEL, True)
        await until(lambda: blocks.files[MODEL.inode].counts[Place.NEAR] == BLOCKS)
        machine.fetcher.set_known(MODEL, False)
        assert blocks.files[MODEL.inode].counts[Place.USED] == BLOCKS
        machine.fetcher.set_known(MODEL, True)
        machine.fetcher.was_read(MODEL, 0, 10)
        await read(machine, 0)
        await until(lambda: blocks.files[MODEL.inode].counts[Place.NEAR] == BLOCKS)
        assert sorted(machine.source.asked) == list(range(BLOCKS))

    play(machine, scenario)


def test_a_block_that_failed_takes_no_room_and_no_claim() -> None:
    machine = Machine()
    machine.source.error = AccessDeniedError("no")
    machine.order(MODEL)

    async def scenario(nursery: trio.Nursery) -> None:
        await until(lambda: len(machine.disk.released) == BLOCKS)
        await until(lambda: machine.fetcher.in_flight == 0)
        assert machine.fetcher.memory_bytes == 0
        assert machine.fetcher.trouble
        with pytest.raises(AccessDeniedError):
            await read(machine, 3)
        assert machine.fetcher.memory_bytes == 0

    play(machine, scenario)


def test_readers_of_one_block_share_a_request() -> None:
    machine = Machine(prefetch="off")
    machine.source.open.clear()

    async def scenario(nursery: trio.Nursery) -> None:
        async with trio.open_nursery() as readers:
            for _ in range(5):
                readers.start_soon(read, machine, 7)
            await until(lambda: bool(machine.source.asked))
            await for_a_while()
            machine.source.open.set()
        assert machine.source.asked == [7]

    play(machine, scenario)


def test_a_pause_stops_what_is_read_ahead_from_the_disk_too() -> None:
    machine = Machine()
    machine.fetcher.pause(True)

    async def scenario(nursery: trio.Nursery) -> None:
        await machine.fetcher.scan([ON_DISK])
        machine.order(ON_DISK)
        machine.fetcher.set_known(ON_DISK, True)
        await for_a_while()
        assert machine.disk.loaded == []
        machine.fetcher.pause(False)
        await until(lambda: machine.pages.pushed == [ON_DISK.inode] * 4)

    play(machine, scenario)


def test_read_ahead_from_the_disk_waits_for_demand() -> None:
    machine = Machine(**{"max-concurrency": "1"})
    machine.source.open.clear()
    demanded = URGENT_EXTRA + 2

    async def scenario(nursery: trio.Nursery) -> None:
        await machine.fetcher.scan([ON_DISK])
        async with trio.open_nursery() as readers:
            for number in range(demanded):
                readers.start_soon(read, machine, number)
            await until(lambda: len(machine.source.asked) == demanded - 1)
            machine.order(ON_DISK)
            machine.fetcher.set_known(ON_DISK, True)
            await for_a_while()
            assert machine.disk.loaded == [], "one reader has not got a request yet"
            machine.source.open.set()
        await until(lambda: len(machine.disk.loaded) == 4)

    play(machine, scenario)


def test_other_files_leave_the_link_to_the_first_file_that_a_reader_waits_for() -> None:
    machine = Machine()
    first = File(5, 1, "first", "first", 4 * BLOCK, "e", 0)
    held_back = START - int(START * BESIDE_FIRST)

    async def scenario(nursery: trio.Nursery) -> None:
        machine.order(first, LARGE)
        machine.source.open.clear()
        machine.prefetcher.was_read(first.inode, 3 * BLOCK, 10)
        async with trio.open_nursery() as readers:
            readers.start_soon(machine.fetcher.read, first, Span(3, 0, 10))
            await until(lambda: machine.fetcher.in_flight == START - held_back)
            await for_a_while()
            assert machine.fetcher.in_flight == START - held_back
            machine.source.open.set()
        await until(lambda: len(machine.source.asked) > 100)

    assert held_back
    play(machine, scenario)


async def until_memory_is_full(machine: Machine) -> None:
    """All is prefetched for which there is room; nobody reads it, and the disk does not keep it."""
    machine.disk.keeps = False
    machine.order(LARGE)
    machine.fetcher.pump()
    await until(lambda: len(machine.source.asked) > 150 and machine.fetcher.in_flight == 0)


def test_a_reader_gets_the_room_of_what_was_prefetched_last() -> None:
    machine = Machine()

    async def scenario(nursery: trio.Nursery) -> None:
        await until_memory_is_full(machine)
        for number in range(299, 235, -1):
            await machine.fetcher.read(LARGE, Span(number, 0, 10))
        await machine.fetcher.read(LARGE, Span(0, 0, 10))
        assert machine.source.asked.count(0) == 1, "what is read first is still there"

    play(machine, scenario)


def test_the_room_of_a_block_that_was_read_is_used_at_once() -> None:
    machine = Machine()

    async def scenario(nursery: trio.Nursery) -> None:
        await until_memory_is_full(machine)
        count = len(machine.source.asked)
        await machine.fetcher.read(LARGE, Span(0, 0, BLOCK // 2))
        await for_a_while()
        assert len(machine.source.asked) == count, "half of it is still to be read"
        await machine.fetcher.read(LARGE, Span(0, BLOCK // 2, BLOCK))
        await until(lambda: len(machine.source.asked) > count)

    play(machine, scenario)


def test_what_is_on_the_disk_is_read_ahead_although_memory_is_full() -> None:
    machine = Machine()

    async def scenario(nursery: trio.Nursery) -> None:
        await until_memory_is_full(machine)
        await machine.fetcher.scan([ON_DISK])
        machine.order(ON_DISK, LARGE)
        machine.fetcher.set_known(ON_DISK, True)
        await until(lambda: machine.pages.pushed == [ON_DISK.inode] * 4)

    play(machine, scenario)


@pytest.mark.parametrize(("rest_s", "goes_on"), [(3600.0, False), (0.0, True)])
def test_a_fault_of_the_policy_ends_prefetching_for_a_while(
    rest_s: float, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        raise LookupError

    monkeypatch.setattr(machine.prefetcher, "next_fetch", fail)
    monkeypatch.setattr(scheduler, "AHEAD_REST_S", rest_s)
    machine.order(MODEL)

    async def scenario(nursery: trio.Nursery) -> None:
        await until(lambda: calls >= 1)
        for number in range(3):
            await read(machine, number)
        machine.fetcher.pump()
        assert (calls > 1) == goes_on

    play(machine, scenario)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_reader_that_goes_away_leaves_nothing_behind(has_begun: bool) -> None:
    machine = Machine(**{"max-concurrency": "1", "prefetch": "off"})
    machine.source.open.clear()

    async def scenario(nursery: trio.Nursery) -> None:
        others = 0 if has_begun else URGENT_EXTRA + 1
        async with trio.open_nursery() as readers:
            for number in range(others):
                readers.start_soon(read, machine, number)
            await until(lambda: len(machine.source.asked) == others)
            going = trio.CancelScope()

            async def go() -> None:
                with going:
                    await read(machine, 15)

            readers.start_soon(go)
            if has_begun:
                await until(lambda: 15 in machine.source.asked)
            else:
                await trio.testing.wait_all_tasks_blocked()
                assert 15 not in machine.source.asked
            going.cancel()
            machine.source.open.set()
        await until(lambda: machine.fetcher.in_flight == 0)
        await read(machine, 15)
        assert machine.source.asked.count(15) == 1

    play(machine, scenario)


def test_bytes_on_the_disk_are_counted_to_the_end_of_the_file() -> None:
    machine = Machine(prefetch="off")
    short = replace(ON_DISK, size_bytes=4 * BLOCK - 5)

    async def scenario(nursery: trio.Nursery) -> None:
        assert await machine.fetcher.cached_bytes(short) == 4 * BLOCK - 5
        assert await machine.fetcher.cached_bytes(MODEL) == 0

    play(machine, scenario)


def test_without_a_disk_nothing_is_there() -> None:
    machine = Machine(has_disk=False, prefetch="off")

    async def scenario(nursery: trio.Nursery) -> None:
        await machine.fetcher.scan([MODEL])
        await read(machine, 3)
        assert await machine.fetcher.cached_bytes(MODEL) == 0
        assert machine.fetcher.shed_blocks == 0
        assert machine.source.asked == [3]

    play(machine, scenario)


def test_a_reader_that_goes_away_just_when_its_block_comes_frees_it() -> None:
    machine = Machine(prefetch="off")
    block, span = BlockId(MODEL.inode, 0), Span(0, 0, 10)

    async def scenario(nursery: trio.Nursery) -> None:
        machine.fetcher.add_file(MODEL)
        scheduler = machine.fetcher._scheduler
        job = scheduler.demand(block, span)
        for _ in range(2):
            assert scheduler.demand(block, span) is job
        scheduler.pump()
        await job.done.wait()
        assert job.held is not None
        counts = [job.held.users]
        for _ in range(3):
            scheduler.leave(job, span)
            counts.append(job.held.users)
        assert counts == list(range(counts[0], counts[0] - 4, -1))
        assert counts[0] >= 3, "each of the three readers holds it"

    play(machine, scenario)


@pytest.mark.parametrize(("blocks", "is_here"), [(1, False), (10, False), (10, True)])
def test_a_header_is_fetched_once_with_its_block_or_without(blocks: int, is_here: bool) -> None:
    machine = Machine(prefetch="off")
    header = (100).to_bytes(8, "little") + b"{}".ljust(100)
    shard = File(5, 1, "s.safetensors", "s", blocks * BLOCK, "e", 0)
    machine.source.contents["s"] = header
    # A small shard comes whole; of a large one, the header comes by itself.
    comes_with_block = blocks == 1 or is_here

    async def scenario(nursery: trio.Nursery) -> None:
        if is_here:
            await machine.fetcher.read(shard, Span(0, 0, 10))
        for _ in range(2):
            assert await machine.fetcher.header(shard) == header
        assert machine.source.asked == [0]
        assert machine.fetcher.has_header(shard)
        assert machine.fetcher.head(shard)[:108] == (b"" if comes_with_block else header)
        await machine.fetcher.read(shard, Span(0, BLOCK - 10, BLOCK))
        assert len(machine.source.asked) == (1 if comes_with_block else 2)

    play(machine, scenario)


def others(count: int) -> list[File]:
    return [File(10 + n, 1, f"o{n}", f"o{n}", 2 * BLOCK, "e", 0) for n in range(count)]


class Refusing:
    """A machine without a disk whose S3 refuses an object, and has answered one request at once."""

    def __init__(self, **options: str) -> None:
        self.machine = Machine(has_disk=False, **{"prefetch": "off", **options})
        self.machine.source.broken.add(LARGE.key)
        self.machine.fetcher._getter._concurrency.limit = 1
        self.jobs = self.machine.fetcher._jobs
        self.most = 1 + URGENT_EXTRA

    async def wants(self, file: File, number: int) -> None:
        await self.machine.fetcher.read(file, Span(number, 0, 10))

    async def fill(self, nursery: trio.Nursery, count: int = 4) -> None:
        """Have more readers wait for the refused object than there are places for requests."""
        for number in range(self.most + count):
            nursery.start_soon(self.wants, LARGE, number)
        await until(lambda: self.jobs._pausing[LARGE.key] == self.most)
        assert self.jobs.fetching == self.most, "of this object there are enough"


def test_an_object_that_s3_does_not_give_holds_up_no_other_one() -> None:
    """Its requests pause most of the time, and take the places of all requests meanwhile."""
    refusing = Refusing()

    async def scenario(nursery: trio.Nursery) -> None:
        await refusing.fill(nursery)
        # What was wrong with another object once says nothing about now.
        refusing.machine.fetcher._getter.troubles[MODEL.key] = "it was not well"
        for number in range(3):
            with trio.fail_after(5):
                await refusing.wants(MODEL, number)
        assert refusing.jobs.fetching <= refusing.most + 1

    play(refusing.machine, scenario)
    assert not refusing.jobs._pausing


def test_an_object_that_s3_does_not_give_does_not_stop_prefetching() -> None:
    refusing = Refusing(prefetch="model")

    async def scenario(nursery: trio.Nursery) -> None:
        await refusing.fill(nursery)
        refusing.machine.order(MODEL)
        refusing.machine.fetcher.pump()
        with trio.fail_after(20):
            await until(lambda: MODEL.key in refusing.machine.source.keys)

    play(refusing.machine, scenario)


def test_an_s3_that_refuses_all_objects_is_asked_for_few() -> None:
    refusing = Refusing()
    files = others(40)
    refusing.machine.source.broken |= {file.key for file in files}

    async def scenario(nursery: trio.Nursery) -> None:
        await refusing.fill(nursery)
        for file in files:
            nursery.start_soon(refusing.wants, file, 0)
        for _ in range(10):
            await for_a_while()
            assert refusing.jobs.fetching <= 2 * refusing.most

    play(refusing.machine, scenario)


def test_blocks_that_s3_does_not_give_leave_room_for_others() -> None:
    """Otherwise demand would wait for them, as it waits for blocks on their way to readers."""
    refusing = Refusing()

    async def scenario(nursery: trio.Nursery) -> None:
        await refusing.fill(nursery)
        memory = refusing.machine.fetcher._memory
        while memory.unused_bytes >= BLOCK:  # what was prefetched, and is not read yet
            number = len(memory._held)
            memory.reserve(BLOCK)
            memory.hold(
                BlockId(LARGE.inode, 100 + number), Held(LARGE, memoryview(bytes(BLOCK)), unread=1)
            )
        with trio.fail_after(5):
            await refusing.wants(MODEL, 0)

    play(refusing.machine, scenario)


def test_what_prefetching_does_is_known() -> None:
    """`lazyfs status` and the report of a load say so."""
    machine = Machine()
    recorder = machine.fetcher._recorder

    async def scenario(nursery: trio.Nursery) -> None:
        assert recorder.activity is Activity.DONE
        machine.source.open.clear()
        machine.order(MODEL)
        machine.fetcher.pump()
        assert recorder.activity is Activity.FETCHING
        machine.fetcher.pause(True)
        assert recorder.activity is Activity.PAUSED
        machine.fetcher.pause(False)
        assert recorder.activity is Activity.FETCHING
        machine.source.open.set()
        await until(lambda: recorder.activity is Activity.DONE)
        await until(lambda: len(machine.source.asked) == BLOCKS)
        await until_memory_is_full(machine)
        await until(lambda: recorder.activity is Activity.NO_ROOM)

    play(machine, scenario)


def test_prefetching_waits_for_readers_that_have_no_request_yet() -> None:
    machine = Machine(**{"max-concurrency": "1"})
    machine.source.open.clear()
    recorder = machine.fetcher._recorder

    async def scenario(nursery: trio.Nursery) -> None:
        async with trio.open_nursery() as readers:
            for number in range(URGENT_EXTRA + 2):
                readers.start_soon(read, machine, number)
            await until(lambda: len(machine.source.asked) == URGENT_EXTRA + 1)
            machine.order(MODEL)
            machine.fetcher.pump()
            assert recorder.activity is Activity.DEMAND
            assert machine.fetcher.in_flight == URGENT_EXTRA + 1
            machine.source.open.set()
        await until(lambda: recorder.activity is Activity.DONE)

    play(machine, scenario)


@pytest.mark.parametrize(
    ("movers", "hangs", "loads"), [("0", False, LOADERS), ("4", False, 4), ("0", True, START)]
)
def test_few_blocks_are_read_ahead_from_the_disk_at_once(
    movers: str, hangs: bool, loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But when it hangs, all come from S3, where many at once are faster."""
    machine = Machine(movers=movers)
    large = replace(LARGE, inode=ON_DISK.inode, size_bytes=100 * BLOCK)
    may_load = threading.Event()
    loading: list[int] = []

    def load(file: File, number: int) -> memoryview:
        loading.append(number)
        may_load.wait(20)
        return memoryview(bytes(BLOCK))

    monkeypatch.setattr(machine.disk, "load_or_claim", load)
    monkeypatch.setattr(machine.disk, "present", lambda file: list(range(100)))

    async def scenario(nursery: trio.Nursery) -> None:
        try:
            machine.fetcher._scheduler.disk_hangs = hangs
            await machine.fetcher.scan([large])
            machine.order(large)
            machine.fetcher.set_known(large, True)
            await until(lambda: len(loading) >= loads)
            await for_a_while()
            assert len(loading) == loads == machine.fetcher._jobs.loading
        finally:
            may_load.set()

    play(machine, scenario)
