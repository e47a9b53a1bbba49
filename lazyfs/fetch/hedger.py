"""Gets one answer to a request, by a second request if the first is much slower than usual.

Of many requests, some take far longer than the others, and a reader waits for the slowest. A second
one is sent only if it is likely to come sooner: the link may simply be slow, or have stalled. An
attempt whose answer is no longer wanted is ended by closing its connection; its memory counts until
its thread has ended.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable

import trio

from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import SourceError
from lazyfs.fetch.attempt import Answer, Attempts, Got, Request
from lazyfs.fetch.concurrency import HedgeTimer
from lazyfs.fetch.fleet_policy import FAR_OVERTAKEN, LATE_S, Fleet
from lazyfs.observe.recorder import Recorder
from lazyfs.store.protocol import Store
from lazyfs.store.retry import LONGEST_PAUSE_S
from lazyfs.threads import Threads

log = logging.getLogger(__name__)

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


class Hedger:
    """Gets the answers to the requests of one mount.

    Args:
        source: the object store.
        fleet: what is known of the fleet's cache, if there is one.
        memory: second attempts reserve room there.
        threads: run the requests.
        room_made: called when an attempt whose answer is no longer wanted has freed its room.
        recorder: is told of requests and second attempts.
        has_movers: whether movers may make requests.

    Attributes:
        timer: how long answers usually take.
        second_attempts: how many are under way.
    """

    def __init__(
        self,
        source: Store,
        fleet: Fleet | None,
        memory: BlockMemory,
        threads: Threads,
        room_made: Callable[[], None],
        recorder: Recorder,
        *,
        has_movers: bool,
    ) -> None:
        self._source = source
        self._fleet = fleet
        self._memory = memory
        self._threads = threads
        self._room_made = room_made
        self._recorder = recorder
        self._attempts = Attempts(
            source, fleet, threads, recorder, self._attempt_ended, has_movers=has_movers
        )
        self.timer = HedgeTimer()
        self.second_attempts = 0
        # Requests without a second attempt.
        self._first_attempts: dict[Request, None] = {}
        # When bytes came last, as far as was noticed.
        self._came_at_s = -math.inf
        # When requests were counted, and the bytes and seconds of all of them.
        self._counted_s = -math.inf
        self._counted = 0, 0.0

    def came(self) -> None:
        """Bytes have come just now."""
        self._came_at_s = trio.current_time()

    async def first_answer(self, request: Request, note: Callable[[SourceError], None]) -> Got:
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
                delay_s = self.timer.delay_s
                with trio.move_on_after(delay_s / 2):
                    return await answers.receive()
                before = came
                came = request.under_way[0].received_bytes() if request.under_way else None
                if came and came != before:
                    self.came()
                is_stuck = came == before or request.overtaken >= OVERTAKEN
                is_late = trio.current_time() >= request.began_s + delay_s
                is_over = not request.under_way  # its answer is about to come
                if is_late and is_stuck and not is_over and self._may_hedge(request):
                    return None
        finally:
            del self._first_attempts[request]
            self.overtakes(request.began_s, request.length)

    def overtakes(self, began_s: float, length: int) -> None:
        """A request was answered: those that were made well before it are slower."""
        before_s = began_s - self.timer.delay_s / 2
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
        return trio.current_time() >= since_s + max(SILENT_S, self.timer.delay_s)

    def _may_hedge(self, request: Request) -> bool:
        """Reserve room for a second attempt, unless many are under way already."""
        if self._fleet and self._fleet.is_lost:
            return False
        is_silent = self._is_silent(request)
        if not is_silent:
            if self.second_attempts >= HEDGES:
                return False
            # On a slow link, connections pause for seconds while others have their turn.
            if trio.current_time() < request.began_s + 2 * self._usual_s(request):
                return False
        if request.is_elsewhere and (
            self.second_attempts
            or request.overtaken < FAR_OVERTAKEN
            or trio.current_time() < request.began_s + LATE_S
        ):
            return False
        urgent = is_silent and not request.has_time()
        if not self._memory.make_room(request.length, urgent=urgent):
            return False
        log.debug("%s at %d is slow: sending a second request", request.file.key, request.start)
        self._reserve(request, request.length)
        self.second_attempts += 1
        self._recorder.hedges += 1
        request.hedged = True
        return True

    def _reserve(self, request: Request, extra_bytes: int) -> None:
        self._memory.reserve(extra_bytes)
        request.extra_bytes += extra_bytes

    def _attempt_ended(self, request: Request) -> None:
        """Free what was reserved beyond a request's room when all attempts have ended."""
        if request.extra_bytes and not request.under_way:
            self.second_attempts -= request.hedged
            self._memory.release(request.extra_bytes)
            request.extra_bytes = 0
            self._room_made()
