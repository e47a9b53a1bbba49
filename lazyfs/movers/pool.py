"""Calls functions in other processes, on buffers that both sides map.

A worker answers the kernel, and one interpreter moves 1.5 to 6 GB/s at most, on any number of
processors. So a worker on a large machine leaves receiving, decryption, checksums, and calls that
store pages or write blocks to *movers*: processes, each with its own interpreter. A call names the
place of the bytes in the arena (`blocks/arena.py`); bytes never cross a socket.

Each call has a line of its own (`call.py`). So it blocks like any other function, and a stuck call
does not delay others. A task can await a call without a thread (`run`), which costs a quarter of
the processor time. Each function can also be called in the worker itself, and is if there are no
movers.

Movers start with the first calls, more of them if there are more concurrent calls, and end when
none was made for a while. If a mover dies, its running calls are lost (`MoverLostError`); the next
call starts another one. A mover that is stopped, or waits for something in the kernel, is *silent*:
it does not end calls that nobody waits for any more. It gets no others, and another one does its
work; if it stays silent, it is ended.

The module is long because it is one class: each call may lose its mover, and those of others.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lazyfs.blocks import buffers
from lazyfs.blocks.arena import Arena
from lazyfs.faults import contained, report_fault
from lazyfs.movers.call import (
    MOST_BYTES,
    MoverLostError,
    Nudge,
    Wire,
    message_of,
    value_of,
)
from lazyfs.movers.mover import Mover, MoverLine, start_mover

log = logging.getLogger(__name__)

# Movers end when nothing was moved for this time.
MOST_IDLE_S = 30.0
# The pause after the death of a mover before another one starts; it grows while they keep dying.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
# Concurrent calls, or parts of them, of each mover before another one is started: they share an
# interpreter.
CALLS_OF_EACH = 6
# Processor times of movers are read at most this often, each time a file of each.
READ_AGAIN_S = 0.1
# How long a task that is in no hurry waits for a mover that is starting.
LONGEST_START_S = 5.0


class Movers:
    """The movers of one worker. Calls can be made from any thread.

    Args:
        count: how many processes; 0: every call raises MoverLostError at once.

    Raises:
        OSError: there is no memory to share.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._movers: list[Mover] = []
        self._starting = 0
        self._ended = False
        self._used_s = 0.0
        self._pause_s = 0.0
        self._not_before_s = 0.0
        self.lost = 0
        # Processor times: of movers that have ended, and of all as they were last read, and when.
        self._ended_s = self._read_s = 0.0
        self._read_at_s = -READ_AGAIN_S
        if count:
            self._arena = Arena()
            buffers.share(self._arena)

    @property
    def running(self) -> int:
        """The present number of processes."""
        return len(self._movers)

    @property
    def processor_s(self) -> float:
        """Processor time of all movers so far, in seconds."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._read_at_s + READ_AGAIN_S:
                return self._read_s
            self._read_at_s = now_s
            ended_s, movers = self._ended_s, list(self._movers)
        self._read_s = max(self._read_s, ended_s + sum(mover.processor_s for mover in movers))
        return self._read_s

    def lend(self, name: str, descriptor: int) -> None:
        """Let movers that start from now on inherit a descriptor; see `context.lent`."""
        self._descriptors[name] = descriptor

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        buffer: memoryview | Sequence[memoryview],
        wire: Wire | None = None,
    ) -> Any:
        """Call a function of a module in a mover, with parts of its memory as the last arguments.

        Args:
            function: a function that the mover can import by its name.
            arguments, returned value: values that JSON can represent.
            buffer: a view of a buffer of `take_buffer`, in use until this returns or raises; or
                several of them.
            wire: gets the connection that the call waits for (`context.tell_wire`).

        Raises:
            MoverLostError: there is no mover, or it has ended, or the buffer is not shared.
            OSError: raised by the function: one of `OS_ERRORS`.
            MoverFaultError: another exception of the function.
        """
        asked = message_of(function, arguments, buffer)
        line = self._take()
        try:
            told = line.exchange(asked, wire)
        except OSError as error:
            self._lose(line)
            raise MoverLostError(str(error)) from error
        except BaseException:
            self._lose(line)
            raise
        self._give_back(line)
        return value_of(told)

    async def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        buffer: memoryview | Sequence[memoryview],
        wire: Wire | None = None,
        ended: Callable[[], None] = lambda: None,
        came: Callable[[Any], None] = lambda part: None,
        nudge: Nudge | None = None,
        parts: int = 1,
    ) -> Any:
        """Like `call`, for a task of the trio thread.

        Args:
            came: called with each part of the value that the function tells (`context.tell`).
            nudge: sends words to the function while it runs.
            parts: how many things the function does at once.
            ended: called when the mover is done, even if the task was cancelled before that: then
                the call goes on without it, and the buffer stays in use.

        Raises:
            MoverLostError, MoverFaultError, OSError: as by `call`.
        """
        import trio  # not for movers and for the probe of S3, which every mount waits for

        def tell(part: Any) -> None:
            try:
                came(part)
            except Exception as error:
                report_fault("handling a part of an answer", error)

        try:
            asked = message_of(function, arguments, buffer)
            line = self._take(parts)
        except BaseException:
            ended()
            raise
        try:
            line.send(asked, wire)
            if nudge is not None:
                nudge.begin(line.channel)
            told = await line.wait_for_answer(wire, tell)
        except trio.Cancelled:
            self._go_on(line, buffer, wire, ended)
            raise
        except OSError as error:
            self._done(line, wire, ended, lost=True)
            raise MoverLostError(str(error)) from error
        except ValueError as error:
            log.error("a process that moves bytes sent no answer but %s", error)
            self._remove(line.mover)
            self._go_on(line, buffer, wire, ended)
            raise MoverLostError(str(error)) from error
        finally:
            if nudge is not None:
                nudge.end()
        self._done(line, wire, ended, lost=False)
        return value_of(told)

    def _done(
        self, line: MoverLine, wire: Wire | None, ended: Callable[[], None], *, lost: bool
    ) -> None:
        """A call that a task awaited is over: the mover has answered, or closed the line."""
        line.mover.left.pop(line, None)
        if wire is not None:
            wire.use(None)
        if lost:
            self._lose(line, is_over=True)
        else:
            self._give_back(line)
        ended()

    def _go_on(
        self,
        line: MoverLine,
        buffer: memoryview | Sequence[memoryview],
        wire: Wire | None,
        ended: Callable[[], None],
    ) -> None:
        """Leave a call to a task that outlives the one that made it."""
        import trio

        line.mover.left[line] = time.monotonic()
        trio.lowlevel.spawn_system_task(
            contained, "waiting for a mover", self._drain, line, buffer, wire, ended
        )

    async def _drain(
        self,
        line: MoverLine,
        buffer: memoryview | Sequence[memoryview],
        wire: Wire | None,
        ended: Callable[[], None],
    ) -> None:
        """Wait for the end of a call without its task; until then `buffer` is in use.

        Cancelled when the worker ends. It must not wait for the mover then, which may be storing a
        page that only the next worker unlocks.
        """
        while True:
            try:
                await line.wait_for_answer(wire)
            except ValueError:
                continue
            except OSError as error:
                log.debug("a call that no task waits for was lost: %s", error)
                self._done(line, wire, ended, lost=True)
            else:
                self._done(line, wire, ended, lost=False)
            return

    def start(self) -> None:
        """Start the first movers ahead of a load. Returns at once."""
        with self._lock:
            self._used_s = time.monotonic()
            while not self._ended and len(self._movers) + self._starting < min(2, self.count):
                before = self._starting
                self._start_another()
                if self._starting == before:
                    return  # they rest

    async def wait_for_first(self, has_time: Callable[[], bool]) -> None:
        """Return when a mover runs, or none will for a while, or `has_time` is false."""
        if self._movers or not self.count:
            return
        import trio

        self.start()
        until_s = time.monotonic() + LONGEST_START_S
        while self._starting and not self._movers and has_time() and time.monotonic() < until_s:
            await trio.sleep(0.01)

    def look_after(self) -> None:
        """End movers that stay silent, or all if none was used for a while. Called repeatedly."""
        for mover in list(self._movers):
            was_stopped, mover.was_stopped = mover.was_stopped, mover.is_stopped
            stays = mover.is_silent(MOST_IDLE_S) or (was_stopped and mover.was_stopped)
            if stays and self._remove(mover):
                log.warning("a process that moves bytes does not answer: it is ended")
        with self._lock:
            # A call may take minutes: over a slow link, or while the kernel holds a page.
            is_used = any(mover.busy for mover in self._movers)
            if is_used or time.monotonic() - self._used_s <= MOST_IDLE_S:
                return
            movers = self._forget_all()
        for mover in movers:
            mover.end()
        buffers.free_idle()

    def close(self) -> None:
        """End them for good; calls in progress are lost."""
        with self._lock:
            self._ended = True
            movers = self._forget_all()
        for mover in movers:
            mover.end()

    def _take(self, parts: int = 1) -> MoverLine:
        with self._lock:
            self._used_s = time.monotonic()
            able = [mover for mover in self._movers if not mover.is_silent()]
            there = len(able) + self._starting
            calls = parts + sum(mover.busy for mover in able)
            is_full = len(self._movers) >= 2 * self.count  # with silent ones
            most = 0 if self._ended or is_full else self.count
            if there < min(most, max(2, calls // CALLS_OF_EACH)):
                self._start_another()
            for mover in sorted(able, key=lambda each: each.busy):
                if not mover.idle:
                    try:
                        mover.add_line()
                    except OSError:  # it has ended, or this process may open no more files
                        if mover.process.poll() is not None:
                            self._forget(mover)
                            self._rest()
                            mover.end()
                        continue
                mover.busy += parts
                line = mover.idle.pop()
                line.parts = parts
                return line
        raise MoverLostError("none is running")

    def _give_back(self, line: MoverLine) -> None:
        with self._lock:
            self._used_s = time.monotonic()
            line.mover.busy -= line.parts
            if line.mover in self._movers:
                line.mover.idle.append(line)
                self._pause_s = 0.0
                return
        line.close()

    def _lose(self, line: MoverLine, *, is_over: bool = False) -> None:
        """A call broke off: end its mover, and wait until it can use the buffer no longer.

        Args:
            is_over: the mover has closed the line. The trio thread must not wait.
        """
        with self._lock:
            line.mover.busy -= line.parts
            self.lost += 1
        is_first = self._remove(line.mover)
        if not is_over:
            with contextlib.suppress(OSError):  # the other side is closed
                while line.channel.recv(MOST_BYTES):
                    pass
        line.close()
        if is_first:
            log.warning(
                "a process that moves bytes ended unexpectedly (exit code %s); another is started",
                line.mover.process.poll(),
            )

    def _remove(self, mover: Mover) -> bool:
        """End a mover; False if it was ended before."""
        with self._lock:
            if mover not in self._movers:
                return False
            self._forget(mover)
            self._rest()
        mover.end()
        return True

    def _forget(self, mover: Mover) -> None:
        """Count one no longer. The caller has the lock."""
        self._movers.remove(mover)
        self._ended_s += mover.processor_s

    def _forget_all(self) -> list[Mover]:
        movers = list(self._movers)
        for mover in movers:
            self._forget(mover)
        return movers

    def _rest(self) -> None:
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        self._not_before_s = time.monotonic() + self._pause_s

    def _start_another(self) -> None:
        """Start a mover in a thread, because that takes a tenth of a second."""
        if time.monotonic() < self._not_before_s:
            return
        self._starting += 1
        try:
            threading.Thread(target=self._start, name="starting a mover", daemon=True).start()
        except RuntimeError:  # no more threads are allowed
            self._starting -= 1
            self._rest()

    def _start(self) -> None:
        mover = None
        try:
            mover = start_mover(self._arena.descriptor, self._descriptors)
        except (OSError, EOFError) as error:
            log.warning("no process to move bytes could be started: %s", error)
        with self._lock:
            self._starting -= 1
            if mover is None:
                self._rest()
                return
            if not self._ended:
                self._movers.append(mover)
                return
        mover.end()
