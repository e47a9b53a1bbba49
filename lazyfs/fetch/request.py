"""Requests one block from S3: with limits on concurrency and rate, hedging, and retries.

Each attempt is one ranged GET in a thread, of the fleet's cache first where there is one
(`fleet.py`). An attempt whose answer is no longer wanted is ended by closing its connection; its
memory counts until its thread has ended.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio

from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import SourceError, ThrottledError, UnavailableError
from lazyfs.fetch.concurrency import START, Concurrency, HedgeTimer, Pacer
from lazyfs.fetch.fleet import FAR_OVERTAKEN, LATE_S, Fleet
from lazyfs.objects import File
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.fleet_cache import FleetCache, FleetCacheError, Trouble
from lazyfs.store.protocol import Store
from lazyfs.store.refusals import Refusal
from lazyfs.store.retry import patiently
from lazyfs.threads import Threads

log = logging.getLogger(__name__)

# How often a request asks the fleet's cache before it asks S3, if the cache had trouble with S3.
MOST_ASKED_OF_CACHE = 3

# Requests at the beginning, for each process that moves bytes: a sign of how large the machine is.
STARTS_OF_MOVER = 4
# Second attempts under way at once; when more are slow, it is the link.
HEDGES = 4
# A request that this many later ones have overtaken is slower than the link.
OVERTAKEN = 4
# A prefetch is given up after this time; a reader that needs the block starts a request of its own.
PREFETCH_PATIENCE_S = 20.0


class Got(NamedTuple):
    """Bytes, and where they came from: S3 or the fleet's cache."""

    data: memoryview
    tier: Tier


_Answer = Got | SourceError


@dataclass(slots=True, eq=False)
class _Attempt:
    """A GET, in a thread.

    Attributes:
        cache: the fleet's cache, if it is asked; None: S3.
        trouble: why the cache did not deliver.
        is_direct: S3 is asked, and the fleet counts it.
        returns: how often it was made of the cache again, because that came back.
    """

    operation: str
    began_s: float
    cache: FleetCache | None
    cancel: Cancel = field(default_factory=Cancel)
    trouble: FleetCacheError | None = None
    is_direct: bool = False
    returns: int = 0

    @property
    def s3_refusal(self) -> Refusal | None:
        """S3's answer to the cache, if the trouble is S3's and not the cache's."""
        if self.trouble and self.trouble.trouble is Trouble.S3_TROUBLE:
            return self.trouble.refusal
        return None


@dataclass(slots=True, eq=False)
class _Request:
    """A requested range and its running attempts.

    Attributes:
        began_s: when it was made.
        has_time: whether no reader waits for it.
        overtaken: how many requests that were made well after it, and are no shorter, have ended.
        is_elsewhere: whether the fleet's cache is asked.
        is_direct: the fleet has let it go to S3.
    """

    file: File
    start: int
    length: int
    began_s: float
    has_time: Callable[[], bool]
    overtaken: int = 0
    under_way: list[Cancel] = field(default_factory=list)
    hedged: bool = False
    is_elsewhere: bool = False
    is_direct: bool = False


