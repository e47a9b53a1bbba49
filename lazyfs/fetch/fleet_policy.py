"""Whether a mount asks the cache of its fleet, or S3 itself.

While the cache (`store/fleet_cache.py`) serves, it is asked first for blocks and headers. If it
does not deliver, the same attempt asks S3, so readers never see trouble with the cache. If S3 then
delivers, the cache *rests*: it is not asked for `REST_S`. Then it gets one request as a trial, and
the others go to S3 until that one succeeds.

If there is no connection, the cache rests until there is one, or as long. A cache that was there a
moment ago is most likely being started again. If all requests of this node went to S3 meanwhile,
each of them would be one more copy for the fleet, over a link that the other nodes share. So they
wait for `RETURN_S` first, and then go to S3 a few at a time, more the longer it takes.

The cache makes one request of S3 for all nodes that want the same range. A second request of the
cache would join the first one, and a request of S3 would send the range once more for each node. So
requests of the cache are not hedged. The exception is one request at a time that many others have
overtaken: a slow machine of the cache must not stop a load.

The state is kept in the trio thread, like all decisions of this package.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections import Counter
from enum import StrEnum

import trio

from lazyfs.faults import contained
from lazyfs.store.fleet_cache import FleetCache, FleetCacheError, Trouble

log = logging.getLogger(__name__)

REST_S = 30.0
# The time between two attempts to connect, so that a cache that is back is used soon.
RECONNECT_S = 0.25
# For how long requests wait for a cache that was there and is gone.
RETURN_S = 2.0
# How many requests S3 then gets at a time, and after how long twice as many.
FIRST_DIRECT = 2
DOUBLES_S = 2.0
# How long the first requests of a mount wait for the connection to the cache.
FIRST_WORD_S = 0.25
# The cache rests after this many requests in a row that were cut off twice.
MOST_CUT_OFF = 3
# A trial that takes longer has failed.
TRIAL_S = 60.0
# A request that this many others have overtaken, and that is this old, is also made of S3.
FAR_OVERTAKEN = 16
LATE_S = 10.0


class State(StrEnum):
    """Whether the cache is asked."""

    UNKNOWN = "unknown"  # not connected yet
    USED = "used"
    RESTING = "resting"
    ON_TRIAL = "on_trial"  # the rest is over; one request is made, or may be


class Fleet:
    """What a mount knows of the cache of its fleet. Created in the trio thread.

    Args:
        cache: connections to it.

    Attributes:
        trouble: why it rests, in words.
        results: how many requests ended how: `served`, or a `Trouble`.
    """

    def __init__(self, cache: FleetCache) -> None:
        self.cache = cache
        self.state = State.UNKNOWN
        self.trouble: str | None = None
        self.results: Counter[str] = Counter()
        self._heard = trio.Event()
        self._waits_until_s = trio.current_time() + FIRST_WORD_S
        self._rests_until_s = 0.0
        self._trial_until_s = 0.0
        self._cut_off = 0
        self._told = False
        self._is_reconnecting = False
        # Requests of S3 under way, and the most of them: limited while the cache is lost.
        self._direct = 0
        self._most_direct: float = math.inf
        self._turns = trio.lowlevel.ParkingLot()
        trio.lowlevel.spawn_system_task(
            contained, "connecting to the cache of the fleet", self._connect
        )

    @property
    def is_lost(self) -> bool:
        """Whether it was there a moment ago, and is waited for."""
        return self._most_direct != math.inf

    async def may_be_asked(self) -> bool:
        """Wait for the turn of a request, and say of whom it is to be made now.

        True: of the cache; `gave`, `failed` or `let_go` must follow. False: of S3; `asked_s3` must
        follow.
        """
        with trio.move_on_at(self._waits_until_s):
            await self._heard.wait()
        while True:
            now_s = trio.current_time()
            if self.state is State.RESTING and now_s >= self._rests_until_s:
                self.state = State.ON_TRIAL
            if self.state is State.ON_TRIAL and now_s >= self._trial_until_s:
                self._trial_until_s = now_s + TRIAL_S
                return True
            if self.state is State.USED:
                return True
            if self._direct < self._most_direct:
                self._direct += 1
                return False
            await self._turns.park()

    def goes_to_s3(self) -> None:
        """What it did not give is asked of S3 now; `asked_s3` must follow."""
        self._direct += 1

    def asked_s3(self) -> None:
        """S3 has answered."""
        self._direct -= 1
        self._turns.unpark()

    def gave(self) -> None:
        """The cache delivered."""
        self.results["served"] += 1
        self._cut_off = 0
        self._trial_until_s = 0.0
        # What was asked before the trouble may be answered after it.
        if self.state is State.ON_TRIAL:
            self.state, self.trouble = State.USED, None
            log.info("the fleet cache %s serves again", self.cache.url)

    def failed(self, error: FleetCacheError, *, s3_gave: bool) -> None:
        """The cache did not deliver.

        Args:
            s3_gave: whether S3 delivered instead.
        """
        self.results[error.trouble.value] += 1
        self._trial_until_s = 0.0
        if error.trouble is Trouble.CUT_OFF:
            self._cut_off += 1
        is_gone = error.trouble is Trouble.AWAY or self._cut_off >= MOST_CUT_OFF
        if is_gone or (s3_gave and error.trouble is not Trouble.CUT_OFF):
            self._rest(str(error), is_away=error.trouble is Trouble.AWAY)

    def outdone(self) -> None:
        """S3 delivered what the cache, several times, reported S3 to have trouble with."""
        self._rest("it reports trouble with S3 that S3 does not have")

    def is_asked_again(self, error: FleetCacheError) -> None:
        """It did not give what was asked for, and may do so the next time."""
        self.results[error.trouble.value] += 1

    def let_go(self) -> None:
        """A request of the cache was cancelled."""
        self._trial_until_s = 0.0

    def _rest(self, trouble: str, *, is_away: bool = False) -> None:
        # At random, so that nodes that saw the same trouble do not return at the same time.
        self._rests_until_s = trio.current_time() + REST_S * random.uniform(1, 1.2)  # noqa: S311
        self._cut_off = 0
        if is_away and self.state is State.USED:
            self._lose()
        if self.state is not State.RESTING:
            level = logging.DEBUG if self._told else logging.WARNING
            self._told = True
            log.log(
                level, "the fleet cache %s: %s: asking S3 itself, and the cache again in %.0f s",
                self.cache.url, trouble, REST_S,
            )  # fmt: skip
        self.state, self.trouble = State.RESTING, trouble
        if is_away and not self._is_reconnecting:
            self._is_reconnecting = True
            trio.lowlevel.spawn_system_task(contained, "trying the fleet cache", self._reconnect)

    def _lose(self) -> None:
        """It was there a moment ago: let requests wait."""
        self._heard = trio.Event()
        self._waits_until_s = trio.current_time() + RETURN_S
        self._most_direct = FIRST_DIRECT

    async def _reconnect(self) -> None:
        """Try to connect while the cache rests."""
        try:
            while self.state is State.RESTING and trio.current_time() < self._rests_until_s:
                await trio.sleep(RECONNECT_S)
                if self.is_lost:
                    gone_s = trio.current_time() - self._waits_until_s
                    self._most_direct = FIRST_DIRECT * 2 ** max(0, int(gone_s / DOUBLES_S))
                    self._turns.unpark_all()
                with contextlib.suppress(FleetCacheError):
                    await trio.to_thread.run_sync(self.cache.connect, abandon_on_cancel=True)
                    if self.state is State.RESTING:
                        self.state, self.trouble = State.USED, None
                        log.info("the fleet cache %s is there again", self.cache.url)
        finally:
            self._is_reconnecting = False
            self._most_direct = math.inf
            self._heard.set()
            self._turns.unpark_all()

    async def _connect(self) -> None:
        try:
            await trio.to_thread.run_sync(self.cache.connect, abandon_on_cancel=True)
        except FleetCacheError as error:
            if self.state is State.UNKNOWN:
                self.results[error.trouble.value] += 1
                self._rest(str(error), is_away=True)
        else:
            if self.state is State.UNKNOWN:
                self.state = State.USED
        self._heard.set()
