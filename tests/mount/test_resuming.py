"""A new worker knows which blocks its predecessor put into the page cache."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
from mounting import TIMEOUT_S, Mounted, dropped_blocks, lazyfs, python, wait_until_gone
from s3 import S3
from safetensors.numpy import save

pytestmark = pytest.mark.fuse

MIB = 1 << 20
OPTIONS = ["--block-size=1MiB", "--memory-limit=64MiB"]
WITHOUT_CACHE = [*OPTIONS, "--cache-dir=none"]
SHARDS = {
    f"m/model-{shard:05}-of-00002.safetensors": save(
        {
            f"layer.{n:02}": np.random.default_rng(n).integers(0, 256, 4 * MIB, np.uint8)
            for n in range(12 * shard - 12, 12 * shard)
        }
    )
    for shard in (1, 2)
}
BLOCKS = sum(-(-len(shard) // MIB) for shard in SHARDS.values())
# Blocks that the kernel drops pages of between a look and the end, that are fetched twice because
# they are slow, and that were on their way when a worker was killed.
FEW = 8
DIGEST = """
import hashlib, pathlib, sys
digest = hashlib.md5()
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    digest.update(path.read_bytes())
print(digest.hexdigest())
"""
FORGET = """
import os, pathlib, sys
for path in pathlib.Path(sys.argv[1]).glob("*.safetensors"):
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
"""
READ_A_BLOCK = """
import os, pathlib, sys
path = min(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
os.pread(os.open(path, os.O_RDONLY), 1, 2 << 20)
"""


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("resuming", SHARDS)


def by_killing(mounted: Mounted) -> None:
    worker = mounted.worker
    os.kill(worker, signal.SIGKILL)
    wait_until_gone(worker)


def by_upgrading(mounted: Mounted) -> None:
    answer = lazyfs("upgrade", mounted.path)
    assert answer.returncode == 0, answer.stderr


Replace = Callable[[Mounted], None]
every_way = pytest.mark.parametrize("replace", [by_killing, by_upgrading])


def digest(mounted: Mounted) -> str:
    return python(DIGEST, mounted.path)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_successor(mounted: Mounted) -> None:
    """Until another worker serves the mount, and has fetched ahead all that it wants."""

    def has_all() -> bool:
        status = mounted.status()
        if "error" in status:
            return False
        return bool(status["resumes"] and status["ready"]["model"] and not status["in_flight"])

    wait_until(has_all)


def dropped(mounted: Mounted) -> int:
    return sum(dropped_blocks(path, MIB) for path in mounted.path.glob("*.safetensors"))


def fetched_mib(s3: S3) -> float:
    """How much S3 was asked for."""
    size = 0
    for _, asked in s3.data_requests():
        assert asked is not None
        first, last = asked.removeprefix("bytes=").split("-")
        size += int(last) - int(first) + 1
    return size / MIB


@every_way
def test_without_a_cache_a_loaded_model_is_loaded_again_without_s3(
    mount: Callable[..., Mounted], s3: S3, replace: Replace
) -> None:
    mounted = mount("s3://resuming/m", *WITHOUT_CACHE)
    expected = digest(mounted)
    s3.forget()
    for _ in range(2):  # what is carried is carried on
        replace(mounted)
        wait_for_successor(mounted)
    assert fetched_mib(s3) <= FEW, "a successor knows what is in the page cache"
    lost = dropped(mounted)
    assert digest(mounted) == expected
    assert fetched_mib(s3) <= lost + BLOCKS // 4  # and not twice that many, for each successor


def by_nothing(mounted: Mounted) -> None:
    pass


# A worker that goes on has blocks in memory, which it does not fetch again.
@pytest.mark.parametrize(("replace", "in_memory"), [(by_killing, 0), (by_nothing, 64)])
def test_pages_that_are_gone_are_fetched_ahead_of_the_next_reader(
    mount: Callable[..., Mounted], s3: S3, replace: Replace, in_memory: int
) -> None:
    mounted = mount("s3://resuming/m", *WITHOUT_CACHE)
    expected = digest(mounted)
    replace(mounted)
    python(FORGET, mounted.path)
    s3.forget()
    python(READ_A_BLOCK, mounted.path)
    wait_until(lambda: fetched_mib(s3) > BLOCKS - FEW - in_memory)
    assert digest(mounted) == expected
