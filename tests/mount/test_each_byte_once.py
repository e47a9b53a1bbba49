"""Each byte is fetched from S3 once, whatever the kernel and loaders drop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mounting import Mounted, lazyfs, python
from s3 import S3
from safetensors.numpy import save

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SHARDS = {
    f"m/model-{shard:05}-of-00003.safetensors": save(
        {
            f"layer.{n}": np.random.default_rng(n).integers(0, 256, 4 * MIB, np.uint8)
            for n in range(4 * shard - 4, 4 * shard)
        }
    )
    for shard in (1, 2, 3)
}
NEEDED = sum(map(len, SHARDS.values()))
OPTIONS = ["--block-size=1MiB", "--memory-limit=64MiB"]
# Reads all shards, and after every 3 MiB drops all pages of all of them, as SGLang and vLLM can be
# told to do with one; or has the kernel reclaim the pages of a cgroup.
LOAD_AND_DROP = """
import contextlib, hashlib, mmap, os, pathlib, sys
paths = sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
digest = hashlib.md5()
for path in paths:
    with open(path, "rb") as file:
        for at in range(0, path.stat().st_size, 3 << 20):
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                digest.update(mapped[at : at + (3 << 20)])
            if sys.argv[2:]:
                with contextlib.suppress(OSError):  # it reclaimed less than was asked for
                    pathlib.Path(sys.argv[2]).write_text(sys.argv[3])
                continue
            for each in paths:
                with open(each, "rb") as other:
                    os.posix_fadvise(other.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
print(digest.hexdigest())
"""
# Of each version of cgroups: where the memory controller is, and how the kernel is told to reclaim.
RECLAIM = (
    ("/sys/fs/cgroup/memory", "memory.force_empty", "1"),
    ("/sys/fs/cgroup", "memory.reclaim", "1G"),
)
DIGEST = """
import hashlib, pathlib, sys
digest = hashlib.md5()
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    digest.update(path.read_bytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("once", SHARDS)


def skipped_and_repeated(mounted: Mounted) -> tuple[int, int]:
    """Blocks that were not written because the disk was slower than the link; second requests."""
    status = mounted.status()
    return int(status["shed_blocks"]), int(status["second_requests"])


def fetched(s3: S3) -> int:
    """Bytes that S3 was asked for; the first 64 KiB of a shard come with its header as well."""
    size = 0
    for _, asked in s3.data_requests():
        assert asked is not None
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        size += last - first + 1 if (first, last) != (0, 65535) else 0
    return size


@contextmanager
def reclaimable(pid: int) -> Iterator[tuple[Path, str]]:
    """What to write where, to have the kernel reclaim what a process has pushed meanwhile."""
    for parent, name, text in RECLAIM:
        group = Path(parent) / f"lazyfs-test-{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / name).exists():
                continue
            (group / "cgroup.procs").write_text(str(pid))
            yield group / name, text
            (group.parent / "cgroup.procs").write_text(str(pid))
            return
        finally:
            group.rmdir()
    pytest.skip("no cgroup with a memory controller can be made here")


def test_pages_that_the_kernel_reclaims_in_mid_load_come_from_the_disk(
    mount: Callable[..., Mounted], s3: S3, tmp_path: Path
) -> None:
    # The disk is faster than 2 MiB/s, and nothing is left unwritten.
    s3.fault("GET /once/m/", "slow", times=10**6, seconds=0.1)
    cache = f"--cache-dir={tmp_path / 'own cache'}"
    mounted = mount("s3://once/m", *OPTIONS, cache, "--max-concurrency=2")
    with reclaimable(mounted.worker) as (file, text):
        loaded = python(LOAD_AND_DROP, mounted.path, file, text)
    assert python(DIGEST, mounted.path) == loaded
    skipped, repeated = skipped_and_repeated(mounted)
    assert not skipped
    assert fetched(s3) <= NEEDED * 1.01 + repeated * MIB


@pytest.mark.parametrize("slow", [False, True], ids=["fast link", "slow link"])
def test_pages_that_are_dropped_in_mid_load_come_from_the_disk(
    mount: Callable[..., Mounted], s3: S3, slow: bool, tmp_path: Path
) -> None:
    options = [*OPTIONS, f"--cache-dir={tmp_path / 'own cache'}"]
    if slow:
        # 2 MiB/s: even a busy disk is faster, and nothing is left unwritten.
        s3.fault("GET /once/m/", "slow", times=10**6, seconds=0.1)
        options.append("--max-concurrency=2")
    mounted = mount("s3://once/m", *options)
    loaded = python(LOAD_AND_DROP, mounted.path)
    # Only blocks that the disk was too slow for may be fetched again, and what S3 was slow with.
    skipped, repeated = skipped_and_repeated(mounted)
    assert skipped or fetched(s3) <= NEEDED * 1.01 + repeated * MIB
    assert not (slow and skipped)
    assert python(DIGEST, mounted.path) == loaded
    skipped, repeated = skipped_and_repeated(mounted)
    assert lazyfs("umount", mounted.path).returncode == 0
    again = mount("s3://once/m", *options)
    assert python(DIGEST, again.path) == loaded
    assert skipped or fetched(s3) <= NEEDED * 1.01 + repeated * MIB, "it is on the disk"


def test_a_long_header_is_fetched_once(mount: Callable[..., Mounted], s3: S3) -> None:
    names = [f"model.layers.{n}.{'expert' * 50}.weight" for n in range(14_000)]
    shards = {
        f"h/model-{shard:05}-of-00002.safetensors": save(
            dict.fromkeys(names[shard::2], np.full(600, shard, np.uint8))
        )
        for shard in (0, 1)
    }
    assert all(int.from_bytes(body[:8], "little") > 2 * MIB for body in shards.values())
    s3.put("headers", shards)
    s3.forget()
    mounted = mount("s3://headers/h", "--memory-limit=256MiB")
    directory = mounted.path
    digest = hashlib.md5()
    for body in shards.values():
        digest.update(body)
    assert python(DIGEST, directory).strip() == digest.hexdigest()
    ranges = [asked.removeprefix("bytes=").split("-") for _, asked in s3.data_requests() if asked]
    fetched = sum(int(last) - int(first) + 1 for first, last in ranges)
    assert fetched <= 1.02 * sum(map(len, shards.values()))  # 64 KiB of each come twice
