"""Objects that S3 refuses for now: their blocks hold nothing, and readers of others notice nothing.

All in modelled time: the real fetcher over a link that takes time and an S3 that refuses.
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, cast
from unittest import mock

import pytest
import trio
import trio.testing
from simulated.machine import Bucket, Disk, Link, Machine, Movers, Threads

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.cache import BlockCache
from lazyfs.errors import AccessDeniedError, SourceError, ThrottledError, UnavailableError
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.fetch.jobs import FAILED_AGAIN_S
from lazyfs.fetch.refused import ALL, AT_ONCE
from lazyfs.fetch.scheduler import URGENT_EXTRA
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.protocol import Store
from lazyfs.store.retry import LONGEST_PAUSE_S

BLOCK = 1 << 20
IO_TIMEOUT_S = 60.0
ROUND_TRIP_S = 0.03
LIMIT = 16


def files(first: int, count: int, blocks: int = 8) -> list[File]:
    return [
        File(inode, 1, f"f{inode}", f"f{inode}", blocks * BLOCK, "e", 0)
        for inode in range(first, first + count)
    ]


HEALTHY = File(2, 1, "healthy", "healthy", 200 * BLOCK, "e", 0)
LARGE = File(3, 1, "large", "large", 300 * BLOCK, "e", 0)


class Memory:
    """Stands for the memory of a request."""


class S3(Bucket):
    """Refuses objects, or blocks of them, or is silent for 20 s first."""

    def __init__(self, link: Link, threads: Threads, machine: Machine) -> None:
        super().__init__({}, BLOCK, link, threads, machine, Movers(machine))
        self.refuses: dict[str, SourceError] = {}
        self.silent: set[str] = set()
        self.bad_blocks: set[tuple[str, int]] = set()
        # When, key and block.
        self.requests: list[tuple[float, str, int]] = []
        self.memory: weakref.WeakSet[Memory] = weakref.WeakSet()

    def read(
        self, pin: File, start: int, length: int, cancel: object, asked: int | None = None
    ) -> memoryview:
        number = start // BLOCK
        memory = Memory()
        self.memory.add(memory)
        self.requests.append((trio.current_time(), pin.key, number))
        if pin.key in self.silent:
            self._threads.takes(trio.sleep(20))
            raise UnavailableError("no answer")
        if (pin.key, number) in self.bad_blocks:
            self._threads.takes(trio.sleep(ROUND_TRIP_S))
            raise UnavailableError("this block is broken")
        if (error := self.refuses.get(pin.key)) is not None:
            self._threads.takes(trio.sleep(ROUND_TRIP_S))
            raise error
        return super().read(pin, start, length, cancel, asked)

    def asked_for(self, key: str, since_s: float = 0.0) -> list[float]:
        return [at_s for at_s, other, _ in self.requests if other == key and at_s >= since_s]


class PageCacheOf:
    """The page cache, which takes everything or nothing."""

    def __init__(self, *, takes: bool) -> None:
        self.supported = takes

    def budget(self, planned_bytes: object, unused_bytes: int) -> int:
        return 1 << 40 if self.supported else 0

    async def push_elsewhere(self, inode: int, parts: object) -> None:
        """There are no movers."""

    def push(self, inode: int, offset: int, data: memoryview) -> bool:
        return True


class Mount:
    """A mount without movers, with 64 MiB of memory."""

    def __init__(self, *, has_disk: bool = False, **options: str) -> None:
        machine = Machine(link=500e6, connection=90e6, latency_s=ROUND_TRIP_S)
        self.threads = Threads()
        self.link = Link(machine)
        self.s3 = S3(self.link, self.threads, machine)
        texts = {
            "block-size": "1MiB", "memory-limit": "64MiB", "movers": "0", "prefetch": "off",
            "access-check": "0s", "io-timeout": f"{IO_TIMEOUT_S:g}s", **options,
        }  # fmt: skip
        parsed = MountOptions.parse(("{name}", texts))
        self.map = BlockMap(BLOCK)
        self.prefetcher = Prefetcher(parsed.prefetch, self.map)
        self.disk = Disk(machine, self.threads, Movers(machine))
        self.recorder = Recorder(parsed.prefetch)
        self.fetcher = BlockFetcher(
            cast(Store, self.s3), cast(BlockCache, self.disk) if has_disk else None,
            cast(PageCache, PageCacheOf(takes=has_disk)), self.prefetcher, parsed, self.recorder,
        )  # fmt: skip
        self.jobs, self.refused = self.fetcher._jobs, self.fetcher._refused
        self.failed: list[tuple[float, SourceError]] = []
        self.served: list[float] = []

    def refuse(self, refused: Iterable[File], kind: type[SourceError] = UnavailableError) -> None:
        for file in refused:
            self.s3.refuses[file.key] = kind("not now")

    def order(self, ordered: Iterable[File]) -> None:
        ordered = list(ordered)
        for file in ordered:
            self.fetcher.add_file(file)
        self.prefetcher.set_order((), [file.inode for file in ordered])
        self.fetcher.pump()

    async def read(self, file: File, number: int) -> None:
        try:
            data = await self.fetcher.read(file, Span(number, 0, BLOCK))
            assert len(data) == BLOCK
            self.served.append(trio.current_time())
        except SourceError as error:
            self.failed.append((trio.current_time(), error))

    def crowd(self, nursery: trio.Nursery, crowded: Iterable[File], blocks: int = 8) -> None:
        """Readers of each block of files."""
        for file in crowded:
            for number in range(blocks):
                nursery.start_soon(self.read, file, number)

    async def load(self, readers: int = 4) -> tuple[float, float]:
        """Read all of the healthy file; returns when its first block came, and the last one."""
        began_s, numbers = trio.current_time(), iter(range(100))
        first_s: list[float] = []

        async def work() -> None:
            for number in numbers:
                await self.fetcher.read(HEALTHY, Span(number, 0, BLOCK))
                first_s.append(trio.current_time() - began_s)

        async with trio.open_nursery() as nursery:
            for _ in range(readers):
                nursery.start_soon(work)
        return first_s[0], first_s[-1]


def play(scenario: Callable[[Mount, trio.Nursery], Awaitable[None]], **options: Any) -> Mount:
    mounts: list[Mount] = []

    async def main() -> None:
        await trio.sleep(1)  # at 0 is never
        mount = Mount(**options)
        mounts.append(mount)
        with trio.fail_after(7200):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mount.link.run)
                mount.fetcher.start(nursery)
                async with trio.open_nursery() as readers:
                    await scenario(mount, readers)
                    readers.cancel_scope.cancel()
                nursery.cancel_scope.cancel()

    async def run_sync(*call: Any, **how: Any) -> Any:
        return await mounts[0].threads.run_sync(*call, **how)

    with (
        mock.patch("trio.to_thread.run_sync", run_sync),
        mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch("trio._core._run._r", random.Random(0)),
    ):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return mounts[0]


@functools.cache
def times_of_load(refused: int, kind: type[SourceError] | None) -> tuple[float, float]:
    """Of a load beside so many objects with eight readers each; None: S3 is silent about them."""
    times: list[tuple[float, float]] = []

    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        broken = files(10, refused)
        if kind is None:
            mount.s3.silent |= {file.key for file in broken}
        else:
            mount.refuse(broken, kind)
        mount.crowd(nursery, broken)
        await trio.sleep(60 if kind is None else 5)
        times.append(await mount.load())
        assert len(mount.refused) >= 8 * refused - AT_ONCE, "they still wait"

    play(scenario, **{"io-timeout": "600s"})
    return times[0]


@pytest.mark.parametrize(
    ("refused", "kind"),
    [(1, UnavailableError), (48, UnavailableError), (48, ThrottledError), (8, None)],
)
def test_a_load_beside_objects_that_s3_refuses_is_as_fast_as_without(
    refused: int, kind: type[SourceError] | None
) -> None:
    first_s, all_s = times_of_load(0, UnavailableError)
    beside_first_s, beside_all_s = times_of_load(refused, kind)
    assert beside_first_s <= first_s + ROUND_TRIP_S
    assert beside_all_s <= 1.05 * all_s


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed is freed by the end of its last use."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("has_disk", [False, True])
def test_what_s3_refuses_holds_nothing(has_disk: bool, no_collector: None) -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        broken = files(10, 30)
        mount.refuse(broken)
        mount.crowd(nursery, broken)
        await trio.sleep(5)
        held: Counter[int] = Counter()
        for _ in range(500):
            await trio.sleep(0.01)
            assert mount.jobs.fetching <= AT_ONCE
            assert mount.fetcher.memory_bytes == mount.jobs.fetching * BLOCK
            held[mount.jobs.fetching] += 1
            assert mount.jobs.demanded == mount.jobs.fetching
            assert len(mount.s3.memory) <= mount.jobs.fetching, "an error keeps it"
        assert held[0] > 150, "most of the time nothing is asked for"
        assert mount.fetcher.in_flight == 240, "they are not given up"
        assert not mount.failed

    play(scenario, has_disk=has_disk)


def test_one_request_asks_for_an_object_and_pauses_grow_to_three_seconds() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        mount.crowd(nursery, [LARGE], 100)
        await trio.sleep(50)
        assert len(mount.s3.asked_for("large")) <= 100 + LIMIT + URGENT_EXTRA + 50
        late = mount.s3.asked_for("large", since_s=10)
        assert 10 <= len(late) <= 50
        gaps = [after - before for before, after in itertools.pairwise(late)]
        assert min(gaps) > ROUND_TRIP_S, "never two at once"
        assert max(gaps) <= LONGEST_PAUSE_S + 2 * ROUND_TRIP_S

    play(scenario)


@pytest.mark.parametrize("objects", [1, 48])
def test_readers_are_served_when_s3_does_not_refuse_any_more(objects: int) -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        broken = files(10, objects)
        mount.refuse(broken)
        mount.crowd(nursery, broken)
        await trio.sleep(30)
        mount.s3.refuses.clear()
        await trio.sleep(5)
        assert len(mount.served) == 8 * objects
        assert not mount.refused and mount.fetcher.in_flight == 0
        assert not any(mount.map.files[file.inode].is_refused for file in broken)

    play(scenario)


@pytest.mark.parametrize("told_s", [0.0, 30.0])
def test_all_readers_of_a_refused_object_fail_at_their_time(told_s: float) -> None:
    """Also those for whose blocks S3 was never asked, and when S3 says to come back later."""

    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        mount.s3.refuses["large"].retry_after_s = told_s
        mount.crowd(nursery, [LARGE], 100)
        await trio.sleep(10)
        nursery.start_soon(mount.read, LARGE, 200)
        await trio.sleep(IO_TIMEOUT_S - 11)
        assert not mount.failed
        await trio.sleep(1 + LONGEST_PAUSE_S)
        assert len(mount.failed) == 100
        await trio.sleep(10)
        assert len(mount.failed) == 101 and mount.failed[-1][0] >= 10 + IO_TIMEOUT_S
        assert {str(error) for _, error in mount.failed} == {"not now"}
        assert not mount.refused and mount.fetcher.in_flight == 0
        assert mount.fetcher.memory_bytes == 0

    play(scenario)


def test_prefetching_goes_on_with_other_files_and_returns_to_a_refused_one() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        broken, good = files(10, 1), files(20, 2)
        mount.refuse(broken)
        mount.order([*broken, *good])
        await trio.sleep(5)
        assert all(mount.map.is_held(BlockId(20, number)) for number in range(8))
        assert all(mount.map.is_held(BlockId(21, number)) for number in range(8))
        assert mount.fetcher.in_flight > 0, "whoever waits for the model does not stop"
        mount.s3.refuses.clear()
        await trio.sleep(5)
        assert all(mount.map.is_held(BlockId(10, number)) for number in range(8))
        assert mount.fetcher.in_flight == 0

    play(scenario, prefetch="model")


def test_a_file_that_is_refused_for_too_long_is_not_prefetched_any_more() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        mount.order([LARGE])
        await trio.sleep(IO_TIMEOUT_S - 1)
        assert mount.map.files[LARGE.inode].counts[Place.ABSENT] > 0
        await trio.sleep(1 + LONGEST_PAUSE_S)
        assert mount.map.files[LARGE.inode].counts[Place.LEFT] == 300
        asked = len(mount.s3.requests)
        await trio.sleep(60)
        assert len(mount.s3.requests) == asked and mount.fetcher.in_flight == 0
        mount.s3.refuses.clear()
        await mount.read(LARGE, 5)
        assert len(mount.served) == 1, "a reader gets it"

    play(scenario, prefetch="model")


def test_readers_that_go_away_leave_nothing_and_another_one_asks() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        async with trio.open_nursery() as first:
            mount.crowd(first, [LARGE], 30)
            await trio.sleep(10)
            nursery.start_soon(mount.read, LARGE, 100)
            await trio.sleep(1)
            first.cancel_scope.cancel()
        await trio.sleep(1)
        assert mount.fetcher.in_flight == 1, "the one whose reader stayed"
        assert mount.map.files[LARGE.inode].counts[Place.COMING] == 1
        gone_s = trio.current_time()
        mount.s3.refuses.clear()
        await trio.sleep(LONGEST_PAUSE_S + 1)
        assert len(mount.served) == 1
        assert {number for at_s, _, number in mount.s3.requests if at_s > gone_s} == {100}
        assert not mount.refused and mount.fetcher.in_flight == 0

    play(scenario)


def test_a_block_that_s3_cannot_give_pauses_although_others_of_its_object_come() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.s3.bad_blocks |= {("healthy", 7), ("healthy", 8), ("healthy", 9)}
        mount.crowd(nursery, [HEALTHY], 200)
        await trio.sleep(30)
        assert len(mount.served) == 197
        for bad in (7, 8, 9):
            asked = [at_s for at_s, _, number in mount.s3.requests if number == bad]
            assert 3 <= len(asked) <= 45

    play(scenario)


def test_an_s3_that_refuses_everything_is_asked_for_few_objects_ahead_of_readers() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        shards = files(10, 100)
        mount.refuse(shards)
        mount.order(shards)
        await trio.sleep(20)
        assert len({key for _, key, _ in mount.s3.requests}) <= ALL + 2
        last_s = [at_s for at_s, _, _ in mount.s3.requests if at_s > 10]
        assert len(last_s) <= 10 * ALL / (LONGEST_PAUSE_S / 4)
        mount.s3.refuses.clear()
        await trio.sleep(20)
        assert mount.map.progress()[1] > 40 * BLOCK, "as much as there is room for"

    play(scenario, prefetch="model")


def test_an_object_that_is_throttled_all_the_time_does_not_keep_the_limit_low() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        broken = files(10, 8)
        mount.refuse(broken, ThrottledError)
        mount.crowd(nursery, broken)
        await trio.sleep(5)
        assert mount.fetcher.requests_limit < LIMIT, "S3 asked for fewer requests"
        low = mount.fetcher.requests_limit
        await trio.sleep(30)
        assert mount.fetcher.requests_limit == low

    play(scenario)


def test_a_pause_of_prefetching_ends_what_is_asked_for_ahead_of_readers() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        mount.order([LARGE])
        await trio.sleep(5)
        mount.fetcher.pause(True)
        await trio.sleep(5)
        asked = len(mount.s3.requests)
        await trio.sleep(30)
        assert len(mount.s3.requests) == asked and mount.fetcher.in_flight == 0
        mount.fetcher.pause(False)
        await trio.sleep(1)
        assert len(mount.s3.requests) > asked

    play(scenario, prefetch="model")


def test_what_is_no_longer_planned_is_not_asked_for_again() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        mount.order([LARGE])
        await trio.sleep(5)
        mount.prefetcher.set_order((), [])
        mount.fetcher.abandon([LARGE])
        await trio.sleep(1)
        assert mount.fetcher.in_flight == 0
        asked = len(mount.s3.requests)
        await trio.sleep(30)
        assert len(mount.s3.requests) == asked

    play(scenario, prefetch="model")


def test_a_final_refusal_is_told_to_all_readers_at_once() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        mount.crowd(nursery, [LARGE], 100)
        await trio.sleep(10)
        mount.refuse([LARGE], AccessDeniedError)
        await trio.sleep(LONGEST_PAUSE_S + 1)
        assert len(mount.failed) == 100

    play(scenario)


def stored(mount: Mount, count: int = 8) -> None:
    for number in range(count):
        mount.disk._put(HEALTHY, number, memoryview(bytes(BLOCK)))


def test_blocks_on_the_disk_are_read_although_s3_refuses_others_of_their_object() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        stored(mount)
        await mount.fetcher.scan([HEALTHY])
        mount.refuse([HEALTHY])
        nursery.start_soon(mount.read, HEALTHY, 100)
        await trio.sleep(5)
        mount.crowd(nursery, [HEALTHY])
        await trio.sleep(1)
        assert len(mount.served) == 8

    play(scenario, has_disk=True)


def test_blocks_on_the_disk_that_s3_does_not_allow_yet_hold_nothing() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        stored(mount)
        mount.refuse([HEALTHY])
        await mount.fetcher.scan([HEALTHY])
        mount.crowd(nursery, [HEALTHY])
        await trio.sleep(30)
        assert mount.jobs.fetching <= 1 and not mount.jobs.loading
        assert len(mount.s3.asked_for("healthy", since_s=10)) <= 40
        mount.s3.refuses.clear()
        await trio.sleep(LONGEST_PAUSE_S + 1)
        assert len(mount.served) == 8

    play(scenario, has_disk=True, **{"access-check": "60s"})


def test_the_kernel_is_told_at_once_when_it_asks_again_for_what_has_failed() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        await mount.read(LARGE, 1)
        (failed_s, error), asked = mount.failed.pop(), len(mount.s3.requests)
        await trio.sleep(0.1)
        await mount.read(LARGE, 1)
        assert mount.failed == [(failed_s + 0.1, error)] and len(mount.s3.requests) == asked
        nursery.start_soon(mount.read, LARGE, 2)
        await trio.sleep(FAILED_AGAIN_S)
        nursery.start_soon(mount.read, LARGE, 1)
        await trio.sleep(1)
        assert len(mount.failed) == 1, "another reader, of this block or of another one, waits"

    play(scenario)


def test_what_has_failed_is_asked_for_again_when_s3_gives_anything() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        mount.refuse([LARGE])
        await mount.read(LARGE, 1)
        mount.s3.refuses.clear()
        await mount.read(HEALTHY, 1)
        await mount.read(LARGE, 1)
        assert len(mount.failed) == 1 and len(mount.served) == 2

    play(scenario)


def test_what_is_on_the_disk_is_not_loaded_ahead_before_s3_allows_it() -> None:
    """Each block would be loaded, S3 be asked, and the block be dropped."""

    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        stored(mount, 100)
        mount.refuse([HEALTHY])
        loaded: list[int] = []
        load = mount.disk.load_or_claim
        mount.disk.load_or_claim = lambda file, number: (  # type: ignore[method-assign]
            loaded.append(number), load(file, number)
        )[1]  # fmt: skip
        mount.fetcher.set_known(HEALTHY, True)
        await mount.fetcher.scan([HEALTHY])
        mount.order([HEALTHY])
        await trio.sleep(30)
        assert 1 <= len(loaded) <= 60
        assert mount.map.files[HEALTHY.inode].counts[Place.LEFT] == 0, "nothing is given up"
        mount.s3.refuses.clear()
        await trio.sleep(30)
        assert mount.map.files[HEALTHY.inode].counts[Place.NEAR] >= 100

    play(scenario, has_disk=True, prefetch="model", **{"access-check": "60s"})


def test_prefetching_of_refused_objects_begins_again_after_a_pause_of_it() -> None:
    async def scenario(mount: Mount, nursery: trio.Nursery) -> None:
        shards = files(10, 40)
        mount.refuse(shards)
        mount.order(shards)
        await trio.sleep(20)
        mount.fetcher.pause(True)
        await trio.sleep(20)
        assert mount.fetcher.in_flight == 0
        mount.s3.refuses.clear()
        mount.fetcher.pause(False)
        await trio.sleep(20)
        assert mount.map.progress()[1] > 40 * BLOCK

    play(scenario, prefetch="model")
