"""Unnamed files in memory, which processes pass to each other as descriptors (memfd_create(2))."""

from __future__ import annotations

import fcntl
import os

_FINAL = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def memory_file(name: str, content: bytes, *, final: bool = False) -> int:
    """A descriptor of an unnamed file in memory (memfd_create(2)).

    Args:
        final: nobody can change the file any more, whoever gets the descriptor.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    if final:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _FINAL)
    return descriptor


def read_whole(descriptor: int) -> bytes:
    """All bytes of a file; its position, which other holders share, stays."""
    size = os.fstat(descriptor).st_size
    content = bytearray()
    while part := os.pread(descriptor, size - len(content), len(content)):
        content += part
    return bytes(content)
