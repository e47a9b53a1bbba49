"""Memory for blocks: aligned and reused, without explicit release.

A buffer lives as long as views of it exist; with the last view it returns to the pool, in any
thread. So a reply, a push or an abandoned request in progress keeps its bytes, even if the block
was dropped before.

Reused memory costs no page faults and no zeroing by the kernel, and it is in huge pages if the
kernel has them. At most `MOST_IDLE_BYTES` of unused buffers are kept for each size.

Where other processes move the bytes (`movers/`), buffers for blocks are taken from an arena, which
they map too (`share`). Such buffers are all kept until `free_idle`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections import deque
from typing import ClassVar

from lazyfs.blocks.arena import Arena, Slot

# Direct I/O needs memory aligned to the device's blocks; no device has larger ones.
ALIGNMENT = 4096
HUGE_PAGE = 2 << 20
MOST_IDLE_BYTES = 64 << 20
# For smaller buffers, a call to another process does not pay.
LEAST_SHARED = 1 << 20

_arena: Arena | None = None
_lease_types: list[type[_Lease]] = []


def share(arena: Arena | None) -> None:
    """Take buffers of `LEAST_SHARED` bytes or more from an arena from now on."""
    global _arena
    _arena = arena
    # Idle buffers are outside this arena.
    _lease_type.cache_clear()
    _lease_types.clear()


def free_idle() -> None:
    """Free the memory of an arena's unused buffers after a load."""
    for lease_type in _lease_types:
        with contextlib.suppress(IndexError):
            while isinstance(lease_type.idle[0], Slot):
                slot = lease_type.idle.popleft()
                assert isinstance(slot, Slot)
                slot.arena.give_back(slot)


def shared_offset(buffer: memoryview) -> int | None:
    """The offset of a view in the arena's file; None if it is not in the arena, or is read-only."""
    lease = buffer.obj
    if not isinstance(lease, _Lease) or buffer.readonly or not buffer:
        return None
    if not isinstance(lease.memory, Slot) or lease.memory.arena is not _arena:
        return None
    first = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))
    return lease.memory.offset + first - ctypes.addressof(lease)


def align(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def take_buffer(size: int) -> memoryview:
    """`size` bytes of memory with any content.

    Raises:
        OSError: out of memory.
    """
    return _lease_type(_room(size)).take()[:size]


def is_aligned(buffer: memoryview) -> bool:
    """Whether the view begins where a buffer of `take_buffer` begins."""
    lease = buffer.obj
    if not isinstance(lease, _Lease) or buffer.readonly or not buffer:
        return False
    first = ctypes.c_ubyte.from_buffer(buffer)
    return ctypes.addressof(first) == ctypes.addressof(lease)


def _room(size: int) -> int:
    """The size to allocate: a few sizes serve all requests."""
    if size > HUGE_PAGE:
        return -(-size // HUGE_PAGE) * HUGE_PAGE
    return max(ALIGNMENT, 1 << (size - 1).bit_length())


class _Lease(ctypes.Array[ctypes.c_ubyte]):
    """Owns memory as long as views exist, which refer to this object."""

    _type_ = ctypes.c_ubyte
    _length_ = 0
    idle: ClassVar[deque[mmap.mmap]]
    most_idle: ClassVar[int]
    memory: mmap.mmap

    @classmethod
    def take(cls) -> memoryview:
        try:
            memory = cls.idle.pop()
        except IndexError:
            memory = _new_memory(cls._length_)
        lease = cls.from_buffer(memory)
        lease.memory = memory
        return memoryview(lease).cast("B")

    def __del__(self) -> None:
        # Freeing 8 MiB takes a millisecond, and this may be the thread that answers the kernel.
        if isinstance(self.memory, Slot) or len(self.idle) < self.most_idle:
            self.idle.append(self.memory)


def _new_memory(size: int) -> mmap.mmap:
    if _arena is not None and size >= LEAST_SHARED:
        return _arena.take(size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@functools.cache
def _lease_type(room: int) -> type[_Lease]:
    class Lease(_Lease):
        _length_ = room
        idle: ClassVar[deque[mmap.mmap]] = deque()
        most_idle = max(1, MOST_IDLE_BYTES // room)

    _lease_types.append(Lease)

    return Lease
