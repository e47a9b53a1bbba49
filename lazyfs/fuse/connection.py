"""The kernel's requests: handles reads and interrupts here, passes all others to libfuse.

libfuse and pyfuse3 translate names and attributes. Two things they do not provide, so this module
is between them and `/dev/fuse`:

- *Waiting threads.* A thread that waits for an answer ignores SIGKILL until it gets one
  (`request_wait_answer` and `fuse_direct_IO` in Linux). The kernel reports signals
  (FUSE_INTERRUPT), and each request names its thread. libfuse exposes neither.
- *Reads.* Nearly all requests of a load are reads, and threads wait for them. They are answered
  directly from a block's memory.

Requests that go through libfuse are small: one message each way over a socket pair.

A request ends with EINTR when the thread that waits for it is being killed: then SIGKILL is
pending, also for each thread of a process that another fatal signal ends. `/proc` shows this, and
is checked for every request that waits long. Other signals must not end a wait: a read that fails
because of a profiler's timer would mean SIGBUS for a process that has mapped the file. A thread
that is not visible, because it is in a PID namespace beyond ours, is released some time after its
interrupt, whatever the signal was.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FUSEError

from lazyfs.faults import contained, keep_running, report_fault
from lazyfs.fuse.mount_syscalls import REQUEST_BYTES
from lazyfs.fuse.reply import HEADER, Buffer, reply, reply_in_mover
from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.movers.pool import Movers

log = logging.getLogger(__name__)

# linux/fuse.h: fuse_in_header, fuse_read_in, fuse_interrupt_in.
_IN_HEADER = struct.Struct("<IIQQIIII")
_READ_IN = struct.Struct("<QQIIQI")
_INTERRUPT_IN = struct.Struct("<Q")
_BATCH_FORGET_IN = struct.Struct("<II")
_FORGET_ONE_BYTES = 16
_SIZE_AT = _IN_HEADER.size + 16  # of `size` in fuse_read_in
_READ, _READDIR, _INTERRUPT, _READDIRPLUS = 15, 28, 36, 44
_BATCH_FORGET = 42
_UNANSWERED = {2, _BATCH_FORGET}  # the first one is FORGET
# In `read_flags`, FUSE_READ_LOCKOWNER: the kernel sets it for direct reads, and not for those that
# fill the page cache (`fuse_send_read` and `fuse_send_readpages` in Linux). The flags of the file
# are the same for both.
_IS_DIRECT = 1 << 1

# Part of a directory in one answer: enough for nearly all, and fits into a socket's buffer.
MOST_OF_DIRECTORY = 64 << 10
# Inodes of one FUSE_BATCH_FORGET, for the same reason: the kernel sends up to 65,000 of them.
MOST_FORGOTTEN = 4096
# Answers of this size are written by movers, while some run: the kernel copies 1 MiB in a quarter
# of a millisecond, and a call takes a fifth of that here.
LEAST_MOVED = 256 << 10
# How long a mover may take for it.
LONGEST_MOVED_S = 1.0
# Requests taken before other tasks run.
AT_ONCE = 64
# Requests that wait longer are checked, and how often.
LONG_S = 0.5
LOOK_S = 0.5
# How long a thread that is not visible waits after its interrupt.
UNSEEN_PATIENCE_S = 3.0


@dataclass(slots=True)
class _Waiting:
    """A request without an answer so far.

    Attributes:
        thread: the waiting thread's id in our PID namespace; 0: it is not in ours.
        since_s: when it was taken.
        scope: the scope of the task that serves it, if it is a read.
        interrupted_s: when the kernel first reported a signal to the thread.
    """

    thread: int
    since_s: float
    scope: trio.CancelScope | None = None
    interrupted_s: float | None = None


class KernelConnection:
    """Takes the kernel's requests and sends the answers, for one mount.

    Args:
        device: a descriptor of `/dev/fuse`.
        libfuse: the other end of what libfuse takes for the kernel.
        read: serves a read: handle, offset and size; raises FUSEError.
        arrives: called with each read before it is served, in the order in which they came: trio
            runs tasks in any order.
        answers_empty: whether a direct read (handle, offset, size, flags of the file) is answered
            with no bytes, so that the kernel continues it in the page cache.
        movers: write long answers.
    """

    def __init__(
        self,
        device: int,
        libfuse: socket.socket,
        read: Callable[[FileHandleT, int, int], Awaitable[Buffer]],
        arrives: Callable[[FileHandleT, int, int], None],
        answers_empty: Callable[[FileHandleT, int, int, int], bool],
        movers: Movers | None = None,
    ) -> None:
        self._movers = movers
        self._device = device
        self._libfuse = libfuse
        self._read = read
        self._arrives = arrives
        self._answers_empty = answers_empty
        self._waiting: dict[int, _Waiting] = {}

    async def run(self) -> None:
        """Serve until the kernel has ended the session; then end libfuse."""
        os.set_blocking(self._device, False)
        self._libfuse.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_answers)
            nursery.start_soon(keep_running, "releasing killed readers", self._look_after)
            await self._take_requests(nursery)
            nursery.cancel_scope.cancel()
        pyfuse3.terminate()

    async def _take_requests(self, nursery: trio.Nursery) -> None:
        buffer = memoryview(bytearray(REQUEST_BYTES))
        while True:
            await trio.lowlevel.wait_readable(self._device)
            for _ in range(AT_ONCE):
                try:
                    size = os.readv(self._device, [buffer])
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR):
                        continue  # a request that was withdrawn meanwhile
                    if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                        return
                    raise
                await self._take(nursery, buffer[:size])

    async def _take(self, nursery: trio.Nursery, message: memoryview) -> None:
        _, operation, unique, _, _, _, thread, _ = _IN_HEADER.unpack_from(message)
        if operation == _READ:
            handle, offset, size, kind, _, flags = _READ_IN.unpack_from(message, _IN_HEADER.size)
            if kind & _IS_DIRECT and self._answers_empty(FileHandleT(handle), offset, size, flags):
                self._send(reply(unique, 0))
                return
            self._arrives(FileHandleT(handle), offset, size)
            scope = trio.CancelScope()
            self._waiting[unique] = _Waiting(thread, trio.current_time(), scope)
            nursery.start_soon(
                contained, "answering a read", self._serve_read, unique, scope, handle, offset, size
            )
        elif operation == _INTERRUPT:
            (interrupted,) = _INTERRUPT_IN.unpack_from(message, _IN_HEADER.size)
            if (waiting := self._waiting.get(interrupted)) is not None:
                waiting.interrupted_s = trio.current_time()
        else:
            if operation in (_READDIR, _READDIRPLUS):
                (size,) = struct.unpack_from("<I", message, _SIZE_AT)
                struct.pack_into("<I", message, _SIZE_AT, min(size, MOST_OF_DIRECTORY))
            if operation not in _UNANSWERED:
                self._waiting[unique] = _Waiting(thread, trio.current_time())
            if operation == _BATCH_FORGET:
                for part in _in_parts(message):
                    await self._give_libfuse(part)
            else:
                await self._give_libfuse(message)

    async def _give_libfuse(self, message: memoryview) -> None:
        while True:
            try:
                self._libfuse.send(message)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._libfuse)
            else:
                return

    async def _serve_read(
        self, unique: int, scope: trio.CancelScope, handle: int, offset: int, size: int
    ) -> None:
        with scope:
            try:
                data = await self._read(FileHandleT(handle), offset, size)
            except FUSEError as error:
                self._answer(unique, error.errno)
            else:
                if not await self._is_answered(unique, data):
                    self._answer(unique, 0, data)

    async def _is_answered(self, unique: int, data: Buffer) -> bool:
        """Have a mover answer a read; False if it may not have. A second answer does no harm."""
        if self._movers is None or not self._movers.running or len(data) < LEAST_MOVED:
            return False
        try:
            # A mover that was killed keeps its lines open while a push of it waits, perhaps for
            # this very answer.
            with trio.move_on_after(LONGEST_MOVED_S) as limit:
                await self._movers.run(reply_in_mover, unique, buffer=memoryview(data))
            if limit.cancelled_caught:
                return False
        except (MoverLostError, MoverFaultError):
            return False
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                return False  # it may be the mover's, not the kernel's
            _note(error)
        except Exception as error:
            report_fault("answering a read by a mover", error)
            return False
        self._waiting.pop(unique, None)
        return True

    async def _pass_answers(self) -> None:
        """Pass libfuse's answers on."""
        while True:
            await trio.lowlevel.wait_readable(self._libfuse)
            try:
                message = self._libfuse.recv(REQUEST_BYTES)
            except BlockingIOError:
                continue
            _, _, unique = HEADER.unpack_from(message)
            # Otherwise it was given up meanwhile, or is FUSE_INIT's.
            if self._waiting.pop(unique, None):
                self._send([message])

    def _answer(self, unique: int, error: int, data: Buffer = b"") -> None:
        if self._waiting.pop(unique, None) is None:
            return  # it was given up just when its answer came
        self._send(reply(unique, error, data))

    def _send(self, parts: list[Buffer]) -> None:
        try:
            os.writev(self._device, parts)
        except OSError as error:
            _note(error)

    async def _look_after(self) -> None:
        """Release threads that are being killed."""
        while True:
            await trio.sleep(LOOK_S)
            now_s = trio.current_time()
            long = [each for each in self._waiting.items() if now_s >= each[1].since_s + LONG_S]
            killed = {
                thread: is_being_killed(thread) for thread in {each.thread for _, each in long}
            }
            for unique, waiting in long:
                dies = killed[waiting.thread]
                if dies is None and waiting.interrupted_s is not None:
                    dies = now_s >= waiting.interrupted_s + UNSEEN_PATIENCE_S
                if dies:
                    log.debug("request %d of thread %d is given up", unique, waiting.thread)
                    self._answer(unique, errno.EINTR)
                    if waiting.scope:
                        waiting.scope.cancel()


