"""Hundreds of threads fault at once in random order: a mount with little memory serves them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mounted, fusectl, peak_mib
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SIZE = 96 * MIB
PART = 128 << 10
RANKS, THREADS = 4, 64
# On a machine that does other things, too. Where pushes may hold all memory it never ends.
LONGEST_S = 100
# Of a worker that may hold 64 MiB of blocks: its program and libraries take 40 to 60 MiB.
MOST_MIB = 160

# Each rank copies every n-th part, in an order of its own, by threads without the interpreter's
# lock; its last line is whether all parts were right.
COPY = """
import ctypes, os, random, sys, zlib
from concurrent.futures import ThreadPoolExecutor
path, sums, rank, ranks, threads, part = sys.argv[1], open(sys.argv[2]).read().split(), *map(int, sys.argv[3:])
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.memcpy.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
file = os.open(path, os.O_RDONLY)
begin = libc.mmap(None, os.fstat(file).st_size, 1, 2, file, 0)
def is_right(number):
    copy = ctypes.create_string_buffer(part)
    libc.memcpy(copy, begin + number * part, part)
    return zlib.crc32(copy) == int(sums[number])
parts = list(range(rank, len(sums), ranks))
random.Random(rank).shuffle(parts)
with ThreadPoolExecutor(threads) as pool:
    print(all(pool.map(is_right, parts)))
"""  # noqa: E501


@pytest.fixture(scope="module")
def sums(server: S3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the checksum of each part."""
    body = b"".join(random.Random(n).randbytes(MIB) for n in range(SIZE // MIB))
    server.put("faults", {"m/weights.bin": body})
    path = tmp_path_factory.mktemp("sums") / "sums"
    parts = (body[at : at + PART] for at in range(0, SIZE, PART))
    path.write_text("\n".join(str(zlib.crc32(part)) for part in parts))
    return path


@pytest.mark.parametrize(
    ("background", "options"),
    [
        (4, ["--prefetch=off"]),
        (4, ["--prefetch=model", "--cache-dir=none"]),
        (None, ["--prefetch=tensor"]),
    ],
)
def test_loads_by_many_threads_end(
    mount: Callable[..., Mounted],
    sums: Path,
    tmp_path: Path,
    background: int | None,
    options: list[str],
) -> None:
    """Also where the kernel sends only a few reads at a time, and locks the pages of the rest."""
    mounted = mount("s3://faults/m", "--memory-limit=64MiB", *options)
    if background is not None:
        with fusectl(tmp_path / "fusectl") as connections:
            number = os.minor(mounted.path.stat().st_dev)
            (connections / str(number) / "max_background").write_text(str(background))
    copy_all(mounted, sums, RANKS, THREADS)


# Fifty loads, for `make faults`.
CASES = [
    pytest.param(ranks, threads, policy, disk, id=f"{ranks * threads}-{policy}-{disk}")
    for ranks, threads in ((1, 1), (1, 8), (4, 16), (4, 64), (4, 256))
    for policy in ("model", "tensor", "sequential", "headers", "off")
    for disk in ("disk", "none")
    if os.environ.get("LAZYFS_FAULTS")
]


@pytest.mark.parametrize(("ranks", "threads", "policy", "disk"), CASES)
def test_any_number_of_threads(
    mount: Callable[..., Mounted],
    sums: Path,
    ranks: int,
    threads: int,
    policy: str,
    disk: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [f"--prefetch={policy}", *(["--cache-dir=none"] if disk == "none" else [])]
    mounted = mount("s3://faults/m", "--memory-limit=64MiB", *options)
    began_s = time.monotonic()
    copy_all(mounted, sums, ranks, threads)
    lasted_s = time.monotonic() - began_s
    peak = peak_mib(mounted.worker)
    with capsys.disabled():
        print(f" {lasted_s:.1f} s, {peak:.0f} MiB", end="")
    assert peak < MOST_MIB


def copy_all(mounted: Mounted, sums: Path, ranks: int, threads: int) -> None:
    """Have processes of threads copy all parts, and see that each is right."""
    command = [sys.executable, "-c", COPY, mounted.path / "weights.bin", sums]
    running = [
        subprocess.Popen(
            [*command, *map(str, (rank, ranks, threads, PART))], stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        assert [rank.communicate(timeout=LONGEST_S)[0] for rank in running] == ["True\n"] * ranks
    finally:
        for rank in running:
            rank.kill()
