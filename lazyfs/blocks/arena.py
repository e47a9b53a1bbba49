"""Memory for buffers that other processes map as well: one unnamed file, in slots.

Slots are private memory until another process gets the file. A returned slot keeps its place in the
file, but its memory is freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections import defaultdict, deque

# linux/mman.h
_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_MAP_FAILED = ctypes.c_void_p(-1).value


# The file grows by so much: each step is one more mapping of each mover.
STEP = 256 << 20


class Slot(mmap.mmap):
    """A part of the file, mapped.

    Attributes:
        arena: the owner of the file.
        offset: the offset in the file, in bytes.
    """

    arena: Arena
    offset: int


class Arena:
    """A memory file that grows as slots are taken, and never shrinks.

    Raises:
        OSError: the kernel cannot create it.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("lazyfs-blocks", os.MFD_CLOEXEC)
        self._size = self._file_size = 0
        self._growing = threading.Lock()
        # Free slots by size. Without a lock: any thread may release the last view of a slot.
        self._free: defaultdict[int, deque[int]] = defaultdict(deque)

    def take(self, size: int) -> Slot:
        """Take a slot of `size` bytes, a multiple of the page size.

        Raises:
            OSError: out of memory, or out of address space.
        """
        try:
            offset = self._free[size].popleft()
        except IndexError:
            with self._growing:
                if self._size + size > self._file_size:
                    # No slot lies across a former end of the file, where mappings of movers end.
                    self._size = self._file_size
                    os.ftruncate(self.descriptor, self._file_size + max(STEP, size))
                    self._file_size += max(STEP, size)
                offset = self._size
                self._size += size
        try:
            slot = self._mapped(size, offset)
        except OSError:
            self._free[size].append(offset)
            raise
        slot.arena, slot.offset = self, offset
        with contextlib.suppress(OSError):  # a kernel without huge pages
            slot.madvise(mmap.MADV_HUGEPAGE)
        return slot

    def _mapped(self, size: int, offset: int) -> Slot:
        """A part of the file. Raises OSError.

        `mmap` of Python would keep a descriptor for each slot, and there may be thousands. So the
        file takes the place of memory without one.
        """
        slot = Slot(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(slot))
        rights, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(address, size, rights, flags, self.descriptor, offset) == _MAP_FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free the memory of a slot that is no longer used."""
        with contextlib.suppress(OSError):
            slot.madvise(mmap.MADV_REMOVE)
        self._free[len(slot)].append(slot.offset)
