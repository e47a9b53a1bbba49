"""The requests that a worker has taken from the kernel and not answered, for the next worker.

After the death of a worker, the kernel resends its requests to the next one. A request that crashes
workers would end one after another, and its reader could not even be killed. So each worker records
its pending requests. If `MOST_DEATHS` workers died with a request in hand, the next one
answers it with EIO.

Only deaths that a request may have caused count: crashes, and kills for lack of memory. A worker
that is killed or replaced from outside does not make its requests suspicious. The supervisor sees
how a worker ended, and counts those deaths in the head of the file (`note_death`).

The record is a memory file, kept with the session (`lazyfs/handover/handover.py`). A request gets a
slot when it is taken, and the slot is freed when it is answered, by two stores into mapped memory:
a microsecond, no system call. The last byte of a slot is written last, so that no slot is ever half
written. All numbers are little-endian:

    head     8 bytes format, 8 bytes deaths counted, 8 bytes deaths that the present worker knows of
    slots    8 bytes inode, 8 bytes detail, 1 byte operation, 1 byte deaths, 5 unused, 1 byte state
"""

from __future__ import annotations

import fcntl
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
    """The fields that identify a request.

    Attributes:
        operation: its number.
        inode: the node that it concerns.
        detail: an offset, or a digest of a name.
    """

    operation: int
    inode: int
    detail: int


class InHand:
    """The requests that the worker of one mount has in hand.

    Args:
        descriptor: the memory file. Content of another format is discarded.
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
        """Take over a slot that a former worker left.

        Args:
            died: a request may have caused the worker's death. Otherwise requests that it had not
                taken itself are forgotten: a worker of another version may be able to answer them.
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
        """Record a request that was taken; returns its slot, for `answered`.

        None: it must not be served, because too many workers died with it in hand.
        """
        deaths = 0
        # Nearly always nothing is left, and every read passes here.
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
        """Free the slot of a request that was answered."""
        if slot != _NOT_NOTED:
            self._file[slot + _STATE] = _FREE
            self._free.append(slot)


def note_death(descriptor: int) -> None:
    """Count the death of a worker that one of its requests may have caused.

    The worker may have stored any file here, with any number in it.

    Raises:
        OSError: it is no file in memory that can be read and written.
    """
    # Fails for other files. Of one in its own mount, a read would wait for the next worker.
    fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    (counted,) = _NUMBER.unpack(os.pread(descriptor, _NUMBER.size, _COUNTED_AT).ljust(8, b"\0"))
    os.pwrite(descriptor, _NUMBER.pack((counted + 1) % (1 << 64)), _COUNTED_AT)
