"""Records what happens in a mount: counts it, and keeps it as events.

Each worker has one recorder. It is called from the trio thread only, so it needs no locks. A call
costs about a microsecond and is made per block or request, never per byte. Readers of the recorder:
`lazyfs/control/status.py`, `measure.py` and `recording.py`.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from lazyfs.blocks import BlockId, Span
from lazyfs.errors import CredentialsExpiredError, SourceError, ThrottledError
from lazyfs.listed_object import File
from lazyfs.observe.events import ARRIVALS, Activity, Cause, EventKind, EventRing, Purpose
from lazyfs.observe.histogram import Histogram
from lazyfs.options.mount_options import PLANNED

# A shorter wait is counted, but not kept as an event.
STALL_S = 0.01
# Waits within this time after S3 asked for fewer requests count as throttled.
THROTTLED_FOR_S = 5.0
# Processes remembered for each file, of those that opened it.
OPENERS = 8
RATE_WINDOW_S = 5.0


class Tier(StrEnum):
    """Where the bytes of a read were when the read arrived."""

    MEMORY = "memory"
    DISK = "disk"
    FLEET = "fleet"
    S3 = "s3"


@dataclass(slots=True, eq=False)
class Wait:
    """A reader that waits for a block.

    Attributes:
        coming: the block was already in flight when the wait began.
        again: the block had arrived before, and was evicted since.
        activity: of prefetching when the wait began.
    """

    file: File
    span: Span
    since_s: float
    coming: bool
    again: bool
    activity: Activity


class Recorder:
    """What happened in one mount since its worker began.

    Args:
        policy: the value of `--prefetch`.
        now_s: the clock.
    """

    def __init__(self, policy: str = "model", now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._began_s = now_s()
        self.open_files = 0
        # The processor time of the processes that move bytes for this one, in seconds.
        self.movers_s: Callable[[], float] = lambda: 0.0
        # Processor times while files were open, and what they were when the first was opened.
        self._processor_s = self._counted_s = 0.0, 0.0
        self.events = EventRing()
        self.files: list[File] = []
        self._numbers: dict[int, int] = {}
        # By inode, a byte for each block: 1 if the block was read, or has arrived.
        self._seen: dict[int, bytearray] = {}
        self._landed: dict[int, bytearray] = {}
        self._openers: dict[int, dict[int, None]] = {}
        self.activity = Activity.OFF if policy == "off" else Activity.DONE
        # Until there is a plan, no block is expected to have arrived before its reader.
        self._planned = policy not in PLANNED
        self.waits: dict[Wait, None] = {}
        self._accounted_until_s = 0.0
        self._troubled: dict[BlockId, Cause] = {}
        self._throttled_at_s = -THROTTLED_FOR_S

        self.fetched_bytes: Counter[Purpose] = Counter()
        self.fetched_blocks: Counter[Purpose] = Counter()
        self.shared_bytes: Counter[Purpose] = Counter()
        self.shared_blocks: Counter[Purpose] = Counter()
        self.loaded_bytes: Counter[Purpose] = Counter()
        self.loaded_blocks: Counter[Purpose] = Counter()
        self.read_bytes: Counter[Tier] = Counter()
        self.reads: defaultdict[Tier, Histogram] = defaultdict(Histogram)
        self.requests: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.in_flight: Counter[str] = Counter()
        self.failed_requests: Counter[str] = Counter()
        self.received_bytes = 0
        self.fleet_received_bytes = 0
        self.retries: Counter[Cause] = Counter()
        self.hedges = 0
        self.hidden_objects = 0
        self.failures: Counter[Cause] = Counter()
        self.stalled_s: defaultdict[Cause, float] = defaultdict(float)
        self.pushed_blocks = 0
        self.written_bytes = 0
        self.last_error = ""
        self.last_error_at_s = 0.0

    def clock(self) -> float:
        """The current time, for `began_s` of later calls."""
        return self._now_s()

    @property
    def uptime_s(self) -> float:
        """Seconds since the worker started. Events use this clock."""
        return self._now_s() - self._began_s

    # Hooks for `TracedRecorder`

    def ready(self) -> None:
        """The mount is ready."""

    def loaded(self, start_s: float, end_s: float, facts: Mapping[str, str | float]) -> None:
        """The first load is over. Times are seconds since the worker started."""

    def close(self) -> None:
        """The worker ends."""

    # Files

    def resumed(self) -> None:
        """This worker has taken the mount over from another."""
        self.events.add(self.uptime_s, EventKind.RESUMED)

    def planned(self, size_bytes: int) -> None:
        """The loading order is known; `size_bytes` are to be prefetched."""
        self._planned = True
        self.events.add(self.uptime_s, EventKind.PLANNED, size=size_bytes)

    def opened(self, file: File, pid: int, *, direct: bool = False) -> None:
        """A process opened a file; `direct`: with O_DIRECT."""
        openers = self._openers.setdefault(file.inode, {})
        openers.pop(pid, None)
        openers[pid] = None
        if len(openers) > OPENERS:
            del openers[next(iter(openers))]
        self._seen.pop(file.inode, None)
        if not self.open_files:
            self._counted_s = self._clocks()
        self.open_files += 1
        self.events.add(self.uptime_s, EventKind.OPENED, direct, self._number(file))

    def closed(self, file: File) -> None:
        """A file handle was released. It may have been opened under a previous worker."""
        if self.open_files == 1:
            self._processor_s = self.processor_s
        self.open_files = max(0, self.open_files - 1)
        self.events.add(self.uptime_s, EventKind.CLOSED, file=self._number(file))

    @property
    def processor_s(self) -> tuple[float, float]:
        """Processor time of this process, and of its movers, in seconds, while files were open."""
        if not self.open_files:
            return self._processor_s
        before, began, now = self._processor_s, self._counted_s, self._clocks()
        return before[0] + now[0] - began[0], before[1] + now[1] - began[1]

    def _clocks(self) -> tuple[float, float]:
        return time.process_time(), self.movers_s()

    def was_opened(self, file: File) -> bool:
        """Whether the file was opened since the worker started."""
        return file.inode in self._openers

    def openers(self, file: File) -> list[int]:
        """PIDs of the processes that opened the file, latest first. Some may have ended."""
        return list(reversed(self._openers.get(file.inode, {})))

    # Reads

    def read(self, file: File, span: Span, tier: Tier, began_s: float) -> None:
        """A read that arrived at `began_s` was answered."""
        now_s = self._now_s()
        self.reads[tier].observe(now_s - began_s)
        self.read_bytes[tier] += span.stop - span.start
        if not _is_marked(self._seen, file.inode, span.number):
            _mark(self._seen, file.inode, span.number)
            at_s = now_s - self._began_s
            self.events.add(
                at_s, EventKind.READ, 0, self._number(file), span.number, 0, now_s - began_s
            )

    def begin_wait(self, file: File, span: Span, *, coming: bool) -> Wait:
        """A reader starts to wait for a block. `coming`: the block is already in flight."""
        again = _is_marked(self._landed, file.inode, span.number)
        wait = Wait(file, span, self._now_s(), coming, again, self.activity)
        self.waits[wait] = None
        return wait

    def end_wait(self, wait: Wait, tier: Tier) -> None:
        """The wait is over; the block came from `tier`."""
        del self.waits[wait]
        now_s = self._now_s()
        cause = self._cause_of_wait(wait, tier, now_s)
        # Waits may overlap; each second counts once.
        self.stalled_s[cause] += now_s - max(wait.since_s, self._accounted_until_s)
        self._accounted_until_s = now_s
        if now_s - wait.since_s >= STALL_S:
            span = wait.span
            self.events.add(
                now_s - self._began_s, EventKind.WAITED, cause, self._number(wait.file),
                span.number, span.stop - span.start, now_s - wait.since_s,
            )  # fmt: skip

    def wait_s(self, wait: Wait) -> float:
        """How long a reader has waited so far."""
        return self._now_s() - wait.since_s

    def _cause_of_wait(self, wait: Wait, tier: Tier, now_s: float) -> Cause:
        troubled = self._troubled.get(BlockId(wait.file.inode, wait.span.number))
        if troubled is not None:
            return troubled
        if tier is Tier.DISK:
            return Cause.DISK
        if now_s - self._throttled_at_s < THROTTLED_FOR_S:
            return Cause.THROTTLED
        if wait.coming:
            return Cause.MEMORY if wait.activity == Activity.NO_ROOM else Cause.NETWORK
        if not self._planned:
            return Cause.NETWORK
        if wait.activity in (Activity.DONE, Activity.PAUSED, Activity.OFF):
            return Cause.NO_PREFETCH
        return Cause.MEMORY if wait.again else Cause.ORDER

    # Blocks

    def begun(self, block: BlockId) -> float:
        """A fetch of a block starts; returns the time. Forgets earlier trouble with the block."""
        self._troubled.pop(block, None)
        return self._now_s()

    def landed(
        self, file: File, block: BlockId, size: int, tier: Tier, purpose: Purpose, began_s: float
    ) -> None:
        """A block whose fetch started at `began_s` has arrived."""
        now_s = self._now_s()
        if tier is Tier.DISK:
            kind = EventKind.LOADED
            self.loaded_bytes[purpose] += size
            self.loaded_blocks[purpose] += 1
        elif tier is Tier.FLEET:
            kind = EventKind.SHARED
            self.shared_bytes[purpose] += size
            self.shared_blocks[purpose] += 1
        else:
            kind = EventKind.FETCHED
            self.fetched_bytes[purpose] += size
            self.fetched_blocks[purpose] += 1
        _mark(self._landed, file.inode, block.number)
        at_s = now_s - self._began_s
        self.events.add(
            at_s, kind, purpose, self._number(file), block.number, size, now_s - began_s
        )

    def part_loaded(self, size: int) -> None:
        """A part of a block was read from the disk for a reader."""
        self.loaded_bytes[Purpose.DEMAND] += size

    def failed(self, file: File, block: BlockId, error: SourceError) -> None:
        """A block could not be fetched."""
        cause = cause_of(error)
        self.failures[cause] += 1
        self._remember(error)
        self.events.add(self.uptime_s, EventKind.FAILED, cause, self._number(file), block.number)

    def pushed(self, file: File, block: BlockId, size: int, began_s: float) -> None:
        """A block, or the rest of it, was put into the page cache, starting at `began_s`."""
        now_s = self._now_s()
        self.pushed_blocks += 1
        at_s = now_s - self._began_s
        self.events.add(
            at_s, EventKind.PUSHED, 0, self._number(file), block.number, size, now_s - began_s
        )

    def written(self, size: int) -> None:
        """A block was written to disk."""
        self.written_bytes += size

    def prefetch_is(self, activity: Activity) -> None:
        """Prefetching has changed its activity."""
        if activity is not self.activity and self.activity is not Activity.OFF:
            self.activity = activity
            self.events.add(self.uptime_s, EventKind.PREFETCH, activity)

    # Requests to S3

    def asked(self, operation: str) -> float:
        """A request to S3, or to the cache of the fleet (`fleet`), starts; returns the time, for
        `answered`."""
        self.in_flight[operation] += 1
        return self._now_s()

    def withdrawn(self, operation: str) -> None:
        """A request that was counted is not made, or another one goes on with it."""
        self.in_flight[operation] -= 1

    def answered(
        self, operation: str, began_s: float, size: int = 0, *, key: str = "", failed: bool
    ) -> None:
        """A request for a key or prefix has ended: answered, failed or cancelled."""
        self.in_flight[operation] -= 1
        self.requests[operation].observe(self._now_s() - began_s)
        if operation == "fleet":
            self.fleet_received_bytes += size
        else:
            self.received_bytes += size
        self.failed_requests[operation] += failed

    def listing_retried(self, error: SourceError) -> None:
        """A listing is retried."""
        self._retried(error)

    def block_retried(self, file: File, number: int, error: SourceError) -> None:
        """A request for a block is retried."""
        cause = self._retried(error)
        self._troubled[BlockId(file.inode, number)] = cause
        self.events.add(self.uptime_s, EventKind.RETRIED, cause, self._number(file), number)

    def _retried(self, error: SourceError) -> Cause:
        cause = cause_of(error)
        self.retries[cause] += 1
        self._remember(error)
        if cause is Cause.THROTTLED:
            self._throttled_at_s = self._now_s()
        return cause

    def rate(self) -> float:
        """Bytes per second from S3, the fleet and disk, over the last `RATE_WINDOW_S`."""
        now_s = self.uptime_s
        window_s = max(0.1, min(RATE_WINDOW_S, now_s))
        size = 0.0
        for event in self.events.newest_first():
            if event.at_s < now_s - window_s:
                break
            if event.kind in ARRIVALS:
                # Only part of a block that took longer than the window arrived within it.
                within_s = event.at_s - (now_s - window_s)
                size += event.size * min(1.0, within_s / max(event.seconds, 1e-3))
        return size / window_s

    def _remember(self, error: SourceError) -> None:
        self.last_error = str(error)
        self.last_error_at_s = time.time()

    def _number(self, file: File) -> int:
        number = self._numbers.get(file.inode)
        if number is None:
            number = self._numbers[file.inode] = len(self.files)
            self.files.append(file)
        return number


def _is_marked(marks: dict[int, bytearray], inode: int, number: int) -> bool:
    of_file = marks.get(inode)
    return of_file is not None and number < len(of_file) and bool(of_file[number])


def _mark(marks: dict[int, bytearray], inode: int, number: int) -> None:
    of_file = marks.setdefault(inode, bytearray())
    if len(of_file) <= number:
        of_file.extend(bytes(number + 1 - len(of_file)))
    of_file[number] = 1


def cause_of(error: SourceError) -> Cause:
    """The cause to which an error of S3 counts."""
    if isinstance(error, ThrottledError):
        return Cause.THROTTLED
    if isinstance(error, CredentialsExpiredError):
        return Cause.CREDENTIALS
    return Cause.ERRORS
