"""Headers of shards: what is requested, what is pushed, and what memory they take."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio
import trio.testing
from inline_threads import InlineThreads

from lazyfs.errors import SourceError, UnavailableError
from lazyfs.fetch.attempt import Got
from lazyfs.fetch.block_getter import PREFETCH_PATIENCE_S
from lazyfs.fetch.shard_headers import AT_ONCE, PUSHERS, ShardHeaders, heads_limit
from lazyfs.fetch.tiers import OriginTier
from lazyfs.listed_object import File
from lazyfs.model.safetensors import HEAD_BYTES, LONGEST_HEADER, MalformedHeaderError
from lazyfs.observe.events import Purpose
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.prefetch.prefetcher import Prefetcher

MIB = 1 << 20
SIZE = 64 * MIB


def shard(inode: int = 2, size_bytes: int = SIZE) -> File:
    return File(inode, 1, f"f{inode}", f"f{inode}", size_bytes, "e", 0)


class S3:
    """Shards with headers of one length."""

    def __init__(self, header_length: int) -> None:
        self.body = header_length.to_bytes(8, "little") + bytes(range(256)) * 1024
        self.asked: list[tuple[int, int, int]] = []
        self.error: SourceError | None = None
        self.tier = Tier.S3
        self.gate = trio.Event()
        self.gate.set()
        self.at_once = self.most_at_once = 0

    async def get_part(
        self, file: File, start: int, length: int, patience_s: Callable[[], float]
    ) -> Got:
        assert patience_s() == PREFETCH_PATIENCE_S
        self.asked.append((file.inode, start, length))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        self.at_once -= 1
        if self.error is not None:
            raise self.error
        return Got(memoryview(self.body)[start : start + length], self.tier)


class Pages:
    """The page cache, with what was pushed."""

    def __init__(self) -> None:
        self.supported = True
        self.takes = True
        self.pushed: list[tuple[int, int, int]] = []

    def push(self, inode: int, offset: int, data: memoryview) -> bool:
        self.pushed.append((inode, offset, len(data)))
        return self.takes


class Policy:
    """Which headers are wanted, and of which files the kernel knows."""

    def __init__(self) -> None:
        self.wanted: deque[int] = deque()
        self.known: set[int] = set()
        self.coming: set[int] = set()
        self.came: list[int] = []

    def next_head(self) -> int | None:
        return self.wanted.popleft() if self.wanted else None

    def needs_head(self, inode: int) -> bool:
        return inode not in self.coming

    def head_came(self, inode: int) -> None:
        self.came.append(inode)

    def takes_head(self, inode: int) -> bool:
        return inode in self.known


class Desk:
    """Headers with room for `heads` of the usual size."""

    def __init__(self, header_length: int = 100, heads: float = 100) -> None:
        self.s3, self.pages, self.policy = S3(header_length), Pages(), Policy()
        self.threads, self.recorder = InlineThreads(), Recorder()
        self.headers = ShardHeaders(
            cast(OriginTier, self.s3), int(heads * HEAD_BYTES), cast(PageCache, self.pages),
            cast(Prefetcher, self.policy), self.threads.threads, self.recorder,
        )  # fmt: skip

    async def pump(self, *inodes: int) -> None:
        """Have headers fetched, and wait for that."""
        self.policy.wanted += inodes
        async with trio.open_nursery() as nursery:
            self.headers.pump(nursery, {inode: shard(inode) for inode in range(200)})


def play(scenario: Callable[[Desk], Awaitable[None]], *desk: float) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            await scenario(Desk(*desk))  # type: ignore[arg-type]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_how_much_memory_headers_may_take() -> None:
    assert heads_limit(1024 * MIB, 32 * MIB) == 64 * MIB
    assert heads_limit(34 * MIB, 32 * MIB) == 2 * MIB, "there must be room for blocks"
    assert heads_limit(32 * MIB, 32 * MIB) == 0
    assert heads_limit(8 * MIB, 32 * MIB) == 0


def test_a_header_is_fetched_once_and_kept() -> None:
    async def scenario(desk: Desk) -> None:
        header = await desk.headers.header(shard())
        assert header == desk.s3.body[:108]
        assert await desk.headers.header(shard()) == header
        assert desk.headers.get(2) == desk.s3.body[:HEAD_BYTES]
        assert desk.s3.asked == [(2, 0, HEAD_BYTES)]
        assert desk.headers.used_bytes == HEAD_BYTES
        assert desk.recorder.fetched_bytes == {Purpose.AHEAD: HEAD_BYTES}

    play(scenario)


def test_bytes_of_the_fleets_cache_are_counted_apart() -> None:
    async def scenario(desk: Desk) -> None:
        desk.s3.tier = Tier.FLEET
        await desk.headers.header(shard())
        assert desk.recorder.shared_bytes == {Purpose.AHEAD: HEAD_BYTES}
        assert not desk.recorder.fetched_bytes

    play(scenario)


def test_of_a_long_header_only_the_rest_is_fetched_in_whole_pages() -> None:
    async def scenario(desk: Desk) -> None:
        header = await desk.headers.header(shard())
        assert header == desk.s3.body[: HEAD_BYTES + 108]
        assert desk.s3.asked == [(2, 0, HEAD_BYTES), (2, HEAD_BYTES, HEAD_BYTES)]
        assert desk.headers.get(2) == desk.s3.body[: 2 * HEAD_BYTES]
        assert desk.headers.used_bytes == 2 * HEAD_BYTES

    play(scenario, HEAD_BYTES + 100)


@pytest.mark.parametrize("is_coming", [False, True])
def test_the_rest_of_a_long_header_is_left_to_a_block_that_is_on_its_way(is_coming: bool) -> None:
    async def scenario(desk: Desk) -> None:
        if is_coming:
            desk.policy.coming.add(2)
        await desk.pump(2)
        rest = [] if is_coming else [(2, HEAD_BYTES, HEAD_BYTES)]
        assert desk.s3.asked == [(2, 0, HEAD_BYTES), *rest]
        assert desk.policy.came == [2]
        # The planner needs it, whatever comes.
        assert len(await desk.headers.header(shard()) or b"") == HEAD_BYTES + 108
        assert desk.s3.asked == [(2, 0, HEAD_BYTES), (2, HEAD_BYTES, HEAD_BYTES)]

    play(scenario, HEAD_BYTES + 100)


def test_a_header_of_exactly_the_first_read_needs_no_second_one() -> None:
    async def scenario(desk: Desk) -> None:
        assert len(await desk.headers.header(shard()) or b"") == HEAD_BYTES
        assert len(desk.s3.asked) == 1

    play(scenario, HEAD_BYTES - 8)


def test_no_more_is_requested_than_a_file_has() -> None:
    async def scenario(desk: Desk) -> None:
        small = shard(size_bytes=HEAD_BYTES + 50)
        assert len(await desk.headers.header(small) or b"") == HEAD_BYTES + 10
        assert desk.s3.asked == [(2, 0, HEAD_BYTES), (2, HEAD_BYTES, 50)]
        tiny = shard(3, size_bytes=1000)
        desk.s3.body = (100).to_bytes(8, "little") + bytes(992)
        assert len(await desk.headers.header(tiny) or b"") == 108
        assert desk.s3.asked[2:] == [(3, 0, 1000)]

    play(scenario, HEAD_BYTES + 2)


def test_a_header_that_is_too_long_is_not_fetched() -> None:
    async def scenario(desk: Desk) -> None:
        assert await desk.headers.header(shard()) is None
        assert len(desk.s3.asked) == 1

    play(scenario, LONGEST_HEADER)


def test_the_longest_header_that_is_fetched() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.headers.header(shard())
        assert desk.s3.asked[1:] == [(2, HEAD_BYTES, LONGEST_HEADER - HEAD_BYTES)]

    play(scenario, LONGEST_HEADER - 8, 4 * 256)


def test_a_header_over_a_quarter_of_the_memory_is_not_fetched() -> None:
    async def scenario(desk: Desk) -> None:
        assert await desk.headers.header(shard()) is None
        assert len(desk.s3.asked) == 1

    play(scenario, 3 * HEAD_BYTES - 7, 12)


def test_a_header_of_a_quarter_of_the_memory() -> None:
    async def scenario(desk: Desk) -> None:
        assert len(await desk.headers.header(shard()) or b"") == 3 * HEAD_BYTES

    play(scenario, 3 * HEAD_BYTES - 8, 12)


def test_a_length_that_is_not_valid() -> None:
    async def scenario(desk: Desk) -> None:
        with pytest.raises(MalformedHeaderError):
            await desk.headers.header(shard())

    play(scenario, SIZE)


def test_an_error_leaves_no_memory_in_use(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(desk: Desk) -> None:
        desk.s3.error = UnavailableError("away")
        with pytest.raises(UnavailableError):
            await desk.headers.header(shard())
        assert desk.headers.used_bytes == 0
        assert desk.headers.get(2) == b""

    play(scenario)
    assert "header of f2" in caplog.text
    assert "away" in caplog.text


def test_a_few_wanted_headers_are_fetched_at_once() -> None:
    async def scenario(desk: Desk) -> None:
        desk.s3.gate = trio.Event()
        wanted = range(2, 2 + 3 * AT_ONCE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.pump, *wanted)
            await trio.testing.wait_all_tasks_blocked()
            assert len(desk.s3.asked) == AT_ONCE
            assert desk.headers.used_bytes == AT_ONCE * HEAD_BYTES, "what is on its way counts"
            desk.s3.gate.set()
        assert sorted(desk.policy.came) == list(wanted)
        assert desk.s3.most_at_once == AT_ONCE

    play(scenario)


def test_headers_are_pushed_as_soon_as_the_kernel_knows_their_files() -> None:
    async def scenario(desk: Desk) -> None:
        desk.policy.known = {2}
        await desk.pump(2, 3)
        assert desk.pages.pushed == [(2, 0, HEAD_BYTES)]
        async with trio.open_nursery() as nursery:
            for inode in (2, 3, 4):
                desk.headers.set_known(nursery, inode)
        assert desk.pages.pushed == [(2, 0, HEAD_BYTES), (3, 0, HEAD_BYTES)], "each once"

    play(scenario)


def test_a_header_that_the_kernel_did_not_take_is_pushed_again() -> None:
    async def scenario(desk: Desk) -> None:
        desk.policy.known = {2}
        desk.pages.takes = False
        await desk.pump(2)
        desk.pages.takes = True
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                desk.headers.set_known(nursery, 2)
        assert len(desk.pages.pushed) == 2

    play(scenario)


def test_few_headers_are_pushed_at_once() -> None:
    async def scenario(desk: Desk) -> None:
        desk.policy.known = set(range(100))
        desk.threads.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.pump, *range(2, 10))
            await trio.testing.wait_all_tasks_blocked()
            assert desk.threads.running == PUSHERS
            desk.threads.gate.set()
        assert desk.threads.most == PUSHERS
        assert len(desk.pages.pushed) == 8

    play(scenario)


def test_nothing_is_pushed_if_the_kernel_accepts_no_pages() -> None:
    async def scenario(desk: Desk) -> None:
        desk.policy.known = {2}
        desk.pages.supported = False
        await desk.pump(2)
        assert (desk.pages.pushed, desk.policy.came) == ([], [2])

    play(scenario)


def test_headers_in_the_page_cache_make_room_the_oldest_first() -> None:
    async def scenario(desk: Desk) -> None:
        desk.policy.known = {2, 3, 4}
        for inode in (2, 3, 4):
            await desk.pump(inode)
        assert [bool(desk.headers.get(inode)) for inode in (2, 3, 4)] == [False, True, True]
        assert desk.headers.used_bytes == 2 * HEAD_BYTES, "there is room for the next one"

    play(scenario, 100, 3)


def test_headers_that_were_not_pushed_stay_and_no_others_are_fetched() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.pump(2, 3, 4)
        assert (sorted(desk.policy.came), list(desk.policy.wanted)) == ([2, 3], [4])
        async with trio.open_nursery() as nursery:
            desk.headers.set_known(nursery, 2)
        await desk.pump()
        assert sorted(desk.policy.came) == [2, 3, 4]

    play(scenario, 100, 2)


def test_a_header_without_room_is_given_but_not_kept() -> None:
    async def scenario(desk: Desk) -> None:
        assert await desk.headers.header(shard()) == desk.s3.body[:108]
        assert desk.headers.get(2) == b""
        assert desk.headers.used_bytes == 0

    play(scenario, 100, 0.5)


def test_a_damaged_header_does_not_hold_up_the_others() -> None:
    async def scenario(desk: Desk) -> None:
        await desk.pump(*range(2, 2 + 2 * AT_ONCE))
        assert len(desk.policy.came) == 2 * AT_ONCE, "readers get the bytes all the same"

    play(scenario, SIZE)


def test_an_error_does_not_hold_up_the_others() -> None:
    async def scenario(desk: Desk) -> None:
        desk.s3.error = UnavailableError("away")
        await desk.pump(*range(2, 2 + 2 * AT_ONCE))
        assert len(desk.s3.asked) == 2 * AT_ONCE
        assert desk.policy.came == []

    play(scenario)
