"""Blocks from an S3 that is slow, stuck or throttling."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from inline_threads import InlineThreads

from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import AccessDeniedError, SourceError, ThrottledError, UnavailableError
from lazyfs.fetch import hedger
from lazyfs.fetch.block_getter import BlockGetter
from lazyfs.fetch.hedger import HEDGES, OVERTAKEN
from lazyfs.listed_object import File
from lazyfs.observe.events import Cause
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import retry
from lazyfs.store.cancel import Cancel
from lazyfs.store.http import CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S
from lazyfs.threads import Threads

FILE = File(2, 1, "f", "f", 100, "e", 0)
LIMIT = 1000

Answer = tuple[memoryview, BlockGetter, BlockMemory, Recorder]


class Source:
    """Answers one request after another as it is told."""

    def __init__(self, *answers: Callable[[], memoryview]) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.cancels: list[Cancel] = []
        self._lock = threading.Lock()

    def name(self, key: str) -> str:
        return key

    def close_idle(self, longer_than_s: float) -> None:
        """There are no connections."""

    @property
    def ranges(self) -> Source:
        return self

    def read(self, pin: File, start: int, length: int, cancel: Cancel) -> memoryview:
        with self._lock:
            self.asked += 1
            self.cancels.append(cancel)
            answer = self.answers.pop(0)
        return answer()


def good() -> memoryview:
    return memoryview(b"good")


def failing(error: SourceError) -> Callable[[], memoryview]:
    def answer() -> memoryview:
        raise error

    return answer


def get(source: Source, patience_s: Callable[[], float] = lambda: 60.0) -> Answer:
    async def run() -> Answer:
        memory = BlockMemory(LIMIT, 10, BlockMap(10), lambda: 1)
        threads = Threads(10)
        recorder = Recorder()
        getter = BlockGetter(source, memory, MountOptions(), threads, lambda: None, recorder)  # type: ignore[arg-type]
        with trio.fail_after(20):
            came, _ = await getter.get(FILE, 0, 4, patience_s=patience_s, saturated=lambda: True)
        return bytes(came), getter, memory, recorder

    return trio.run(run)


def test_transient_errors_are_retried() -> None:
    data, getter, _, recorder = get(Source(failing(ThrottledError("slow down")), good))
    assert bytes(data) == b"good"
    assert recorder.retries == {Cause.THROTTLED: 1}
    assert getter.limit == 8, "throttling halves what is in flight"


def test_final_errors_are_not() -> None:
    source = Source(failing(AccessDeniedError("no")), good)
    with pytest.raises(AccessDeniedError):
        get(source)
    assert source.asked == 1


def test_retries_end() -> None:
    source = Source(*[failing(ThrottledError("slow down"))] * 100)
    with pytest.raises(ThrottledError):
        get(source, patience_s=lambda: 60.0 if source.asked < 3 else 0.0)
    assert source.asked == 3


def test_a_stuck_request_is_asked_a_second_time_and_its_room_is_counted() -> None:
    released = threading.Event()

    def stuck() -> memoryview:
        released.wait(timeout=30)
        return memoryview(b"late")

    source = Source(stuck, good)
    try:
        data, _, memory, recorder = get(source)
        assert bytes(data) == b"good"
        assert (source.asked, recorder.hedges) == (2, 1)
        assert memory.used_bytes == 4, "the stuck thread still holds its bytes"
        assert source.cancels[0].called, "and is told to end"
    finally:
        released.set()


def test_the_room_of_a_request_that_is_not_wanted_counts_until_its_thread_has_ended() -> None:
    released = threading.Event()

    def stuck() -> memoryview:
        released.wait(timeout=30)
        return memoryview(b"late")

    async def run() -> None:
        source, made = Source(stuck), trio.Event()
        memory = BlockMemory(LIMIT, 10, BlockMap(10), lambda: 1)
        getter = BlockGetter(
            source, memory, MountOptions(), Threads(10), made.set, Recorder()  # type: ignore[arg-type]
        )  # fmt: skip
        with trio.move_on_after(0.2) as scope:
            await getter.get(FILE, 0, 4, patience_s=lambda: 60.0, saturated=lambda: True)
        assert scope.cancelled_caught
        assert source.cancels[0].called
        assert memory.used_bytes == 4
        released.set()
        with trio.fail_after(20):
            await made.wait()
        assert memory.used_bytes == 0

    try:
        trio.run(run)
    finally:
        released.set()


def test_over_a_slow_link_nothing_is_asked_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes keep coming, if slowly: a second request would take the link from the others."""
    came = itertools.count()
    monkeypatch.setattr(Cancel, "received_bytes", lambda self: next(came))

    def slow() -> memoryview:
        time.sleep(3.5)  # longer than the first patience of the timer
        return good()

    _, _, _, recorder = get(Source(slow))
    assert recorder.hedges == 0


