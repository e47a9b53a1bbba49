"""Where a block comes from: tiers asked in turn, the disk, and what S3 must allow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio
import trio.testing
from inline_threads import InlineThreads

from lazyfs.blocks import BlockId, Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory, Held
from lazyfs.cache import CARE_S, BlockCache, Claim
from lazyfs.cache.block_writer import BlockWriter
from lazyfs.cache.disk_calls import DiskHangsError
from lazyfs.cache.other_daemons import LEASE_S, LOOK_S, OtherDaemons
from lazyfs.errors import AccessDeniedError, SourceError, UnavailableError
from lazyfs.fetch.attempt import Got
from lazyfs.fetch.block_getter import PREFETCH_PATIENCE_S, BlockGetter
from lazyfs.fetch.disk_tier import FORMER_LEASE_S, FORMER_S, SEEN_S, DiskTier
from lazyfs.fetch.disks import Disks
from lazyfs.fetch.tiers import Job, OriginTier, Tiers
from lazyfs.listed_object import File
from lazyfs.model.safetensors import HEAD_BYTES
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions

SIZE = 10
IO_TIMEOUT_S = 77.0
FILE = File(2, 1, "f", "f", 4 * SIZE, "e", 0)


def job(number: int = 1, *, waiting: bool = False) -> Job:
    return Job(FILE, BlockId(2, number), SIZE, [Span(number, 0, 1)] if waiting else [])


class Cache:
    """A tier that gives what it is told to give."""

    def __init__(self, kind: Tier, gives: memoryview | Claim | SourceError) -> None:
        self.kind = kind
        self.gives = gives
        self.calls: list[str] = []

    def begin(self, _: Job) -> None:
        self.calls.append("begin")

    async def get(self, _: Job) -> memoryview | Claim:
        self.calls.append("get")
        if isinstance(self.gives, SourceError):
            raise self.gives
        return self.gives

    def put(self, block: BlockId, held: Held, *, reader_waits: bool) -> None:
        self.calls.append(f"put {block.number} {reader_waits}")

    def give_up(self, _: Job) -> None:
        self.calls.append("give up")


class Getter:
    """S3, with what was asked of it."""

    most = 16

    def __init__(self) -> None:
        self.error: SourceError | None = None
        self.tier = Tier.S3
        self.asked: list[tuple[int, int, bool]] = []
        self.went_on_with: object = None
        self.patience: Callable[[], float] = float
        self.patience_s = 0.0
        self.may_answer = trio.Event()
        self.may_answer.set()

    async def get(
        self, file: File, start: int, length: int, *, patience_s: Callable[[], float],
        saturated: Callable[[], bool], has_time: Callable[[], bool] = bool, is_block: bool = True,
        asked: object = None, pauses: Callable[[bool], None] = bool,
    ) -> Got:  # fmt: skip
        self.went_on_with = asked
        self.asked.append((start, length, is_block))
        self.patience, self.patience_s = patience_s, patience_s()
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return Got(memoryview(bytes(length)), self.tier)


def origin(getter: Getter, access_check_s: float = 60.0, *, head: bytes = b"") -> OriginTier:
    return OriginTier(
        cast(BlockGetter, getter), access_check_s, SIZE, IO_TIMEOUT_S, lambda: False,
        lambda inode: memoryview(head),
    )  # fmt: skip


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


DATA = memoryview(b"0123456789")
HELD = Held(FILE, DATA)


def test_a_block_comes_from_the_first_tier_that_has_it_and_is_stored_above() -> None:
    async def scenario() -> None:
        getter = Getter()
        near, far = Cache(Tier.DISK, Claim.OURS), Cache(Tier.FLEET, DATA)
        tiers, wanted = Tiers([near, far], origin(getter)), job()
        tiers.begin(wanted)
        assert await tiers.get(wanted) == DATA
        assert wanted.tier is Tier.FLEET
        tiers.put(wanted, HELD, reader_waits=True)
        assert near.calls == ["begin", "get", "put 1 True"]
        assert far.calls == ["begin", "get"]
        assert getter.asked == []

    run(scenario)


@pytest.mark.parametrize("tier", [Tier.S3, Tier.FLEET])
def test_the_origin_is_asked_last_and_names_the_source_of_a_block(tier: Tier) -> None:
    async def scenario() -> None:
        getter, disk = Getter(), Cache(Tier.DISK, Claim.OURS)
        getter.tier = tier
        tiers, wanted = Tiers([disk], origin(getter)), job(3)
        assert await tiers.get(wanted) == bytes(SIZE)
        assert (wanted.tier, getter.asked) == (tier, [(3 * SIZE, SIZE, True)])
        tiers.put(wanted, HELD, reader_waits=False)
        assert disk.calls == ["get", "put 3 False"]

    run(scenario)


@pytest.mark.parametrize("reader_comes", [False, True])
def test_a_request_that_is_not_wanted_ends_unless_a_reader_comes_meanwhile(
    reader_comes: bool,
) -> None:
    async def scenario() -> None:
        getter, disk = Getter(), Cache(Tier.DISK, Claim.OURS)
        getter.may_answer = trio.Event()
        wanted = job()
        got: list[memoryview | None] = []

        async def get() -> None:
            got.append(await Tiers([disk], origin(getter)).get(wanted))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(get)
            await trio.testing.wait_all_tasks_blocked()
            wanted.scope.cancel()
            if reader_comes:
                wanted.waiting.append(Span(1, 0, 1))
            await trio.testing.wait_all_tasks_blocked()
            getter.may_answer.set()
        if reader_comes:
            assert got == [bytes(SIZE)]
            assert (len(getter.asked), disk.calls) == (2, ["get"]), "the claim is kept"
        else:
            assert got == [None]
            assert (len(getter.asked), disk.calls) == (1, ["get", "give up"])

    run(scenario)


LONG = b"h" * (HEAD_BYTES + 15)


@pytest.mark.parametrize(
    ("number", "begin", "asked"),
    [
        (HEAD_BYTES // 10, b"", []),  # all of it is header
        (len(LONG) // 10, b"h" * (len(LONG) % 10), [(len(LONG), 10 - len(LONG) % 10, False)]),
        (len(LONG) // 10 + 1, b"", [(len(LONG) // 10 * 10 + 10, 10, True)]),
    ],
)
def test_a_long_header_is_not_fetched_again(
    number: int, begin: bytes, asked: list[tuple[int, int, bool]]
) -> None:
    async def scenario() -> None:
        getter = Getter()
        wanted = job(number)
        got = await origin(getter, head=LONG).get(wanted)
        assert getter.asked == asked
        came = sum(length for _, length, _ in asked)
        assert wanted.headed_bytes == SIZE - came
        assert got.data == b"h" * wanted.headed_bytes + bytes(came)
        assert got.data[: len(begin)] == begin

    run(scenario)


def test_a_short_header_comes_with_its_block() -> None:
    async def scenario() -> None:
        getter = Getter()
        got = await origin(getter, head=b"h" * HEAD_BYTES).get(job(0))
        assert (getter.asked, got.data) == ([(0, SIZE, True)], bytes(SIZE))

    run(scenario)


def test_a_block_that_another_daemon_fetches_is_not_requested() -> None:
    async def scenario() -> None:
        getter = Getter()
        tiers = Tiers([Cache(Tier.DISK, Claim.THEIRS)], origin(getter))
        assert await tiers.get(job()) is None
        assert getter.asked == []

    run(scenario)


@pytest.mark.parametrize("is_refused_above", [True, False])
def test_after_an_error_no_tier_waits_for_the_block(is_refused_above: bool) -> None:
    async def scenario() -> None:
        getter, error = Getter(), AccessDeniedError("no")
        disk = Cache(Tier.DISK, error if is_refused_above else Claim.OURS)
        getter.error = error
        with pytest.raises(AccessDeniedError):
            await Tiers([disk], origin(getter)).get(job())
        assert disk.calls == ["get", "give up"]
        assert bool(getter.asked) is not is_refused_above

    run(scenario)


@pytest.mark.parametrize(
    "waiting, patience_s", [(True, IO_TIMEOUT_S), (False, PREFETCH_PATIENCE_S)]
)
def test_requests_are_repeated_longer_for_readers(waiting: bool, patience_s: float) -> None:
    async def scenario() -> None:
        getter = Getter()
        await origin(getter).get(job(waiting=waiting))
        assert getter.patience_s == patience_s

    run(scenario)


def test_a_reader_that_comes_later_has_all_of_its_time() -> None:
    async def scenario() -> None:
        getter, wanted = Getter(), job()
        getter.may_answer = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(origin(getter).get, wanted)
            await trio.sleep(15)
            assert getter.patience() == PREFETCH_PATIENCE_S
            wanted.waits_since_s = trio.current_time()
            wanted.waiting.append(Span(1, 0, 1))
            assert getter.patience() == 15 + IO_TIMEOUT_S
            getter.may_answer.set()

    run(scenario)


def test_access_to_objects_that_s3_delivered_is_not_checked() -> None:
    async def scenario() -> None:
        for show in (
            lambda tier: tier.get(job()),
            lambda tier: tier.get_part(FILE, 5, 2, lambda: 1.0),
        ):
            getter = Getter()
            tier = origin(getter)
            await show(tier)
            getter.error = AccessDeniedError("no")
            await tier.check_access(job())
            assert len(getter.asked) == 1
        assert getter.asked == [(5, 2, False)]

    run(scenario)


def test_access_is_checked_with_one_byte() -> None:
    async def scenario() -> None:
        getter = Getter()
        tier = origin(getter)
        await tier.check_access(job(2, waiting=True))
        await tier.check_access_ahead([FILE])
        assert (getter.asked, getter.patience_s) == ([(0, 1, False)], IO_TIMEOUT_S)
        other = File(3, 1, "g", "g", 1, "e", 0)
        await tier.check_access_ahead([other])
        assert (getter.asked[1:], getter.patience_s) == ([(0, 1, False)], PREFETCH_PATIENCE_S)

    run(scenario)


class Disk:
    """A disk with some blocks, of which others claim some."""

    def __init__(self) -> None:
        self.stored: dict[int, memoryview] = {}
        self.elsewhere: set[int] = set()
        self.claimed: set[int] = set()
        self.ours: set[int] = set()
        self.waiting: set[int] = set()
        self.announced: list[int] = []
        self.loading: list[int] = []
        self.planned: list[list[int]] = []
        self.asked: list[int] = []
        self.looks = 0
        self.is_shared = False

    def claim_alone(self, file: File, number: int) -> bool:
        if not self.is_shared:
            self.ours.add(number)
        return not self.is_shared

    def load_or_claim(self, file: File, number: int) -> memoryview | Claim:
        self.asked.append(number)
        if number in self.stored:
            return self.stored[number]
        if number in self.claimed:
            return Claim.THEIRS
        self.ours.add(number)
        return Claim.OURS

    def release(self, file: File, number: int) -> None:
        assert file is FILE
        self.ours.remove(number)

    def is_claimed(self, file: File, number: int) -> bool:
        return number in self.claimed

    def set_waiting(self, file: File, number: int, waiting: bool) -> None:
        assert file is FILE
        (self.waiting.add if waiting else self.waiting.discard)(number)

    def present(self, file: File) -> list[int]:
        self.looks += 1
        return sorted(self.stored) if file is FILE else []

    def announce(self, files: list[File]) -> None:
        self.announced += [file.inode for file in files]

    def claim_absent(self, file: File, numbers: list[int]) -> set[int]:
        return {number for number in numbers if self.load_or_claim(file, number) is Claim.OURS}

    name = "/cache"

    def parts(self) -> list[Disk]:
        return [self]

    def has_place_for(self, file: File, number: int) -> bool:
        return number not in self.elsewhere

    def set_loading(self, file: File) -> None:
        self.loading.append(file.inode)

    def care(self, plan: list[File]) -> None:
        self.planned.append([file.inode for file in plan])


class Writer:
    """Writes nothing."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def run(self) -> None:
        await trio.sleep_forever()

    async def finish(self) -> None:
        self.calls.append("finish")

    def put(self, block: BlockId, held: Held, *, reader_waits: bool) -> None:
        self.calls.append(f"put {block.number} {reader_waits}")


