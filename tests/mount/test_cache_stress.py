"""Stress for one small cache: mounts, `warm`, kills, damage and a full disk give no wrong byte.

For a longer run, or to repeat a run:

    LAZYFS_STRESS_S=600 LAZYFS_SEED=17 pytest tests/mount/test_cache_stress.py -s
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Mounted, environment, lazyfs, python, tmpfs
from s3 import S3

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs"),
]

MIB = 1 << 20
LENGTH_S = float(os.environ.get("LAZYFS_STRESS_S", "8"))
SEED = int(os.environ.get("LAZYFS_SEED") or random.SystemRandom().randrange(10**6))
BLOCKS = "--block-size=1MiB"

# Reads anywhere, in any size, past what the kernel still has, and compares with the local copy.
READER = """
import os, random, sys, time
mounted, local, seed, until = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
chance = random.Random(seed)
names = sorted(os.listdir(local))
reads = 0
while time.time() < until:
    name = chance.choice(names)
    file = os.open(os.path.join(mounted, name), os.O_RDONLY)
    copy = os.open(os.path.join(local, name), os.O_RDONLY)
    size = os.fstat(copy).st_size
    for _ in range(chance.randrange(1, 20)):
        offset, length = chance.randrange(size), chance.randrange(1, 3 << 20)
        if chance.random() < 0.5:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        got, expected = os.pread(file, length, offset), os.pread(copy, length, offset)
        # A read may be short where a process is interrupted, but not wrong.
        assert got and got == expected[:len(got)], (name, offset, length, len(got))
        reads += 1
    os.close(file)
    os.close(copy)
print(reads)
"""

# Has the cache look after itself at once; says which files no row names, and the other way round.
SETTLE = """
import os, sys
from pathlib import Path
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.index import BlockIndex
from lazyfs.cache.space import Limits
path = Path(sys.argv[1])
directory = CacheDirectory(path, Limits(1 << 40))
directory.open()
os.utime(path / "care", (0, 0)) if (path / "care").exists() else None
directory.care([])
files = {str(f.relative_to(path)) for f in path.glob("[0-9a-f][0-9a-f]/*")}
rows = {row.filename for row in BlockIndex(path).rows()}
print(len(files ^ rows), len(rows))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", "24m") as path:
        yield path


class Chaos:
    """What goes wrong, one thing at a time, as a seed says."""

    def __init__(self, seed: int, disk: Path, mounts: list[Mounted], warm: list[str]) -> None:
        self._chance = random.Random(seed)
        self._disk = disk
        self._cache = disk / "cache"
        self._mounts = mounts
        self._warm = warm
        self._warming: list[subprocess.Popen[bytes]] = []
        self.done: Counter[str] = Counter()

    def one(self) -> None:
        """Something."""
        deeds: dict[Callable[[], None], int] = {
            self.flip: 8,
            self.cut: 4,
            self.take_away: 3,
            self.begin_warm: 4,
            self.kill_warm: 3,
            self.kill_worker: 2,
            self.fill_disk: 2,
            self.remove_index: 1,
            self.garble_index: 1,
            self.age: 2,
            self.prune: 1,
            self.remove_all: 1,
        }
        (deed,) = self._chance.choices(list(deeds), list(deeds.values()))
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            deed()
            self.done[deed.__name__] += 1

    def end(self) -> None:
        for process in self._warming:
            process.kill()
            process.wait(timeout=60)

    def _file(self) -> Path:
        files = list(self._cache.glob("[0-9a-f][0-9a-f]/*"))
        return self._chance.choice(files) if files else self._cache / "none"

    def flip(self) -> None:
        path = self._file()
        with path.open("r+b") as file:
            file.seek(self._chance.randrange(max(1, path.stat().st_size)))
            file.write(self._chance.randbytes(3))

    def cut(self) -> None:
        path = self._file()
        os.truncate(path, self._chance.randrange(max(1, path.stat().st_size)))

    def take_away(self) -> None:
        self._file().unlink()

    def begin_warm(self) -> None:
        self._warming = [process for process in self._warming if process.poll() is None]
        if len(self._warming) < 2:
            self._warming.append(
                subprocess.Popen(self._warm, env=environment(), stderr=subprocess.DEVNULL)
            )

    def kill_warm(self) -> None:
        for process in self._warming:
            process.kill()

    def kill_worker(self) -> None:
        with contextlib.suppress(AssertionError, ProcessLookupError):  # between two workers
            os.kill(self._chance.choice(self._mounts).worker, signal.SIGKILL)

    def fill_disk(self) -> None:
        others = self._disk / "others"
        try:
            with others.open("wb") as file:
                while True:
                    file.write(bytes(MIB))
        except OSError:
            time.sleep(self._chance.random())
        finally:
            others.unlink()

    def remove_index(self) -> None:
        for path in self._cache.glob("cache.db*"):
            path.unlink()

    def garble_index(self) -> None:
        path = self._cache / "cache.db"
        with path.open("r+b") as file:
            file.seek(self._chance.randrange(max(1, path.stat().st_size)))
            file.write(self._chance.randbytes(200))

    def age(self) -> None:
        """Let all blocks be old, so that they make room."""
        with contextlib.suppress(sqlite3.Error):  # it was taken away, or is locked
            index = sqlite3.connect(f"file:{self._cache}/cache.db?mode=rw", timeout=1, uri=True)
            with contextlib.closing(index), index:
                index.execute("UPDATE Cache SET access_time = access_time - 5000")

    def prune(self) -> None:
        lazyfs("cache", "prune", "--to=4MiB", f"--cache-dir={self._cache}")

    def remove_all(self) -> None:
        shutil.rmtree(self._cache, ignore_errors=True)


