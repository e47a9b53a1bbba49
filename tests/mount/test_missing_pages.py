"""What is read again when the kernel has dropped some pages of a mounted file."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mounted, python, wait_until_gone
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
PAGE = 4096
BODY = random.Random(17).randbytes(40 * MIB)
# Where the last block begins.
LAST = 32 * MIB
NAME = "model-00001-of-00001.safetensors"
# Has the kernel drop 128 KiB, and reads pages of them: prints whether the first was gone, and all.
DROP_AND_READ = f"""
import mmap, os, sys
from pathlib import Path
from lazyfs.pagecache.mincore import all_resident
start, *places = map(int, sys.argv[2:])
file = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(file, start, 128 << 10, os.POSIX_FADV_DONTNEED)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
print(all_resident(file, start, {PAGE}))
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
    wait_until(lambda: near_bytes(mounted) == mounted.status()["to_disk_bytes"] == len(BODY))
    worker = mounted.worker
    os.kill(worker, signal.SIGKILL)
    wait_until_gone(worker)
    wait_until(lambda: "error" not in mounted.status() and has_resumed(mounted))
    return mounted


def has_resumed(mounted: Mounted) -> bool:
    """Whether another worker serves the mount, and knows what is local."""
    status = mounted.status()
    return bool(status["resumes"] and status["ready"]["model"] and not status["in_flight"])


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def near_bytes(mounted: Mounted) -> int:
    """How many bytes are in the page cache."""
    return int(mounted.status()["prefetch"]["near_bytes"])


def from_disk(mounted: Mounted) -> int:
    return int(mounted.status()["from_disk_bytes"])


def read_dropped(path: Path, start: int, *places: int) -> None:
    """Drop pages from a place on, and read some of them."""
    was_there, *pages = python(DROP_AND_READ, path, start, *places).split()
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
