"""What nobody foresaw costs one answer, and is told once."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing

from lazyfs import faults
from lazyfs.blocks import Span
from lazyfs.blocks.block_map import BlockMap
from lazyfs.errors import SourceError
from lazyfs.faults import FaultLog, contained, keep_running, start_watching, the_error
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.fuse.filesystem import Filesystem
from lazyfs.handover.pending_requests import InHand
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.url import SourceUrl


def _fail(message: str) -> None:
    raise LookupError(message)


def test_repeats_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    log = FaultLog(lambda: now_s)
    for number in range(7):
        try:
            _fail(f"number {number}")
        except LookupError as error:
            log.report("counting", error)
        now_s += 20
    texts = [(record.getMessage(), record.exc_info is not None) for record in caplog.records]
    assert texts == [
        ("counting failed; this is a bug of lazyfs", True),
        ("counting failed 3 more times: LookupError: number 3", False),
        ("counting failed 3 more times: LookupError: number 6", False),
    ]
    assert log.count == 7


def test_different_faults_are_told_each(caplog: pytest.LogCaptureFixture) -> None:
    log = FaultLog(lambda: 0.0)
    for error in (
        ValueError("a"),
        ValueError("b"),
        KeyError("a"),
        ExceptionGroup("x", [OSError()]),
    ):
        log.report("this", error)
        log.report("that", error)
    assert len(caplog.records) == 6  # the two of ValueError are one
    assert isinstance(the_error(ExceptionGroup("x", [ExceptionGroup("y", [OSError()])])), OSError)


def test_memory_of_faults_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MOST_FAULTS", 10)
    log = FaultLog(lambda: 0.0)
    for number in range(1000):
        log.report(f"fault {number}", ValueError())
    assert len(log._seen) <= 10


def test_a_background_task_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    began_s: list[float] = []

    async def task(name: str) -> None:
        began_s.append(trio.current_time())
        if len(began_s) < 4:
            raise ZeroDivisionError(name)

    async def run() -> None:
        await keep_running("dividing", task, "x")

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(began_s) == 4
    pauses = [b - a for a, b in itertools.pairwise(began_s)]
    assert pauses == sorted(pauses) and pauses[0] > 0, "they grow"
    assert caplog.text.count("Traceback") == 1


def test_a_task_that_is_cancelled_ends() -> None:
    async def run() -> None:
        with trio.move_on_after(0.01) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_running, "waiting", trio.sleep_forever)
                nursery.start_soon(contained, "waiting", trio.sleep_forever)
        assert scope.cancelled_caught

    trio.run(run)


def test_a_supervising_thread_continues_after_a_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.001)
    rounds = iter((ValueError("filedescriptor out of range in select()"), OSError("no room")))
    ended = threading.Event()

    def watch() -> None:
        error = next(rounds, None)
        if error is not None:
            raise error
        ended.set()

    thread = start_watching("a mount", watch)
    assert ended.wait(10)
    thread.join(10)
    assert thread.daemon and not thread.is_alive()
    assert "out of range in select" in caplog.text and "no room" in caplog.text


OPERATIONS = {
    "lookup": (1, b"name", None), "getattr": (1, None), "opendir": (1, None),
    "readdir": (1, 0, None), "open": (1, os.O_RDONLY, None), "read": (1, 0, 4096), "release": (1,),
    "statfs": (None,), "getxattr": (1, b"user.x", None), "listxattr": (1, None),
}  # fmt: skip


class _Broken:
    """Whatever is asked of it fails as nobody foresaw."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_request_is_answered(name: str, caplog: pytest.LogCaptureFixture) -> None:
    filesystem = Filesystem.__new__(Filesystem)
    filesystem.in_hand = InHand(os.memfd_create("in-hand"))
    filesystem._tree = filesystem._recorder = _Broken()  # type: ignore[assignment]
    with pytest.raises(pyfuse3.FUSEError) as raised:
        trio.run(getattr(filesystem, name), *OPERATIONS[name])
    assert raised.value.errno == errno.EIO
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "LookupError" in caplog.text


def test_no_operation_is_left_out() -> None:
    """What is of `Operations` and not refused as a write is answered whatever happens."""
    ours = {name for name in vars(Filesystem) if name in vars(pyfuse3.Operations)}
    refused = {name for name in ours if isinstance(vars(Filesystem)[name], staticmethod)}
    without_work = {"init", "forget", "releasedir", "flush", "fsync", "fsyncdir"}
    rest = {
        name for name in ours - refused - without_work if not name.startswith(("_", "supp", "ena"))
    }
    assert rest == set(OPERATIONS)


def test_forget_requests_get_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    filesystem = Filesystem.__new__(Filesystem)
    filesystem._lookups = _Broken()  # type: ignore[assignment]
    trio.run(filesystem.forget, [(1, 1)])
    assert "forget failed" in caplog.text


class _FaultySource:
    """A store whose answers make a fault at first."""

    url = SourceUrl("bucket", "")

    def __init__(self, faults: int) -> None:
        self.faults = faults

    @property
    def ranges(self) -> _FaultySource:
        return self

    def read(self, wanted: Any, start: int, length: int, cancel: Any) -> memoryview:
        if self.faults:
            self.faults -= 1
            raise ValueError("Invalid header value")  # as http.client says
        return memoryview(bytes(length))

    def close_idle(self, longer_than_s: float = 0.0) -> None:
        pass

    def name(self, key: str) -> str:
        return key


FILE = File(2, 1, "f", "f", 10, "etag", 0)


def _fetcher(source: _FaultySource, prefetcher: Prefetcher) -> BlockFetcher:
    options = MountOptions.parse(("--{name}", {"prefetch": "off"}))
    page_cache, recorder = PageCache("off"), Recorder(options.prefetch)
    return BlockFetcher(source, None, page_cache, prefetcher, options, recorder)  # type: ignore[arg-type]


def test_a_fault_while_a_block_is_fetched_fails_its_readers() -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            fetcher = _fetcher(_FaultySource(faults=1), Prefetcher("off", BlockMap(8 << 20)))
            fetcher.start(nursery)
            errors = []

            async def read() -> None:
                try:
                    await fetcher.read(FILE, Span(0, 0, 10))
                except SourceError as error:
                    errors.append(error.errno)

            async with trio.open_nursery() as readers:
                for _ in range(3):
                    readers.start_soon(read)
            assert errors == [errno.EIO] * 3
            assert fetcher.in_flight == 0
            assert await fetcher.read(FILE, Span(0, 0, 10)) == bytes(10)
            assert fetcher.memory_bytes <= 8 << 20
            nursery.cancel_scope.cancel()

    trio.run(run)


def test_a_fault_of_prefetching_does_not_reach_readers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefetcher = Prefetcher("off", BlockMap(8 << 20))

    def fail(*_: object) -> None:
        raise LookupError("policy")

    for name in ("next_fetch", "was_read", "next_head"):
        monkeypatch.setattr(prefetcher, name, fail)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            fetcher = _fetcher(_FaultySource(faults=0), prefetcher)
            fetcher.start(nursery)
            fetcher.was_read(FILE, 0, 10)
            assert await fetcher.read(FILE, Span(0, 0, 10)) == bytes(10)
            nursery.cancel_scope.cancel()

    trio.run(run)
    assert caplog.text.count("Traceback") == 2