def _in_parts(message: memoryview) -> Iterator[memoryview]:
    """A FUSE_BATCH_FORGET as several that fit into a socket's buffer."""
    begin = _IN_HEADER.size + _BATCH_FORGET_IN.size
    most = MOST_FORGOTTEN * _FORGET_ONE_BYTES
    for at in range(begin, len(message), most):
        part = bytearray(message[:begin])
        part += message[at : at + most]
        count = (len(part) - begin) // _FORGET_ONE_BYTES
        struct.pack_into("<I", part, 0, len(part))
        _BATCH_FORGET_IN.pack_into(part, _IN_HEADER.size, count, 0)
        yield memoryview(part)


def _note(error: OSError) -> None:
    """Log that the kernel did not take an answer, unless it no longer waits for it."""
    # ENOENT: the request was withdrawn. ENODEV: the session has ended.
    if error.errno not in (errno.ENOENT, errno.ENODEV):
        log.error("the kernel did not take an answer: %s", error)


def is_being_killed(thread: int) -> bool | None:
    """Whether SIGKILL is pending for a thread (proc(5), `SigPnd`); None: it is not visible."""
    if thread == 0:
        return None
    try:
        status = Path(f"/proc/{thread}/status").read_text(errors="replace")
    except OSError:
        return None
    pending = 0
    for line in status.splitlines():
        if line.startswith(("SigPnd:", "ShdPnd:")):
            pending |= int(line.split()[1], 16)
    return bool(pending & 1 << (signal.SIGKILL - 1))
