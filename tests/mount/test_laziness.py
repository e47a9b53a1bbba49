"""What is fetched, and how often, counted at the server."""

from __future__ import annotations

import hashlib
import mmap
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mounted, python, shell
from s3 import S3

pytestmark = pytest.mark.fuse

BLOCK = 256 * 1024
READ_AT = """
import os, sys
os.pread(os.open(sys.argv[1], os.O_RDONLY), 100, int(sys.argv[2]))
"""
READ_BY_THREADS = """
import sys, threading
def read(): open(sys.argv[1], "rb").read()
threads = [threading.Thread(target=read) for _ in range(24)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
OFF = ["--prefetch=off", "--block-size=256KiB", "--read-ahead=0"]


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    body = random.Random(3).randbytes(10 * BLOCK - 5)
    server.put("lazy", {"m/big.bin": body, "m/small.json": b"{}", "m/sub/other.bin": body})


def test_a_mount_and_a_listing_fetch_nothing(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://lazy/m", *OFF)
    assert shell("ls -laR && du -s && stat big.bin", mounted.path).returncode == 0
    assert s3.data_requests() == []
    assert len(s3.requests()) == 2, (
        "a small source needs a listing, and a byte to see if it is read"
    )


def test_only_the_block_that_is_read_is_fetched(mount: Callable[..., Mounted], s3: S3) -> None:
    mounted = mount("s3://lazy/m", *OFF)
    python(READ_AT, mounted.path / "big.bin", 5 * BLOCK + 10)
    assert s3.data_requests() == [
        ("/lazy/m/big.bin", f"bytes={5 * BLOCK}-{6 * BLOCK - 1}"),
    ]
    python(READ_AT, mounted.path / "small.json", 0)
    assert s3.data_requests()[1:] == [("/lazy/m/small.json", "bytes=0-1")]


def test_one_fetch_however_many_wait(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /lazy/m/big.bin", "hang", times=4, seconds=0.5)
    mounted = mount("s3://lazy/m", "--prefetch=off", "--block-size=256KiB")
    python(READ_BY_THREADS, mounted.path / "big.bin")
    ranges = [wanted for _, wanted in s3.data_requests()]
    assert len(ranges) == 10
    assert len(set(ranges)) == 10


def test_a_second_mount_fetches_nothing(mount: Callable[..., Mounted], s3: S3) -> None:
    first = mount("s3://lazy/m", "--prefetch=off", "--block-size=256KiB")
    expected = shell("sha256sum big.bin small.json sub/*", first.path).stdout
    wait_for_cached(first, "big.bin")
    wait_for_cached(first, "sub/other.bin")
    wait_for_cached(first, "small.json")
    first.end()
    s3.forget()
    for prefetch in ("off", "model"):
        second = mount("s3://lazy/m", f"--prefetch={prefetch}", "--block-size=256KiB")
        assert shell("sha256sum big.bin small.json sub/*", second.path).stdout == expected
        second.end()
    assert s3.data_requests() == []


def wait_for_cached(mounted: Mounted, name: str) -> None:
    """Writing to the cache goes on after the read; see it through."""
    deadline = time.monotonic() + 60
    while True:
        seen = shell(f"getfattr --only-values -n user.lazyfs.cached {name}", mounted.path).stdout
        have, _, whole = seen.partition("/")
        if have == whole:
            return
        assert time.monotonic() < deadline, f"{name}: {seen} cached"
        time.sleep(0.05)


def test_a_cache_smaller_than_the_model_helps(
    mount: Callable[..., Mounted], s3: S3, tmp_path: Path
) -> None:
    files = {f"{i}.bin": random.Random(i).randbytes(8 << 20) for i in range(12)}
    s3.put("large", files)
    expected = [hashlib.sha256(content).hexdigest() for content in files.values()]
    options = ["--cache-size=64MiB", "--prefetch=off", "--block-size=1MiB"]
    for fetched in (96, 96 - 63):
        s3.forget()
        mounted = mount("s3://large", *options)
        read = shell("for i in {0..11}; do sha256sum $i.bin; done", mounted.path)
        assert read.stdout.split()[::2] == expected
        wait_for_cached(mounted, "6.bin")
        mounted.end()
        assert len(s3.data_requests()) == fetched
        used = int(shell("du -sb . | cut -f1", tmp_path / "cache").stdout)
        assert 62 << 20 < used < 66 << 20


def test_a_cache_smaller_than_the_model_keeps_a_window_ahead_of_the_reader(
    mount: Callable[..., Mounted], s3: S3, tmp_path: Path
) -> None:
    """What he has had makes room on the disk, and nothing is fetched twice."""
    body = random.Random(8).randbytes(96 << 20)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    s3.put("window", dict.fromkeys(names, body))
    s3.forget()
    options = ["--cache-size=64MiB", "--memory-limit=64MiB", "--page-cache=off"]
    mounted = mount("s3://window", *options, "--block-size=1MiB", "--prefetch=model")

    def come_to_rest() -> int:
        """Wait until nothing is on its way, for long enough; how many blocks were requested."""
        seen, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < 5:  # a busy disk rests for a moment, too
            now = len(set(blocks(s3)))
            status = mounted.status()
            if now != seen or status["in_flight"] or not status["prefetch"]["planned"]:
                seen, since_s = now, time.monotonic()
            time.sleep(0.5)
        return seen

    waiting = come_to_rest()
    assert 80 < waiting < 125, "the disk, and what memory holds"
    code = """
