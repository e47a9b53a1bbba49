"""Gets blocks from S3: with limits on concurrency and rate, and retries.

Each block is one ranged GET (`attempt.py`), or two if the first is slow (`hedger.py`). Movers can
get several blocks in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio

from lazyfs.blocks.buffers import LEAST_SHARED
from lazyfs.blocks.memory import BlockMemory
from lazyfs.errors import SourceError, ThrottledError
from lazyfs.fetch.attempt import MOST_ASKED_OF_CACHE, Got, Request
from lazyfs.fetch.concurrency import START, Concurrency, Pacer
from lazyfs.fetch.fleet_policy import Fleet
from lazyfs.fetch.hedger import Hedger
from lazyfs.listed_object import File
from lazyfs.movers.call import Nudge
from lazyfs.observe.recorder import Recorder, Tier
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.fleet_cache import FleetCache
from lazyfs.store.protocol import Store
from lazyfs.store.retry import patiently
from lazyfs.threads import Threads

# Requests at the beginning, for each process that moves bytes: a sign of how large the machine is.
STARTS_OF_MOVER = 4
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
        memory: second attempts, and what movers still write, reserve room there.
        options: limits of concurrency and bandwidth.
        threads: run the requests.
        room_made: called when a request whose answer is no longer wanted has freed its room.
        recorder: is told of requests and retries.

    Attributes:
        hedger: gets the answers.
        fleet: what is known of the fleet's cache, if there is one.
        troubles: S3's last error for each object that cannot be read.
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
        self._concurrency = Concurrency(
            options.max_concurrency, max(START, STARTS_OF_MOVER * options.movers)
        )
        self._pacer = Pacer(options.bandwidth_limit)
        self._block_size = options.block_size
        self.fleet: Fleet | None = None
        if options.fleet_cache:
            self.fleet = Fleet(FleetCache(options.fleet_cache))
        self.hedger = Hedger(
            source, self.fleet, memory, threads, room_made, recorder,
            has_movers=options.movers > 0,
        )  # fmt: skip
        self._moves_together = (
            options.movers > 0 and not options.fleet_cache and options.block_size >= LEAST_SHARED
        )
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
            got = await self.hedger.first_answer(request, note)
            now_s = trio.current_time()
            self.hedger.came()
            is_last = length > 1 and asked_of_cache == MOST_ASKED_OF_CACHE
            if self.fleet and is_last and got.tier is Tier.S3:
                self.fleet.outdone()
            self.troubles.pop(file.key, None)
            if is_block:
                if request.first_ended:  # otherwise its connection is dead (RFC 6298, section 3)
                    self.hedger.timer.answered(now_s - began_s)
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
        is_known = (
            self.hedger.timer.answers >= START
        )  # and of requests that were under way together
        if not is_known or self.limit < LEAST_RATE * self.hedger.timer.usual_s:
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
        patience_s = self.hedger.timer.delay_s
        asked_s = [self._recorder.asked("get") for _ in parts]
        missing = dict.fromkeys(range(len(parts)))
        room_bytes, is_over, all_came = 0, False, True

        def tell(found: Sequence[tuple[int, memoryview | Any]]) -> None:
            nonlocal all_came
            now_s = trio.current_time()
            self.hedger.came()
            self.hedger.overtakes(began_s, self._block_size)
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
            self.hedger.timer.answered(trio.current_time() - began_s)