class BlockGetter:
    """Gets blocks from S3.

    Args:
        source: the object store.
        memory: second attempts reserve room there.
        options: limits of concurrency and bandwidth.
        threads: run the requests.
        room_made: called when an attempt whose answer is no longer wanted has freed its room.
        recorder: is told of requests and retries.
    """

    def __init__(
        self,
        source: Store,
        memory: BlockMemory,
        options: MountOptions,
        threads: Threads,
        room_made: Callable[[], None],
        recorder: Recorder,
    ) -> None:
        self._recorder = recorder
        self._room_made = room_made
        self._source = source
        self._memory = memory
        self._threads = threads
        self._concurrency = Concurrency(
            options.max_concurrency, max(START, STARTS_OF_MOVER * options.movers)
        )
        self._timer = HedgeTimer()
        self._pacer = Pacer(options.bandwidth_limit)
        self._block_size = options.block_size
        self._has_movers = options.movers > 0
        self._hedges_running = 0
        self.fleet: Fleet | None = None
        if options.fleet_cache:
            self.fleet = Fleet(FleetCache(options.fleet_cache))
        # Requests without a second attempt.
        self._first_attempts: dict[_Request, None] = {}
        # S3's last error for each object that cannot be read.
        self.troubles: dict[str, str] = {}

    @property
    def limit(self) -> int:
        """How many blocks to request concurrently now."""
        return self._concurrency.limit

    @property
    def most(self) -> int:
        """The highest value that `limit` may have."""
        return self._concurrency.most

    @property
    def trouble(self) -> str | None:
        """What is wrong with S3, in words; None if all requests succeeded."""
        if not self.troubles:
            return None
        more = f" (and {len(self.troubles) - 1} more objects)" if len(self.troubles) > 1 else ""
        return list(self.troubles.values())[-1] + more

    def tune(self, options: MountOptions) -> None:
        """Use other limits of requests and bandwidth from now on."""
        self._concurrency = Concurrency(
            options.max_concurrency, max(START, STARTS_OF_MOVER * options.movers)
        )
        self._pacer = Pacer(options.bandwidth_limit)

    async def get(
        self,
        file: File,
        start: int,
        length: int,
        *,
        patience_s: Callable[[], float],
        saturated: Callable[[], bool],
        has_time: Callable[[], bool] = lambda: False,
        is_block: bool = True,
    ) -> Got:
        """`length` bytes of a file from `start`.

        A single byte always comes from S3: it shows whether the mount may read the file.

        Args:
            patience_s: returns for how long transient errors are still retried.
            saturated: whether as many requests are in flight as `limit` allows; only then does the
                rate say whether the limit is right.
            has_time: whether no reader waits for it.
            is_block: whether a whole block is requested; only blocks count for usual times.

        Raises:
            SourceError: they could not be fetched in that time.
        """

        asked_of_cache = 0 if length > 1 else MOST_ASKED_OF_CACHE

        async def attempt() -> Got:
            nonlocal asked_of_cache
            await trio.sleep(self._pacer.delay_s(trio.current_time(), length))
            began_s = trio.current_time()
            request = _Request(file, start, length, began_s, has_time)
            if self.fleet and asked_of_cache < MOST_ASKED_OF_CACHE:
                request.is_elsewhere = await self.fleet.may_be_asked()
                request.is_direct = not request.is_elsewhere
                asked_of_cache += request.is_elsewhere
            got = await self._first_answer(request)
            now_s = trio.current_time()
            is_last = length > 1 and asked_of_cache == MOST_ASKED_OF_CACHE
            if self.fleet and is_last and got.tier is Tier.S3:
                self.fleet.outdone()
            self.troubles.pop(file.key, None)
            if is_block:
                self._timer.answered(now_s - began_s)
                self._concurrency.answered(now_s, length, saturated=saturated())
            return got

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

    async def _first_answer(self, request: _Request) -> Got:
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
                while unanswered and not isinstance(answer, Got):
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
        self._first_attempts[request] = None
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
            del self._first_attempts[request]
            self._overtakes(request)

    def _overtakes(self, request: _Request) -> None:
        """A request was answered: those that were made well before it are slower."""
        before_s = request.began_s - self._timer.delay_s / 2
        for other in self._first_attempts:  # in the order in which they were made
            if other.began_s > before_s:
                break
            other.overtaken += other.length <= request.length

    async def _attempt(self, request: _Request, answers: trio.MemorySendChannel[_Answer]) -> None:
        cache = None
        if self.fleet and request.is_elsewhere and not request.hedged:
            cache = self.fleet.cache
        operation = "fleet" if cache else "get"
        attempt = _Attempt(operation, self._recorder.asked(operation), cache)
        if not request.hedged:
            attempt.is_direct = request.is_direct
        request.under_way.append(attempt.cancel)
        asked: Any = None
        if self._has_movers and cache is None:
            found = await self._moved(request, attempt)
            if isinstance(found, Got | SourceError):
                answers.send_nowait(found)
                return
            asked = found
        token = trio.lowlevel.current_trio_token()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
        except trio.Cancelled:
            self._ended(request, attempt, 0)  # no thread will do so
            raise

        def get() -> _Answer:
            size = 0
            wanted = request.file, request.start, request.length
            try:
                asks_cache = cache is not None
                while asks_cache:
                    assert cache is not None
                    attempt.trouble = data = None
                    try:
                        data = self._ask_cache(cache, request, attempt.cancel, token)
                    except FleetCacheError as error:
                        attempt.trouble = error
                    if data is not None:
                        size = request.length
                        return Got(data, Tier.FLEET)
                    if refusal := attempt.s3_refusal:
                        return refusal.error(self._source.name(request.file.key))
                    asks_cache = trio.from_thread.run(
                        self._may_ask_cache_again, request, attempt, trio_token=token
                    )
                data = self._source.read_range(
                    *wanted, attempt.cancel, **({"asked": asked} if asked else {})
                )
                size = request.length
                return Got(data, Tier.S3)
            except SourceError as error:
                return error
            except (CancelledError, trio.RunFinishedError, trio.Cancelled):
                return UnavailableError("not wanted any more")
            finally:
                with contextlib.suppress(trio.RunFinishedError):  # the mount has ended
                    token.run_sync_soon(self._ended, request, attempt, size)

        answers.send_nowait(await self._threads.run(get))

    async def _moved(self, request: _Request, attempt: _Attempt) -> _Answer | Any:
        """Have a mover make the request.

        Returns:
            The answer; or what `read_range` needs to go on with it, or None to begin.
        """
        is_left = is_over = False

        def ended() -> None:
            nonlocal is_over
            is_over = True
            if is_left:
                self._ended(request, attempt, 0)

        try:
            found = await self._source.read_moved(
                request.file, request.start, request.length, attempt.cancel,
                request.has_time, ended,
            )  # fmt: skip
        except CancelledError:
            self._ended(request, attempt, 0)
            return UnavailableError("not wanted any more")
        except BaseException:
            if is_over:
                self._ended(request, attempt, 0)
            else:  # a mover still writes into the memory, which counts until it is done
                is_left = True
            raise
        if not isinstance(found, memoryview):
            return found
        self._ended(request, attempt, request.length)
        return Got(found, Tier.S3)

    def _ask_cache(
        self,
        cache: FleetCache,
        request: _Request,
        cancel: Cancel,
        token: trio.lowlevel.TrioToken,
    ) -> memoryview | None:
        """Ask the fleet's cache, and again if what came cannot be used.

        An answer is cut off if one of its machines dies, in whose place another one answers the
        next time. What is wrong or cut off again may be so on the disk of a machine: then the cache
        is told to get it anew. None: it is not to be asked for this file.

        Raises:
            FleetCacheError: it did not deliver.
            SourceError: there are no credentials.
        """
        wanted = request.file, request.start, request.length
        assert self.fleet
        may_be_dead = True
        while True:
            try:
                return self._source.read_cached(cache, *wanted, cancel)
            except FleetCacheError as error:
                if error.trouble not in (Trouble.CUT_OFF, Trouble.WRONG):
                    raise
                token.run_sync_soon(self.fleet.is_asked_again, error)
                if error.trouble is Trouble.WRONG or not may_be_dead:
                    return self._source.read_cached(cache, *wanted, cancel, fresh=True)
                may_be_dead = False

    def _may_hedge(self, request: _Request) -> bool:
        """Reserve room for a second attempt, unless many are under way already."""
        if self._hedges_running >= HEDGES or (self.fleet and self.fleet.is_lost):
            return False
        if request.is_elsewhere and (
            self._hedges_running
            or request.overtaken < FAR_OVERTAKEN
            or trio.current_time() < request.began_s + LATE_S
        ):
            return False
        if not self._memory.make_room(request.length, urgent=False):
            return False
        log.debug("%s at %d is slow: sending a second request", request.file.key, request.start)
        self._memory.reserve(request.length)
        self._hedges_running += 1
        self._recorder.hedges += 1
        request.hedged = True
        return True

    async def _may_ask_cache_again(self, request: _Request, attempt: _Attempt) -> bool:
        """The cache of the fleet did not give it; say whether it is asked again, or S3 is."""
        assert self.fleet
        self._recorder.answered(
            attempt.operation, attempt.began_s, key=request.file.key, failed=bool(attempt.trouble)
        )
        attempt.operation = ""  # nothing is asked while it waits
        is_elsewhere = False
        if attempt.trouble and attempt.trouble.is_certain:
            # At once: when S3 has answered, the cache may be back already.
            self.fleet.failed(attempt.trouble, s3_gave=False)
        is_away = attempt.trouble and attempt.trouble.trouble is Trouble.AWAY
        if is_away and attempt.returns < MOST_ASKED_OF_CACHE:
            is_elsewhere = await self.fleet.may_be_asked()
            attempt.returns += is_elsewhere
        else:
            self.fleet.goes_to_s3()
        request.is_elsewhere, attempt.is_direct = is_elsewhere, not is_elsewhere
        attempt.operation = "fleet" if is_elsewhere else "get"
        attempt.began_s = self._recorder.asked(attempt.operation)
        return is_elsewhere

    def _ended(self, request: _Request, attempt: _Attempt, size: int) -> None:
        """The thread of an attempt has ended, whether or not its answer is still wanted."""
        failed = not size and not attempt.cancel.called
        if attempt.operation:
            self._recorder.answered(
                attempt.operation, attempt.began_s, size, key=request.file.key, failed=failed
            )
        if attempt.is_direct and self.fleet:
            self.fleet.asked_s3()
        if attempt.cache is not None and self.fleet:
            if attempt.trouble and attempt.trouble.is_certain:
                pass  # it was told when S3 was asked
            elif attempt.trouble:
                self.fleet.failed(attempt.trouble, s3_gave=size > 0)
            elif attempt.operation == "fleet" and size:
                self.fleet.gave()
            else:
                self.fleet.let_go()
        request.under_way.remove(attempt.cancel)
        if request.hedged and not request.under_way:
            self._hedges_running -= 1
            self._memory.release(request.length)
            self._room_made()