class OnDisk:
    """The disk as a tier."""

    def __init__(self, access_check_s: float = 60.0) -> None:
        self.disk, self.getter, self.writer = Disk(), Getter(), Writer()
        self.origin = origin(self.getter, access_check_s)
        cache, calls = cast(BlockCache, self.disk), InlineThreads().calls
        others = OtherDaemons(cache, calls, lambda block, there: None)
        self.tier = DiskTier(cache, cast(BlockWriter, self.writer), others, self.origin, calls)
        memory = BlockMemory(1 << 30, 1 << 20, BlockMap(1 << 20), lambda: 1)
        self.disks = Disks(
            cache, MountOptions(), InlineThreads().threads, memory, self.origin, Recorder("off"),
            lambda written: None, lambda block, there: None, lambda: None,
        )  # fmt: skip

    async def get(self, wanted: Job) -> memoryview | Claim:
        self.tier.begin(wanted)
        return await self.tier.get(wanted)


def test_a_block_on_the_disk_is_given_when_s3_allows_it() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.stored[1] = DATA
        assert await on_disk.get(job()) == DATA
        assert on_disk.getter.asked == [(0, 1, False)]

    run(scenario)


def test_a_block_on_the_disk_is_not_given_when_s3_refuses() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.stored[1] = DATA
        on_disk.getter.error = AccessDeniedError("no")
        with pytest.raises(AccessDeniedError):
            await on_disk.get(job())

    run(scenario)


