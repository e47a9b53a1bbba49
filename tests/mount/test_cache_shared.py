"""The cache with mounts and commands: shared, warmed, listed and damaged."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from awscrt import checksums
from crc32c import crc32c
from mounting import Mounted, environment, lazyfs, load_json, python, shell, tmpfs
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SHARDS = {
    f"model-0000{i}-of-00003.safetensors": random.Random(i).randbytes(9 * MIB + i)
    for i in (1, 2, 3)
}
MODEL = {**SHARDS, "config.json": b"{}"}
SIZE = sum(map(len, MODEL.values()))
SUMS = {name: hashlib.sha256(body).hexdigest() for name, body in MODEL.items()}
BLOCKS = "--block-size=1MiB"


@pytest.fixture(scope="module")
def source(server: S3) -> str:
    server.put("cached", {f"m/{name}": body for name, body in MODEL.items()})
    return "s3://cached/m"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def warm(s3: S3, cache: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(what: object, *options: str) -> subprocess.CompletedProcess[str]:
        where = [f"--endpoint-url={s3.url}", f"--cache-dir={cache}", BLOCKS]
        return lazyfs("warm", what, *where, *options)

    return run


def sums(mounted: Mounted) -> dict[str, str]:
    """What a reader sees of all files."""
    # Some versions of sha256sum stop at the first file that they cannot read.
    each = 'for file in *; do sha256sum "$file"; done'
    lines = shell(each, mounted.path).stdout.splitlines()
    return {line.split()[1]: line.split()[0] for line in lines}


def block_requests(s3: S3) -> list[tuple[str, str | None]]:
    """What was asked for, but for headers alone, which each mount has for itself."""
    return [request for request in s3.data_requests() if request[1] != "bytes=0-65535"]


def fetched_bytes(s3: S3) -> int:
    """What was asked for, each range once: one that is slow may be asked for twice."""
    ranges = [text.removeprefix("bytes=").split("-") for _, text in set(block_requests(s3)) if text]
    return sum(int(last) - int(first) + 1 for first, last in ranges)


def block_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("[0-9a-f][0-9a-f]/*"))


def told(cache: Path, *arguments: object) -> object:
    answer = lazyfs("cache", *arguments, f"--cache-dir={cache}", "--json")
    assert answer.returncode == 0, answer.stderr
    if arguments[0] == "verify":
        return load_json(answer.stdout)
    return json.loads(answer.stdout)


# Two daemons


def test_two_mounts_that_load_at_once_fetch_the_model_once(
    mount: Callable[..., Mounted], s3: S3, source: str
) -> None:
    s3.fault("GET /cached/m/model", "slow", times=30, seconds=0.02)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        mounts = list(pool.map(lambda _: mount(source, BLOCKS), range(3)))
        assert list(pool.map(sums, mounts)) == [SUMS] * 3
    assert fetched_bytes(s3) == SIZE
    assert len(block_requests(s3)) <= 32  # of 31 blocks


def test_blocks_of_a_killed_claimant_are_fetched(
    mount: Callable[..., Mounted], s3: S3, source: str
) -> None:
    """Its answers hang in S3; it dies, and the other has the block soon."""
    s3.fault("GET /cached/m/model-00001", "hang", times=20, seconds=8)
    first = mount(source, BLOCKS, "--prefetch=off")
    reader = subprocess.Popen(["head", "-c1", first.path / "model-00001-of-00003.safetensors"])
    deadline = time.monotonic() + 60
    while not s3.data_requests():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    s3.forget()
    first.kill_all()
    second = mount(source, BLOCKS, "--prefetch=off")
    assert sums(second) == SUMS
    lazyfs("umount", "--lazy", first.path)
    reader.wait(timeout=60)


def test_a_mount_fetches_a_block_itself_after_the_lease(
    mount: Callable[..., Mounted], s3: S3, source: str
) -> None:
    first = mount(source, BLOCKS, "--prefetch=off")
    s3.fault("GET /cached/m/config", "hang", times=1, seconds=20)
    reader = subprocess.Popen(["cat", first.path / "config.json"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not s3.data_requests():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.worker, signal.SIGSTOP)
    try:
        second = mount(source, BLOCKS, "--prefetch=off")
        assert shell("cat config.json", second.path).stdout == "{}"
    finally:
        os.kill(first.worker, signal.SIGCONT)
    reader.wait(timeout=60)


# warm


def test_warm_then_mount_fetches_nothing(
    warm: Callable[..., subprocess.CompletedProcess[str]], mount: Callable[..., Mounted],
    s3: S3, source: str,
) -> None:  # fmt: skip
    answer = warm(source)
    assert answer.returncode == 0, answer.stderr
    assert "4 files, 27MiB in the cache; 27MiB fetched" in answer.stdout
    assert "cached: 27MiB of 27MiB (100%)" in answer.stderr
    assert fetched_bytes(s3) == SIZE
    s3.forget()
    assert sums(mount(source, BLOCKS)) == SUMS
    again = warm(source)
    assert "; 0B fetched" in again.stdout
    assert s3.data_requests() == []


def test_objects_that_may_only_be_listed_do_not_come_from_the_disk(
    warm: Callable[..., subprocess.CompletedProcess[str]], mount: Callable[..., Mounted],
    s3: S3, source: str,
) -> None:  # fmt: skip
    """The blocks are there, brought with the credentials of somebody who may read them."""
    assert warm(source).returncode == 0
    s3.fault("GET /cached/m/model-00002", "status", times=10_000, status=403, code="AccessDenied")
    mounted = mount(source, BLOCKS)
    hidden = "model-00002-of-00003.safetensors"
    for _ in range(2):
        refused = shell(f"cat {hidden}", mounted.path)
        assert refused.stdout == "" and "Permission denied" in refused.stderr
    assert sums(mounted) == {name: text for name, text in SUMS.items() if name != hidden}
    s3.forget()
    assert sums(mounted) == SUMS


def test_access_to_an_object_is_checked_once(
    warm: Callable[..., subprocess.CompletedProcess[str]], mount: Callable[..., Mounted],
    s3: S3, source: str,
) -> None:  # fmt: skip
    assert warm(source).returncode == 0
    s3.forget()
    mounted = mount(source, BLOCKS)
    assert sums(mounted) == SUMS
    asked = s3.access_requests()
    assert {path.rpartition("/")[2] for path in asked} == set(SUMS)
    assert len(asked) <= len(SUMS) + 1  # the mount itself reads a byte of one
    assert s3.data_requests() == []


def test_warm_resumes_after_it_was_killed(
    warm: Callable[..., subprocess.CompletedProcess[str]], s3: S3, source: str, cache: Path
) -> None:
    s3.fault("GET /cached/m/model-00003", "hang", times=100, seconds=30)
    arguments = [f"--endpoint-url={s3.url}", f"--cache-dir={cache}", BLOCKS]
    killed = subprocess.Popen(
        [sys.executable, "-m", "lazyfs", "warm", source, *arguments], env=environment()
    )
    deadline = time.monotonic() + 60
    while len(block_files(cache)) < 15:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.wait(timeout=60)
    there = sum(entry["cached_bytes"] for entry in told(cache, "ls"))  # type: ignore[attr-defined]
    s3.forget()
    answer = warm(source)
    assert answer.returncode == 0, answer.stderr
    assert 0 < fetched_bytes(s3) == SIZE - there
    assert told(cache, "verify")["finished"]  # type: ignore[index]


def test_two_warms_at_once_share_the_work(s3: S3, source: str, cache: Path) -> None:
    arguments = [f"--endpoint-url={s3.url}", f"--cache-dir={cache}", BLOCKS]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "lazyfs", "warmup", source, *arguments], env=environment()
        )
        for _ in range(2)
    ]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert fetched_bytes(s3) == SIZE
    assert len(block_requests(s3)) <= 32


def test_warm_only_matching_files_of_a_mount(
    warm: Callable[..., subprocess.CompletedProcess[str]], mount: Callable[..., Mounted],
    s3: S3, source: str, cache: Path,
) -> None:  # fmt: skip
    mounted = mount(source, BLOCKS, "--prefetch=off")
    answer = lazyfs("warm", mounted.path, "--include=*2-of*", "--include=*.json")
    assert answer.returncode == 0, answer.stderr
    assert {path.rpartition("/")[2] for path, _ in s3.data_requests()} == {
        "config.json", "model-00002-of-00003.safetensors",
    }  # fmt: skip
    s3.forget()
    assert lazyfs("warm", mounted.path, "--verify").returncode == 0
    assert sums(mounted) == SUMS
    assert fetched_bytes(s3) <= SIZE - 9 * MIB
    wrong = lazyfs("warm", mounted.path, "--include=*.gguf")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "no file matches '*.gguf'" in wrong.stderr.splitlines()[-1]
    assert lazyfs("warm", mounted.path, "--region=eu-west-1").returncode == 2


def test_warm_says_what_is_missing(
    warm: Callable[..., subprocess.CompletedProcess[str]], s3: S3, source: str
) -> None:
    answer = warm(source, "--cache-size=64MiB", "--cache-reserve=100%")
    assert answer.returncode == 1
    assert "27MiB of 27MiB are not in the cache: there is no room" in answer.stderr
    s3.fault("GET /cached/m/model-00002", "status", times=1000, status=403, code="AccessDenied")
    answer = warm(source)
    assert answer.returncode == 1
    assert "AccessDenied" in answer.stderr.splitlines()[-1]
    assert "9MiB of 27MiB are not in the cache" in answer.stderr.splitlines()[-1]


WHOLE = random.Random(9).randbytes(3 * MIB + 5)
WHOLE_SUMS = {
    "CRC32": zlib.crc32(WHOLE).to_bytes(4, "big"),
    "CRC32C": crc32c(WHOLE).to_bytes(4, "big"),
    "CRC64NVME": checksums.crc64nvme(WHOLE).to_bytes(8, "big"),
    "SHA256": hashlib.sha256(WHOLE).digest(),
}


@pytest.mark.parametrize("kind", WHOLE_SUMS)
def test_warm_compares_whole_objects(
    warm: Callable[..., subprocess.CompletedProcess[str]], s3: S3, cache: Path, kind: str
) -> None:
    s3.put("sums", {"a.bin": WHOLE})

    def verify(said: bytes, suffix: str = "") -> subprocess.CompletedProcess[str]:
        text = base64.b64encode(said).decode() + suffix
        add = {f"x-amz-checksum-{kind.lower()}": text}
        s3.fault("HEAD /sums/a.bin", "headers", add=add, without="x-amz-checksum")
        return warm("s3://sums", "--verify")

    answer = verify(WHOLE_SUMS[kind])
    assert answer.returncode == 0, answer.stderr
    assert "1 files compared" in answer.stdout
    assert "0 files compared" in verify(b"of the parts", "-3").stdout
    answer = verify(bytes(8))
    assert answer.returncode == 1
    assert f"has not the {kind} checksum" in answer.stderr
    assert block_files(cache) == []


def test_missing_checksum_code_is_reported_before_anything_is_fetched(
    s3: S3, source: str, cache: Path, tmp_path: Path
) -> None:
    """As where lazyfs was installed without the extra `verify`."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['awscrt'] = None")
    where = [f"--endpoint-url={s3.url}", f"--cache-dir={cache}", BLOCKS]
    env = environment(PYTHONPATH=str(tmp_path))
    answer = lazyfs("warm", source, "--verify", *where, env=env)
    assert answer.returncode == 2
    assert answer.stderr.startswith("lazyfs: --verify: ")
    assert answer.stderr.endswith("pip install 'lazyfs[verify]'\n")
    assert s3.data_requests() == []
    assert lazyfs("warm", source, *where, env=env).returncode == 0


