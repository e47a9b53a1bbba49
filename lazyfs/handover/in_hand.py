"""Which requests a worker has taken from the kernel and not answered, for the worker after it.

The kernel asks the next worker again for what a dead one had taken. So a request that makes workers
die would end one after another, and its reader could not even be killed. Each worker therefore
writes down what it has in hand. A request that was in the hands of `MOST_DEATHS` workers when they
died is answered EIO by the next one.

Only deaths that may be due to a request count: crashes, and kills because memory ran out. Whoever
kills or replaces a worker from outside does not make a request suspicious. The supervisor, which
sees how a worker ended, counts those deaths in the head of the file (`note_death`).

It is a memory file, kept with the session (`lazyfs/handover/handover.py`). A request is written
into a slot of it when it is taken, and crossed out when it is answered, by two stores into mapped
memory: a microsecond, no system call. The last byte of a slot is written last, so that no slot is
ever half written. All numbers are little-endian:

    head     8 bytes form, 8 bytes deaths counted, 8 bytes deaths that the present worker knows of
    slots    8 bytes inode, 8 bytes detail, 1 byte operation, 1 byte deaths, 5 unused, 1 byte state
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

MOST_DEATHS = 2
# As many as a worker takes at once (`MOST_REQUESTS` in `process/mount.py`).
SLOTS = 4096

_FORM = b"in hand1"  # 8 bytes
_HEAD = struct.Struct("<8sQQ")
_COUNTED_AT = 8
_NUMBER = struct.Struct("<Q")
_SLOT = struct.Struct("<QQBB5xB")
_STATE = _SLOT.size - 1
# States of a slot: not used; in the hands of the present worker; in those of a former one.
_FREE, _HELD, _LEFT = 0, 1, 2
_NOT_NOTED = -1
_SIZE = _HEAD.size + SLOTS * _SLOT.size


class Request(NamedTuple):
    """A request, as far as it tells it from others.

    Attributes:
        operation: its number.
        inode: what it is about.
        detail: an offset, or a digest of a name.
    """

    operation: int
    inode: int
    detail: int


class InHand:
    """The requests that the worker of one mount has in hand.

    Args:
        descriptor: of the memory file. What is not of this form is forgotten.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        if os.fstat(descriptor).st_size != _SIZE:
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, _SIZE)
        self._file = mmap.mmap(descriptor, _SIZE)
        # Slot and deaths of each request that former workers left.
        self._left: dict[Request, tuple[int, int]] = {}
        self._free: list[int] = []
        form, counted, known = _HEAD.unpack_from(self._file)
        if form != _FORM:
            self._file[:] = bytes(_SIZE)
            counted = known = 0
        states = self._file[_HEAD.size + _STATE :: _SLOT.size]
        for number in range(SLOTS - 1, -1, -1):
            at = _HEAD.size + number * _SLOT.size
            if states[number] == _FREE:
                self._free.append(at)
            else:
                self._recover(at, died=counted > known)
        _HEAD.pack_into(self._file, 0, _FORM, counted, counted)

    def _recover(self, at: int, *, died: bool) -> None:
        """Take over a slot as a former worker left it.

        Args:
            died: its death may be due to a request. Otherwise what it never took itself is
                forgotten: a worker of another version may be able to answer it.
        """
        inode, detail, operation, deaths, state = _SLOT.unpack_from(self._file, at)
        request = Request(operation, inode, detail)
        if state == _HELD:
            deaths = min(deaths + died, MOST_DEATHS)
        if not deaths or request in self._left or (state == _LEFT and not died):
            self._file[at + _STATE] = _FREE
            self._free.append(at)
        else:
            self._left[request] = at, deaths
            _SLOT.pack_into(self._file, at, inode, detail, operation, deaths, _LEFT)

    def deaths(self, request: Request) -> int:
        """How many workers died with a request in hand that was not taken again yet."""
        return self._left[request][1] if request in self._left else 0

    def take(self, operation: int, inode: int, detail: int) -> int | None:
        """A request was taken; what `answered` is to be told.

        None: it must not be served, because too many workers have died with it in hand.
        """
        deaths = 0
        # Nearly always nothing is left, and this is on the way of every read.
        if self._left and (request := Request(operation, inode, detail)) in self._left:
            at, deaths = self._left[request]
            if deaths >= MOST_DEATHS:
                return None
            del self._left[request]
        elif self._free:
            at = self._free.pop()
        else:
            return _NOT_NOTED
        _SLOT.pack_into(self._file, at, inode, detail, operation, deaths, _HELD)
        return at

    def answered(self, slot: int) -> None:
        """A request was answered."""
        if slot != _NOT_NOTED:
            self._file[slot + _STATE] = _FREE
            self._free.append(slot)


def note_death(descriptor: int) -> None:
    """Count the death of a worker that may be due to a request it had in hand."""
    (counted,) = _NUMBER.unpack(os.pread(descriptor, _NUMBER.size, _COUNTED_AT).ljust(8, b"\0"))
    os.pwrite(descriptor, _NUMBER.pack(counted + 1), _COUNTED_AT)
