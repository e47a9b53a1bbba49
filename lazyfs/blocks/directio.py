"""Whole files read and written past the kernel's page cache.

The page cache is to hold the files of the mount, not a second copy of each block in the cache
directory; and a direct write costs a fortieth of the processor time of a buffered one, because no
page is allocated, copied to and written back later (`docs/ARCHITECTURE.md`, measured). Where a
filesystem has no direct I/O, ordinary reads and writes do the same, slower.

Direct I/O wants memory and lengths in multiples of the device's block: blocks lie in `buffers.py`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lazyfs.blocks.buffers import ALIGNMENT, align, is_aligned, take_buffer


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
        data, tail = _aligned(length), _aligned(tail_length)
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

    Args:
        data: in a buffer of `take_buffer`; other memory is copied into one first, under the
            interpreter's lock.

    Raises:
        OSError: it exists, or cannot be written; what was written is left for the caller.
    """
    if not is_aligned(data):
        data = _copy(data)
    # What does not fill a block of the device goes with the tail.
    body = len(data) - len(data) % ALIGNMENT
    end = bytes(data[body:]).ljust(align(len(data)) - body, b"\0") + tail
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)
        descriptor = os.open(path, flags, 0o600)
    try:
        _write_all(descriptor, data[:body], _copy(end.ljust(align(len(end)), b"\0")))
        os.ftruncate(descriptor, body + len(end))
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, body: memoryview, end: memoryview) -> None:
    while body or end:
        written = os.writev(descriptor, [body, end])
        end = end[max(0, written - len(body)) :]
        body = body[written:]


def _aligned(size: int) -> memoryview:
    """Memory that direct I/O can fill: as large as the next multiple of the alignment."""
    return take_buffer(align(size))


def _copy(data: memoryview | bytes) -> memoryview:
    copy = take_buffer(len(data))
    copy[:] = data
    return copy
