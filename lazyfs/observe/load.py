"""A load, made out of what a recorder kept: what came when, who waited, at which rate. Pure.

A load begins with the first file that was opened or read, and ends with the last thing a reader
did; while files are open it goes on. Fetching begins earlier, at mount, and is part of the picture.
Times are seconds since the worker began.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lazyfs.observe.events import NO_FILE, Activity, Cause, Event, Kind, Purpose, unpack
from lazyfs.observe.recorder import Tier

# The best rate is the best that was kept up for so long.
BEST_OVER_S = 1.0
READING = (Kind.OPENED, Kind.READ, Kind.WAITED)


@dataclass(slots=True)
class BlockLife:
    """One block: begun, landed, and, if it was, pushed into the page cache and read."""

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
    """What a worker gave as its report (`GET /report`).

    Attributes:
        about: the mount: source, mountpoint, version, options.
        files: path and size in bytes, in the order of the events' numbers.
        now_s: when it was given.
        lost: how many older events the ring no longer has.
    """

    about: Mapping[str, Any]
    files: tuple[tuple[str, int], ...]
    events: tuple[Event, ...]
    now_s: float
    lost: int

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Recording:
        """From JSON. Raises KeyError, ValueError: it is none."""
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
        start_s, end_s: of reading; None: nothing was read.
        is_over: no file is open any more.
        stalled_s: seconds of waiting by cause, each second once.
        blocked_s: how long prefetching was at each activity while the load ran.
    """

    recording: Recording
    lives: list[BlockLife] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    retries: Counter[Cause] = field(default_factory=Counter)
    start_s: float | None = None
    end_s: float = 0.0
    is_over: bool = True
    stalled_s: dict[Cause, float] = field(default_factory=dict)
    blocked_s: dict[Activity, float] = field(default_factory=dict)
    again_bytes: int = 0

    @classmethod
    def of(cls, recording: Recording) -> Load:
        """Make it out."""
        load = cls(recording)
        latest: dict[tuple[int, int], BlockLife] = {}
        open_files = 0
        for event in recording.events:
            kind, key = event.kind, (event.file, event.block)
            if kind in (Kind.FETCHED, Kind.LOADED):
                tier = Tier.S3 if kind == Kind.FETCHED else Tier.DISK
                life = BlockLife(
                    event.file, event.block, event.size, max(0.0, event.at_s - event.seconds),
                    event.at_s, tier, Purpose(event.detail),
                )  # fmt: skip
                if tier is Tier.S3 and key in latest and latest[key].tier is Tier.S3:
                    load.again_bytes += event.size
                latest[key] = life
                load.lives.append(life)
            elif kind == Kind.PUSHED and key in latest:
                latest[key].pushed_s = event.at_s
            elif kind == Kind.READ and key in latest:
                latest[key].read_s = event.at_s
            elif kind == Kind.WAITED:
                begin_s = event.at_s - event.seconds
                load.stalls.append(Stall(begin_s, event.at_s, Cause(event.detail), *key))
            elif kind == Kind.RETRIED:
                load.retries[Cause(event.detail)] += 1
            open_files += (kind == Kind.OPENED) - (kind == Kind.CLOSED and open_files > 0)
            if kind in READING or kind == Kind.CLOSED:
                load.end_s = event.at_s
            if kind in READING and load.start_s is None:
                load.start_s = max(0.0, event.at_s - event.seconds)
        load.is_over = not open_files
        if open_files:
            load.end_s = recording.now_s
        load.stalled_s = _each_second_once(load.stalls)
        load.blocked_s = load._activities()
        return load

    @property
    def duration_s(self) -> float:
        """Of reading."""
        return 0.0 if self.start_s is None else max(0.0, self.end_s - self.start_s)

    @property
    def begin_s(self) -> float:
        """When the picture begins: with the first block or the first reader."""
        times = [life.begun_s for life in self.lives]
        return min([*times, *([] if self.start_s is None else [self.start_s])], default=0.0)

    @property
    def last_s(self) -> float:
        """When it ends."""
        return max([self.end_s, *(life.landed_s for life in self.lives)], default=0.0)

    def bytes_from(self, tier: Tier) -> int:
        """Bytes of blocks that came from there."""
        return sum(life.size for life in self.lives if life.tier is tier)

    def rates(self, tier: Tier, begin_s: float, end_s: float, count: int) -> list[float]:
        """Bytes a second from there in each of so many equal parts of a time.

        A block's bytes are taken to have come evenly while it was under way.
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
        """The best that S3 and disk brought together for a second (or the whole, if shorter)."""
        span_s = self.last_s - self.begin_s
        if span_s <= 0:
            return 0.0
        count = max(1, min(20_000, int(span_s / (BEST_OVER_S / 5))))
        by_tier = [self.rates(tier, self.begin_s, self.last_s, count) for tier in Tier]
        both = [sum(rates) for rates in zip(*by_tier, strict=True)]
        wide = max(1, round(BEST_OVER_S / (span_s / count)))
        running: float = sum(both[:wide])
        best = running
        for at in range(wide, count):
            running += both[at] - both[at - wide]
            best = max(best, running)
        return best / min(wide, count)

    def _activities(self) -> dict[Activity, float]:
        """How long prefetching was at what, while readers read."""
        spent: defaultdict[Activity, float] = defaultdict(float)
        if self.start_s is None:
            return spent
        now, since_s = Activity.DONE, 0.0
        changes = [(e.at_s, Activity(e.detail)) for e in self.recording.events
                   if e.kind == Kind.PREFETCH]  # fmt: skip
        for at_s, activity in [*changes, (self.end_s, Activity.DONE)]:
            spent[now] += max(0.0, min(at_s, self.end_s) - max(since_s, self.start_s))
            now, since_s = activity, at_s
        return dict(spent)

    def path(self, file: int) -> str:
        """The path of a file."""
        return "" if file == NO_FILE else self.recording.files[file][0]


def _each_second_once(stalls: Iterable[Stall]) -> dict[Cause, float]:
    spent: defaultdict[Cause, float] = defaultdict(float)
    until_s = 0.0
    for stall in sorted(stalls, key=lambda stall: stall.end_s):
        spent[stall.cause] += max(0.0, stall.end_s - max(stall.begin_s, until_s))
        until_s = max(until_s, stall.end_s)
    return dict(spent)
