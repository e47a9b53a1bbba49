"""A disk cache whose disk does not answer: no reader waits for it to do so."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hanging_disk import HangingDisk
from mounting import Mounted, is_mounted, lazyfs, shell, wait_until_gone
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
FILES = {f"part-{i:02}.bin": random.Random(i).randbytes(8 * MIB + i) for i in range(12)}
SUMS = {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()}
SIZE = sum(map(len, FILES.values()))
OPTIONS = ("--block-size=1MiB", "--memory-limit=64MiB", "--prefetch=off")


@pytest.fixture(scope="module")
def source(server: S3) -> str:
    server.put("hanging", {f"m/{name}": body for name, body in FILES.items()})
    return "s3://hanging/m"


@pytest.fixture
def mount(
    s3: S3, tmp_path: Path, disk: HangingDisk, source: str
) -> Iterator[Callable[[], Mounted]]:
    mounts: list[Mounted] = []

    def make(*options: str) -> Mounted:
        path = tmp_path / f"mnt{len(mounts)}"
        mounts.append(Mounted(source, path, disk.path / "cache", s3.url, *OPTIONS, *options))
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
        [sys.executable, "-c", _READ, *names], cwd=mounted.path, timeout=100, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return {name: digest for name, digest, _ in json.loads(done.stdout)}


def wait_for(what: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def all_come_from_the_disk(mounted: Mounted, names: list[str]) -> None:
    """Wait until no disk hangs; then nothing of these files is fetched."""
    wait_for(lambda: not mounted.status()["hanging_disks"])
    fetched = mounted.status()["fetched_bytes"]
    assert read(mounted, names) == {name: SUMS[name] for name in names}
    assert mounted.status()["fetched_bytes"] == fetched, "the disk is used again"


def in_cache(disk: HangingDisk, mount: Callable[[], Mounted]) -> None:
    """Put the files on the disk, and end that mount."""
    mounted = mount()
    assert shell("sha256sum *", mounted.path, 300).returncode == 0
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
    assert mounted.status()["hanging_disks"]
    assert f"the disk of {disk.path}/cache does not answer" in lazyfs("status", mounted.path).stdout
    disk.answer()
    all_come_from_the_disk(mounted, names[8:])
    mounted.wait_for_log("answers again")


def test_a_load_is_not_held_up_by_a_disk_that_takes_no_writes(
    mount: Callable[[], Mounted], disk: HangingDisk
) -> None:
    mounted = mount()
    assert shell("cat part-00.bin | wc -c", mounted.path).stdout == f"{8 * MIB}\n"
    disk.hang()
    assert read(mounted, list(SUMS)) == SUMS, "twelve files, with memory for eight of them"
    disk.answer()
    assert read(mounted, list(SUMS)) == SUMS


def test_a_mount_begins_while_the_disk_hangs(
    mount: Callable[[], Mounted], disk: HangingDisk
) -> None:
    in_cache(disk, mount)
    disk.forget()
    disk.hang()
    log_file = f"--log-file={disk.path}/log/mount.log"
    refused = lazyfs("mount", "s3://hanging/m", "/nonexistent", log_file)
    assert refused.returncode == 2
    assert "its disk does not answer" in refused.stderr
    mounted = mount()
    assert mounted.status()["hanging_disks"]
    assert f"the disk of {disk.path}/cache does not answer" in lazyfs("status", mounted.path).stdout
    mounted.wait_for_log("does not answer")
    assert mounted.log().count("does not answer") == 1
    names = list(SUMS)
    assert read(mounted, names[:4]) == {name: SUMS[name] for name in names[:4]}
    disk.answer()
    all_come_from_the_disk(mounted, names[4:])


def test_the_next_worker_serves_while_the_disk_hangs(
    mount: Callable[[], Mounted], disk: HangingDisk
) -> None:
    in_cache(disk, mount)
    mounted = mount()
    names = list(SUMS)
    assert read(mounted, names[:2]) == {name: SUMS[name] for name in names[:2]}
    disk.hang()
    assert read(mounted, names[2:4]) == {name: SUMS[name] for name in names[2:4]}
    os.kill(mounted.worker, signal.SIGKILL)
    assert read(mounted, names[4:6]) == {name: SUMS[name] for name in names[4:6]}
    upgraded = lazyfs("upgrade", mounted.path)
    assert upgraded.returncode == 0, upgraded.stderr
    assert mounted.status()["restarts"] == 1, "the kill; an upgrade is not a death"
    assert read(mounted, names[6:8]) == {name: SUMS[name] for name in names[6:8]}
    disk.answer()
    wait_for(lambda: not mounted.status()["hanging_disks"])


@pytest.mark.parametrize("how", ["lazyfs umount", "umount", "SIGTERM"])
def test_an_unmount_ends_while_the_disk_hangs(
    mount: Callable[[], Mounted], disk: HangingDisk, how: str
) -> None:
    in_cache(disk, mount)
    mounted = mount()
    worker, names = mounted.worker, list(SUMS)
    disk.hang()
    assert read(mounted, names[:4]) == {name: SUMS[name] for name in names[:4]}
    said = ""
    if how == "lazyfs umount":
        answer = lazyfs("umount", mounted.path)
        assert answer.returncode == 0, answer.stderr
        said = answer.stderr
    elif how == "umount":
        assert shell(f"umount {mounted.path}", Path("/")).returncode == 0
    else:
        mounted.kill(signal.SIGTERM)
    wait_until_gone(mounted.pid)
    assert not is_mounted(mounted.path)
    line = f"process {worker} waits for a disk"
    mounted.wait_for_log(line)
    assert not said or line in said
    again = mount()
    assert read(again, names[:1]) == {names[0]: SUMS[names[0]]}
    disk.answer()
    wait_until_gone(worker)


def test_a_disk_that_hangs_takes_no_other_directory_with_it(
    s3: S3, tmp_path: Path, disk: HangingDisk, source: str
) -> None:
    options = (*OPTIONS, "--max-concurrency=4")
    cache = Path(f"{disk.path}/cache:{tmp_path}/cache")
    filling = Mounted(source, tmp_path / "filling", cache, s3.url, *options)
    assert shell("sha256sum *", filling.path, 300).returncode == 0
    filling.end()
    mounted = Mounted(source, tmp_path / "mounted", cache, s3.url, *options)
    disk.hang()
    try:
        assert read(mounted, list(SUMS)) == SUMS
        seen = mounted.status()
        assert seen["hanging_disks"] == [f"{disk.path}/cache"]
        assert min(seen["fetched_bytes"], seen["from_disk_bytes"]) > SIZE // 4
    finally:
        disk.answer()
        mounted.end()


def test_a_log_on_a_disk_that_hangs_holds_up_nothing(
    mount: Callable[..., Mounted], disk: HangingDisk
) -> None:
    log_file = disk.path / "mount.log"
    mounted = mount(f"--log-file={log_file}", "--log-level=debug")
    names = list(SUMS)
    assert read(mounted, names[:2]) == {name: SUMS[name] for name in names[:2]}
    disk.hang()
    until_s = time.monotonic() + 15  # the journal is committed every 5 s, and writes wait for that
    while time.monotonic() < until_s:
        assert read(mounted, names) == SUMS
    os.kill(mounted.worker, signal.SIGKILL)
    assert read(mounted, names[:2]) == {name: SUMS[name] for name in names[:2]}
    assert lazyfs("umount", mounted.path).returncode == 0
    wait_until_gone(mounted.pid)
    disk.answer()
    wait_for(lambda: "mounted s3://" in log_file.read_text())


def test_commands_do_not_wait_for_a_disk_that_hangs(
    mount: Callable[[], Mounted], disk: HangingDisk, source: str
) -> None:
    in_cache(disk, mount)
    disk.hang()
    cache = f"--cache-dir={disk.path}/cache"
    for command in (["cache", "info"], ["cache", "verify"], ["warm", source], ["doctor"]):
        answer = lazyfs(*command, cache)
        assert answer.returncode != 0
        said = answer.stdout + answer.stderr
        assert "its disk does not answer" in " ".join(said.split())