def test_a_request_that_later_ones_overtake_is_asked_a_second_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came = itertools.count()
    monkeypatch.setattr(Cancel, "received_bytes", lambda self: next(came))
    released = threading.Event()

    def slow() -> memoryview:
        released.wait(timeout=30)
        return good()

    source = Source(slow, *[good] * (OVERTAKEN + 1))

    async def run() -> Recorder:
        memory = BlockMemory(LIMIT, 10, BlockMap(10), lambda: 1)
        threads, recorder = Threads(10), Recorder()
        getter = BlockGetter(source, memory, MountOptions(), threads, lambda: None, recorder)  # type: ignore[arg-type]

        async def one(length: int = 4) -> None:
            await getter.get(FILE, 0, length, patience_s=lambda: 60.0, saturated=lambda: True)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one)
                for _ in range(OVERTAKEN):
                    await trio.sleep(1.1)  # half the timer's first patience
                    await one()
        return recorder

    try:
        assert trio.run(run).hedges == 1
    finally:
        released.set()


@pytest.mark.parametrize(
    ("bytes_per_s", "hedges"),
    [
        ([20], 0),  # at this rate a request takes 20 s
        ([1000, 10], 1),  # together they show a fast link
    ],
)
def test_a_pause_on_a_slow_link_is_no_reason_to_ask_a_second_time(
    monkeypatch: pytest.MonkeyPatch, bytes_per_s: list[int], hedges: int
) -> None:
    """Others show how slow the link is, before the first block has come."""
    length, began_s = 400, time.monotonic()
    released = threading.Event()

    def slow() -> memoryview:
        released.wait(timeout=30)
        return good()

    source = Source(slow, *[slow for _ in bytes_per_s], good)

    def came(cancel: Cancel) -> int:
        others = {
            id(other): rate for other, rate in zip(source.cancels[1:], bytes_per_s, strict=False)
        }
        return int((time.monotonic() - began_s) * others.get(id(cancel), 0)) or 10

    monkeypatch.setattr(Cancel, "received_bytes", came)

    async def run() -> Recorder:
        memory = BlockMemory(4 * length, 10, BlockMap(10), lambda: 1)
        threads, recorder = Threads(10), Recorder()
        getter = BlockGetter(source, memory, MountOptions(), threads, lambda: None, recorder)  # type: ignore[arg-type]

        async def one() -> None:
            await getter.get(FILE, 0, length, patience_s=lambda: 60.0, saturated=lambda: True)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(len(bytes_per_s) + 1):
                    nursery.start_soon(one)
                    while source.asked <= number:
                        await trio.sleep(0.01)
                await trio.sleep(3.5)  # the timer's first patience is 2 s
                released.set()
        return recorder

    try:
        assert trio.run(run).hedges == hedges
    finally:
        released.set()


