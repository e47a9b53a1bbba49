"""Requests one block from S3: with limits on concurrency and rate, hedging, and retries.

Each attempt is one ranged GET in a worker thread. An attempt whose answer is no longer wanted is
ended by closing its connection; its memory counts until its thread has ended.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import SourceError, ThrottledError, UnavailableError
from lazyfs.fetch.concurrency import Concurrency, HedgeTimer, Pacer
from lazyfs.fetch.threads import in_bulk
from lazyfs.objects import File
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.protocol import Store
from lazyfs.store.retry import patiently

log = logging.getLogger(__name__)

_Answer = memoryview | SourceError

# Second attempts under way at once; when more are slow, it is the link.
HEDGES = 4
# A request that so many later ones have overtaken is slower than the link.
OVERTAKEN = 4
# A prefetch is given up after this time; a reader that needs the block starts a request of its own.
PREFETCH_PATIENCE_S = 20.0


@dataclass(slots=True, eq=False)
class _Request:
    """A requested range and its running attempts.

    Attributes:
        began_s: when it was made.
        overtaken: by how many that were made well after it and are no shorter.
    """

    file: File
    start: int
    length: int
    began_s: float
    overtaken: int = 0
    under_way: list[Cancel] = field(default_factory=list)
    hedged: bool = False


class BlockGetter:
    """Gets blocks from S3.

    Args:
        source: where from.
        memory: where second attempts reserve room.
        options: limits of concurrency and bandwidth.
        threads: limits the worker threads.
        room_made: called when an attempt that nobody waits for has given back its room.
        recorder: is told of requests and retries.
        on_answer: told of each file of which S3 gave bytes.
    """

    def __init__(
        self,
        source: Store,
        memory: BlockMemory,
        options: MountOptions,
        threads: trio.CapacityLimiter,
        room_made: Callable[[], None],
        recorder: Recorder,
        on_answer: Callable[[File], None] = lambda file: None,
    ) -> None:
        self._recorder = recorder
        self._on_answer = on_answer
        self._room_made = room_made
        self._source = source
        self._memory = memory
        self._threads = threads
        self._concurrency = Concurrency(options.max_concurrency)
        self._timer = HedgeTimer()
        self._pacer = Pacer(options.bandwidth_limit)
        self._block_size = options.block_size
        self._hedges_running = 0
        # Those of which no second attempt was made.
        self._first_attempts: set[_Request] = set()
        # S3's last error for each object that cannot be read.
        self.troubles: dict[str, str] = {}

    @property
    def limit(self) -> int:
        """How many blocks to request concurrently now."""
        return self._concurrency.limit

    def tune(self, options: MountOptions) -> None:
        """Use other limits of requests and bandwidth from now on."""
        self._concurrency = Concurrency(options.max_concurrency)
        self._pacer = Pacer(options.bandwidth_limit)

    async def get(
        self,
        file: File,
        start: int,
        length: int,
        *,
        patience_s: Callable[[], float],
        saturated: Callable[[], bool],
        is_block: bool = True,
    ) -> memoryview:
        """`length` bytes of a file from `start`.

        Args:
            patience_s: how long to go on after transient errors; asked anew each time.
            saturated: whether as much is under way as `limit` allows; else speed says nothing.
            is_block: what is got is a block; how long less takes says nothing of blocks.

        Raises:
            SourceError: they cannot be had, or not in that time.
        """

        async def attempt() -> memoryview:
            await trio.sleep(self._pacer.delay_s(trio.current_time(), length))
            began_s = trio.current_time()
            request = _Request(file, start, length, began_s)
            data = await self._first_answer(request)
            now_s = trio.current_time()
            self.troubles.pop(file.key, None)
            self._on_answer(file)
            if is_block:
                self._timer.answered(now_s - began_s)
                self._concurrency.answered(now_s, length, saturated=saturated())
            return data

        what = self._source.name(file.key)

        def note(error: SourceError) -> None:
            self._recorder.block_retried(file, start // self._block_size, error)
            self.troubles[file.key] = str(error)
            if isinstance(error, ThrottledError):
                self._concurrency.throttled()

        try:
            return await patiently(attempt, what=what, timeout_s=patience_s, on_retry=note)
        except SourceError as error:
            self.troubles[file.key] = str(error)
            raise

    async def _first_answer(self, request: _Request) -> memoryview:
        """The answer to one GET, or to a second one if the first is much slower than usual.

        Raises:
            SourceError: all attempts failed.
        """
        answer: _Answer | None = None
        try:
            async with trio.open_nursery() as nursery:
                send, receive = trio.open_memory_channel[_Answer](2)
                nursery.start_soon(self._attempt, request, send)
                answer = await self._answer_unless_stuck(request, receive)
                unanswered = 0
                if answer is None:
                    nursery.start_soon(self._attempt, request, send)
                    unanswered = 2
                while unanswered and not isinstance(answer, memoryview):
                    answer = await receive.receive()
                    unanswered -= 1
                nursery.cancel_scope.cancel()
        finally:
            for cancel in request.under_way:
                cancel()
        if isinstance(answer, SourceError):
            raise answer
        assert answer is not None
        return answer

    async def _answer_unless_stuck(
        self, request: _Request, answers: trio.MemoryReceiveChannel[_Answer]
    ) -> _Answer | None:
        """The answer to the first attempt; None: it is time for a second one.

        Being slow is not enough: over a slow link each request takes long, and every second attempt
        takes bandwidth from the others. So either no more bytes arrive, or later requests have
        overtaken it.
        """
        came: int | None = None
        self._first_attempts.add(request)
        try:
            while True:
                delay_s = self._timer.delay_s
                with trio.move_on_after(delay_s / 2):
                    return await answers.receive()
                before = came
                came = request.under_way[0].received_bytes() if request.under_way else None
                is_stuck = came == before or request.overtaken >= OVERTAKEN
                is_late = trio.current_time() >= request.began_s + delay_s
                if is_late and is_stuck and self._may_hedge(request):
                    return None
        finally:
            self._first_attempts.remove(request)
            self._overtakes(request)

    def _overtakes(self, request: _Request) -> None:
        """A request was answered: those that were made well before it are slower."""
        before_s = request.began_s - self._timer.delay_s / 2
        for other in self._first_attempts:
            other.overtaken += other.began_s <= before_s and other.length <= request.length

    async def _attempt(self, request: _Request, answers: trio.MemorySendChannel[_Answer]) -> None:
        cancel = Cancel()
        request.under_way.append(cancel)
        began_s = self._recorder.asked("get")
        token = trio.lowlevel.current_trio_token()

        def get() -> _Answer:
            size = 0
            wanted = request.file, request.start, request.length
            try:
                data = self._source.read_range(*wanted, cancel)
                size = request.length
                return data
            except SourceError as error:
                return error
            except CancelledError:
                return UnavailableError("not wanted any more")
            finally:
                with contextlib.suppress(trio.RunFinishedError):  # the mount has ended
                    token.run_sync_soon(self._ended, request, cancel, began_s, size)

        answers.send_nowait(
            await trio.to_thread.run_sync(
                in_bulk, get, abandon_on_cancel=True, limiter=self._threads
            )
        )

    def _may_hedge(self, request: _Request) -> bool:
        """Reserve room for a second attempt, unless many are under way already."""
        if self._hedges_running >= HEDGES:
            return False
        if not self._memory.make_room(request.length, urgent=False):
            return False
        log.debug("%s at %d is slow: sending a second request", request.file.key, request.start)
        self._memory.reserve(request.length)
        self._hedges_running += 1
        self._recorder.hedges += 1
        request.hedged = True
        return True

    def _ended(self, request: _Request, cancel: Cancel, began_s: float, size: int) -> None:
        """The thread of an attempt came back, wanted or not."""
        failed = not size and not cancel.called
        self._recorder.answered("get", began_s, size, key=request.file.key, failed=failed)
        request.under_way.remove(cancel)
        if request.hedged and not request.under_way:
            self._hedges_running -= 1
            self._memory.release(request.length)
            self._room_made()