# The commands


def test_the_cache_is_shown_checked_and_pruned(
    warm: Callable[..., subprocess.CompletedProcess[str]], mount: Callable[..., Mounted],
    s3: S3, source: str, cache: Path,
) -> None:  # fmt: skip
    s3.put("other", {"n/a.safetensors": random.Random(8).randbytes(2 * MIB)})
    assert warm(source, "--include=*1-of*").returncode == 0
    assert warm("s3://other/n").returncode == 0
    (info,) = told(cache, "info")  # type: ignore[misc]
    assert (info["objects"], info["models"], info["blocks"]) == (2, 2, 12)
    entries = told(cache, "ls", "--files")
    assert [(one["name"], one["cached_bytes"]) for one in entries] == [  # type: ignore[attr-defined]
        ("s3://cached/m/model-00001-of-00003.safetensors", 9 * MIB + 1),
        ("s3://other/n/a.safetensors", 2 * MIB),
    ]
    for command in ("info", "ls"):
        text = lazyfs("cache", command, f"--cache-dir={cache}").stdout
        assert "11.01MiB of" in text or "s3://cached/m/" in text
        assert "secret" not in text + json.dumps([info, entries])
    mounted = mount(source, BLOCKS, "--prefetch=off")
    assert lazyfs("cache", "prune", "s3://cached/*", f"--cache-dir={cache}").returncode == 0
    assert [one["name"] for one in told(cache, "ls")] == ["s3://other/n/"]  # type: ignore[attr-defined]
    assert sums(mounted) == SUMS
    assert told(cache, "prune", "--older-than=1h")["freed_bytes"] == 0  # type: ignore[index]
    assert told(cache, "prune", "--to=5MiB")["left_bytes"] <= 5 * MIB  # type: ignore[index]
    told(cache, "clear")
    assert block_files(cache) == []
    assert sums(mounted) == SUMS


