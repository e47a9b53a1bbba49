"""Requests of a kernel that is a socket; time is simulated."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError

from lazyfs.fuse import connection as module
from lazyfs.fuse.connection import KernelConnection, is_being_killed
from lazyfs.fuse.reply import reply_in_mover
from lazyfs.movers.call import MoverFaultError, MoverLostError

LOOKUP, READ, INTERRUPT, FORGET, BATCH_FORGET, READDIRPLUS = 1, 15, 36, 2, 42, 44
LOCK_OWNER, FLAGS = 2, os.O_DIRECT
DATA = b"some bytes of a block"


class Kernel:
    """The other ends of a connection: what it takes for the kernel, and for libfuse."""

    def __init__(self, device: socket.socket, libfuse: socket.socket) -> None:
        self.device, self.libfuse = device, libfuse
        for end in (device, libfuse):
            end.setblocking(False)

    def ask(self, operation: int, unique: int, body: bytes = b"", thread: int = 7) -> bytes:
        message = struct.pack(
            "<IIQQIIII", 40 + len(body), operation, unique, 5, 0, 0, thread, 0
        ) + body  # fmt: skip
        self.device.send(message)
        return message

    def read(self, unique: int, size: int = 9, thread: int = 7, *, direct: bool = False) -> None:
        kind = LOCK_OWNER if direct else 0
        self.ask(READ, unique, struct.pack("<QQIIQII", 5, 100, size, kind, 1, FLAGS, 0), thread)

    def interrupt(self, unique: int) -> None:
        self.ask(INTERRUPT, unique | 1, struct.pack("<Q", unique))

    async def answer(self) -> tuple[int, int, bytes]:
        """Of which request, its error, and what else is in it."""
        await trio.lowlevel.wait_readable(self.device)
        message = self.device.recv(1 << 20)
        length, error, unique = struct.unpack_from("<IiQ", message)
        assert length == len(message)
        return unique, -error, message[16:]

    async def passed(self) -> bytes:
        await trio.lowlevel.wait_readable(self.libfuse)
        return self.libfuse.recv(1 << 20)

    def has_answer(self) -> bool:
        try:
            self.device.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        return True


Read = Callable[[int, int, int], Awaitable[bytes]]


async def at_once(handle: int, offset: int, size: int) -> bytes:
    assert (handle, offset) == (5, 100)
    return DATA[:size]


def with_bytes(handle: int, offset: int, size: int, flags: int) -> bool:
    assert (handle, offset, size, flags) == (5, 100, 9, FLAGS)
    return False


def converse(
    script: Callable[[Kernel], Awaitable[None]],
    read: Read = at_once,
    answers_empty: Callable[[int, int, int, int], bool] = with_bytes,
    movers: object = None,
    arrives: Callable[[int, int, int], None] = lambda *_: None,
) -> None:
    """Let a connection serve while a script plays the kernel and libfuse."""

    async def run() -> None:
        ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        with ends[0][0], ends[0][1], ends[1][0], ends[1][1]:
            served = KernelConnection(
                ends[0][0].fileno(),
                ends[1][0],
                read,
                arrives,
                answers_empty,
                movers,  # type: ignore[arg-type]
            )
            with trio.fail_after(1000):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(served.run)
                    await script(Kernel(ends[0][1], ends[1][1]))
                    nursery.cancel_scope.cancel()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0.01))


def never() -> tuple[Read, list[str]]:
    """A read that takes for ever, and what became of it."""
    ends: list[str] = []

    async def read(handle: int, offset: int, size: int) -> bytes:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            ends.append("cancelled")
            raise
        raise AssertionError

    return read, ends


def test_a_read_is_answered_with_its_bytes() -> None:
    async def script(kernel: Kernel) -> None:
        kernel.read(2)
        assert await kernel.answer() == (2, 0, DATA[:9])

    converse(script)


def test_reads_are_told_in_the_order_in_which_they_came() -> None:
    """Tasks that start together run in any order, and a policy follows the positions of readers."""
    told: list[int] = []

    async def read(handle: int, offset: int, size: int) -> bytes:
        assert len(told) == 12, "all were told before one was served"
        return DATA

    async def script(kernel: Kernel) -> None:
        for at in range(12):
            kernel.read(2 * at, size=at)
        answers = [await kernel.answer() for _ in range(12)]
        assert sorted(unique for unique, _, _ in answers) == list(range(0, 24, 2))

    converse(script, read, arrives=lambda handle, offset, size: told.append(size))
    assert told == list(range(12))


def test_direct_reads_may_be_answered_empty_and_others_are_not() -> None:
    async def script(kernel: Kernel) -> None:
        kernel.read(2, direct=True)
        assert await kernel.answer() == (2, 0, b"")
        kernel.read(4)
        assert await kernel.answer() == (4, 0, DATA[:9])

    converse(script, answers_empty=lambda *_: True)


def test_a_direct_read_is_answered_with_its_bytes_where_it_must() -> None:
    async def script(kernel: Kernel) -> None:
        kernel.read(2, direct=True)
        assert await kernel.answer() == (2, 0, DATA[:9])

    converse(script)


class Mover:
    """A mover that writes an answer, or does not."""

    running = 1

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[tuple[int, int]] = []

    async def run(self, function: object, unique: int, *, buffer: memoryview) -> None:
        assert function is reply_in_mover
        self.asked.append((unique, len(buffer)))
        await trio.lowlevel.checkpoint()
        if isinstance(self.error, TimeoutError):
            await trio.sleep_forever()
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "is_answered_here"),
    [(None, False), (MoverLostError(), True), (MoverFaultError(), True),
     (OSError(errno.ENOENT, "withdrawn"), False), (OSError(errno.ENOMEM, "its own"), True),
     (RuntimeError("no more threads"), True), (TimeoutError("it hangs"), True)],
)  # fmt: skip
def test_long_answers_are_written_by_movers(
    error: Exception | None, is_answered_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_MOVED", 9)
    monkeypatch.setattr(module, "LONGEST_MOVED_S", 0.2)
    mover = Mover(error)

    async def script(kernel: Kernel) -> None:
        kernel.read(2, size=9)
        kernel.read(4, size=8)
        answers = [await kernel.answer() for _ in range(1 + is_answered_here)]
        assert sorted(unique for unique, _, _ in answers) == [2, 4][-len(answers) :]
        await trio.sleep(1)
        assert not kernel.has_answer()

    converse(script, movers=mover)
    assert mover.asked == [(2, 9)]


def test_a_read_that_fails_is_answered_with_its_error() -> None:
    async def fails(handle: int, offset: int, size: int) -> bytes:
        raise FUSEError(errno.ESTALE)

    async def script(kernel: Kernel) -> None:
        kernel.read(2)
        assert await kernel.answer() == (2, errno.ESTALE, b"")

    converse(script, fails)


def test_names_are_asked_of_libfuse() -> None:
    async def script(kernel: Kernel) -> None:
        asked = kernel.ask(LOOKUP, 4, b"name\0")
        assert await kernel.passed() == asked
        kernel.libfuse.send(struct.pack("<IiQ", 20, 0, 4) + b"node")
        assert await kernel.answer() == (4, 0, b"node")
        asked = kernel.ask(FORGET, 6, b"12345678")
        assert await kernel.passed() == asked

    converse(script)


def test_directory_reads_are_limited_to_what_a_socket_takes() -> None:
    async def script(kernel: Kernel) -> None:
        for size, given in ((4096, 4096), (1 << 20, module.MOST_OF_DIRECTORY)):
            kernel.ask(READDIRPLUS, 4, struct.pack("<QQIIQII", 5, 0, size, 0, 0, 0, 0))
            assert struct.unpack_from("<I", await kernel.passed(), 56) == (given,)

    converse(script)


@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 12_000])
def test_any_number_of_inodes_can_be_forgotten_at_once(count: int) -> None:
    """The kernel does so when memory is short, or a directory was walked."""
    forgotten = [struct.pack("<QQ", inode + 2, 1) for inode in range(count)]

    async def script(kernel: Kernel) -> None:
        kernel.ask(BATCH_FORGET, 2, struct.pack("<II", count, 0) + b"".join(forgotten))
        kernel.ask(LOOKUP, 4, b"name\0")
        told: list[bytes] = []
        while True:
            message = await kernel.passed()
            length, operation = struct.unpack_from("<II", message)
            assert length == len(message) <= 128 << 10
            if operation == LOOKUP:
                break
            (inside,) = struct.unpack_from("<I", message, 40)
            assert len(message) == 48 + 16 * inside
            told += [message[at : at + 16] for at in range(48, length, 16)]
        assert told == forgotten

    converse(script)


def test_more_requests_than_a_socket_holds_reach_libfuse() -> None:
    async def script(kernel: Kernel) -> None:
        async def ask() -> None:
            for number in range(2000):
                await trio.lowlevel.wait_writable(kernel.device)
                kernel.ask(LOOKUP, 2 * number, b"x" * 200)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(1)
            for number in range(2000):
                assert struct.unpack_from("<Q", await kernel.passed(), 8) == (2 * number,)

    converse(script)


def test_second_answers_to_a_request_are_discarded() -> None:
    async def script(kernel: Kernel) -> None:
        kernel.libfuse.send(struct.pack("<IiQ", 20, 0, 2) + b"init")
        await trio.sleep(10)
        assert not kernel.has_answer()

    converse(script)


def test_readers_that_are_being_killed_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: set[int] = set()
    monkeypatch.setattr(module, "is_being_killed", lambda thread: thread in killed)
    read, ends = never()

    async def script(kernel: Kernel) -> None:
        kernel.read(2, thread=7)
        kernel.read(4, thread=8)
        kernel.ask(LOOKUP, 6, b"name\0", thread=7)
        await trio.sleep(60)
        assert not kernel.has_answer()
        killed.add(7)
        began_s = trio.current_time()
        answers = {(await kernel.answer())[:2] for _ in range(2)}
        assert answers == {(2, errno.EINTR), (6, errno.EINTR)}
        assert trio.current_time() - began_s < 2
        assert ends == ["cancelled"]
        kernel.libfuse.send(struct.pack("<IiQ", 20, 0, 6) + b"late")
        await trio.sleep(60)
        assert not kernel.has_answer()

    converse(script, read)


def test_a_harmless_signal_ends_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_being_killed", lambda thread: False)

    async def script(kernel: Kernel) -> None:
        kernel.read(2)
        kernel.interrupt(2)
        kernel.interrupt(100)
        await trio.sleep(60)
        assert not kernel.has_answer()

    converse(script, never()[0])


def test_invisible_readers_are_released_after_an_interrupt() -> None:
    async def script(kernel: Kernel) -> None:
        kernel.read(2, thread=0)
        kernel.read(4, thread=0)
        await trio.sleep(60)
        kernel.interrupt(4)
        began_s = trio.current_time()
        assert await kernel.answer() == (4, errno.EINTR, b"")
        assert module.UNSEEN_PATIENCE_S <= trio.current_time() - began_s < 5
        await trio.sleep(60)
        assert not kernel.has_answer()

    converse(script, never()[0])


def test_which_threads_can_be_seen() -> None:
    assert is_being_killed(threading.get_native_id()) is False
    assert is_being_killed(0) is None
    assert is_being_killed(int(Path("/proc/sys/kernel/pid_max").read_text()) + 1) is None
    assert is_being_killed(os.getpid()) is False
