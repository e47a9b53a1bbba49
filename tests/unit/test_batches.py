"""Blocks that are requested together, in one call of a mover."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from inline_mover import inline_mover
from inline_threads import InlineThreads
from test_jobs import BLOCK, FILE, JobsOver
from test_source import ANSWER, Request, Serve, part, refusal, serve

from lazyfs.blocks import BlockId, Span, buffers
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.buffers import LEAST_SHARED
from lazyfs.blocks.file_blocks import Place
from lazyfs.blocks.memory import BlockMemory
from lazyfs.cache import BlockCache, Claim
from lazyfs.cache.space import Limits
from lazyfs.errors import FaultError, ThrottledError, UnavailableError
from lazyfs.fetch.attempt import Got
from lazyfs.fetch.attempt import Request as BlockRequest
from lazyfs.fetch.block_getter import LEAVES_S, BlockGetter
from lazyfs.fetch.concurrency import START
from lazyfs.fetch.jobs import Jobs
from lazyfs.fetch.scheduler import Scheduler
from lazyfs.fetch.shard_headers import ShardHeaders
from lazyfs.fetch.tiers import Batch, Came, Job, OriginTier, Tiers
from lazyfs.listed_object import File, ListedObject
from lazyfs.model.safetensors import HEAD_BYTES
from lazyfs.movers.call import Nudge
from lazyfs.movers.pool import Movers
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.block_pusher import BlockPusher
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store import range_reader
from lazyfs.store.protocol import EACH, STOP

__all__ = ["serve"]
PART = LEAST_SHARED
PARTS = [(number * PART, PART) for number in range(4)]
DATA = os.urandom(len(PARTS) * PART)
PIN = ListedObject("m/k", len(DATA), '"v1"', 0, "m/k")


def whole(asked: Request) -> ANSWER:
    return part(asked, data=DATA)


@pytest.fixture(params=["process", "thread"])
def movers(request: pytest.FixtureRequest) -> Iterator[Movers]:
    if request.param == "thread":
        with inline_mover() as made:
            yield made
        return
    made = Movers(1)
    yield made
    made.close()
    buffers.share(None)


class Call:
    """One call, and what came of it: the first message, the second, and so on."""

    def __init__(self, service: Any, movers: Movers) -> None:
        self.source = service.source()
        self.source.use(movers)
        self._movers = movers
        self.nudge = Nudge()
        self.messages: list[list[int]] = []
        self.found: dict[int, Any] = {}
        self.came = trio.Event()
        self.ended = 0

    def _tell(self, found: Sequence[tuple[int, Any]]) -> None:
        self.messages.append(sorted(which for which, _ in found))
        self.found |= dict(found)
        self.came.set()

    def _end(self) -> None:
        self.ended += 1

    async def run(self, patience_s: float = 20.0) -> None:
        with trio.fail_after(60):
            while not self._movers.running:
                await self._movers.wait_for_first(lambda: True)
            await self.source.ranges.read_each(
                PIN, PARTS, self._tell, self.nudge, patience_s, self._end
            )
        assert self.ended == 1

    def rest(self, which: int) -> bytes:
        """A part, read on from what the call told of it."""
        return bytes(self.source.ranges.read(PIN, *PARTS[which], asked=self.found[which]))


def part_of(which: int) -> bytes:
    start, length = PARTS[which]
    return DATA[start : start + length]


def test_all_parts_come_in_two_messages_over_connections_of_their_own(
    serve: Serve, movers: Movers
) -> None:
    together = threading.Barrier(len(PARTS))

    def answer(asked: Request) -> ANSWER:
        together.wait(20)
        return whole(asked)

    async def main() -> None:
        call = Call(serve(answer), movers)
        await call.run()
        assert len(call.messages) <= 2
        assert all(call.found[which] == part_of(which) for which in range(4))

    trio.run(main)


def test_a_word_has_each_part_told_as_it_comes(serve: Serve, movers: Movers) -> None:
    may_come = {number * PART: threading.Event() for number in (1, 2, 3)}

    def answer(asked: Request) -> ANSWER:
        if (event := may_come.get(asked.range[0])) is not None:
            event.wait(20)
        return whole(asked)

    async def main() -> None:
        call = Call(serve(answer), movers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            while call.nudge._channel is None:
                await trio.sleep(0.01)
            await trio.sleep(0.5)
            assert call.messages == [], "less than a half is there, and nobody has asked for it"
            call.nudge.send(EACH)
            await call.came.wait()
            assert call.messages == [[0]]
            call.came = trio.Event()
            may_come[2 * PART].set()
            await call.came.wait()
            assert call.messages == [[0], [2]]
            for event in may_come.values():
                event.set()
        assert sorted(call.found) == [0, 1, 2, 3]
        assert all(call.found[which] == part_of(which) for which in range(4))

    trio.run(main)


def test_a_word_before_the_call_is_heard(serve: Serve, movers: Movers) -> None:
    """A reader may come while it is found out which blocks are on the disk."""
    last = threading.Event()

    def answer(asked: Request) -> ANSWER:
        if asked.range[0]:
            last.wait(20)
        return whole(asked)

    async def main() -> None:
        call = Call(serve(answer), movers)
        call.nudge.send(EACH)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run)
            await call.came.wait()
            assert call.messages == [[0]]
            last.set()

    trio.run(main)


def test_a_connection_that_fails_is_told_as_such(serve: Serve, movers: Movers) -> None:
    """Otherwise the worker would ask at once and by itself, not after a pause."""

    async def main() -> None:
        call = Call(serve(whole), movers)
        client = call.source._client
        # It refuses connections.
        client.endpoint = replace(client.endpoint, server="http://127.0.0.1:1")
        await call.run()
        assert sorted(call.found) == [0, 1, 2, 3]
        assert all(isinstance(each.asked.told, ConnectionError) for each in call.found.values())

    trio.run(main)


@pytest.mark.parametrize("by_word", [False, True])
def test_what_has_not_come_is_cut_off_and_what_came_of_it_is_used(
    serve: Serve, movers: Movers, by_word: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_reader, "LEAST_KEPT", 1000)
    taken: list[memoryview] = []

    def take(size: int) -> memoryview:
        taken.append(buffers.take_buffer(size))
        return taken[-1]

    monkeypatch.setattr(range_reader, "take_buffer", take)
    hangs, is_over = threading.Event(), threading.Event()

    def answer(asked: Request) -> ANSWER:
        start, _ = asked.range
        if is_over.is_set() or start < 2 * PART:
            return whole(asked)
        status, headers, body = whole(asked)
        if start == 2 * PART:  # a half of it comes
            return status, headers | {"Content-Length": str(len(body))}, body[: PART // 2]
        hangs.wait(20)
        return whole(asked)

    async def main() -> None:
        service = serve(answer)
        call = Call(service, movers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run, 60.0 if by_word else 1.0)
            if by_word:
                await call.came.wait()
                while taken[2][2000 - 8 : 2000] != part_of(2)[2000 - 8 : 2000]:
                    await trio.sleep(0.01)
                call.nudge.send(STOP)
        assert 3 not in call.found, "nothing came of the last one"
        if by_word:  # else it depends on the machine how much came in the time
            assert sorted(call.found) == [0, 1, 2]
        is_over.set()
        hangs.set()
        if by_word:
            before = len(service.requests)
            assert await trio.to_thread.run_sync(call.rest, 2) == part_of(2)
            (asked,) = service.requests[before:]
            assert asked.range[0] >= 2 * PART + 2000

    trio.run(main)


@pytest.mark.parametrize(("etag", "tag"), [('"v1"', '"v1"'), ('W/"v1"', None)])
def test_only_the_listed_version_is_asked_for(
    serve: Serve, movers: Movers, etag: str, tag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_batches.PIN", replace(PIN, etag=etag))

    async def main() -> None:
        service = serve(whole)
        await Call(service, movers).run()
        assert [asked.headers.get("if-match") for asked in service.requests] == [tag] * len(PARTS)

    trio.run(main)


def test_a_refusal_is_told_and_not_asked_for_again(serve: Serve, movers: Movers) -> None:
    def answer(asked: Request) -> ANSWER:
        return refusal(503, "SlowDown") if asked.range[0] == PART else whole(asked)

    async def main() -> None:
        service = serve(answer)
        call = Call(service, movers)
        await call.run()
        assert all(call.found[which] == part_of(which) for which in (0, 2, 3))
        with pytest.raises(ThrottledError):
            await trio.to_thread.run_sync(call.rest, 1)
        assert len(service.requests) == 4

    trio.run(main)


def test_a_word_that_comes_too_late_does_not_disturb_the_next_call(
    serve: Serve, movers: Movers
) -> None:
    async def main() -> None:
        call = Call(serve(whole), movers)
        await call.run()
        (line,) = movers._movers[0].idle
        line.channel.send(STOP)
        call.ended = 0
        await call.run()
        assert sorted(which for message in call.messages for which in message) == [
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
        ]
        assert movers.lost == 0

    trio.run(main)


# What the getter does


class Link:
    """Has parts when a test says so.

    Attributes:
        calls: parts and end of each call.
        tells: hands parts over.
    """

    def __init__(self) -> None:
        self.calls: list[Sequence[tuple[int, int]]] = []
        self.tells: Callable[[Sequence[tuple[int, Any]]], None] = lambda found: None
        self.patience_s = 0.0
        self.may_end = trio.Event()
        self.ended: Callable[[], None] = lambda: None

    @property
    def ranges(self) -> Link:
        return self

    may_move = True

    def name(self, key: str) -> str:
        return key

    def close_idle(self, longer_than_s: float) -> None: ...

    async def read_by_mover(self, *wanted: Any) -> memoryview:
        await trio.sleep(0.1)
        wanted[-1]()
        return memoryview(bytes(wanted[2]))

    async def read_each(
        self, pin: object, parts: Sequence[tuple[int, int]],
        came: Callable[[Sequence[tuple[int, Any]]], None], nudge: Nudge, patience_s: float,
        ended: Callable[[], None],
    ) -> None:  # fmt: skip
        self.calls.append(parts)
        self.tells, self.patience_s, self.ended = came, patience_s, ended
        await self.may_end.wait()
        ended()


class Machine:
    def __init__(self, **options: Any) -> None:
        self.link, self.memory = Link(), BlockMemory(4000, 4, BlockMap(4), lambda: 1)
        self.recorder = Recorder()
        self.told: list[tuple[int, Any]] = []
        self.made_room = 0
        self.getter = BlockGetter(
            cast(Any, self.link), self.memory, MountOptions(**{"movers": 8, **options}),
            InlineThreads().threads, self._room_made, self.recorder,
        )  # fmt: skip

    def _room_made(self) -> None:
        self.made_room += 1

    async def warm(self) -> None:
        """One block comes in the usual time."""
        await self.getter.get(FILE, 0, 4, patience_s=lambda: 60.0, saturated=lambda: False)

    async def get(self, *starts: int) -> None:
        parts = [(start, 4) for start in starts]
        await self.getter.get_each(FILE, parts, Nudge(), self.told.extend, lambda: True)


def play(steps: Callable[[Machine], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        await steps(Machine(**options))

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("options", "together"),
    [
        ({}, 8),
        ({"max_concurrency": 24}, 6),
        ({"max_concurrency": 7}, 1),
        ({"movers": 0}, 1),
        ({"bandwidth_limit": 10**9}, 1),
        ({"fleet_cache": "http://127.0.0.1:1"}, 1),
    ],
)
def test_blocks_are_requested_together_where_many_are_under_way(
    options: dict[str, Any], together: int
) -> None:
    async def steps(machine: Machine) -> None:
        assert machine.getter.together == 1, "before it is known how long a block takes"
        for _ in range(START):
            machine.getter.hedger.timer.answered(0.1)
        assert machine.getter.together == together
        for _ in range(30):
            machine.getter.hedger.timer.answered(machine.getter.limit / 30)
        assert machine.getter.together == 1, "of a slow link"

    play(steps, **options)


def test_what_comes_is_counted_as_if_each_had_been_requested_by_itself() -> None:
    async def steps(machine: Machine) -> None:
        await machine.warm()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.get, 4, 8, 12)
            await trio.sleep(0.1)
            assert machine.recorder.in_flight["get"] == 3
            machine.link.tells([(0, memoryview(b"aaaa"))])
            assert machine.recorder.in_flight["get"] == 2
            machine.link.tells([(1, memoryview(b"bbbb")), (2, "more")])
            machine.link.may_end.set()
        assert [(which, got) for which, got in machine.told] == [
            (0, Got(memoryview(b"aaaa"), Tier.S3)), (1, Got(memoryview(b"bbbb"), Tier.S3)),
            (2, "more"),
        ]  # fmt: skip
        assert machine.recorder.in_flight["get"] == 0
        assert machine.recorder.received_bytes == 3 * 4
        assert machine.recorder.failed_requests["get"] == 0
        assert machine.memory.used_bytes == 0

    play(steps)


def test_more_is_requested_at_once_if_more_comes() -> None:
    """Blocks that come in batches show how fast the link is, as single ones do."""

    async def steps(machine: Machine) -> None:
        await machine.warm()
        limit = machine.getter.limit
        for _ in range(limit // 8 + 1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machine.get, *range(0, 32, 4))
                await trio.sleep(0.1)
                machine.link.tells([(which, memoryview(b"aaaa")) for which in range(8)])
                machine.link.may_end.set()
            machine.link.may_end = trio.Event()
        assert machine.getter.limit > limit

    play(steps)


def test_a_call_that_does_not_end_is_left_and_its_memory_counts_until_it_does() -> None:
    async def steps(machine: Machine) -> None:
        await machine.warm()
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.get, 4, 8)
            await trio.sleep(0.1)
            machine.link.tells([(1, memoryview(b"bbbb"))])
        took_s = trio.current_time() - began_s
        assert took_s == pytest.approx(machine.link.patience_s + LEAVES_S)
        assert machine.recorder.in_flight["get"] == 0
        assert machine.memory.used_bytes == 4
        machine.link.ended()
        assert (machine.memory.used_bytes, machine.made_room) == (0, 1)
        assert machine.getter.hedger.timer.delay_s == machine.link.patience_s, "and is no measure"

    play(steps)


def test_a_call_that_no_mover_makes_says_nothing_about_the_link() -> None:
    async def steps(machine: Machine) -> None:
        await machine.warm()
        before_s = machine.getter.hedger.timer.delay_s
        machine.link.may_end.set()
        await machine.get(4, 8)
        assert (machine.told, machine.recorder.in_flight["get"]) == ([], 0)
        assert machine.getter.hedger.timer.delay_s == before_s

    play(steps)


# What jobs do


class FakeTiers:
    """Gives what a test tells, to batches and to single jobs."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.came: Callable[[Sequence[Came]], None] = lambda found: None
        self.singles: list[tuple[int, Any]] = []
        self.given_up: list[int] = []
        self.may_end = trio.Event()

    def begin(self, job: Job) -> None: ...

    async def get_each(self, batch: Batch, came: Callable[[Sequence[Came]], None]) -> None:
        self.batches.append(batch)
        self.came = came
        await self.may_end.wait()

    async def get(self, job: Job) -> memoryview | None:
        with job.scope:
            await trio.lowlevel.checkpoint()
        if job.scope.cancelled_caught:
            return None
        self.singles.append((job.block.number, job.asked))
        return memoryview(bytes(BLOCK))

    def put(self, *_: object, **__: object) -> None: ...

    def give_up(self, job: Job) -> None:
        self.given_up.append(job.block.number)