def test_a_missing_block_is_claimed_until_it_is_given_up() -> None:
    async def scenario() -> None:
        on_disk, wanted = OnDisk(), job()
        assert await on_disk.get(wanted) is Claim.OURS
        assert on_disk.disk.ours == {1}
        on_disk.tier.give_up(wanted)
        assert on_disk.disk.ours == set()
        assert on_disk.getter.asked == []

    run(scenario)


def test_the_disk_is_not_asked_for_a_block_that_was_absent_a_moment_ago() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.stored[0] = DATA
        await on_disk.tier.numbers([FILE])
        assert await on_disk.get(job(1)) is Claim.OURS
        assert (on_disk.disk.asked, on_disk.disk.ours) == ([], {1})
        assert await on_disk.tier.claim([job(2), job(3)]) != []
        assert (on_disk.disk.asked, on_disk.disk.ours) == ([], {1, 2, 3})
        assert await on_disk.get(job(0)) == DATA

    run(scenario)


def test_the_disk_is_asked_for_a_block_that_may_have_come_since() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        await on_disk.tier.numbers([FILE])
        on_disk.disk.stored = dict.fromkeys(range(4), DATA)
        ours = job(0)
        ours.is_stored = True
        assert await on_disk.get(ours) == DATA, "this mount has stored it"
        on_disk.disk.is_shared = True
        assert await on_disk.get(job(1)) == DATA, "another one has"
        on_disk.disk.is_shared = False
        assert await on_disk.get(job(3)) == DATA, "and has ended since"
        await on_disk.tier.numbers([FILE])
        on_disk.disk.stored[4] = DATA
        await trio.sleep(SEEN_S)
        assert await on_disk.get(job(4)) == DATA, "one that began and ended since"

    run(scenario)