def test_requests_that_stall_together_are_counted_once_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a link that stalls, hundreds ask at the same time how fast the others are."""
    requests, asked = 64, 0

    def received(cancel: Cancel) -> int:
        nonlocal asked
        asked += 1
        return 10

    monkeypatch.setattr(Cancel, "received_bytes", received)

    async def run() -> None:
        memory = BlockMemory(1000 * requests, 10, BlockMap(10), lambda: 1)
        getter = BlockGetter(
            LateLink(), memory, MountOptions(movers=1), InlineThreads(), lambda: None, Recorder()  # type: ignore[arg-type]
        )  # fmt: skip

        async def one() -> None:
            await getter.get(FILE, 0, 400, patience_s=lambda: 60.0, saturated=lambda: True)

        with trio.move_on_after(3.5):  # the timer's first patience is 2 s
            async with trio.open_nursery() as nursery:
                for _ in range(requests):
                    nursery.start_soon(one)

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert requests < asked <= 5 * requests, "each looks three times, and twice all are counted"


def test_an_error_of_the_second_attempt_leaves_the_first() -> None:
    first_may_answer = threading.Event()

    def slow() -> memoryview:
        first_may_answer.wait(timeout=30)
        return good()

    def second() -> memoryview:
        threading.Timer(0.2, first_may_answer.set).start()  # after this error has been seen
        raise ThrottledError("slow down")

    data, _, memory, recorder = get(Source(slow, second))
    assert bytes(data) == b"good"
    assert not recorder.retries
    assert memory.used_bytes == 0


def test_a_thread_that_gets_bytes_gives_way_to_the_loop() -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    source = Source(lambda: memoryview(bytes([nice()])))
    data, *_ = get(source)
    assert data[0] > nice()


class DeadLink(Source):
    """Loses all connections for a while, and forgets them: those made before stay silent.

    Args:
        lasts_s: from `begin` on.
    """

    SYN_S = (0.0, 1.0, 3.0)  # when Linux asks for a connection (tcp(7), tcp_syn_retries)

    def __init__(self, lasts_s: float) -> None:
        super().__init__()
        self._lasts_s = lasts_s
        self._began_s = math.inf

    @property
    def over_s(self) -> float:
        return self._began_s + self._lasts_s

    def begin(self) -> None:
        self._began_s = trio.current_time()

    async def read_by_mover(
        self, pin: File, start: int, length: int, cancel: Cancel,
        has_time: Callable[[], bool], ended: Callable[[], None],
    ) -> memoryview | None:  # fmt: skip
        self.asked += 1
        try:
            began_s = trio.current_time()
            if began_s >= self._began_s:
                over_in_s = self.over_s - began_s
                connected_s = next((s for s in self.SYN_S if s >= over_in_s), None)
                await trio.sleep(CONNECT_TIMEOUT_S if connected_s is None else connected_s)
                if connected_s is None:
                    return None
            await trio.sleep(0.2)
            if began_s < self._began_s <= trio.current_time():
                await trio.sleep(SILENCE_TIMEOUT_S)
                return None
            return memoryview(bytes(length))
        finally:
            ended()

    def read(self, pin: File, start: int, length: int, cancel: Cancel) -> memoryview:
        raise UnavailableError("timed out")


class LateLink(DeadLink):
    """Answers when it is back."""

    def __init__(self) -> None:
        super().__init__(0)
        self.is_back = trio.Event()

    async def read_by_mover(
        self, pin: File, start: int, length: int, cancel: Cancel,
        has_time: Callable[[], bool], ended: Callable[[], None],
    ) -> memoryview | None:  # fmt: skip
        self.asked += 1
        await self.is_back.wait()
        ended()
        return memoryview(bytes(length))


def test_a_link_that_comes_back_before_the_second_attempt_costs_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hedger, "SILENT_S", 0.1)

    async def run() -> None:
        memory = BlockMemory(64, 4, BlockMap(4), lambda: 1)
        link, threads = LateLink(), InlineThreads()
        getter = BlockGetter(
            link, memory, MountOptions(movers=1), threads, lambda: None, Recorder()  # type: ignore[arg-type]
        )  # fmt: skip
        threads.hold()

        async def one() -> None:
            memory.reserve(4)
            await getter.get(FILE, 0, 4, patience_s=lambda: 60.0, saturated=lambda: True)
            memory.release(4)

        link.is_back.set()
        for _ in range(8):  # so that it is known what is usual
            await one()
        link.is_back = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            with trio.fail_after(30):
                while not threads.running:  # it closes idle connections before the second attempt
                    await trio.sleep(0.1)
            assert memory.used_bytes == 8
            link.is_back.set()
            await trio.testing.wait_all_tasks_blocked()
            threads.gate.set()
        assert (link.asked, memory.used_bytes, getter.hedger.second_attempts) == (9, 0, 0)

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


def test_an_answer_in_the_moment_of_a_second_attempt_costs_no_room() -> None:
    class Punctual(DeadLink):
        """Answers when the getter looks the second time."""

        async def read_by_mover(
            self, pin: File, start: int, length: int, cancel: Cancel,
            has_time: Callable[[], bool], ended: Callable[[], None],
        ) -> memoryview | None:  # fmt: skip
            self.asked += 1
            try:
                await trio.sleep(getter.hedger.timer.delay_s)
                return memoryview(bytes(length))
            finally:
                ended()

    async def run() -> None:
        for _ in range(40):
            await getter.get(FILE, 0, 4, patience_s=lambda: 60.0, saturated=lambda: False)
            await trio.testing.wait_all_tasks_blocked()
        assert (memory.used_bytes, getter.hedger.second_attempts) == (0, 0)

    memory = BlockMemory(64, 4, BlockMap(4), lambda: 1)
    getter = BlockGetter(
        Punctual(0), memory, MountOptions(movers=1), Threads(9), lambda: None, Recorder()  # type: ignore[arg-type]
    )  # fmt: skip
    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_request_that_ends_before_it_has_a_thread_leaves_nothing() -> None:
    async def run() -> None:
        threads, memory = InlineThreads(), BlockMemory(64, 4, BlockMap(4), lambda: 1)
        getter = BlockGetter(
            Source(), memory, MountOptions(), threads.threads, lambda: None, Recorder()  # type: ignore[arg-type]
        )  # fmt: skip
        threads.hold()
        with trio.move_on_after(1):
            await getter.get(FILE, 0, 4, patience_s=lambda: 60.0, saturated=lambda: False)
        assert memory.used_bytes == 0

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("lasts_s", [0.5, 1, 3, 4, 6, 8, 10, 14, 19, 25, 60])
def test_readers_wait_for_a_dead_link_at_most_five_seconds_longer(
    lasts_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a router forgets its connections: those that are made later work."""
    monkeypatch.setattr(retry.random, "random", lambda: 1.0)  # the longest pauses
    readers = 24
    link = DeadLink(lasts_s)
    answered_s: list[float] = []

    async def run() -> None:
        memory = BlockMemory(16 * readers, 4, BlockMap(4), lambda: 1)
        getter = BlockGetter(
            link, memory, MountOptions(movers=1), InlineThreads(), lambda: None, Recorder()  # type: ignore[arg-type]
        )  # fmt: skip

        async def one() -> None:
            memory.reserve(4)
            await getter.get(FILE, 0, 4, patience_s=lambda: 600.0, saturated=lambda: True)
            memory.release(4)
            answered_s.append(trio.current_time())

        for _ in range(8):
            await one()
        async with trio.open_nursery() as nursery:
            for _ in range(readers):
                nursery.start_soon(one)
            await trio.sleep(0.1)
            link.begin()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0.01))
    assert len(answered_s) == 8 + readers
    assert max(answered_s) <= link.over_s + 5
    assert link.asked <= 8 + readers * (3 + lasts_s / 3), "and it is not asked without end"


def test_a_slow_beginning_is_no_dead_link() -> None:
    """Before anything has come, a link may be slow: few requests are repeated."""
    asked: list[float] = []

    class Slow(DeadLink):
        async def read_by_mover(self, *wanted: Any) -> memoryview | None:
            asked.append(trio.current_time())
            await trio.sleep(3.5)
            wanted[-1]()
            return memoryview(bytes(4))

    async def run() -> None:
        memory = BlockMemory(1000, 4, BlockMap(4), lambda: 1)
        getter = BlockGetter(
            Slow(0), memory, MountOptions(movers=1), InlineThreads(), lambda: None, Recorder()  # type: ignore[arg-type]
        )  # fmt: skip

        async def one() -> None:
            await getter.get(FILE, 0, 4, patience_s=lambda: 600.0, saturated=lambda: True)

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for _ in range(16):
                    nursery.start_soon(one)
            await trio.sleep(100)  # nothing comes while nothing is asked

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0.01))
    assert len(asked) <= 2 * (16 + HEDGES)
