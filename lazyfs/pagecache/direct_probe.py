"""Tests whether this kernel continues direct reads in the page cache (`direct_reads.py`).

A worker must not read its own mount, so a helper process runs this module, which uses only the
standard library to start quickly.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from pathlib import Path

from lazyfs.pagecache.mincore import open_known

# The worker sees these flags with each read, and no other program opens a file like this.
PROBE_FLAGS = os.O_DIRECT | os.O_SYNC | os.O_APPEND | os.O_NONBLOCK
SIZE = 4096
YES = b"yes"

# io_setup, io_destroy, io_submit, io_getevents: asm/unistd_64.h, asm-generic/unistd.h.
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
_libc = ctypes.CDLL(None, use_errno=True)


class _ControlBlock(ctypes.Structure):
    """linux/aio_abi.h, struct iocb, little-endian. Opcode 0 is IOCB_CMD_PREAD."""

    _fields_ = (
        ("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16), ("priority", ctypes.c_int16), ("file", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64), ("size", ctypes.c_uint64), ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64), ("more_flags", ctypes.c_uint32), ("event", ctypes.c_uint32),
    )  # fmt: skip


def read_asynchronously(descriptor: int, buffer: mmap.mmap, offset: int) -> int:
    """Read with io_submit(2); returns what the read returned.

    Raises:
        OSError: there is no asynchronous I/O here.
    """
    if platform.machine() not in _CALLS:
        raise OSError(f"the system calls of {platform.machine()} are not known")
    setup, destroy, submit, get_events = _CALLS[platform.machine()]
    context = ctypes.c_ulong(0)
    _call(setup, 1, ctypes.byref(context))
    try:
        memory = (ctypes.c_ubyte * len(buffer)).from_buffer(buffer)
        block = _ControlBlock(
            file=descriptor, buffer=ctypes.addressof(memory), size=len(buffer), offset=offset
        )
        _call(submit, context, 1, ctypes.byref(ctypes.pointer(block)))
        event = (ctypes.c_int64 * 4)()  # struct io_event: data, obj, res, res2
        _call(get_events, context, 1, 1, ctypes.byref(event), None)
        return event[2]
    finally:
        _libc.syscall(destroy, context)


def _call(number: int, *arguments: object) -> None:
    if _libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def continues_in_page_cache(
    mountpoint: Path, path: str, inode: int, offset: int, length: int
) -> bool:
    """Whether direct reads return all bytes of a part of a file, if the worker answers them empty.

    Raises:
        OSError: the file cannot be opened or read, or there is no asynchronous I/O.
    """
    descriptor = open_known(mountpoint, path, inode, PROBE_FLAGS)
    if descriptor is None:
        return False
    try:
        buffer = mmap.mmap(-1, SIZE)
        waited = os.preadv(descriptor, [buffer], offset)
        return waited == length == read_asynchronously(descriptor, mmap.mmap(-1, SIZE), offset)
    finally:
        os.close(descriptor)


def main() -> None:
    """Print `YES` or why not: `direct_probe.py MOUNTPOINT < "INODE OFFSET LENGTH PATH"`."""
    inode, offset, length, path = sys.stdin.read().split(" ", 3)
    try:
        mountpoint = Path(sys.argv[1])
        if continues_in_page_cache(mountpoint, path, int(inode), int(offset), int(length)):
            sys.stdout.buffer.write(YES)
        else:
            print("a direct read ended early")
    except OSError as error:
        print(error)


if __name__ == "__main__":
    main()
