"""Memory for blocks: aligned, used again and again, and given back by nobody.

A buffer belongs to those who hold views of it; with the last view it goes back to the pool, in
whatever thread. So a reply under way, a push or a request that nobody waits for any more keeps its
bytes, however early the block was let go.

What is used again costs no page faults and no zeroing by the kernel, and it is in huge pages where
the kernel has them. Of each size, no more than `MOST_IDLE_BYTES` are kept while nobody uses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections import deque
from typing import ClassVar

# Direct I/O wants memory that begins and ends with a block of the device; none has larger ones.
ALIGNMENT = 4096
HUGE_PAGE = 2 << 20
MOST_IDLE_BYTES = 64 << 20


def align(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def take_buffer(size: int) -> memoryview:
    """`size` bytes of memory with any content.

    Raises:
        OSError: there is none.
    """
    return _lease_type(_room(size)).take()[:size]


def is_aligned(buffer: memoryview) -> bool:
    """Whether it is the beginning of a buffer of `take_buffer`."""
    lease = buffer.obj
    if not isinstance(lease, _Lease) or buffer.readonly or not buffer:
        return False
    first = ctypes.c_ubyte.from_buffer(buffer)
    return ctypes.addressof(first) == ctypes.addressof(lease)


def _room(size: int) -> int:
    """How much to take: few sizes serve for all."""
    if size > HUGE_PAGE:
        return -(-size // HUGE_PAGE) * HUGE_PAGE
    return max(ALIGNMENT, 1 << (size - 1).bit_length())


class _Lease(ctypes.Array[ctypes.c_ubyte]):
    """Memory while somebody has a view of it, which refers to this object."""

    _type_ = ctypes.c_ubyte
    _length_ = 0
    idle: ClassVar[deque[mmap.mmap]]
    memory: mmap.mmap

    @classmethod
    def take(cls) -> memoryview:
        try:
            memory = cls.idle.pop()
        except IndexError:
            memory = mmap.mmap(-1, cls._length_, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        lease = cls.from_buffer(memory)
        lease.memory = memory
        return memoryview(lease).cast("B")

    def __del__(self) -> None:
        self.idle.append(self.memory)  # and the oldest goes when there are many


@functools.cache
def _lease_type(room: int) -> type[_Lease]:
    class Lease(_Lease):
        _length_ = room
        idle: ClassVar[deque[mmap.mmap]] = deque(maxlen=max(1, MOST_IDLE_BYTES // room))

    return Lease
