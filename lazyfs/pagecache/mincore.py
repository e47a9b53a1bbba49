"""Finds pages of a mount that the kernel has dropped from the page cache.

A worker must not access its own mount, so a helper process runs this module, which uses only the
standard library to start quickly. It calls mincore(2), which fetches nothing.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_PAGE = mmap.PAGESIZE
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
_STEP = os.O_PATH | os.O_DIRECTORY | _SAFELY
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
# The lowest bit of a page's byte says whether it is there; the other bits are reserved.
_IS_THERE = bytes(byte & 1 for byte in range(256))
# What the disk reads for a missing page (`PIECE` of `cache/block_format.py`), in pages.
_PIECE_PAGES = (256 << 10) // _PAGE
_MAP_FAILED = ctypes.c_void_p(-1).value


def open_known(mountpoint: Path, path: str, inode: int, flags: int = 0) -> int | None:
    """A descriptor of a file, if it has that inode and mincore(2) tells the truth about it.

    To users other than its owner the kernel reports all pages as present.

    Args:
        path: below the mountpoint. No link is followed: a worker that was taken over can answer the
            kernel with links to anywhere.
        flags: more of open(2).

    Raises:
        OSError: it cannot be opened, or leads out of the mount.
    """
    *directories, name = path.split("/")
    if Path(path).is_absolute() or ".." in (*directories, name):
        raise PermissionError(path)
    here = os.open(mountpoint, _STEP)
    try:
        for each in directories:
            below = os.open(each, _STEP, dir_fd=here)
            os.close(here)
            here = below
        # A pipe would wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | _SAFELY | os.O_NONBLOCK | flags, dir_fd=here)
    finally:
        os.close(here)
    status = os.fstat(descriptor)
    if status.st_ino == inode and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    return None


def broken_pieces(descriptor: int, offset: int, length: int) -> int:
    """How many pieces of a part of a file have pages that are not in the page cache.

    Raises:
        OSError: it cannot be mapped.
    """
    begin = offset - offset % _PAGE
    length += offset - begin
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, begin)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        pages = ctypes.create_string_buffer(-(-length // _PAGE))
        if _libc.mincore(address, length, pages) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        there = pages.raw.translate(_IS_THERE)
        starts = range(0, len(there), _PIECE_PAGES)
        return sum(there.find(0, start, start + _PIECE_PAGES) >= 0 for start in starts)
    finally:
        _libc.munmap(address, length)


def dropped(mountpoint: Path, path: str, inode: int, parts: Iterable[Sequence[int]]) -> list[int]:
    """The indices of the parts that miss more than they may; none if not known.

    Args:
        path: below the mountpoint.
        parts: offset and length of each part, and of how many pieces pages may be missing; of none
            if that is not given.
    """
    try:
        descriptor = open_known(mountpoint, path, inode)
        if descriptor is None:
            return []
        try:
            return [
                at
                for at, (offset, length, *most) in enumerate(parts)
                if broken_pieces(descriptor, offset, length) > sum(most)
            ]
        finally:
            os.close(descriptor)
    except OSError:
        return []  # the file is gone, or the mount is


def main(mountpoint: Path, wanted: Sequence[tuple[str, int, list[Sequence[int]]]]) -> None:
    """Print which parts of files are dropped: a list of indices for each file.

    Args:
        mountpoint: no file is looked at that is not below it.
        wanted: path, inode and parts of each file.
    """
    print(json.dumps([dropped(mountpoint, *each) for each in wanted]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.load(sys.stdin))
