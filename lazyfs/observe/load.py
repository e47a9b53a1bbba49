"""A load, reconstructed from recorded events: arrivals of blocks, waits of readers, rates. Pure.

A load begins when the first file is opened or read. It lasts while files are open, and ends with
the last action of a reader. A pause in which no file is open, between two loads of a mount, does
not count as reading. Fetching begins at mount, before the load, and is part of the chart.
Times are seconds since the worker started.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lazyfs.observe.events import NO_FILE, Activity, Cause, Event, EventKind, Purpose, unpack
from lazyfs.observe.recorder import Tier

# The best rate is the highest average over this time.
BEST_OVER_S = 1.0
ARRIVED_FROM = {
    EventKind.FETCHED: Tier.S3, EventKind.SHARED: Tier.FLEET, EventKind.LOADED: Tier.DISK,
}  # fmt: skip
READING = (EventKind.OPENED, EventKind.READ, EventKind.WAITED)


@dataclass(slots=True)
class BlockLife:
    """What happened to one block, and when. None: it was not pushed, or not read."""

    file: int
    block: int
    size: int
    begun_s: float
    landed_s: float
    tier: Tier
    purpose: Purpose
    pushed_s: float | None = None
    read_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """A reader waited for a block."""

    begin_s: float
    end_s: float
    cause: Cause
    file: int
    block: int


@dataclass(frozen=True, slots=True)
class Recording:
    """A worker's answer to `GET /report`.

    Attributes:
        about: the mount: source, mountpoint, version, options.
        files: path and size in bytes; `Event.file` is an index into it.
        now_s: when the worker answered.
        lost: number of older events that the ring no longer holds.
    """

    about: Mapping[str, Any]
    files: tuple[tuple[str, int], ...]
    events: tuple[Event, ...]
    now_s: float
    lost: int

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Recording:
        """Decode the JSON answer. Raises KeyError or ValueError if it is malformed."""
        events = unpack(base64.b64decode(answer["events"]))
        return cls(
            about=answer["about"],
            files=tuple((path, size) for path, size in answer["files"]),
            events=tuple(events),
            now_s=float(answer["now_s"]),
            lost=max(0, int(answer["recorded"]) - len(events)),
        )


@dataclass(slots=True)
class Load:
    """One load.

    Attributes:
        start_s, end_s: when reading began and ended; `start_s` is None if nothing was read.
        duration_s: how long reading took.
        is_over: all files are closed.
        stalled_s: seconds in which at least one reader waited, by cause.
        activity_s: seconds that prefetching spent on each activity during the load.
        refetched_bytes: bytes of blocks that were fetched over the network more than once.
        reloaded_bytes: bytes of blocks that were read from the disk more than once.
        has_direct: a file was opened with O_DIRECT.
    """

    recording: Recording
    lives: list[BlockLife] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    retries: Counter[Cause] = field(default_factory=Counter)
    start_s: float | None = None
    end_s: float = 0.0
    is_over: bool = True
    stalled_s: dict[Cause, float] = field(default_factory=dict)
    activity_s: dict[Activity, float] = field(default_factory=dict)
    refetched_bytes: int = 0
    reloaded_bytes: int = 0
    has_direct: bool = False
    duration_s: float = 0.0

    @classmethod
    def of(cls, recording: Recording) -> Load:
        """Reconstruct the load from a recording."""
        load = cls(recording)
        latest: dict[tuple[int, int], BlockLife] = {}
        was_loaded: set[tuple[int, int]] = set()
        spells = _Spells()
        open_files = 0
        for event in recording.events:
            kind, key = event.kind, (event.file, event.block)
            if kind in ARRIVED_FROM:
                tier = ARRIVED_FROM[EventKind(kind)]
                life = BlockLife(
                    event.file, event.block, event.size, max(0.0, event.at_s - event.seconds),
                    event.at_s, tier, Purpose(event.detail),
                )  # fmt: skip
                if tier is not Tier.DISK and key in latest and latest[key].tier is not Tier.DISK:
                    load.refetched_bytes += event.size
                if tier is Tier.DISK:
                    load.reloaded_bytes += event.size if key in was_loaded else 0
                    was_loaded.add(key)
                latest[key] = life
                load.lives.append(life)
            elif kind == EventKind.PUSHED and key in latest:
                latest[key].pushed_s = event.at_s
            elif kind == EventKind.READ and key in latest:
                latest[key].read_s = event.at_s
            elif kind == EventKind.WAITED:
                begin_s = event.at_s - event.seconds
                load.stalls.append(Stall(begin_s, event.at_s, Cause(event.detail), *key))
            elif kind == EventKind.RETRIED:
                load.retries[Cause(event.detail)] += 1
            load.has_direct |= kind == EventKind.OPENED and event.detail == 1
            open_files += (kind == EventKind.OPENED) - (kind == EventKind.CLOSED and open_files > 0)
            if kind in READING or kind == EventKind.CLOSED:
                spells.add(event.at_s - event.seconds, event.at_s, is_open=open_files > 0)
            if kind in READING or kind == EventKind.CLOSED:
                load.end_s = event.at_s
            if kind in READING and load.start_s is None:
                load.start_s = max(0.0, event.at_s - event.seconds)
        load.is_over = not open_files
        if open_files:
            load.end_s = recording.now_s
            spells.add(load.end_s, load.end_s, is_open=False)
        load.duration_s = spells.sum_s
        load.stalled_s = _without_overlap(load.stalls)
        load.activity_s = load._activities()
        return load

    @property
    def firsts(self) -> list[BlockLife]:
        """How each block came for the first time."""
        firsts: dict[tuple[int, int], BlockLife] = {}
        for life in self.lives:
            firsts.setdefault((life.file, life.block), life)
        return list(firsts.values())

    def count(self, is_true: Callable[[BlockLife], bool]) -> int:
        """How many blocks there are of which that is true, however often each of them came."""
        return len({(life.file, life.block) for life in self.lives if is_true(life)})

    @property
    def begin_s(self) -> float:
        """When the chart begins: with the first block or the first reader."""
        times = [life.begun_s for life in self.lives]
        return min([*times, *([] if self.start_s is None else [self.start_s])], default=0.0)

    @property
    def last_s(self) -> float:
        """When the chart ends: with the last block or the last reader."""
        return max([self.end_s, *(life.landed_s for life in self.lives)], default=0.0)

    def bytes_from(self, tier: Tier) -> int:
        """Bytes of blocks that arrived from a tier."""
        return sum(life.size for life in self.lives if life.tier is tier)

    @property
    def arriving_s(self) -> float:
        """For how long blocks were on their way."""
        spells = _Spells()
        for life in sorted(self.lives, key=lambda life: life.begun_s):
            spells.add(life.begun_s, life.landed_s, is_open=False)
        return spells.sum_s

    def rates(self, tier: Tier, begin_s: float, end_s: float, count: int) -> list[float]:
        """Bytes per second from a tier, in each of `count` equal parts of a time span.

        A block's bytes are spread evenly over the time in which it was in flight.
        """
        width = (end_s - begin_s) / count
        sums = [0.0] * count
        for life in self.lives:
            if life.tier is not tier or width <= 0:
                continue
            took_s = max(life.landed_s - life.begun_s, 1e-6)
            first = max(0, min(count - 1, int((life.begun_s - begin_s) / width)))
            last = max(0, min(count - 1, int((life.landed_s - begin_s) / width)))
            for part in range(first, last + 1):
                from_s = max(life.begun_s, begin_s + part * width)
                to_s = min(life.landed_s, begin_s + (part + 1) * width)
                sums[part] += life.size * max(0.0, to_s - from_s) / took_s
        return [size / width if width > 0 else 0.0 for size in sums]

    def best_rate(self) -> float:
        """The best rate of all sources together, over a second; if all came sooner, until then."""
        if not self.lives:
            return 0.0
        begin_s = min(life.begun_s for life in self.lives)
        last_s = max(life.landed_s for life in self.lives)
        span_s = last_s - begin_s
        if span_s <= BEST_OVER_S:
            return sum(life.size for life in self.lives) / max(self.arriving_s, 1e-6)
        count = max(1, min(20_000, int(span_s / (BEST_OVER_S / 5))))
        by_tier = [self.rates(tier, begin_s, last_s, count) for tier in Tier]
        both = [sum(rates) for rates in zip(*by_tier, strict=True)]
        wide = max(1, round(BEST_OVER_S / (span_s / count)))
        running: float = sum(both[:wide])
        best = running
        for at in range(wide, count):
            running += both[at] - both[at - wide]
            best = max(best, running)
        return best / min(wide, count)

    def _activities(self) -> dict[Activity, float]:
        """Seconds that prefetching spent on each activity during the load."""
        spent: defaultdict[Activity, float] = defaultdict(float)
        if self.start_s is None:
            return spent
        now, since_s = Activity.DONE, 0.0
        changes = [(e.at_s, Activity(e.detail)) for e in self.recording.events
                   if e.kind == EventKind.PREFETCH]  # fmt: skip
        for at_s, activity in [*changes, (self.end_s, Activity.DONE)]:
            spent[now] += max(0.0, min(at_s, self.end_s) - max(since_s, self.start_s))
            now, since_s = activity, at_s
        return dict(spent)

    def path(self, file: int) -> str:
        """Path of a file of the recording; empty for NO_FILE."""
        return "" if file == NO_FILE else self.recording.files[file][0]


class _Spells:
    """Sums up the time in which files are open, or readers wait."""

    def __init__(self) -> None:
        self.sum_s = 0.0
        self._until_s = 0.0
        self._was_open = False

    def add(self, begin_s: float, end_s: float, *, is_open: bool) -> None:
        """Something was done from one time to another; `is_open`: files are open after it."""
        if self._was_open:
            begin_s = self._until_s
        self.sum_s += max(0.0, end_s - max(begin_s, self._until_s))
        self._until_s = max(self._until_s, end_s)
        self._was_open = is_open


def _without_overlap(stalls: Iterable[Stall]) -> dict[Cause, float]:
    spent: defaultdict[Cause, float] = defaultdict(float)
    until_s = 0.0
    for stall in sorted(stalls, key=lambda stall: stall.end_s):
        spent[stall.cause] += max(0.0, stall.end_s - max(stall.begin_s, until_s))
        until_s = max(until_s, stall.end_s)
    return dict(spent)
