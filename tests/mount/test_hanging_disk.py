"""A disk cache whose disk does not answer: no reader waits for it to do so."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hanging_disk import HangingDisk, hanging_disk
from mounting import Mounted, lazyfs, shell
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
FILES = {f"part-{i:02}.bin": random.Random(i).randbytes(8 * MIB + i) for i in range(12)}
SUMS = {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()}
SIZE = sum(map(len, FILES.values()))
OPTIONS = ("--block-size=1MiB", "--memory-limit=64MiB", "--prefetch=off")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[HangingDisk]:
    directory = tmp_path / "disk"
    directory.mkdir()
    try:
        made = hanging_disk(directory, 512 * MIB)
        disk = made.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine cannot have a disk that hangs: {error}")
    try:
        yield disk
    finally:
        made.__exit__(None, None, None)


@pytest.fixture(scope="module")
def source(server: S3) -> str:
    server.put("hanging", {f"m/{name}": body for name, body in FILES.items()})
    return "s3://hanging/m"


@pytest.fixture
def mount(
    s3: S3, tmp_path: Path, disk: HangingDisk, source: str
) -> Iterator[Callable[[], Mounted]]:
    mounts: list[Mounted] = []

    def make() -> Mounted:
        path = tmp_path / f"mnt{len(mounts)}"
        mounts.append(Mounted(source, path, disk.path / "cache", s3.url, *OPTIONS))
        return mounts[-1]

    yield make
    disk.answer()
    for mounted in mounts:
        mounted.end()


_READ = """
import concurrent.futures, hashlib, json, pathlib, sys, time
began = time.monotonic()
def read(name):
    digest = hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest()
    return name, digest, time.monotonic() - began
with concurrent.futures.ThreadPoolExecutor(len(sys.argv)) as pool:
    print(json.dumps(list(pool.map(read, sys.argv[1:]))))
"""


def read(mounted: Mounted, names: list[str]) -> dict[str, str]:
    """What as many readers see of files, all at once; the disk hangs for as long as they read."""
    done = subprocess.run(
        [sys.executable, "-c", _READ, *names], cwd=mounted.path, timeout=60, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return {name: digest for name, digest, _ in json.loads(done.stdout)}


def wait_for(what: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def in_cache(disk: HangingDisk, mount: Callable[[], Mounted]) -> None:
    """Put the files on the disk, and end that mount."""
    mounted = mount()
    assert shell("sha256sum *", mounted.path).returncode == 0
    mounted.end()


def test_readers_do_not_wait_for_a_disk_that_hangs(
    mount: Callable[[], Mounted], disk: HangingDisk
) -> None:
    in_cache(disk, mount)
    mounted = mount()
    names = list(SUMS)
    assert read(mounted, names[:2]) == {name: SUMS[name] for name in names[:2]}
    assert mounted.status()["fetched_bytes"] == 0, "all of it is on the disk"
    disk.hang()
    assert read(mounted, names[2:8]) == {name: SUMS[name] for name in names[2:8]}
    assert mounted.status()["disk_hangs"]
    assert "the disk does not answer" in lazyfs("status", mounted.path).stdout
    disk.answer()
    wait_for(lambda: not mounted.status()["disk_hangs"])
    assert "the disk of the cache answers again" in mounted.log()
    fetched = mounted.status()["fetched_bytes"]
    assert read(mounted, names[8:]) == {name: SUMS[name] for name in names[8:]}
    assert mounted.status()["fetched_bytes"] == fetched, "the disk is used again"


def test_a_load_is_not_held_up_by_a_disk_that_takes_no_writes(
    mount: Callable[[], Mounted], disk: HangingDisk
) -> None:
    mounted = mount()
    assert shell("cat part-00.bin | wc -c", mounted.path).stdout == f"{8 * MIB}\n"
    disk.hang()
    assert read(mounted, list(SUMS)) == SUMS, "twelve files, with memory for eight of them"
    disk.answer()
    assert read(mounted, list(SUMS)) == SUMS
