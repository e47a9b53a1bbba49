"""Blocks that were read but not written come to the disk out of the page cache, and not from S3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import TIMEOUT_S, Mounted, environment, python
from s3 import S3

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


def salvage(mounted: Mounted, server: S3, cache: Path) -> str:
    """Have all blocks of the file saved into another cache than the mount's; what it says."""
    path = mounted.path / "big.bin"
    etag = os.getxattr(path, "user.lazyfs.etag").decode()
    status = path.stat()
    file = {
        "inode": status.st_ino, "parent": 1, "name": "big.bin", "key": "m/big.bin",
        "size_bytes": status.st_size, "etag": f'"{etag}"', "modified_ns": status.st_mtime_ns,
    }  # fmt: skip
    wanted = {
        "mountpoint": str(mounted.path),
        "cache": {
            "directories": [str(cache)], "limits": {"size": 1 << 30, "reserve": 0},
            "endpoint": server.url, "bucket": "shed", "block_size": BLOCK,
        },
        "blocks": [["big.bin", file, number] for number in range(10)],
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "lazyfs.cache.salvage"], input=json.dumps(wanted),
        capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=True,
    ).stdout  # fmt: skip


def test_what_is_in_the_page_cache_comes_to_the_disk_without_a_fetch(
    mount: Callable[..., Mounted], s3: S3, other_cache: Path, tmp_path: Path
) -> None:
    mounted = mount("s3://shed/m", *OPTIONS)
    expected = python(DIGEST, mounted.path / "big.bin")
    s3.forget()
    assert salvage(mounted, s3, other_cache).startswith("10 of 10")
    assert salvage(mounted, s3, other_cache).startswith("0 of 10"), "what is there is left alone"
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
    assert salvage(mounted, s3, other_cache).startswith("0 of 10")
    assert s3.data_requests() == []
    read_one = "import os,sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 262144, 3 * 262144)"
    python(read_one, mounted.path / "big.bin")
    assert salvage(mounted, s3, other_cache).startswith("1 of 10")