import hashlib, sys
for number, path in enumerate(sys.argv[1:]):
    with open(path, "rb") as file:
        content = file.read(60 << 20)
        if not number:
            print("paused", flush=True)
            sys.stdin.readline()
        print(hashlib.sha256(content + file.read()).hexdigest(), flush=True)
"""
    command = [sys.executable, "-c", code, *(mounted.path / name for name in names)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdout is not None
        try:
            assert reader.stdout.readline() == "paused\n"
            deadline = time.monotonic() + 200
            while len(set(blocks(s3))) <= waiting + 30:
                assert time.monotonic() < deadline, "the window has not moved"
                time.sleep(0.1)
            read, _ = reader.communicate("go on\n", timeout=200)
        finally:
            reader.kill()
    assert read.split() == [hashlib.sha256(body).hexdigest()] * 2
    assert_each_once(mounted, s3, 192)
    used = sum(file.stat().st_size for file in (tmp_path / "cache").glob("[0-9a-f][0-9a-f]/*"))
    assert 60 << 20 < used <= 64 << 20


def attribute(mounted: Mounted, name: str) -> str:
    """How much of a file is cached."""
    return shell(f"getfattr --only-values -n user.lazyfs.cached {name}", mounted.path).stdout


def blocks(s3: S3) -> list[tuple[str, str | None]]:
    """The requests for blocks, and not for headers alone."""
    return [request for request in s3.data_requests() if request[1] != "bytes=0-65535"]


def assert_each_once(mounted: Mounted, s3: S3, count: int) -> None:
    """`count` blocks were fetched, and none again without a reason.

    S3 was slow (a hedge) or failed (a retry, or a block that its reader requests after its prefetch
    failed), or the kernel dropped pages and requested them again.
    """
    status = mounted.status()
    fetched = blocks(s3)
    assert len(set(fetched)) == count
    repeated = [request for request, times in Counter(fetched).items() if times > 1]
    pages_again = (sum(status["read_bytes"].values()) - status["size_bytes"]) // mmap.PAGESIZE
    slow = status["second_requests"] + sum(status["retries"].values()) + status["failed_blocks"]
    excused = slow + max(0, pages_again)
    assert len(fetched) - count <= excused, f"{repeated}: {status}"


def test_model_prefetch_brings_the_whole_model_once(mount: Callable[..., Mounted], s3: S3) -> None:
    body = random.Random(5).randbytes(9 * BLOCK + 1)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    s3.put("model", dict.fromkeys(names, body) | {"config.json": b"{}", "pytorch_model.bin": body})
    s3.forget()
    mounted = mount("s3://model", "--block-size=256KiB")
    wait_for_cached(mounted, names[-1])
    assert shell("cat *.safetensors config.json | wc -c", mounted.path).stdout.strip() == str(
        3 * len(body) + 2
    )
    assert_each_once(mounted, s3, 31)
    assert not [path for path, _ in blocks(s3) if path.endswith("pytorch_model.bin")]


def test_a_larger_model_than_memory_is_still_fetched_once(
    mount: Callable[..., Mounted], s3: S3
) -> None:
    """No disk and no page cache: the prefetch must wait for the reader, not drop blocks."""
    body = random.Random(6).randbytes(40 << 20)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    s3.put("larger", dict.fromkeys(names, body))
    s3.forget()
    options = ["--cache-dir=none", "--page-cache=off", "--memory-limit=64MiB", "--block-size=1MiB"]
    mounted = mount("s3://larger", *options)
    assert shell("sha256sum *", mounted.path).stdout.split()[::2] != []
    assert_each_once(mounted, s3, 120)