def test_verify_removes_damaged_blocks(
    warm: Callable[..., subprocess.CompletedProcess[str]], s3: S3, source: str, cache: Path
) -> None:
    assert warm(source).returncode == 0
    assert "31 blocks" in lazyfs("cache", "verify", f"--cache-dir={cache}").stdout
    # The end of a shard is a block of a few bytes; most of its file is padding that is not served.
    for path in [path for path in block_files(cache) if path.stat().st_size > MIB][:3]:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    answer = lazyfs("cache", "verify", f"--cache-dir={cache}")
    assert answer.returncode == 1
    assert "3 of 31 blocks were damaged and have been removed: block " in answer.stderr
    assert lazyfs("cache", "verify", f"--cache-dir={cache}").returncode == 0
    s3.forget()
    assert warm(source, "--verify").returncode == 0
    assert len(s3.data_requests()) == 3


def test_commands_without_a_cache(tmp_path: Path) -> None:
    for command in ("info", "ls", "verify", "clear"):
        answer = lazyfs("cache", command, f"--cache-dir={tmp_path}/none")
        assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
        assert "no such directory" in answer.stderr
    assert lazyfs("cache", "prune", f"--cache-dir={tmp_path}").returncode == 2


# What goes wrong


def test_damage_while_a_mount_runs(
    mount: Callable[..., Mounted], s3: S3, source: str, cache: Path
) -> None:
    """Flipped, cut, lost, a garbled index, no index, no directory: never a wrong byte."""
    chaos = random.Random(3)

    def flip(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(chaos.randrange(path.stat().st_size))
            file.write(b"\xa5\x5a")

    for damage in (
        lambda: [flip(path) for path in block_files(cache)],
        lambda: [os.truncate(path, chaos.randrange(MIB)) for path in block_files(cache)],
        lambda: [path.unlink() for path in block_files(cache)],
        lambda: (cache / "cache.db").write_bytes(chaos.randbytes(20000)),
        lambda: [path.unlink() for path in cache.glob("cache.db*")],
        lambda: shutil.rmtree(cache),
    ):
        mounted = mount(source, BLOCKS, "--page-cache=off", "--memory-limit=64MiB")
        assert sums(mounted) == SUMS
        damage()
        drop_pages(mounted)
        assert sums(mounted) == SUMS
        second = mount(source, BLOCKS)
        assert sums(second) == SUMS
        second.end()
        mounted.end()


def drop_pages(mounted: Mounted) -> None:
    """Have the kernel forget what it has of the files, so that the next read is a request."""
    code = (
        "import os, sys\n"
        "for name in os.listdir(sys.argv[1]):\n"
        "    file = os.open(os.path.join(sys.argv[1], name), os.O_RDONLY)\n"
        "    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)\n"
    )
    python(code, mounted.path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", "20m") as path:
        yield path


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_mount_is_made_while_the_disk_is_full(
    mount: Callable[..., Mounted], source: str, small_disk: Path
) -> None:
    (small_disk / "cache").mkdir()
    with (small_disk / "others").open("wb", buffering=0) as others, contextlib.suppress(OSError):
        while True:
            others.write(bytes(4096))
    mounted = mount(source, BLOCKS, f"--cache-dir={small_disk}/cache", "--cache-reserve=0")
    assert sums(mounted) == SUMS
    mounted.wait_for_log("its disk is full")
    assert "Traceback" not in mounted.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk_and_a_read_only_one(
    mount: Callable[..., Mounted], s3: S3, source: str, small_disk: Path
) -> None:
    (small_disk / "others").write_bytes(bytes(10 * MIB))
    where = [f"--cache-dir={small_disk}/cache", "--cache-size=1GiB", "--cache-reserve=0"]
    mounted = mount(source, BLOCKS, *where)
    assert sums(mounted) == SUMS
    assert 0 < len(block_files(small_disk / "cache")) < 15
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=False)
    second = mount(source, BLOCKS, f"--cache-dir={small_disk}/cache:{small_disk.parent}/second")
    assert sums(second) == SUMS
    os.kill(mounted.worker, signal.SIGKILL)
    assert sums(mounted) == SUMS
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=False)


def test_a_locked_index_stops_no_mount(
    mount: Callable[..., Mounted], source: str, cache: Path
) -> None:
    mounted = mount(source, BLOCKS, "--prefetch=off")
    lock = sqlite3.connect(cache / "cache.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        assert sums(mounted) == SUMS
    finally:
        lock.execute("ROLLBACK")
        lock.close()
