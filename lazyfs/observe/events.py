"""What happens in a mount, as events, and the ring that keeps the latest of them. Pure.

An event is 32 bytes in one buffer, so that a ring of all blocks of a large model costs a few MiB
and recording one costs less than a microsecond.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

# So many events are kept: the four or so of each block of a model of 500 GB at 8 MiB a block.
CAPACITY = 1 << 18


class Kind(IntEnum):
    """What happened; and what `detail`, `size` and `seconds` of such an event say."""

    OPENED = 1  # a file
    CLOSED = 2  # a file
    FETCHED = 3  # a block came from S3: purpose; its bytes; since it was begun
    LOADED = 4  # a block came from disk: purpose; its bytes; since it was begun
    FAILED = 5  # a block could not be had: cause
    PUSHED = 6  # a block went into the page cache; its bytes; how long that took
    READ = 7  # a reader was given bytes of a block, for the first time since the file was opened
    WAITED = 8  # a reader waited for a block: cause; bytes he asked for; how long
    RETRIED = 9  # S3 was asked again for a block: cause
    PREFETCH = 10  # what prefetching does changed: activity
    LIMIT = 11  # so many requests may be in flight from now on: -; number
    PLANNED = 12  # the order of loading is known: -; bytes of the model
    RESUMED = 13  # another worker took up the mount
    SHED = 14  # a load left no time or memory to write a block to the disk; its bytes


class Purpose(IntEnum):
    """Why a block was brought."""

    AHEAD = 0
    DEMAND = 1


class Cause(IntEnum):
    """Why a reader waited, or S3 was asked again."""

    NETWORK = 0  # the bytes were on their way
    THROTTLED = 1  # S3 asked for fewer requests
    ERRORS = 2  # S3 gave no usable answer
    CREDENTIALS = 3  # they ran out
    DISK = 4  # the cache directory was being read
    MEMORY = 5  # fewer blocks than the link carries had room in the memory budget
    ORDER = 6  # prefetching was at work elsewhere
    NO_PREFETCH = 7  # nothing is fetched ahead

    @property
    def label(self) -> str:
        """In metrics and JSON."""
        return self.name.lower()


class Activity(IntEnum):
    """What prefetching does."""

    DONE = 0  # nothing more is wanted
    FETCHING = 1  # as many requests are in flight as should be
    NO_ROOM = 2  # it waits for room in memory
    DEMAND = 3  # readers' own requests take every slot
    PAUSED = 4  # somebody said so
    OFF = 5

    @property
    def label(self) -> str:
        """In metrics and JSON."""
        return self.name.lower()


class Event(NamedTuple):
    """One thing that happened.

    Attributes:
        at_s: seconds since the worker began.
        file: number of the file in the order of `Recorder.files`; NO_FILE: about none.
        block: its number in the file.
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
    """The latest events; when it is full, the oldest leave.

    Args:
        capacity: how many are kept.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._buffer = bytearray()
        self.recorded = 0

    def add(
        self,
        at_s: float,
        kind: Kind,
        detail: int = 0,
        file: int = NO_FILE,
        block: int = 0,
        size: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Keep one more."""
        packed = _LAYOUT.pack(at_s, kind, detail, file, block, size, seconds)
        if self.recorded < self._capacity:
            self._buffer += packed
        else:
            start = self.recorded % self._capacity * _LAYOUT.size
            self._buffer[start : start + _LAYOUT.size] = packed
        self.recorded += 1

    def dump(self) -> bytes:
        """All that are kept, oldest first, for `unpack`."""
        split = self.recorded % self._capacity * _LAYOUT.size
        if self.recorded <= self._capacity:
            return bytes(self._buffer)
        return bytes(self._buffer[split:] + self._buffer[:split])

    def newest_first(self) -> Iterator[Event]:
        """All that are kept, from the newest back; nothing may be added meanwhile."""
        for number in range(self.recorded - 1, max(-1, self.recorded - self._capacity - 1), -1):
            yield Event(*_LAYOUT.unpack_from(self._buffer, number % self._capacity * _LAYOUT.size))


def unpack(dumped: bytes) -> list[Event]:
    """The events that `EventRing.dump` gave."""
    return [Event(*fields) for fields in _LAYOUT.iter_unpack(dumped)]
