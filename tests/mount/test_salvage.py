"""Blocks that were read but not written come to the disk out of the page cache, and not from S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from busy import busy_processors
from mounting import (
    TIMEOUT_S,
    Mounted,
    dropped_blocks,
    environment,
    lazyfs,
    python,
    wait_until_gone,
)
from s3 import S3
from safetensors.numpy import save

pytestmark = pytest.mark.fuse

MIB = 1 << 20
READ = "import sys; print(len(open(sys.argv[1], 'rb').read()))"
DIGEST = "import hashlib,sys; print(hashlib.md5(open(sys.argv[1], 'rb').read()).hexdigest())"
FORGET = """
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
"""
BLOCK = 256 * 1024
OPTIONS = ["--prefetch=off", "--block-size=256KiB", "--read-ahead=0"]


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("shed", {"m/big.bin": os.urandom(10 * BLOCK - 5)})


@pytest.fixture
def other_cache(tmp_path: Path) -> Path:
    return tmp_path / "other cache"


def salvage(mounted: Mounted, server: S3, cache: Path) -> dict[str, Any]:
    """Have all blocks of the file saved into another cache than the mount's; what it says."""
    path = mounted.path / "big.bin"
    etag = os.getxattr(path, "user.lazyfs.etag").decode()
    status = path.stat()
    file = {
        "inode": status.st_ino, "parent": 1, "name": "big.bin", "key": "m/big.bin",
        "size_bytes": status.st_size, "etag": f'"{etag}"', "modified_ns": status.st_mtime_ns,
    }  # fmt: skip
    wanted = {
        "mountpoint": str(mounted.path), "in_peace": True,
        "cache": {
            "directories": [str(cache)], "limits": {"size": 1 << 30, "reserve": 0},
            "endpoint": server.url, "bucket": "shed", "block_size": BLOCK,
        },
        "blocks": [["big.bin", file, number] for number in range(10)],
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "lazyfs.cache.late_writer"], input=json.dumps(wanted),
        capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=True,
    )  # fmt: skip
    saved: dict[str, Any] = json.loads(ended.stdout)
    return saved


def test_what_is_in_the_page_cache_comes_to_the_disk_without_a_fetch(
    mount: Callable[..., Mounted], s3: S3, other_cache: Path, tmp_path: Path
) -> None:
    mounted = mount("s3://shed/m", *OPTIONS)
    expected = python(DIGEST, mounted.path / "big.bin")
    s3.forget()
    assert salvage(mounted, s3, other_cache) == {"written": 10, "refused": 0, "gone": []}
    left_alone = {"written": 0, "refused": 0, "gone": []}
    assert salvage(mounted, s3, other_cache) == left_alone
    mounted.end()
    second = Mounted("s3://shed/m", tmp_path / "second", other_cache, s3.url, *OPTIONS)
    try:
        assert python(DIGEST, second.path / "big.bin") == expected
    finally:
        second.end()
    assert s3.data_requests() == []


def test_what_left_the_page_cache_is_not_fetched_for_it(
    mount: Callable[..., Mounted], s3: S3, other_cache: Path
) -> None:
    mounted = mount("s3://shed/m", *OPTIONS)
    python(READ, mounted.path / "big.bin")
    python(FORGET, mounted.path / "big.bin")
    s3.forget()
    assert salvage(mounted, s3, other_cache)["gone"] == list(range(10))
    assert s3.data_requests() == []
    read_one = "import os,sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 262144, 3 * 262144)"
    python(read_one, mounted.path / "big.bin")
    assert salvage(mounted, s3, other_cache)["written"] == 1


LOAD_AND_DROP = """
import os, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
while os.read(file, 1 << 20):
    pass
os.posix_fadvise(file, 16 << 20, 4 << 20, os.POSIX_FADV_DONTNEED)
"""


def cached(path: Path) -> tuple[int, int]:
    """How many bytes of a file are on disk, and how many there are."""
    on_disk, size = os.getxattr(path, "user.lazyfs.cached").decode().split("/")
    return int(on_disk), int(size)