def test_blocks_are_asked_for_singly_while_the_disk_is_looked_through() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        await on_disk.tier.numbers([FILE])
        on_disk.disk.stored[1] = DATA
        await trio.sleep(SEEN_S)
        with trio.CancelScope() as scope:
            scope.cancel()
            await on_disk.get(job(1))
        looks = on_disk.disk.looks
        assert await on_disk.get(job(1)) == DATA
        assert (on_disk.disk.looks, on_disk.disk.asked) == (looks, [1])

    run(scenario)


def test_a_prefetch_leaves_a_block_to_the_daemon_that_claimed_it() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.claimed = {1}
        began_s = trio.current_time()
        assert await on_disk.get(job()) is Claim.THEIRS
        assert trio.current_time() == began_s
        assert on_disk.disk.waiting == {1}, "the other daemon sees that somebody waits"
        on_disk.tier.begin(job())
        assert on_disk.disk.waiting == set(), "a reader needs it now"

    run(scenario)


def test_a_reader_waits_for_the_daemon_that_claimed_a_block() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.claimed = {1}
        began_s = trio.current_time()

        async def other_daemon() -> None:
            await trio.sleep(3)
            on_disk.disk.stored[1] = DATA
            on_disk.disk.claimed.clear()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_daemon)
            assert await on_disk.get(job(waiting=True)) == DATA
        assert 3 <= trio.current_time() - began_s <= 3 + 2 * LOOK_S

    run(scenario)


