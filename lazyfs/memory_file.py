"""Unnamed files in memory, which processes pass to each other as descriptors (memfd_create(2))."""

from __future__ import annotations

import os


def memory_file(name: str, content: bytes) -> int:
    """A descriptor of an unnamed file in memory (memfd_create(2))."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return descriptor


def read_whole(descriptor: int) -> bytes:
    """All bytes of a file; its position, which other holders share, stays."""
    size = os.fstat(descriptor).st_size
    content = bytearray()
    while part := os.pread(descriptor, size - len(content), len(content)):
        content += part
    return bytes(content)
