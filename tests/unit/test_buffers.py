"""Memory that is used again as soon as nobody has a view of it, and not before."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from lazyfs.blocks.buffers import (
    ALIGNMENT,
    HUGE_PAGE,
    MOST_IDLE_BYTES,
    align,
    is_aligned,
    take_buffer,
)
from lazyfs.cache.direct_io import read_file, write_file

# A size that no other test takes.
SIZE = 7 * HUGE_PAGE - 1000


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))


def test_memory_is_used_again() -> None:
    first = take_buffer(SIZE)
    where = address(first)
    first[0] = 77
    del first
    assert address(take_buffer(SIZE)) == where


def test_a_view_of_a_part_keeps_it() -> None:
    buffer = take_buffer(SIZE)
    where = address(buffer)
    buffer[5:9] = b"keep"
    part = buffer[5:9].toreadonly()
    del buffer
    other = take_buffer(SIZE)
    assert address(other) != where
    other[:] = bytes(SIZE)
    assert part == b"keep"


def test_idle_memory_is_bounded() -> None:
    size = MOST_IDLE_BYTES // 2 - HUGE_PAGE
    many = [take_buffer(size) for _ in range(20)]
    for buffer in many:
        buffer[::ALIGNMENT] = bytes(len(buffer[::ALIGNMENT]))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    many.clear()
    del buffer
    assert before - resident() > 17 * size


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 << 20, 8 << 20])
def test_sizes(size: int) -> None:
    buffer = take_buffer(size)
    assert len(buffer) == size
    assert is_aligned(buffer)
    assert address(buffer) % ALIGNMENT == 0
    assert not is_aligned(buffer[1:])
    assert not is_aligned(memoryview(bytearray(size)))


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 100_000])
@pytest.mark.parametrize("ours", [True, False])
def test_files_of_any_length(tmp_path: Path, size: int, ours: bool) -> None:
    data = os.urandom(size)
    buffer = take_buffer(size) if ours else memoryview(bytearray(size))
    buffer[:] = data
    write_file(tmp_path / "file", buffer, b"tail")
    padded = data.ljust(align(size), b"\0")
    assert (tmp_path / "file").read_bytes() == padded + b"tail"
    found = take_buffer(align(size))
    assert read_file(tmp_path / "file", found, 4) == b"tail"
    assert found == padded
    assert read_file(tmp_path / "file", found, 5) is None
