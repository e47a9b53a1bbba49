"""Whole files read and written past the kernel's page cache.

The page cache is to hold the files of the mount, not a second copy of each block in the cache
directory; and a direct write costs a fortieth of the processor time of a buffered one, because no
page is allocated, copied to and written back later (`docs/ARCHITECTURE.md`, measured). Where a
filesystem has no direct I/O, ordinary reads and writes do the same, slower.

Direct I/O wants memory and lengths in multiples of the device's block.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from pathlib import Path

# No device of today has larger blocks.
ALIGNMENT = 4096


def aligned_buffer(size: int) -> memoryview:
    """Memory of at least that size that direct I/O can fill; freed with its last view.

    It comes from the C library's heap, as the blocks that obstore receives do, so that one can be
    put where the other was.

    Raises:
        MemoryError: there is none.
    """
    buffer_type = _buffer_type(align(size))
    address = ctypes.c_void_p()
    if _libc.posix_memalign(ctypes.byref(address), ALIGNMENT, align(size)) != 0:
        raise MemoryError(f"no {size} bytes for a block")
    assert address.value is not None
    return memoryview(buffer_type.from_address(address.value)).cast("B")


@functools.cache
def _buffer_type(size: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    class AlignedBuffer(ctypes.Array[ctypes.c_ubyte]):
        _type_ = ctypes.c_ubyte
        _length_ = size

        def __del__(self) -> None:
            _libc.free(ctypes.c_void_p(ctypes.addressof(self)))

    return AlignedBuffer


_libc = ctypes.CDLL(None)


def read_file(path: Path, length: int, tail_length: int) -> tuple[memoryview, memoryview] | None:
    """A file of `write_file`: its data and tail, or None if it is not exactly that long.

    What the page cache has anyway is copied from there, the rest comes from the device.

    Raises:
        OSError: the file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = align(length) + tail_length
        if os.fstat(descriptor).st_size != size:
            return None
        data, tail = aligned_buffer(length), aligned_buffer(tail_length)
        done = 0
        try:
            done = os.preadv(descriptor, [data, tail], 0, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        done -= done % ALIGNMENT if done < size else 0
        if done < size:
            rest = [data[done:], tail] if done < len(data) else [tail[done - len(data) :]]
            done += _read_rest(path, descriptor, rest, done)
        return (data[:length], tail[:tail_length]) if done >= size else None
    finally:
        os.close(descriptor)


def _read_rest(path: Path, descriptor: int, buffers: list[memoryview], start: int) -> int:
    try:
        direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.preadv(descriptor, buffers, start)
    try:
        return os.preadv(direct, buffers, start)
    finally:
        os.close(direct)


def write_file(path: Path, data: memoryview, tail: bytes) -> None:
    """Write a new file, readable by its owner only: data, zeros to the alignment, tail.

    Raises:
        OSError: it exists, or cannot be written; what was written is left for the caller.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)
        descriptor = os.open(path, flags, 0o600)
    try:
        staging = _stagings.pop() if _stagings else _Staging()
        aligned = staging.fill(data, tail)
        written = 0
        while written < len(aligned):
            written += os.write(descriptor, aligned[written:])
        os.ftruncate(descriptor, align(len(data)) + len(tail))
        _stagings.append(staging)
    finally:
        os.close(descriptor)


class _Staging:
    """Aligned memory from which a file is written.

    It belongs to a memory file, so that filling it is a system call, which lets other threads run
    meanwhile; a copy between two Python buffers would hold the interpreter's lock.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("lazyfs-staging", os.MFD_CLOEXEC)
        self._memory: mmap.mmap | None = None

    def fill(self, data: memoryview, tail: bytes) -> memoryview:
        """The same bytes in aligned memory, each part padded with zeros to the alignment."""
        tail_start = align(len(data))
        size = tail_start + align(len(tail))
        if self._memory is None or len(self._memory) < size:
            os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, size)
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], done)
        os.pwrite(self._file, bytes(tail_start - len(data)) + tail, len(data))
        return memoryview(self._memory)[:size]


# As many as there are writers at once; kept for the next ones.
_stagings: list[_Staging] = []


def align(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
