"""The modelled world of a mount: link, disk, page cache. Sizes are bytes, rates bytes a second."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import socket
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import trio

from lazyfs.blocks import Span
from lazyfs.blocks.buffers import LEAST_SHARED
from lazyfs.cache import Claim
from lazyfs.listed_object import File
from lazyfs.movers.call import Nudge
from lazyfs.store.mover_requests import SHARE_TOLD
from lazyfs.store.protocol import EACH, STOP

# Of the page cache, what is told apart: the smallest request of a loader.
PAGE = 64 << 10
# Also where nothing is pushed, the kernel keeps what it has read ahead until it is used.
LEAST_PAGES = 64 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What the mount runs on.

    Attributes:
        link: that all requests share.
        latency_s: to the first byte of an answer, on average.
        connection: the most that one request gets.
        disk: space of the block cache; None: there is none.
        disk_read, disk_write: of all threads together.
        pages: of the mount that the kernel can hold; `pages` / 2 may be pushed ahead.
        push, request: of putting pages into the page cache, and of a read through FUSE.
        request_s: what a read through FUSE costs beside its bytes.
        max_background: reads that the kernel has sent and that are not answered.
        movers: processors that receive, check and push, one thing after another each; 0: the
            rates of what they do are those of `link`, `push` and the disk alone.
        receive: bytes a second that a mover receives; of HTTPS less than half as many.
        check: the same, of checksums and writes to the disk.
        worker_s: what each block takes of the process that answers the kernel.
        batched_s: the same, of each but one of the blocks that come in one call.
    """

    link: float = 500e6
    latency_s: float = 0.03
    connection: float = 90e6
    disk: int | None = 1 << 40
    disk_read: float = 1.5e9
    disk_write: float = 1e9
    pages: int = 64 << 30
    push: float = 3.6e9
    request: float = 1e9
    request_s: float = 0.0001
    max_background: int = 1024
    movers: int = 0
    receive: float = 2.5e9
    check: float = 6e9
    worker_s: float = 0.0
    batched_s: float = 0.0


class Call:
    """Stands for the socket of a call of a mover, to which words are sent."""

    def __init__(self) -> None:
        self.tells_each = self.is_over = False
        self.news = trio.Event()
        self.scope = trio.CancelScope()

    def send(self, word: bytes, flags: int) -> None:
        """In the place of `socket.send`."""
        self.tells_each |= word == EACH
        self.news.set()
        if word == STOP:
            self.scope.cancel()