def test_what_left_the_page_cache_before_it_was_saved_is_fetched_again_once(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    tensors = {f"layer.{n}": np.full(4 * MIB, n, np.uint8) for n in range(24)}
    s3.put("dropped", {"m/model.safetensors": save(tensors)})
    s3.forget()
    with busy_processors():
        mounted = mount("s3://dropped/m", "--block-size=1MiB", "--memory-limit=64MiB")
        model = mounted.path / "model.safetensors"
        python(LOAD_AND_DROP, model)
        status = json.loads(lazyfs("status", mounted.path, "--json").stdout)
    assert status["shed_blocks"] > 24, "nothing was left to be saved"
    deadline = time.monotonic() + TIMEOUT_S
    while (on_disk := cached(model))[0] < on_disk[1]:
        assert time.monotonic() < deadline, f"{on_disk} on disk"
        time.sleep(0.1)
    blocks = -(-on_disk[1] // MIB)
    fetched = [asked for asked in s3.data_requests() if asked[1] != "bytes=0-65535"]
    assert len(fetched) < blocks * 5 // 4, "more than what was dropped, and what was asked twice"


@pytest.fixture
def shedding(mount: Callable[..., Mounted], s3: S3) -> Iterator[Mounted]:
    """A mount of a model that was just read while the processors were busy, and still are."""
    tensors = {f"layer.{n}": np.full(4 * MIB, n, np.uint8) for n in range(24)}
    s3.put("shedding", {"m/model.safetensors": save(tensors)})
    with busy_processors():
        mounted = mount("s3://shedding/m", "--block-size=1MiB", "--memory-limit=64MiB")
        python(READ, mounted.path / "model.safetensors")
        status = json.loads(lazyfs("status", mounted.path, "--json").stdout)
        assert status["shed_blocks"] > 3 * DROPPED_MEANWHILE, "nothing was left to be saved"
        on_disk, size = cached(mounted.path / "model.safetensors")
        assert on_disk < size * 3 // 4, "it was saved before the end"
        yield mounted


# Blocks that the kernel may drop pages of between a look and the end.
DROPPED_MEANWHILE = 8


def dropped(mounted: Mounted) -> int:
    return dropped_blocks(mounted.path / "model.safetensors", MIB)


def fetched_by_next_mount(mount: Callable[..., Mounted], s3: S3) -> int:
    """How many blocks the next mount asks S3 for."""
    s3.forget()
    mounted = mount("s3://shedding/m", "--block-size=1MiB")
    python(READ, mounted.path / "model.safetensors")
    return len(s3.data_requests())


def by_command(mounted: Mounted) -> None:
    answer = lazyfs("umount", mounted.path)
    assert answer.returncode == 0, answer.stderr


def by_signal(mounted: Mounted) -> None:
    mounted.kill(signal.SIGTERM)
    wait_until_gone(mounted.pid, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("unmount", [by_command, by_signal])
def test_an_orderly_unmount_saves_what_was_shed(
    shedding: Mounted,
    mount: Callable[..., Mounted],
    s3: S3,
    unmount: Callable[[Mounted], None],
) -> None:
    lost = dropped(shedding)
    unmount(shedding)
    assert fetched_by_next_mount(mount, s3) <= lost + DROPPED_MEANWHILE


def test_a_mount_in_use_is_neither_saved_nor_unmounted(
    shedding: Mounted, mount: Callable[..., Mounted], s3: S3
) -> None:
    before = cached(shedding.path / "model.safetensors")
    with subprocess.Popen(["tail", "-f", shedding.path / "model.safetensors"], stdout=-3) as user:
        while not list(Path(f"/proc/{user.pid}/fd").glob("3")):
            time.sleep(0.01)
        answer = lazyfs("umount", shedding.path)
        user.kill()
    assert (answer.returncode, "in use" in answer.stderr) == (1, True)
    assert cached(shedding.path / "model.safetensors") == before
    lost = dropped(shedding)
    by_command(shedding)
    assert fetched_by_next_mount(mount, s3) <= lost + DROPPED_MEANWHILE


def test_a_cache_without_room_does_not_keep_the_mount(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    tensors = {f"layer.{n}": np.full(4 * MIB, n, np.uint8) for n in range(24)}
    s3.put("shedding", {"m/model.safetensors": save(tensors)})
    with busy_processors():
        mounted = mount(
            "s3://shedding/m", "--block-size=1MiB", "--memory-limit=64MiB", "--cache-size=64MiB"
        )
        python(READ, mounted.path / "model.safetensors")
        answer = lazyfs("umount", mounted.path)
    assert (answer.returncode, answer.stderr) == (0, "")
