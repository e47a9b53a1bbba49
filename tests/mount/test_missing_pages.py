"""What is read again when the kernel has dropped some pages of a mounted file."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mounting import Mounted, python
from s3 import S3
from test_resuming import by_killing, wait_for_successor

pytestmark = pytest.mark.fuse

MIB = 1 << 20
PAGE = 4096
BODY = random.Random(17).randbytes(40 * MIB)
# Where the last block begins.
LAST = 32 * MIB
NAME = "pytorch_model.bin"  # its header is not read
# Has the kernel drop pages, and reads some: prints whether the first was gone, and what was read.
DROP_AND_READ = f"""
import os, sys
from lazyfs.pagecache.mincore import broken_pieces
start, length, *places = map(int, sys.argv[2:])
file = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
print(broken_pieces(file, start, {PAGE}) == 0)
for place in places:
    print(os.pread(file, {PAGE}, place).hex())
"""


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("dropped", {f"m/{NAME}": BODY})


@pytest.fixture
def local(mount: Callable[..., Mounted]) -> Mounted:
    """A mount whose blocks are all on the disk and in the page cache, and none in memory."""
    mounted = mount("s3://dropped/m")
    wait_until(mounted, is_all_here)
    by_killing(mounted)
    wait_for_successor(mounted)
    return mounted


def wait_until(mounted: Mounted, is_true: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until something is true of the status of a mount."""
    deadline = time.monotonic() + 60
    while not is_true(status := mounted.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)


def is_all_here(status: dict[str, Any]) -> bool:
    """Whether all blocks are in the page cache and on the disk."""
    return min(status["prefetch"]["near_bytes"], status["to_disk_bytes"]) >= len(BODY)


def from_disk(mounted: Mounted) -> int:
    return int(mounted.status()["from_disk_bytes"])


def read_dropped(path: Path, start: int, *places: int, length: int = 128 << 10) -> None:
    """Drop pages from a place on, and read some of them."""
    was_there, *pages = python(DROP_AND_READ, path, start, length, *places).split()
    assert was_there == "False"
    assert [bytes.fromhex(page) for page in pages] == [BODY[at : at + PAGE] for at in places]


def test_a_few_pages_that_were_dropped_cost_no_block(local: Mounted, s3: S3) -> None:
    """In the last block, behind which nothing is looked for."""
    s3.forget()
    places = [LAST + 3 * PAGE * at for at in range(6)]
    for count in range(1, 5):
        read_dropped(local.path / NAME, LAST, places[count - 1])
        assert from_disk(local) == count * PAGE
    for place in places[4:]:
        read_dropped(local.path / NAME, LAST, place)
        assert from_disk(local) == 4 * PAGE + 8 * MIB, "so many gaps are too many"
    assert s3.data_requests() == []


def test_blocks_that_were_dropped_come_ahead_of_their_reader(local: Mounted, s3: S3) -> None:
    s3.forget()
    read_dropped(local.path / NAME, 0, 8 * MIB, length=0)  # the whole file
    wait_until(local, lambda status: status["from_disk_bytes"] >= 3 * 8 * MIB)
    assert s3.data_requests() == []


def test_a_damaged_piece_comes_from_s3(local: Mounted, s3: S3, tmp_path: Path) -> None:
    for path in (tmp_path / "cache").glob("?0/*"):
        with open(path, "r+b") as file:
            file.seek(4 * MIB)
            file.write(b"damaged")
    s3.forget()
    read_dropped(local.path / NAME, LAST + 6 * MIB, LAST + 6 * MIB)
    assert s3.data_requests() == [], "another piece"
    read_dropped(local.path / NAME, LAST + 4 * MIB, LAST + 4 * MIB)
    assert [wanted for _, wanted in s3.data_requests()] == [f"bytes={LAST}-{LAST + 8 * MIB - 1}"]
    local.wait_for_log("has a wrong checksum")
