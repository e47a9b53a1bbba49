"""Blocks that pass from a socket to FUSE through pipes, in the place of which a pipe takes them."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from test_http import ANSWER, DATA, HEAD, HEADERS, LENGTH, serving

from lazyfs.pagecache.page_cache import PageCache
from lazyfs.pagecache.pipe_pair import PipePair
from lazyfs.pagecache.spliced_block import Arrived, SplicedBlock
from lazyfs.store.http import Cancel, Transport

INODE, OFFSET = 7, 3 << 20
HEADER = struct.Struct("<IiQQQII")  # linux/fuse.h: fuse_out_header, fuse_notify_store_out
PIPE_BYTES = 1 << 20
Answer = Callable[[int, Callable[[], str], Callable[[bytes], None]], None]


class Fuse:
    """Takes what a `PageCache` sends, whenever it is told to."""

    def __init__(self) -> None:
        self._out, self._into = os.pipe()
        fcntl.fcntl(self._into, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.page_cache = PageCache("auto")
        self.page_cache.device = self._into
        self.stored: dict[int, bytes] = {}

    def lock_pages(self) -> None:
        """Whoever stores now waits until `unlock_pages`."""
        os.write(self._into, bytes(PIPE_BYTES))

    def unlock_pages(self) -> None:
        self._read(PIPE_BYTES)

    def take_all(self, sender: Future[Arrived]) -> None:
        """Take messages until nothing more comes from the sender."""
        os.set_blocking(self._out, False)
        while True:
            is_over = sender.done()
            try:
                header = os.read(self._out, HEADER.size)
            except BlockingIOError:
                if is_over:
                    return
                time.sleep(0.001)
                continue
            length, code, unique, inode, offset, size, _ = HEADER.unpack(header)
            assert (length, code, unique, inode) == (HEADER.size + size, 4, 0, INODE)
            os.set_blocking(self._out, True)
            self.stored[offset - OFFSET] = self._read(size)
            os.set_blocking(self._out, False)

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            parts.append(os.read(self._out, count))
            count -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._out)
        os.close(self._into)


@pytest.fixture
def fuse() -> Iterator[Fuse]:
    fuse = Fuse()
    yield fuse
    fuse.close()


@contextmanager
def passing(fuse: Fuse, serve: Answer) -> Iterator[tuple[SplicedBlock, Future[Arrived], Transport]]:
    """A block that passes in another thread."""
    passage = SplicedBlock(fuse.page_cache, INODE, OFFSET, len(DATA))
    with serving(serve) as (_, client), ThreadPoolExecutor(1) as threads:
        arrived = threads.submit(
            client.get_range, "/k", HEADERS, 0, len(DATA), passage.receive, Cancel()
        )
        yield passage, arrived, client


def in_parts(gate: threading.Event, before: int) -> Answer:
    """An answer of which the rest comes when a gate is opened."""

    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + LENGTH + DATA[:before])
        gate.wait(20)
        send(DATA[before:])
        request()
        send(ANSWER)

    return serve


def whole(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
    while True:
        request()
        send(ANSWER)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fits(fuse: Fuse, arrived: Arrived) -> bool:
    """Whether what was stored and what is in memory are the block, each byte once."""
    at = 0
    for offset, data in sorted(fuse.stored.items()):
        if offset != at or DATA[at : at + len(data)] != data or at % 4096:
            return False
        at += len(data)
    return at == arrived.passed and arrived.data[at:] == DATA[at:]


def test_a_block_passes_whole(fuse: Fuse) -> None:
    with passing(fuse, whole) as (_, future, client):
        fuse.take_all(future)
        assert future.result() == Arrived(memoryview(b""), len(DATA))
        assert fits(fuse, future.result())
        assert fuse.page_cache.passed_bytes == fuse.page_cache.pushed_bytes == len(DATA)
        again = memoryview(bytearray(len(DATA)))
        client.get_range("/k", HEADERS, 0, len(DATA), lambda body: body.read_into(again), Cancel())
        assert again == DATA, "the connection is not where the next answer begins"


def test_what_is_called_off_comes_into_memory_from_there_on(fuse: Fuse) -> None:
    gate = threading.Event()
    with passing(fuse, in_parts(gate, 700_001)) as (passage, future, client):
        wait_until(lambda: fuse.page_cache.passed_bytes > 0)
        assert not passage.call_off()
        gate.set()
        fuse.take_all(future)
        arrived = future.result()
        assert 0 < arrived.passed < len(DATA)
        assert fits(fuse, arrived)
        again = memoryview(bytearray(len(DATA)))
        client.get_range("/k", HEADERS, 0, len(DATA), lambda body: body.read_into(again), Cancel())
        assert again == DATA


def test_what_waits_for_a_locked_page_is_rescued_without_it(fuse: Fuse) -> None:
    gate = threading.Event()
    fuse.lock_pages()
    with passing(fuse, in_parts(gate, 700_001)) as (passage, future, _):
        wait_until(lambda: fuse.page_cache.busy)
        assert passage.call_off()
        gate.set()
        rescued = passage.rescue()
        assert rescued is not None
        assert rescued.passed == 0
        assert rescued.data == DATA
        assert not future.done()
        fuse.unlock_pages()
        assert future.result(20) == rescued


def test_a_rescue_may_be_there_before_the_kernel_is_asked(
    fuse: Fuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is about to store may have to wait for a processor longer than a rescue."""
    gate, ask = threading.Event(), fuse.page_cache.push_held
    rescued: list[Arrived | None] = []

    def ask_late(inode: int, size: int, pipes: PipePair) -> bool:
        assert passage.call_off()
        rescued.append(passage.rescue())
        return ask(inode, size, pipes)

    monkeypatch.setattr(fuse.page_cache, "push_held", ask_late)
    with passing(fuse, in_parts(gate, 0)) as (passage, future, _):
        gate.set()
        fuse.take_all(future)
        assert rescued == [future.result()] == [Arrived(memoryview(DATA), 0)]
        assert fuse.stored == {0: DATA[: len(fuse.stored[0])]}, "other bytes than those held"


