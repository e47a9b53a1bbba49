"""Direct reads (O_DIRECT) get their bytes from the page cache, and always the right ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mounting import TIMEOUT_S, Mounted, lazyfs, python
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
# Its end is in the middle of a block, of a page and of a sector.
CONTENT = os.urandom(9 * MIB + 4099)
# More than fits into the worker's memory.
LONG = os.urandom(96 * MIB + 4099)
BLOCK = 8 * MIB

# Reads a file in pieces of 2 MiB: through the page cache, or directly, by waiting or io_submit(2).
# The kernel may drop pages at any time (DAMON), so it also tells which pieces were not in the page
# cache before they were read, and which were not just after. It has the kernel read nothing ahead.
READ = """
import hashlib, json, mmap, os, sys
sys.path.insert(0, sys.argv[4])
from lazyfs.pagecache.direct_probe import read_asynchronously
from lazyfs.pagecache.mincore import broken_pieces
how, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_RDONLY | (0 if how == "buffered" else os.O_DIRECT))
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
pieces = [(at, min(2 << 20, size - at)) for at in range(0, size, 2 << 20)]
before = [at for at, length in pieces if broken_pieces(fd, at, length)]
after, digest = [], hashlib.sha256()
for at, length in pieces:
    if broken_pieces(fd, at, length):
        before.append(at)
    buffer = mmap.mmap(-1, 2 << 20)
    if how == "asynchronous":
        n = read_asynchronously(fd, buffer, at)
    else:
        n = os.preadv(fd, [buffer], at)
    assert n == length, (at, n)
    if broken_pieces(fd, at, length):
        after.append(at)
    digest.update(buffer[:n])
print(json.dumps({"digest": digest.hexdigest(), "before": before, "after": after}))
"""
PIECE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
assert os.preadv(fd, [mmap.mmap(-1, 4096)], int(sys.argv[2])) == 4096
"""
# Maps a file and locks its pages (mlockall(2)), if that is allowed, until its input ends.
KEEP = """
import ctypes, mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    ctypes.CDLL(None).mlockall(1)  # MCL_CURRENT
    assert len(mapped[:]) == int(sys.argv[2])
    print("kept", flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _objects(server: S3) -> None:
    server.put("direct", {"m/file": CONTENT, "long/file": LONG})


class Dropped(NamedTuple):
    """The offsets of the pieces of which pages were not in the page cache."""

    before: list[int]
    after: list[int]


def check(how: str, mounted: Mounted, content: bytes) -> Dropped:
    """Read all of a file."""
    told = json.loads(python(READ, how, mounted.path / "file", len(content), ROOT))
    assert told["digest"] == hashlib.sha256(content).hexdigest()
    return Dropped(told["before"], told["after"])


def blocks(s3: S3) -> set[int]:
    """The blocks that were asked for."""
    spans = [span for _, span in s3.data_requests()]
    return {int(span.removeprefix("bytes=").split("-")[0]) // BLOCK for span in spans if span}


def wait_until_continued(mounted: Mounted, times: int = 1) -> None:
    """Have the worker find out what the kernel does with direct reads."""
    python(PIECE, mounted.path / "file", 0)
    mounted.wait_for_log("direct reads use the page cache", times)


@contextlib.contextmanager
def kept(mounted: Mounted, content: bytes) -> Iterator[None]:
    """With a process that has read the file into the page cache and keeps it there.

    Otherwise a machine on which others run tests forgets the file's inode, with all its pages.
    """
    command = [sys.executable, "-c", KEEP, mounted.path / "file", str(len(content))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as keeper:
        try:
            assert keeper.stdout is not None and keeper.stdout.readline() == "kept\n"
            yield
        finally:
            keeper.kill()


NO_DISK = ("--cache-dir=none", "--memory-limit=64MiB", "--prefetch=off")


@pytest.mark.parametrize("how", ["waiting", "asynchronous"])
def test_what_is_in_the_page_cache_is_not_fetched_for_a_direct_read(
    how: str, mount: Callable[..., Mounted], s3: S3
) -> None:
    mounted = mount("s3://direct/long", *NO_DISK)
    with kept(mounted, LONG):
        wait_until_continued(mounted)
        s3.forget_requests()
        dropped = check(how, mounted, LONG)
        assert blocks(s3) <= {offset // BLOCK for offset in dropped.before}


def test_a_direct_read_fills_the_page_cache_for_others(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    mounted = mount("s3://direct/long", *NO_DISK)
    wait_until_continued(mounted)
    with open(mounted.path / "file", "rb"):  # keeps the inode
        assert check("waiting", mounted, LONG).after == []
        s3.forget_requests()
        dropped = check("buffered", mounted, LONG)
        assert blocks(s3) <= {offset // BLOCK for offset in dropped.before}


@pytest.mark.parametrize("how", ["waiting", "asynchronous"])
@pytest.mark.parametrize("options", [(), ("--page-cache=off",), ("--prefetch=off",)])
def test_every_byte_is_right(
    how: str, options: tuple[str, ...], mount: Callable[..., Mounted]
) -> None:
    mounted = mount("s3://direct/m", "--block-size=256KiB", *options)
    for _ in range(3):  # before, while and after the kernel is tested
        check(how, mounted, CONTENT)


def test_the_next_worker_finds_out_for_itself(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://direct/m")
    wait_until_continued(mounted)
    os.kill(mounted.worker, signal.SIGKILL)
    check("waiting", mounted, CONTENT)
    wait_until_continued(mounted, 2)
    check("asynchronous", mounted, CONTENT)


def test_a_direct_reader_leaves_nothing_that_holds_the_mount(
    mount: Callable[..., Mounted],
) -> None:
    mounted = mount("s3://direct/m")
    python(PIECE, mounted.path / "file", 0)
    deadline = time.monotonic() + TIMEOUT_S
    while (answer := lazyfs("umount", mounted.path)).returncode != 0:
        assert time.monotonic() < deadline, answer.stderr
