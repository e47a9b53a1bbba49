"""Reads and writes files of blocks past the kernel's page cache.

The page cache is for the files of the mount, not for a second copy of each block in the cache
directory. And a direct write costs a fortieth of the processor time of a buffered one, because no
page is allocated, filled and written back later (`docs/ARCHITECTURE.md`, measured). On filesystems
without direct I/O, ordinary reads and writes do the same, slower.

Direct I/O needs memory and lengths in multiples of the device's block size, as `buffers.py` gives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from lazyfs import cache_place
from lazyfs.blocks.buffers import ALIGNMENT, align, is_aligned, take_buffer


def read_file(path: Path, data: memoryview, tail_length: int) -> memoryview | None:
    """Read a file of `write_file`. Returns its tail, or None if it is not exactly that long.

    Args:
        data: for the data, with the zeros that align it.

    Raises:
        OSError: the file cannot be opened or read.
    """
    size = len(data) + tail_length
    descriptor = _open(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_size != size:
            return None
        # Not with RWF_NOWAIT first, which starts a useless read-ahead on a miss.
        tail = take_buffer(align(tail_length))
        done = os.preadv(descriptor, [data, tail], 0)
        return tail[:tail_length] if done >= size else None
    finally:
        os.close(descriptor)


def read_part(path: Path, start: int, data: memoryview) -> bool:
    """Read a part of a file of `write_file`; False if the file ends before.

    Args:
        start: where the part begins, in bytes; a multiple of the alignment.
        data: filled with it; as long as a multiple of the alignment.

    Raises:
        OSError: the file cannot be opened or read.
    """
    descriptor = _open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [data], start) == len(data)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: memoryview, tail: bytes) -> None:
    """Write a new file: data, zeros to the alignment, tail. Its group may do what `mode_in` says.

    Args:
        data: in a buffer of `take_buffer`; other memory is copied into one first, under the
            interpreter's lock.

    Raises:
        OSError: it exists, or cannot be written; what was written is left for the caller.
    """
    if not is_aligned(data):
        data = _copy(data)
    # The rest that does not fill a block of the device is written with the tail.
    body = len(data) - len(data) % ALIGNMENT
    end = bytes(data[body:]).ljust(align(len(data)) - body, b"\0") + tail
    descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode_in(path.parent))
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


def mode_in(directory: Path) -> int:
    """The mode of new files in a directory: their group may do what it may do there."""
    return 0o660 if directory.stat().st_mode & stat.S_IWGRP else 0o600


def open_own(path: Path) -> int:
    """A descriptor of a small file for reading and writing, which is made if it is missing.

    Raises:
        OSError: it cannot be opened, or is a symbolic link.
    """
    mode = mode_in(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    if os.fstat(descriptor).st_mode & 0o777 != mode:
        # Not permitted if it is another worker's, which has only just made it.
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, mode)
    return descriptor


def make_folder(path: Path) -> None:
    """Make a directory below a cache directory, unless it is there. Raises OSError."""
    mode = cache_place.folder_mode(path.parent)
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        return
    # Whoever else may write to a shared cache could put a link there meanwhile.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_mode & 0o7777 != mode:
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int, mode: int = 0) -> int:
    """A descriptor for direct I/O, if the filesystem supports it."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT, mode)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if flags & os.O_EXCL:
            path.unlink(missing_ok=True)  # it was created nevertheless
        return os.open(path, flags, mode)


def _copy(data: memoryview | bytes) -> memoryview:
    copy = take_buffer(len(data))
    copy[:] = data
    return copy