class Worker(JobsOver[FakeTiers]):
    def __init__(self) -> None:
        super().__init__(FakeTiers())

    async def start(self, nursery: trio.Nursery, *numbers: int) -> list[Job]:
        jobs = [self.jobs.new(FILE, BlockId(FILE.inode, number), BLOCK) for number in numbers]
        for job in jobs:
            self.jobs.begin(job)
        self.jobs.run(nursery, jobs)
        await trio.testing.wait_all_tasks_blocked()
        return jobs

    def places(self) -> list[Place]:
        return [Place(place) for place in self.map.files[FILE.inode].places]


GOT = Got(memoryview(bytes(BLOCK)), Tier.S3)


def work(steps: Callable[[Worker, trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await steps(Worker(), nursery)

    trio.run(main, clock=trio.testing.MockClock())


def test_blocks_of_a_batch_are_held_as_they_come_and_others_go_by_themselves() -> None:
    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        jobs = await worker.start(nursery, 0, 1, 2, 3)
        assert worker.jobs.fetching == 4
        assert worker.memory.used_bytes == 4 * BLOCK
        worker.tiers.came([(jobs[0], GOT), (jobs[2], "what came of it")])
        assert worker.jobs.fetching == 3
        assert worker.ended == 1
        assert jobs[0].done.is_set()
        await trio.testing.wait_all_tasks_blocked()
        assert worker.tiers.singles == [(2, "what came of it")]
        worker.tiers.may_end.set()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(worker.tiers.singles[1:]) == [(1, None), (3, None)]
        assert worker.places() == [Place.LOCAL] * 4
        assert (worker.jobs.fetching, worker.memory.used_bytes) == (0, 4 * BLOCK)
        assert sum(worker.recorder.fetched_blocks.values()) == 4

    work(steps)


def test_a_reader_that_waits_for_a_block_of_a_batch_has_it_hurry_once() -> None:
    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        jobs = await worker.start(nursery, 0, 1, 2)
        sent: list[bytes] = []
        worker.tiers.batches[0].nudge.send = sent.append  # type: ignore[method-assign]
        worker.jobs.wait(jobs[1], Span(1, 0, 10))
        worker.jobs.wait(jobs[2], Span(2, 0, 10))
        assert sent == [EACH]
        worker.tiers.came([(jobs[1], GOT)])
        await trio.testing.wait_all_tasks_blocked()
        assert jobs[1].done.is_set()
        assert jobs[1].held is not None
        assert jobs[1].held.users == 1
        assert worker.pusher.around == [[Span(1, 0, 10)]], "the rest is pushed before the answer"
        assert not jobs[2].done.is_set()
        worker.tiers.may_end.set()

    work(steps)


@pytest.mark.parametrize("reader_waits", [False, True])
def test_what_nobody_wants_any_more_of_a_batch_is_ended(reader_waits: bool) -> None:
    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        jobs = await worker.start(nursery, 0, 1, 2)
        if reader_waits:
            worker.jobs.wait(jobs[1], Span(1, 0, 10))
        sent: list[bytes] = []
        worker.tiers.batches[0].nudge.send = sent.append  # type: ignore[method-assign]
        worker.jobs.abandon({FILE.inode})
        assert sent == ([] if reader_waits else [STOP])
        worker.tiers.came([(jobs[2], GOT)])
        worker.tiers.may_end.set()
        await trio.testing.wait_all_tasks_blocked()
        there = Place.LOCAL if reader_waits else Place.ABSENT
        assert worker.places()[:3] == [Place.ABSENT, there, Place.ABSENT]
        assert worker.tiers.singles == ([(1, None)] if reader_waits else [])
        assert worker.memory.used_bytes == (BLOCK if reader_waits else 0)
        assert worker.jobs.fetching == 0

    work(steps)


def test_the_bytes_of_a_batch_are_freed_as_soon_as_memory_drops_them() -> None:
    class Bytes(bytearray):
        """Bytes to which there can be weak references."""

    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        jobs = await worker.start(nursery, 0, 1, 2)
        there: list[weakref.ref[Bytes]] = []
        for job in jobs[:2]:
            data = Bytes(BLOCK)
            there.append(weakref.ref(data))
            worker.tiers.came([(job, Got(memoryview(data), Tier.S3))])
            del data, job
        assert all(each() is not None for each in there)
        for number in (0, 1):
            worker.map.moved(BlockId(FILE.inode, number), Place.NEAR)
        assert worker.memory.make_room(8 * BLOCK, urgent=True, is_served=True) is False
        assert [each() for each in there] == [None, None], "while the batch goes on"
        worker.tiers.may_end.set()

    gc.disable()
    try:
        work(steps)
    finally:
        gc.enable()


def test_a_fault_in_one_block_of_a_batch_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        jobs = await worker.start(nursery, 0, 1)
        monkeypatch.setattr(worker.recorder, "landed", lambda *_: 1 / 0)
        worker.tiers.came([(jobs[0], GOT)])
        monkeypatch.undo()
        worker.tiers.came([(jobs[1], GOT)])
        worker.tiers.may_end.set()
        assert [job.done.is_set() for job in jobs] == [True, True]
        assert isinstance(jobs[0].error, FaultError)
        assert worker.tiers.given_up == [0]
        assert (worker.jobs.fetching, worker.memory.used_bytes) == (0, BLOCK)

    work(steps)


def test_a_reader_that_comes_before_the_first_step_of_a_batch_is_heard() -> None:
    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        jobs = [worker.jobs.new(FILE, BlockId(FILE.inode, number), BLOCK) for number in (0, 1)]
        for job in jobs:
            worker.jobs.begin(job)
        worker.jobs.run(nursery, jobs)
        worker.jobs.wait(jobs[1], Span(1, 0, 10))
        await trio.testing.wait_all_tasks_blocked()
        assert worker.tiers.batches[0].nudge._early == [EACH]
        worker.tiers.may_end.set()

    work(steps)


def test_a_reader_that_was_answered_does_not_keep_the_rest_of_a_batch_going() -> None:
    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        jobs = await worker.start(nursery, 0, 1)
        worker.jobs.wait(jobs[0], Span(0, 0, 10))
        worker.tiers.came([(jobs[0], GOT)])
        worker.jobs.abandon({FILE.inode})
        assert STOP in worker.tiers.batches[0].nudge._early
        worker.tiers.may_end.set()

    work(steps)


def test_jobs_of_a_mount_that_ends_are_done() -> None:
    async def main() -> None:
        worker = Worker()
        async with trio.open_nursery() as nursery:
            jobs = await worker.start(nursery, 0, 1)
            nursery.cancel_scope.cancel()
        assert all(job.done.is_set() for job in jobs)

    trio.run(main)


# What the disk says


def test_blocks_that_are_here_or_claimed_are_not_requested_together(tmp_path: Path) -> None:
    caches = [BlockCache([tmp_path], Limits(1 << 30, 0.0), "e", "b", BLOCK) for _ in range(2)]
    ours, theirs = caches
    for cache in caches:
        cache.open()
    assert ours.put(FILE, 0, bytes(BLOCK))
    assert theirs.claim_absent(FILE, [1]) == {1}
    assert ours.claim_absent(FILE, [0, 1, 2, 3]) == {2, 3}
    assert theirs.claim_absent(FILE, [0, 1, 2]) == {1}
    ours.release(FILE, 2)
    assert theirs.claim_absent(FILE, [0, 2, 3]) == {2}


def test_an_origin_that_fails_at_once_leaves_all_to_themselves() -> None:
    class Failing(FakeTiers):
        async def get_each(self, batch: Batch, came: Callable[[Sequence[Came]], None]) -> None:
            raise UnavailableError("no credentials")

    async def steps(worker: Worker, nursery: trio.Nursery) -> None:
        worker.jobs._tiers = cast(Tiers, failing := Failing())
        await worker.start(nursery, 0, 1)
        assert sorted(failing.singles) == [(0, None), (1, None)]

    work(steps)


# What the scheduler starts


class Started:
    """In the place of `Jobs`: notes which blocks begin together."""

    def __init__(self, blocks: BlockMap, memory: BlockMemory) -> None:
        self._map, self._memory = blocks, memory
        self.fetching = self.loading = self.demanded = 0
        self.reader_waits = False
        self.batches: list[list[tuple[int, int]]] = []

    def new(self, file: File, block: BlockId, length: int) -> Job:
        return Job(file, block, length)

    def busy(self, most_pausing: int) -> int:
        return self.fetching

    def is_pausing(self, key: str) -> bool:
        return False

    def begin(self, job: Job) -> None:
        self.fetching += 1
        self._memory.reserve(job.length)
        self._map.moved(job.block, Place.COMING)

    def run(self, nursery: object, jobs: Sequence[Job]) -> None:
        self.batches.append([(job.block.inode, job.block.number) for job in jobs])


class Policy:
    """In the place of `Prefetcher`: wants absent blocks in their order."""

    readers = 0

    def can_wait(self, block: BlockId) -> bool:
        return False

    def __init__(self, blocks: BlockMap) -> None:
        self.blocks = blocks

    def next_fetch(self) -> BlockId | None:
        for inode in (2, 3):
            file = self.blocks.files[inode]
            if (number := file.find(Place.ABSENT, 0, len(file.places))) >= 0:
                return BlockId(inode, number)
        return None


class Starter:
    """A scheduler with 12 blocks in two files, of which nothing has come."""

    def __init__(self, *, limit: int, together: int, room: int = 100) -> None:
        files = [File(inode, 1, "f", "f", 6 * BLOCK, "e", 0) for inode in (2, 3)]
        self.map = BlockMap(BLOCK)
        for file in files:
            self.map.add_file(file.inode, file.size_bytes)
        self.memory = BlockMemory(2 * room * BLOCK, BLOCK, self.map, lambda: 0)
        self.memory.reserve(room * BLOCK)  # with the quarter for demand, this much is left
        self.jobs = Started(self.map, self.memory)
        self.getter = SimpleNamespace(limit=limit, together=together, proven_limit=limit)
        self.scheduler = Scheduler(
            {file.inode: file for file in files}, cast(Jobs, self.jobs), self.memory,
            cast(Prefetcher, Policy(self.map)), cast(BlockPusher, SimpleNamespace(is_ready=False,
            has_room=True)), cast(BlockGetter, self.getter),
            cast(ShardHeaders, SimpleNamespace(pump=lambda *_: None)), None, BLOCK, Recorder(),
        )  # fmt: skip

    def begin(self) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                self.scheduler.begin(nursery)

        trio.run(main)

    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.jobs.batches]


def test_blocks_of_a_file_begin_together_as_many_as_the_getter_says() -> None:
    starter = Starter(limit=100, together=4)
    starter.begin()
    assert starter.jobs.batches == [
        [(2, 0), (2, 1), (2, 2), (2, 3)], [(2, 4), (2, 5)],
        [(3, 0), (3, 1), (3, 2), (3, 3)], [(3, 4), (3, 5)],
    ]  # fmt: skip
    assert starter.jobs.fetching == 12


def test_while_much_is_under_way_a_batch_waits_until_it_can_be_whole() -> None:
    starter = Starter(limit=10, together=4)
    starter.jobs.fetching = 7
    starter.begin()
    assert starter.sizes() == []
    assert starter.scheduler.is_saturated, "as much is under way as may be"
    starter.jobs.fetching = 6
    starter.begin()
    assert starter.sizes() == [4]


def test_while_little_is_under_way_nothing_waits_for_company() -> None:
    starter = Starter(limit=10, together=8)
    starter.jobs.fetching = 4
    starter.begin()
    assert starter.sizes() == [6]
    assert not Starter(limit=10, together=1).scheduler.is_saturated


def test_a_batch_waits_for_room_for_all_of_it() -> None:
    starter = Starter(limit=20, together=4, room=6)
    starter.jobs.fetching = 10
    starter.begin()
    assert starter.sizes() == [], "there is room for three"
    starter.memory.release(BLOCK)
    starter.begin()
    assert starter.sizes() == [4]
    starter.jobs.fetching = 3
    starter.memory.release(2 * BLOCK)
    starter.begin()
    assert starter.sizes() == [4, 2], "otherwise nothing would be on its way soon"


# What the tiers ask for


class Asked:
    """In the place of the getter."""

    most = 16

    def __init__(self) -> None:
        self.parts: list[tuple[int, int]] = []
        self.went_on: list[Any] = []

    async def get_each(
        self, file: File, parts: Sequence[tuple[int, int]], nudge: Nudge,
        came: Callable[[Sequence[tuple[int, Any]]], None], saturated: object,
    ) -> None:  # fmt: skip
        self.parts += parts
        came([(0, GOT), (1, "what came")][: len(parts)])

    async def get(self, file: File, start: int, length: int, **given: Any) -> Got:
        self.went_on.append((start, length, given["asked"]))
        return Got(memoryview(bytes(length)), Tier.S3)


class Claims:
    """A cache that has some blocks, and leaves the others to us."""

    kind = Tier.DISK

    def __init__(self, *has: int) -> None:
        self.has = has
        self.asked = 0

    def begin(self, _: Job) -> None: ...

    async def claim(self, jobs: Sequence[Job]) -> Sequence[Job]:
        return [job for job in jobs if job.block.number not in self.has]

    async def get(self, _: Job) -> Claim:
        self.asked += 1
        return Claim.OURS

    def give_up(self, _: Job) -> None: ...


SHORT = LEAST_SHARED // 2
LARGE = File(2, 1, "f", "f", 5 * PART + SHORT, "e", 0)


def large_jobs() -> list[Job]:
    return [Job(LARGE, BlockId(2, number), PART if number < 5 else SHORT) for number in range(6)]


def tiers_of(asked: Asked, *caches: Any, head: bytes = b"") -> Tiers:
    origin = OriginTier(
        cast(BlockGetter, asked), 60.0, PART, 60.0, lambda: False, lambda inode: memoryview(head)
    )
    return Tiers(caches, origin)


def test_one_block_may_be_left_of_a_batch() -> None:
    async def main() -> None:
        asked, jobs = Asked(), large_jobs()
        told: list[int] = []
        await tiers_of(asked, Claims(0, 1, 2, 4)).get_each(
            Batch(jobs), lambda found: told.extend(job.block.number for job, _ in found)
        )
        assert asked.parts == [(3 * PART, PART)]
        assert told == [0, 1, 2, 4, 5, 3]

    trio.run(main)


@pytest.mark.parametrize("head", [b"", bytes(HEAD_BYTES + 1)])
def test_only_what_no_cache_and_no_header_has_is_requested_together(head: bytes) -> None:
    async def main() -> None:
        asked, disk = Asked(), Claims(2)
        tiers, jobs = tiers_of(asked, disk, head=head), large_jobs()
        told: list[tuple[int, Any]] = []
        await tiers.get_each(
            Batch(jobs), lambda found: told.extend((job.block.number, got) for job, got in found)
        )
        wanted = [number for number in (0, 1, 3, 4) if number or not head]
        assert [start // PART for start, _ in asked.parts] == wanted
        alone = [number for number in range(6) if number not in wanted]
        assert told == [
            *((number, None) for number in alone), (wanted[0], GOT), (wanted[1], "what came"),
        ], "first those that are fetched alone"  # fmt: skip
        # What was claimed is not looked for again; what was asked for goes on.
        job = jobs[wanted[1]]
        job.asked = "what came"
        assert len(await tiers.get(job) or b"") == PART
        assert (disk.asked, asked.went_on[0][2]) == (0, "what came")
        assert len(await tiers.get(jobs[2]) or b"") == PART
        assert (disk.asked, asked.went_on[1][2]) == (1, None)

    trio.run(main)


def test_a_header_that_came_meanwhile_does_not_change_what_was_asked_for() -> None:
    async def main() -> None:
        asked, job = Asked(), large_jobs()[0]
        job.asked = "a request for all of the block"
        await tiers_of(asked, head=bytes(HEAD_BYTES + 1)).get(job)
        await tiers_of(asked, head=bytes(HEAD_BYTES + 1)).get(large_jobs()[0])
        assert asked.went_on[0][:2] == (0, PART)
        assert asked.went_on[1][:2] == (HEAD_BYTES + 1, PART - HEAD_BYTES - 1)

    trio.run(main)


def test_blocks_that_came_together_show_that_the_mount_may_read_the_file() -> None:
    async def main() -> None:
        asked, jobs = Asked(), large_jobs()
        tiers = tiers_of(asked)
        await tiers.get_each(Batch(jobs), lambda found: None)
        await tiers._origin.check_access(jobs[0])
        assert asked.went_on == [], "S3 is not asked once more"

    trio.run(main)


def test_limits_that_change_are_followed() -> None:
    async def steps(machine: Machine) -> None:
        for _ in range(START):
            machine.getter.hedger.timer.answered(0.1)
        machine.getter.tune(MountOptions(movers=8, bandwidth_limit=10**9))
        assert machine.getter.together == 1
        machine.getter.tune(MountOptions(movers=8))
        assert machine.getter.together == 8
        machine.link.may_move = False  # a proxy, or no credentials now
        assert machine.getter.together == 1

    play(steps)


def test_a_late_request_is_overtaken_once_by_all_that_came_together() -> None:
    async def steps(machine: Machine) -> None:
        await machine.warm()
        late = BlockRequest(FILE, 0, 4, trio.current_time() - 100, lambda: True)
        machine.getter.hedger._first_attempts[late] = None
        machine.getter._block_size = 4
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.get, 4, 8, 12)
            await trio.sleep(0.1)
            machine.link.tells([(which, memoryview(b"aaaa")) for which in (0, 1, 2)])
            machine.link.may_end.set()
        assert late.overtaken == 1

    play(steps)