class Threads:
    """Stands for trio's worker threads: what a call takes is slept, not worked."""

    def __init__(self) -> None:
        self._owed: Awaitable[None] | None = None

    def takes(self, time: Awaitable[None]) -> None:
        """Called by what runs in a thread: it takes as long as `time`."""
        self._owed = time

    async def run_sync(self, function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        """In the place of `trio.to_thread.run_sync`."""
        self._owed = None
        result = function(*arguments)
        owed, self._owed = self._owed, None
        await (owed or trio.lowlevel.checkpoint())
        return result


Unsent = Callable[[int], None]


def nothing(size: int) -> None:
    """What nobody counts."""


class Link:
    """Shared evenly by all transfers, each of which has a limit of its own."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._served = 0.0  # bytes that a transfer has got which was there from the beginning
        self._since_s = 0.0
        self._ends: list[tuple[float, int, trio.Event]] = []
        self._numbers = itertools.count()
        # Without any jitter all transfers would begin and end together.
        self._random = random.Random(1)
        self._changed = trio.Event()

    async def transfer(self, size: int, unsent: Unsent = nothing) -> None:
        """
        Args:
            unsent: if it is cancelled, called with how much was not sent.
        """
        left = float(size)
        transfer: tuple[float, int, trio.Event] | None = None
        try:
            await trio.sleep(self._machine.latency_s * self._random.uniform(0.5, 1.5))
            self._advance()
            transfer = self._served + size, next(self._numbers), trio.Event()
            heapq.heappush(self._ends, transfer)
            self._changed.set()
            await transfer[2].wait()
        except trio.Cancelled:
            if transfer in self._ends:
                self._advance()
                left = transfer[0] - self._served
                self._ends.remove(transfer)
                heapq.heapify(self._ends)
                self._changed.set()
            unsent(max(0, int(left)))
            raise

    async def run(self) -> None:
        while True:
            self._changed = trio.Event()
            left_s = (self._ends[0][0] - self._served) / self._rate if self._ends else math.inf
            with trio.move_on_after(max(0.0, left_s)):
                await self._changed.wait()
            self._advance()
            while self._ends and self._ends[0][0] <= self._served + 1:
                heapq.heappop(self._ends)[2].set()

    @property
    def _rate(self) -> float:
        """Of each transfer now."""
        return min(self._machine.link / max(1, len(self._ends)), self._machine.connection)

    def _advance(self) -> None:
        now_s = trio.current_time()
        if self._ends:
            self._served += (now_s - self._since_s) * self._rate
        self._since_s = now_s


class Queue:
    """A device or a process that does one thing after another.

    Args:
        rate: what it does in a second, in the unit of `take`.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_s = 0.0

    async def take(self, size: float) -> None:
        self._free_s = max(self._free_s, trio.current_time()) + size / self._rate
        await trio.sleep_until(self._free_s)


class Movers:
    """Processors beside the one that decides. What comes is done by the first that is free."""

    def __init__(self, machine: Machine) -> None:
        self._free_s = [0.0] * machine.movers

    async def take(self, size: int, rate: float) -> None:
        """Do something with `size` bytes at a rate; nothing, if there are no movers."""
        if self._free_s:
            free_s = max(heapq.heappop(self._free_s), trio.current_time()) + size / rate
            heapq.heappush(self._free_s, free_s)
            await trio.sleep_until(free_s)


class Bucket:
    """In the place of `Source`: gives headers as they are and zeros for the rest.

    Args:
        contents: the first bytes of objects by key.
        block_size: of the mount.
    """

    url = SimpleNamespace(bucket="simulated", prefix="")

    def __init__(
        self, contents: dict[str, bytes], block_size: int, link: Link, threads: Threads,
        machine: Machine, movers: Movers,
    ) -> None:  # fmt: skip
        self._machine = machine
        self._movers = movers
        self._worker = Queue(1.0)
        self._contents = contents
        self._zeros = memoryview(bytes(block_size))
        self._link = link
        self._threads = threads
        # Key, offset and length, each time it was asked for.
        self.asked: list[tuple[str, int, int]] = []
        # What was not sent because the request was cancelled, by key and offset.
        self.unsent: Counter[tuple[str, int]] = Counter()

    @property
    def sent_bytes(self) -> int:
        return sum(length for _, _, length in self.asked) - self.unsent.total()

    def name(self, key: str) -> str:
        return key

    @property
    def ranges(self) -> Bucket:
        return self

    @property
    def may_move(self) -> bool:
        return True

    def read(
        self, pin: File, start: int, length: int, cancel: object, asked: int | None = None
    ) -> memoryview:
        """
        Args:
            asked: how much of a request that was cut off has not come.
        """
        self._threads.takes(self._receive(pin.key, start, length if asked is None else asked))
        return self._bytes(pin.key, start, length, is_new=asked is None)

    async def read_by_mover(
        self, pin: File, start: int, length: int, cancel: object, has_time: object,
        ended: Callable[[], None],
    ) -> memoryview:  # fmt: skip
        try:
            data = self._bytes(pin.key, start, length)
            await self._receive(pin.key, start, length)
            return data
        finally:
            ended()

    async def read_each(
        self, pin: File, parts: Sequence[tuple[int, int]],
        came: Callable[[Sequence[tuple[int, memoryview | int]]], None], nudge: Nudge,
        patience_s: float, ended: Callable[[], None],
    ) -> None:  # fmt: skip
        call = Call()
        nudge.begin(cast(socket.socket, call))
        there: list[tuple[int, memoryview | int]] = []

        async def get(which: int) -> None:
            found: memoryview | int = self._bytes(pin.key, *parts[which])
            left = 0

            def unsent(size: int) -> None:
                nonlocal left
                left = size

            try:
                await self._receive(pin.key, *parts[which], worker_s=0.0, unsent=unsent)
            except trio.Cancelled:
                found = left
                raise
            finally:
                there.append((which, found))
                call.news.set()

        async def tell_each() -> None:
            while not call.is_over:
                await call.news.wait()
                call.news = trio.Event()
                if call.tells_each or len(there) >= SHARE_TOLD * len(parts):
                    await self._tell(there, came)
            await self._tell(there, came)

        async with trio.open_nursery() as telling:
            telling.start_soon(tell_each)
            with trio.move_on_after(patience_s), call.scope:
                async with trio.open_nursery() as nursery:
                    for which in range(len(parts)):
                        nursery.start_soon(get, which)
            nudge.end()
            call.is_over = True
            call.news.set()
        ended()

    async def _tell(
        self, there: list[tuple[int, memoryview | int]],
        came: Callable[[Sequence[tuple[int, memoryview | int]]], None],
    ) -> None:  # fmt: skip
        if there:
            parts, there[:] = [*there], []
            of_blocks = self._machine.batched_s * (len(parts) - 1)
            await self._worker.take(self._machine.worker_s + of_blocks)
            came(parts)

    def _bytes(self, key: str, start: int, length: int, *, is_new: bool = True) -> memoryview:
        if is_new:
            self.asked.append((key, start, length))
        head = self._contents.get(key, b"")[start : start + length]
        if not head:
            return self._zeros[:length]
        return memoryview(head + bytes(length - len(head)))

    async def _receive(
        self, key: str, start: int, length: int, worker_s: float | None = None,
        unsent: Unsent | None = None,
    ) -> None:  # fmt: skip
        def not_sent(size: int) -> None:
            self.unsent[key, start] += size

        await self._link.transfer(length, unsent or not_sent)
        await self._movers.take(length, self._machine.receive)
        if length >= LEAST_SHARED:
            await self._worker.take(self._machine.worker_s if worker_s is None else worker_s)

    def forget(self) -> None:
        """Count from here on."""
        self.asked.clear()
        self.unsent.clear()

    def close_idle(self, longer_than_s: float = 0.0) -> None:
        """There are no connections."""


class Disk:
    """In the place of `BlockCache`."""

    def __init__(self, machine: Machine, threads: Threads, movers: Movers) -> None:
        self._machine = machine
        self._movers = movers
        self._space = machine.disk or 0
        self._threads = threads
        self._reads, self._writes = Queue(machine.disk_read), Queue(machine.disk_write)
        self._blocks: dict[tuple[str, int], memoryview] = {}
        self._used = 0

    def present(self, file: File) -> list[int]:
        return [number for key, number in self._blocks if key == file.key]

    def holds(self, file: File, number: int) -> bool:
        return (file.key, number) in self._blocks

    def claim_absent(self, file: File, numbers: Sequence[int]) -> set[int]:
        return {number for number in numbers if (file.key, number) not in self._blocks}

    def claim_alone(self, file: File, number: int) -> bool:
        return True

    def load_or_claim(self, file: File, number: int) -> memoryview | Claim:
        data = self._blocks.get((file.key, number))
        if data is None:
            return Claim.OURS
        self._threads.takes(self._reads.take(len(data)))
        return data

    def load_part(self, file: File, span: Span) -> memoryview | None:
        data = self._blocks.get((file.key, span.number))
        if data is None:
            return None
        part = data[span.start : span.stop]
        self._threads.takes(self._reads.take(len(part)))
        return part

    def put_all(self, blocks: list[tuple[File, int, memoryview]]) -> list[bool]:
        """Declined when it is full: a load does not lose what it stored for what it stores next."""
        stored = [self._put(*block) for block in blocks]
        size = sum(len(block[2]) for block, is_stored in zip(blocks, stored, strict=True)
                   if is_stored)  # fmt: skip
        self._threads.takes(self._write(size))
        return stored

    def _put(self, file: File, number: int, data: memoryview) -> bool:
        if self._used + len(data) > self._space:
            return False
        self._blocks[file.key, number] = data
        self._used += len(data)
        return True

    async def _write(self, size: int) -> None:
        await self._movers.take(size, self._machine.check)
        await self._writes.take(size)

    name = "/cache"

    def parts(self) -> list[Any]:
        return [self]

    def has_place_for(self, file: File, number: int) -> bool:
        return True

    def set_loading(self, file: File) -> None:
        pass

    def give_up(self, file: File, numbers: list[int]) -> bool:
        for number in numbers:
            self._used -= len(self._blocks.pop((file.key, number), b""))
        return True

    def announce(self, files: list[File]) -> None:
        pass

    def care(self, plan: list[File]) -> None:
        pass

    def release(self, file: File, number: int) -> None:
        pass

    def is_claimed(self, file: File, number: int) -> bool:
        return False

    def set_waiting(self, file: File, number: int, waiting: bool) -> None:
        pass

    def others_wait(self) -> bool:
        return False


# What a page is.
_ABSENT, _THERE, _LOCKED = range(3)
_DROP = bytes.maketrans(bytes([_THERE]), bytes([_ABSENT]))


class Pages:
    """Stands for `PageCache` and for the kernel, which drops the oldest block first.

    As in Linux, a page is locked from the moment when a read of it is queued until that read is
    answered, and the kernel sends only `max_background` reads at a time (`fuse_readahead`,
    `flush_bg_queue`). A push waits for each locked page in its way (`fuse_notify_store`).
    """

    def __init__(self, machine: Machine, block_size: int, threads: Threads, movers: Movers) -> None:
        self._machine = machine
        self._movers = movers
        self._space = max(machine.pages, LEAST_PAGES)
        self._block_size = block_size
        self._threads = threads
        self._pushes = Queue(machine.push)
        self._files: dict[int, bytearray] = {}
        self._blocks: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._used = 0
        self._unlocked: dict[tuple[int, int], trio.Event] = {}
        self.background = trio.Semaphore(machine.max_background)
        self.supported = machine.pages > 0
        self.pushed_bytes = 0

    def add(self, file: File) -> None:
        self._files[file.inode] = bytearray(-(-file.size_bytes // PAGE))

    def budget(self, planned_bytes: Callable[[], int], unused_bytes: int) -> int:
        return self._space // 2

    async def push_elsewhere(
        self, inode: int, parts: Sequence[tuple[int, memoryview]]
    ) -> bool | None:
        """By a mover, if there are any."""
        if not self._machine.movers:
            return None
        for offset, data in parts:
            await self._store(inode, offset // PAGE, -(-(offset + len(data)) // PAGE))
            self.pushed_bytes += len(data)
        return True

    def push(self, inode: int, offset: int, data: memoryview) -> bool:
        self._threads.takes(self._store(inode, offset // PAGE, -(-(offset + len(data)) // PAGE)))
        self.pushed_bytes += len(data)
        return True

    async def _store(self, inode: int, first: int, last: int) -> None:
        while first < last:
            await self.wait_until_unlocked(inode, first)
            locked = self._files[inode].find(_LOCKED, first, last)
            stop = locked if locked >= 0 else last
            self.fill(inode, first, stop)
            size = (stop - first) * PAGE
            if self._machine.movers:
                await self._movers.take(size, self._machine.push)
            else:
                await self._pushes.take(size)
            first = stop

    def lock_absent(self, inode: int, first: int, last: int) -> tuple[int, int] | None:
        """Lock the first run of absent pages of a range; None if there is none."""
        pages = self._files[inode]
        begin = pages.find(_ABSENT, first, min(last, len(pages)))
        if begin < 0:
            return None
        end = begin
        unlocked = trio.Event()
        while end < min(last, len(pages)) and pages[end] == _ABSENT:
            pages[end] = _LOCKED
            self._unlocked[inode, end] = unlocked
            end += 1
        return begin, end

    def unlock(self, inode: int, first: int, last: int) -> None:
        """A read was answered: its pages are there."""
        unlocked = {self._unlocked.pop((inode, page)) for page in range(first, last)}
        self.fill(inode, first, last)
        for event in unlocked:
            event.set()

    async def wait_until_unlocked(self, inode: int, page: int) -> None:
        while (unlocked := self._unlocked.get((inode, page))) is not None:
            await unlocked.wait()

    def fill(self, inode: int, first: int, last: int) -> None:
        """Pages are there from now on, for as long as there is room."""
        pages = self._files[inode]
        new = last - first - pages.count(_THERE, first, last)
        pages[first:last] = bytes([_THERE]) * (last - first)
        self._touch(inode, first * PAGE, new * PAGE)
        while self._used > self._space:
            (old, number), held = self._blocks.popitem(last=False)
            self._used -= held
            start = number * self._block_size // PAGE
            stop = min(start + self._block_size // PAGE, len(self._files[old]))
            self._files[old][start:stop] = self._files[old][start:stop].translate(_DROP)

    def forget(self, inode: int) -> None:
        """Drop the pages of a file that nobody has open."""
        self._files[inode] = bytearray(len(self._files[inode]))
        for block in [block for block in self._blocks if block[0] == inode]:
            self._used -= self._blocks.pop(block)

    def has(self, inode: int, offset: int, size: int) -> bool:
        """Whether a range is there; it counts as used just now."""
        first, last = offset // PAGE, -(-(offset + size) // PAGE)
        there = self._files[inode].count(_THERE, first, last) == last - first
        if there:
            self._touch(inode, offset, 0)
        return there

    def _touch(self, inode: int, offset: int, more: int) -> None:
        block = inode, offset // self._block_size
        self._blocks[block] = self._blocks.get(block, 0) + more
        self._blocks.move_to_end(block)
        self._used += more
