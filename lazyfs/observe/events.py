"""The events of a mount, and the ring buffer that keeps the latest of them. Pure.

An event takes 32 bytes of one buffer. A ring for all blocks of a large model costs a few MiB, and
recording an event costs less than a microsecond.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

# Events in the ring: about four for each 8 MiB block of a 500 GB model.
CAPACITY = 1 << 18


class EventKind(IntEnum):
    """What happened. The comments say what an event's `detail`, `size` and `seconds` hold."""

    OPENED = 1  # a file was opened; detail: 1 with O_DIRECT
    CLOSED = 2  # a file was closed
    FETCHED = 3  # a block arrived from S3; detail: purpose; size: of the block; seconds: duration
    LOADED = 4  # a block arrived from disk; detail: purpose; size: of the block; seconds: duration
    FAILED = 5  # a block could not be fetched; detail: cause
    PUSHED = 6  # a block was put into the page cache; size: of the block; seconds: duration
    READ = 7  # a read of a block was answered, the first one since the file was opened
    WAITED = 8  # a reader waited for a block; detail: cause; size: of the read; seconds: duration
    RETRIED = 9  # a request for a block was retried; detail: cause
    PREFETCH = 10  # prefetching changed its activity; detail: activity
    PLANNED = 12  # the loading order is known; size: of the model
    RESUMED = 13  # this worker took the mount over from another
    SHARED = 14  # a block arrived from the fleet's cache; the rest as of FETCHED


# A block arrived.
ARRIVALS = (EventKind.FETCHED, EventKind.LOADED, EventKind.SHARED)


class Purpose(IntEnum):
    """Why a block was fetched."""

    AHEAD = 0
    DEMAND = 1


class Cause(IntEnum):
    """Why a reader waited, or why a request to S3 was retried."""

    NETWORK = 0  # the block was in flight from S3
    THROTTLED = 1  # S3 asked for fewer requests
    ERRORS = 2  # S3 gave no usable answer
    CREDENTIALS = 3  # the credentials had expired
    DISK = 4  # the block was being read from the cache directory
    MEMORY = 5  # the memory limit has room for fewer blocks than the link can carry
    ORDER = 6  # prefetching had not reached the block
    NO_PREFETCH = 7  # prefetching does not cover the block

    @property
    def label(self) -> str:
        """The name in metrics and JSON."""
        return self.name.lower()


class Activity(IntEnum):
    """What prefetching is doing."""

    DONE = 0  # nothing is left to fetch
    FETCHING = 1  # as many requests are in flight as the limit allows
    NO_ROOM = 2  # it waits for room in memory
    DEMAND = 3  # requests for waiting readers take every slot
    PAUSED = 4  # `lazyfs pause`
    OFF = 5  # `--prefetch off`

    @property
    def label(self) -> str:
        """The name in metrics and JSON."""
        return self.name.lower()


class Event(NamedTuple):
    """One event.

    Attributes:
        at_s: seconds since the worker started.
        kind: an `EventKind`.
        detail: a `Purpose`, `Cause` or `Activity`, depending on `kind`.
        file: index into `Recorder.files`; NO_FILE if the event concerns no file.
        block: number of the block in the file.
        size: in bytes.
        seconds: how long it took.
    """

    at_s: float
    kind: int
    detail: int
    file: int
    block: int
    size: int
    seconds: float


NO_FILE = 0xFFFFFFFF
_LAYOUT = struct.Struct("<dBBxxIIQf")


class EventRing:
    """The latest events. When the ring is full, a new event overwrites the oldest.

    Args:
        capacity: number of events that the ring holds.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._buffer = bytearray()
        self.recorded = 0

    def add(
        self,
        at_s: float,
        kind: EventKind,
        detail: int = 0,
        file: int = NO_FILE,
        block: int = 0,
        size: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Record an event."""
        packed = _LAYOUT.pack(at_s, kind, detail, file, block, size, seconds)
        if self.recorded < self._capacity:
            self._buffer += packed
        else:
            start = self.recorded % self._capacity * _LAYOUT.size
            self._buffer[start : start + _LAYOUT.size] = packed
        self.recorded += 1

    def dump(self) -> bytes:
        """All events in the ring as bytes for `unpack`, oldest first."""
        split = self.recorded % self._capacity * _LAYOUT.size
        if self.recorded <= self._capacity:
            return bytes(self._buffer)
        return bytes(self._buffer[split:] + self._buffer[:split])

    def newest_first(self) -> Iterator[Event]:
        """All events in the ring, newest first. Do not add events while iterating."""
        for number in range(self.recorded - 1, max(-1, self.recorded - self._capacity - 1), -1):
            yield Event(*_LAYOUT.unpack_from(self._buffer, number % self._capacity * _LAYOUT.size))


def unpack(dumped: bytes) -> list[Event]:
    """Decode the bytes of `EventRing.dump`."""
    return [Event(*fields) for fields in _LAYOUT.iter_unpack(dumped)]