def test_a_reader_waits_for_a_daemon_no_longer_than_its_lease() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.claimed = {1}
        began_s = trio.current_time()
        assert await on_disk.get(job(waiting=True)) is Claim.OURS
        assert trio.current_time() == began_s + LEASE_S

    run(scenario)


def test_a_claim_that_a_killed_worker_left_delays_a_reader_only_a_little() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.claimed = {0, 1}
        on_disk.tier.resumed()
        assert await on_disk.get(job(0)) is Claim.THEIRS, "a prefetch has time"
        began_s = trio.current_time()
        assert await on_disk.get(job(waiting=True)) is Claim.OURS
        assert trio.current_time() == began_s + FORMER_LEASE_S
        await trio.sleep(FORMER_S)
        began_s = trio.current_time()
        assert await on_disk.get(job(waiting=True)) is Claim.OURS
        assert trio.current_time() == began_s + LEASE_S, "others are believed again"

    run(scenario)


def test_a_directory_passes_over_blocks_of_others() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.stored, on_disk.disk.elsewhere = {0: DATA, 1: DATA}, {1, 2}
        assert await on_disk.get(job(1)) is Claim.OURS
        jobs = [job(number) for number in range(4)]
        assert await on_disk.tier.claim(jobs) == jobs[1:]
        assert on_disk.disk.ours == {3}
        on_disk.disk.ours.add(2)
        on_disk.tier.give_up(job(2))
        assert on_disk.disk.ours == {2, 3}
        for number in (0, 1):
            on_disk.tier.put(BlockId(2, number), Held(FILE, DATA), reader_waits=False)
        assert on_disk.writer.calls == ["put 0 False"]

    run(scenario)


def test_files_with_blocks_on_disk_are_announced_and_checked_in_advance() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.stored = {0: DATA, 2: DATA}
        empty = File(3, 1, "g", "g", 9, "e", 0)
        async with trio.open_nursery() as nursery:
            on_disk.disks.start(nursery, list)
            assert await on_disk.disks.present([FILE, empty]) == {2: [0, 2]}
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert on_disk.disk.announced == [2]
        assert on_disk.disk.loading == [2, 3]
        assert on_disk.getter.asked == [(0, 1, False)]
        assert await on_disk.disks.numbers([FILE]) == {2: [0, 2]}
        on_disk.disks.opened(empty)
        assert on_disk.disk.loading == [2, 3, 3]

    run(scenario)


def test_plans_are_not_announced_to_an_empty_disk_cache() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        async with trio.open_nursery() as nursery:
            on_disk.disks.start(nursery, list)
            assert await on_disk.disks.present([FILE]) == {}
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert (on_disk.disk.announced, on_disk.getter.asked) == ([], [])

    run(scenario)


def test_cache_maintenance_gets_the_present_plan() -> None:
    async def scenario() -> None:
        on_disk, plan = OnDisk(), [FILE]
        async with trio.open_nursery() as nursery:
            on_disk.tier.start(nursery, lambda: plan)
            await trio.testing.wait_all_tasks_blocked()
            assert on_disk.disk.planned == [[2]]
            plan.clear()
            await trio.sleep(CARE_S + 1)
            assert on_disk.disk.planned == [[2], []]
            nursery.cancel_scope.cancel()
        await on_disk.tier.finish([FILE])
        assert (on_disk.writer.calls, on_disk.disk.planned[2:]) == (["finish"], [[2]])

    run(scenario)


def test_a_mount_ends_although_its_disk_hangs() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()

        async def hang() -> None:
            raise DiskHangsError

        on_disk.writer.finish = hang  # type: ignore[method-assign]
        await on_disk.tier.finish([FILE])
        assert on_disk.disk.planned == [], "it is not asked for anything else"

    run(scenario)


def test_blocks_are_written_to_the_disk() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.tier.put(BlockId(2, 1), HELD, reader_waits=True)
        assert on_disk.writer.calls == ["put 1 True"]
        assert on_disk.tier.kind is Tier.DISK

    run(scenario)


def test_transient_errors_do_not_change_known_access() -> None:
    async def scenario() -> None:
        on_disk = OnDisk()
        on_disk.disk.stored[1] = DATA
        on_disk.origin.shown(FILE)
        await trio.sleep(61)
        on_disk.getter.error = UnavailableError("away")
        assert await on_disk.get(job()) == DATA

    run(scenario)