@pytest.mark.timeout(LENGTH_S + 120)
def test_no_wrong_byte_whatever_happens(
    mount: Callable[..., Mounted], s3: S3, tmp_path: Path, small_disk: Path
) -> None:
    print(f"LAZYFS_SEED={SEED} LAZYFS_STRESS_S={LENGTH_S:g}")
    chance = random.Random(SEED)
    for model in ("a", "b"):
        (tmp_path / model).mkdir()
        for number in (1, 2):
            name = f"model-0000{number}-of-00002.safetensors"
            body = chance.randbytes(8 * MIB + chance.randrange(MIB))
            (tmp_path / model / name).write_bytes(body)
            s3.put("stress", {f"{model}/{name}": body})
    where = [f"--endpoint-url={s3.url}", f"--cache-dir={small_disk}/cache", "--cache-size=75%"]
    options = [BLOCKS, *where, "--cache-reserve=1MiB", "--memory-limit=64MiB"]
    mounts = [
        mount("s3://stress/a", *options, "--page-cache=off"),
        mount("s3://stress/a", *options),
        mount("s3://stress/b", *options, "--page-cache=off", "--prefetch=off"),
    ]
    warm = [sys.executable, "-m", "lazyfs", "warm", "s3://stress", *options]
    chaos = Chaos(SEED, small_disk, mounts, warm)
    until = time.time() + LENGTH_S
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, mounted.path, tmp_path / model,
             str(SEED + number), str(until)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, (mounted, model) in enumerate(zip(mounts, "aab", strict=True))
    ]  # fmt: skip
    try:
        while time.time() < until:
            chaos.one()
            time.sleep(chance.uniform(0.05, 0.6))
        answers = [reader.communicate(timeout=60) for reader in readers]
    finally:
        chaos.end()
        for reader in readers:
            reader.kill()
            reader.wait(timeout=60)
    print(dict(chaos.done), "reads:", [answer[0].strip() for answer in answers])
    assert [answer[1] for answer in answers] == ["", "", ""], f"seed {SEED}"
    assert all(int(answer[0]) > 10 for answer in answers)
    for mounted in mounts:
        mounted.end()
    lazyfs("cache", "verify", f"--cache-dir={small_disk}/cache")
    strays, rows = python(SETTLE, small_disk / "cache").split()
    assert (strays, int(rows) <= 18) == ("0", True), f"seed {SEED}"
    answer = lazyfs("cache", "verify", f"--cache-dir={small_disk}/cache")
    assert answer.returncode == 0, answer.stderr
