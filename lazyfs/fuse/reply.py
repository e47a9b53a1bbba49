"""Answers to the kernel, which the worker or a mover writes to `/dev/fuse`."""

from __future__ import annotations

import os
import struct

from lazyfs.movers.context import lent
from lazyfs.pagecache.page_cache import DEVICE

Buffer = bytes | memoryview

# linux/fuse.h: fuse_out_header.
HEADER = struct.Struct("<IiQ")


def reply(unique: int, error: int, data: Buffer = b"") -> list[Buffer]:
    """The parts of an answer.

    Args:
        unique: the kernel's number of the request.
        error: an errno, or 0.
    """
    return [HEADER.pack(HEADER.size + len(data), -error, unique), data]


def reply_in_mover(unique: int, data: memoryview) -> None:
    """Answer a read, in a mover. Raises OSError."""
    os.writev(lent(DEVICE), reply(unique, 0, data))
