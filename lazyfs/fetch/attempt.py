"""One attempt at a request: a ranged GET, of the fleet's cache first where there is one.

It is made by a mover, or in a thread. `fleet_policy.py` decides whether the cache is asked.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio

from lazyfs.errors import SourceError, UnavailableError
from lazyfs.fetch.fleet_policy import Fleet
from lazyfs.listed_object import File
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.fleet_cache import FleetCache, FleetCacheError, Trouble
from lazyfs.store.protocol import Store
from lazyfs.store.refusals import Refusal
from lazyfs.threads import Threads

# How often a request asks the fleet's cache before it asks S3, if the cache had trouble with S3.
MOST_ASKED_OF_CACHE = 3


class Got(NamedTuple):
    """Bytes, and where they came from: S3 or the fleet's cache."""

    data: memoryview
    tier: Tier


Answer = Got | SourceError


@dataclass(slots=True, eq=False)
class Attempt:
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
class Request:
    """A requested range and its running attempts.

    Attributes:
        began_s: when it was made.
        first_ended: whether its first attempt was answered, or failed.
        has_time: whether no reader waits for it.
        overtaken: how many requests that were made well after it, and are no shorter, have ended.
        is_elsewhere: whether the fleet's cache is asked.
        is_direct: the fleet has let it go to S3.
        asked: what a mover was told when it requested the range, for the first attempt.
        extra_bytes: what was reserved beyond its room: for a second attempt, and for what goes on
            after nobody wants it.
        counted: the bytes and the seconds that it had when all requests were last counted.
    """

    file: File
    start: int
    length: int
    began_s: float
    has_time: Callable[[], bool]
    first_ended: bool = False
    overtaken: int = 0
    under_way: list[Cancel] = field(default_factory=list)
    hedged: bool = False
    extra_bytes: int = 0
    is_elsewhere: bool = False
    is_direct: bool = False
    asked: Any = None
    counted: tuple[int, float] = (0, 0.0)


class Attempts:
    """Makes the attempts of one mount.

    Args:
        source: the object store.
        fleet: what is known of the fleet's cache, if there is one.
        threads: run the requests.
        recorder: is told of requests.
        on_end: called with a request after each of its attempts, wanted or not.
        has_movers: whether movers may make requests.
    """

    def __init__(
        self,
        source: Store,
        fleet: Fleet | None,
        threads: Threads,
        recorder: Recorder,
        on_end: Callable[[Request], None],
        *,
        has_movers: bool,
    ) -> None:
        self._source = source
        self._fleet = fleet
        self._threads = threads
        self._recorder = recorder
        self._on_end = on_end
        self._has_movers = has_movers

    def begin(self, request: Request) -> Attempt:
        """Begin an attempt, which counts as under way from now on. Then call `make`."""
        cache = None
        if self._fleet and request.is_elsewhere and not request.hedged:
            cache = self._fleet.cache
        operation = "fleet" if cache else "get"
        attempt = Attempt(operation, self._recorder.asked(operation), cache)
        if not request.hedged:
            attempt.is_direct = request.is_direct
        request.under_way.append(attempt.cancel)
        return attempt

    async def make(
        self, request: Request, attempt: Attempt, answers: trio.MemorySendChannel[Answer]
    ) -> None:
        """Make an attempt that has begun, and send its answer."""
        cache = attempt.cache
        asked, request.asked = request.asked, None
        if self._has_movers and cache is None and asked is None:
            found = await self._moved(request, attempt)
            if isinstance(found, Got | SourceError):
                answers.send_nowait(found)
                return
            asked = found
        token = trio.lowlevel.current_trio_token()
        # Whoever gets it ends the attempt.
        begins = threading.Lock()

        def get() -> Answer:
            if not begins.acquire(blocking=False):
                return UnavailableError("not wanted any more")
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
                data = self._source.ranges.read(
                    *wanted, attempt.cancel, **({} if asked is None else {"asked": asked})
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

        try:
            answers.send_nowait(await self._threads.run(get))
        except BaseException:
            if begins.acquire(blocking=False):  # it was cancelled before a thread had it
                self._ended(request, attempt, 0)
            raise

    async def _moved(self, request: Request, attempt: Attempt) -> Answer | Any:
        """Have a mover make the request.

        Returns:
            The answer; or what `read` needs to go on with it, or None to begin.
        """
        is_left = is_over = False

        def ended() -> None:
            nonlocal is_over
            is_over = True
            if is_left:
                self._ended(request, attempt, 0)

        try:
            found = await self._source.ranges.read_by_mover(
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
        request: Request,
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
        assert self._fleet
        may_be_dead = True
        while True:
            try:
                return self._source.ranges.read_cached(cache, *wanted, cancel)
            except FleetCacheError as error:
                if error.trouble not in (Trouble.CUT_OFF, Trouble.WRONG):
                    raise
                token.run_sync_soon(self._fleet.is_asked_again, error)
                if error.trouble is Trouble.WRONG or not may_be_dead:
                    return self._source.ranges.read_cached(cache, *wanted, cancel, fresh=True)
                may_be_dead = False

    async def _may_ask_cache_again(self, request: Request, attempt: Attempt) -> bool:
        """The cache of the fleet did not give it; say whether it is asked again, or S3 is."""
        assert self._fleet
        self._recorder.answered(
            attempt.operation, attempt.began_s, key=request.file.key, failed=bool(attempt.trouble)
        )
        attempt.operation = ""  # nothing is asked while it waits
        is_elsewhere = False
        if attempt.trouble and attempt.trouble.is_certain:
            # At once: when S3 has answered, the cache may be back already.
            self._fleet.failed(attempt.trouble, s3_gave=False)
        is_away = attempt.trouble and attempt.trouble.trouble is Trouble.AWAY
        if is_away and attempt.returns < MOST_ASKED_OF_CACHE:
            is_elsewhere = await self._fleet.may_be_asked()
            attempt.returns += is_elsewhere
        else:
            self._fleet.goes_to_s3()
        request.is_elsewhere, attempt.is_direct = is_elsewhere, not is_elsewhere
        attempt.operation = "fleet" if is_elsewhere else "get"
        attempt.began_s = self._recorder.asked(attempt.operation)
        return is_elsewhere

    def _ended(self, request: Request, attempt: Attempt, size: int) -> None:
        """The thread of an attempt has ended, whether or not its answer is still wanted."""
        failed = not size and not attempt.cancel.called
        if attempt.operation:
            self._recorder.answered(
                attempt.operation, attempt.began_s, size, key=request.file.key, failed=failed
            )
        if attempt.is_direct and self._fleet:
            self._fleet.asked_s3()
        if attempt.cache is not None and self._fleet:
            if attempt.trouble and attempt.trouble.is_certain:
                pass  # it was told when S3 was asked
            elif attempt.trouble:
                self._fleet.failed(attempt.trouble, s3_gave=size > 0)
            elif attempt.operation == "fleet" and size:
                self._fleet.gave()
            else:
                self._fleet.let_go()
        request.under_way.remove(attempt.cancel)
        self._on_end(request)
