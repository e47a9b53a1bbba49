"""Requests one block from S3: with limits on concurrency and rate, hedging, and retries.

Each attempt is one ranged GET (`attempt.py`). An attempt whose answer is no longer wanted is ended
by closing its connection; its memory counts until its thread has ended.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import trio

from lazyfs.blocks.buffers import LEAST_SHARED
from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import SourceError, ThrottledError
from lazyfs.fetch.attempt import MOST_ASKED_OF_CACHE, Answer, Attempts, Got, Request
from lazyfs.fetch.concurrency import START, Concurrency, HedgeTimer, Pacer
from lazyfs.fetch.fleet_policy import FAR_OVERTAKEN, LATE_S, Fleet
from lazyfs.listed_object import File
from lazyfs.movers.call import Nudge
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.fleet_cache import FleetCache
from lazyfs.store.protocol import Store
from lazyfs.store.retry import LONGEST_PAUSE_S, patiently
from lazyfs.threads import Threads

log = logging.getLogger(__name__)

# Requests at the beginning, for each process that moves bytes: a sign of how large the machine is.
STARTS_OF_MOVER = 4
# Second attempts under way at once; when more are slow, it is the link, unless that is silent.
HEDGES = 4
# A request that this many later ones have overtaken is slower than the link.
OVERTAKEN = 4
# When nothing has come over any connection for this long, the connections are dead, however slow
# the link is: its kernel would have sent lost packets again by then.
SILENT_S = 4.0
# After this time it is counted again what has come over all connections. Not by each request: when
# a link stalls, all of them look at the same time.
RECOUNT_S = 0.25
# A second request that failed is repeated after this time, then after twice as long, as long as the
# first one is not answered.
AGAIN_S = 1.0
# The most blocks that one call of a mover requests, and the largest share of those under way: a
# call ends with the last of its blocks.
MOST_TOGETHER = 8
SHARE_OF_CALL = 1 / 4
# Blocks are requested together if at least this many come in a second. If fewer do, their requests
# are no work, and the order in which they come counts.
LEAST_RATE = 40.0
# How long a mover may need to end a call that takes too long.
LEAVES_S = 4.0
# A prefetch is given up after this time; a reader that needs the block starts a request of its own.
PREFETCH_PATIENCE_S = 20.0


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
        self._hedges_running = 0
        # When bytes came last, as far as was noticed.
        self._came_at_s = -math.inf
        # When requests were counted, and the bytes and seconds of all of them.
        self._counted_s = -math.inf
        self._counted = 0, 0.0
        self.fleet: Fleet | None = None
        if options.fleet_cache:
            self.fleet = Fleet(FleetCache(options.fleet_cache))
        self._attempts = Attempts(
            source, self.fleet, threads, recorder, self._attempt_ended,
            has_movers=options.movers > 0,
        )  # fmt: skip
        self._moves_together = (
            options.movers > 0 and not options.fleet_cache and options.block_size >= LEAST_SHARED
        )
        # Requests without a second attempt.
        self._first_attempts: dict[Request, None] = {}
        # S3's last error for each object that cannot be read.
        self.troubles: dict[str, str] = {}

    @property
    def limit(self) -> int:
        """How many blocks to request concurrently now."""
        return self._concurrency.limit

    @property
    def proven_limit(self) -> int:
        """The same, without a growth that is not known to bring more bytes."""
        return self._concurrency.proven_limit

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
        asked: Any = None,
        pauses: Callable[[bool], None] = lambda pauses: None,
    ) -> Got:
        """`length` bytes of a file from `start`.

        A single byte always comes from S3: it shows whether the mount may read the file.

        Args:
            patience_s: returns for how long transient errors are still retried.
            saturated: whether as many requests are in flight as `limit` allows; only then does the
                rate say whether the limit is right.
            has_time: whether no reader waits for it.
            is_block: whether a whole block is requested; only blocks count for usual times.
            asked: what `get_each` told of the same range: the request goes on with that.
            pauses: called with true when it pauses before the next attempt, then with false.

        Raises:
            SourceError: they could not be fetched in that time.
        """

        asked_of_cache = 0 if length > 1 else MOST_ASKED_OF_CACHE

        async def attempt() -> Got:
            nonlocal asked_of_cache, asked
            goes_on()
            await trio.sleep(self._pacer.delay_s(trio.current_time(), length))
            began_s = trio.current_time()
            request = Request(file, start, length, began_s, has_time, asked=asked)
            asked = None
            if self.fleet and asked_of_cache < MOST_ASKED_OF_CACHE:
                request.is_elsewhere = await self.fleet.may_be_asked()
                request.is_direct = not request.is_elsewhere
                asked_of_cache += request.is_elsewhere
            got = await self._first_answer(request, note)
            now_s = trio.current_time()
            is_last = length > 1 and asked_of_cache == MOST_ASKED_OF_CACHE
            self._came_at_s = now_s
            if self.fleet and is_last and got.tier is Tier.S3:
                self.fleet.outdone()
            self.troubles.pop(file.key, None)
            if is_block:
                if request.first_ended:  # otherwise its connection is dead (RFC 6298, section 3)
                    self._timer.answered(now_s - began_s)
                self._concurrency.answered(now_s, length, saturated=saturated())
            return got

        what = self._source.name(file.key)

        def note(error: SourceError) -> None:
            self._recorder.block_retried(file, start // self._block_size, error)
            self.troubles[file.key] = str(error)
            if isinstance(error, ThrottledError):
                self._concurrency.throttled()

        is_pausing = False

        def begins_to_pause(error: SourceError) -> None:
            nonlocal is_pausing
            note(error)
            is_pausing = True
            pauses(True)

        def goes_on() -> None:
            nonlocal is_pausing
            if is_pausing:
                is_pausing = False
                pauses(False)

        try:
            return await patiently(
                attempt, what=what, timeout_s=patience_s, on_retry=begins_to_pause
            )
        except SourceError as error:
            self.troubles[file.key] = str(error)
            raise
        finally:
            goes_on()

    @property
    def together(self) -> int:
        """How many blocks to request in one call of a mover; 1: each by itself."""
        if not self._moves_together or self._pacer.limits:
            return 1
        is_known = self._timer.answers >= START  # and of requests that were under way together
        if not is_known or self.limit < LEAST_RATE * self._timer.usual_s:
            return 1
        if not self._source.ranges.may_move:
            return 1
        most = min(self.limit, self._memory.most_blocks // 2)
        return max(1, min(MOST_TOGETHER, int(most * SHARE_OF_CALL)))

    async def get_each(
        self,
        file: File,
        parts: Sequence[tuple[int, int]],
        nudge: Nudge,
        came: Callable[[Sequence[tuple[int, Got | Any]]], None],
        saturated: Callable[[], bool],
    ) -> None:
        """Request several blocks of a file in one call of a mover, each once.

        Args:
            parts: start and length of each.
            nudge: sends `EACH` and `STOP` meanwhile.
            came: called with what came, and of which part it is, of one or more parts at a time:
                the bytes, or `asked` for `get`. Other parts were not requested.
            saturated: see `get`.

        Raises:
            OSError: out of memory.
        """
        began_s = trio.current_time()
        patience_s = self._timer.delay_s
        asked_s = [self._recorder.asked("get") for _ in parts]
        missing = dict.fromkeys(range(len(parts)))
        room_bytes, is_over, all_came = 0, False, True

        def tell(found: Sequence[tuple[int, memoryview | Any]]) -> None:
            nonlocal all_came
            now_s = self._came_at_s = trio.current_time()
            self._overtakes(began_s, self._block_size)
            told: list[tuple[int, Got | Any]] = []
            for which, data in found:
                del missing[which]
                length = parts[which][1]
                if isinstance(data, memoryview):
                    self.troubles.pop(file.key, None)
                    self._recorder.answered("get", asked_s[which], length, failed=False)
                    self._concurrency.answered(now_s, length, saturated=saturated())
                    told.append((which, Got(data, Tier.S3)))
                else:
                    all_came = False
                    self._recorder.withdrawn("get")  # `get` goes on with it
                    told.append((which, data))
            came(told)

        def ended() -> None:
            nonlocal is_over
            is_over = True
            if room_bytes:
                self._memory.release(room_bytes)
                self._room_made()

        try:
            with trio.move_on_after(patience_s + LEAVES_S):
                await self._source.ranges.read_each(file, parts, tell, nudge, patience_s, ended)
        finally:
            if not is_over:  # it still writes into their memory
                room_bytes = sum(parts[which][1] for which in missing)
                self._memory.reserve(room_bytes)
            for _ in missing:
                self._recorder.withdrawn("get")
        if not missing and all_came:
            self._timer.answered(trio.current_time() - began_s)

    async def _first_answer(self, request: Request, note: Callable[[SourceError], None]) -> Got:
        """The answer to one GET, or to a second one if the first is much slower than usual.

        A second one that fails is repeated, as long as the first one is not answered.

        Args:
            note: called with an error that is followed by another attempt.

        Raises:
            SourceError: all attempts failed.
        """
        answer: Answer | None = None
        again_s = AGAIN_S

        async def first() -> None:
            await self._attempts.make(request, attempt, send)
            request.first_ended = True

        try:
            async with trio.open_nursery() as nursery:
                send, receive = trio.open_memory_channel[Answer](2)
                attempt = self._attempts.begin(request)
                nursery.start_soon(first)
                answer = await self._answer_unless_stuck(request, receive)
                unanswered = 0 if answer else 1
                while unanswered and not isinstance(answer, Got):
                    if unanswered == 1:
                        if self._is_silent(request):  # so idle connections have died, too
                            await self._threads.run(self._source.close_idle, SILENT_S)
                        if request.under_way:  # otherwise its answer is about to come
                            second = self._attempts.begin(request)
                            nursery.start_soon(self._attempts.make, request, second, send)
                            unanswered = 2
                    answer = await receive.receive()
                    unanswered -= 1
                    if unanswered and isinstance(answer, SourceError):
                        failed, pause_s = answer, math.inf
                        if failed.transient:
                            jitter = random.random()  # noqa: S311
                            pause_s = max(again_s * (1 + jitter) / 2, failed.retry_after_s)
                            again_s = min(2 * again_s, LONGEST_PAUSE_S)
                        with trio.move_on_after(pause_s) as pause:
                            answer = await receive.receive()
                            unanswered -= 1
                        if pause.cancelled_caught:
                            note(failed)
                nursery.cancel_scope.cancel()
        finally:
            if request.under_way and not isinstance(answer, Got):
                # The caller frees its own room now.
                wanted = len(request.under_way) * request.length
                self._reserve(request, wanted - request.extra_bytes)
            for cancel in request.under_way:
                cancel()
        if isinstance(answer, SourceError):
            raise answer
        assert answer is not None
        return answer

    async def _answer_unless_stuck(
        self, request: Request, answers: trio.MemoryReceiveChannel[Answer]
    ) -> Answer | None:
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
                if came and came != before:
                    self._came_at_s = trio.current_time()
                is_stuck = came == before or request.overtaken >= OVERTAKEN
                is_late = trio.current_time() >= request.began_s + delay_s
                is_over = not request.under_way  # its answer is about to come
                if is_late and is_stuck and not is_over and self._may_hedge(request):
                    return None
        finally:
            del self._first_attempts[request]
            self._overtakes(request.began_s, request.length)

    def _overtakes(self, began_s: float, length: int) -> None:
        """A request was answered: those that were made well before it are slower."""
        before_s = began_s - self._timer.delay_s / 2
        for other in self._first_attempts:  # in the order in which they were made
            if other.began_s > before_s:
                break
            other.overtaken += other.length <= length

    def _usual_s(self, request: Request) -> float:
        """How long a request takes at the rate of the others under way; 0: nothing has come."""
        now_s = trio.current_time()
        if now_s >= self._counted_s + RECOUNT_S:
            under_way = [each for each in self._first_attempts if each.under_way]
            for each in under_way:
                came = each.under_way[0].received_bytes() or 0
                each.counted = came, now_s - each.began_s
            self._counted_s = now_s
            self._counted = (
                sum(each.counted[0] for each in under_way),
                sum(each.counted[1] for each in under_way),
            )
        came, lasted_s = (
            self._counted[0] - request.counted[0],
            self._counted[1] - request.counted[1],
        )
        return request.length * lasted_s / came if came else 0.0

    def _is_silent(self, request: Request) -> bool:
        """Whether nothing has come over any connection for a while in which this request waited."""
        since_s = max(self._came_at_s, request.began_s)
        # Each request looks twice in the time of the timer.
        return trio.current_time() >= since_s + max(SILENT_S, self._timer.delay_s)

    def _may_hedge(self, request: Request) -> bool:
        """Reserve room for a second attempt, unless many are under way already."""
        if self.fleet and self.fleet.is_lost:
            return False
        is_silent = self._is_silent(request)
        if not is_silent:
            if self._hedges_running >= HEDGES:
                return False
            # On a slow link, connections pause for seconds while others have their turn.
            if trio.current_time() < request.began_s + 2 * self._usual_s(request):
                return False
        if request.is_elsewhere and (
            self._hedges_running
            or request.overtaken < FAR_OVERTAKEN
            or trio.current_time() < request.began_s + LATE_S
        ):
            return False
        urgent = is_silent and not request.has_time()
        if not self._memory.make_room(request.length, urgent=urgent):
            return False
        log.debug("%s at %d is slow: sending a second request", request.file.key, request.start)
        self._reserve(request, request.length)
        self._hedges_running += 1
        self._recorder.hedges += 1
        request.hedged = True
        return True

    def _reserve(self, request: Request, extra_bytes: int) -> None:
        self._memory.reserve(extra_bytes)
        request.extra_bytes += extra_bytes

    def _attempt_ended(self, request: Request) -> None:
        """Free what was reserved beyond a request's room when all attempts have ended."""
        if request.extra_bytes and not request.under_way:
            self._hedges_running -= request.hedged
            self._memory.release(request.extra_bytes)
            request.extra_bytes = 0
            self._room_made()