def test_there_is_nothing_to_rescue_of_what_has_come(fuse: Fuse) -> None:
    with passing(fuse, whole) as (passage, future, _):
        fuse.take_all(future)
        assert not passage.call_off()
        assert passage.rescue() is None


def test_a_rescue_that_fails_ends_both(fuse: Fuse) -> None:
    def cut_off(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + LENGTH + DATA[:700_001])

    fuse.lock_pages()
    with passing(fuse, cut_off) as (passage, future, _):
        wait_until(lambda: fuse.page_cache.busy)
        with pytest.raises(Exception, match="IncompleteRead"):
            passage.rescue()
        fuse.unlock_pages()
        with pytest.raises(Exception, match="IncompleteRead"):
            future.result(20)


def test_a_body_that_ends_too_early_is_an_error(fuse: Fuse) -> None:
    def cut_off(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + LENGTH + DATA[:-1])

    with passing(fuse, cut_off) as (_, future, _client):
        fuse.take_all(future)
        with pytest.raises(Exception, match="IncompleteRead"):
            future.result()


def test_a_body_in_chunks_comes_into_memory(fuse: Fuse) -> None:
    def chunked(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        send(b"%x\r\n" % len(DATA) + DATA + b"\r\n0\r\n\r\n")

    with passing(fuse, chunked) as (_, future, _client):
        fuse.take_all(future)
        assert future.result() == Arrived(memoryview(DATA), 0)


def test_what_the_kernel_does_not_take_comes_into_memory(fuse: Fuse) -> None:
    fuse.page_cache.device = os.open(os.devnull, os.O_RDONLY)  # cannot be written to: EBADF
    with passing(fuse, whole) as (_, future, _client):
        assert future.result(20) == Arrived(memoryview(DATA), 0)
    os.close(fuse.page_cache.device)


def test_bytes_that_come_one_by_one_are_put_together(fuse: Fuse) -> None:
    def trickle(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + LENGTH)
        for at in range(5000):
            send(DATA[at : at + 1])
        send(DATA[5000:])

    with passing(fuse, trickle) as (_, future, _client):
        fuse.take_all(future)
        assert fits(fuse, future.result())
