"""While a load leaves the processors no time, blocks pass by the daemon's memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from busy import busy_processors
from mounting import TIMEOUT_S, Mounted, lazyfs, python
from s3 import S3
from safetensors.numpy import save

pytestmark = pytest.mark.fuse

MIB = 1 << 20
OPTIONS = ["--block-size=1MiB", "--memory-limit=64MiB"]
MODEL = save(
    {
        f"layer.{n:02}": np.random.default_rng(n).integers(0, 256, 4 * MIB, np.uint8)
        for n in range(24)
    }
)
DIGEST = hashlib.md5(MODEL, usedforsecurity=False).hexdigest()
# The file is open before it is read, as loaders have it that read all headers first.
MAPPED = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    print("opened", flush=True)
    sys.stdin.readline()
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    print(hashlib.md5(mapped).hexdigest())
"""
DIRECT = """
import hashlib, mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer, digest, at = mmap.mmap(-1, 1 << 20), hashlib.md5(), 0
while count := os.preadv(file, [buffer], at):
    digest.update(memoryview(buffer)[:count])
    at += count
print(digest.hexdigest())
"""


@pytest.fixture
def busy() -> Iterator[None]:
    with busy_processors():
        yield


@pytest.fixture
def passing(mount: Callable[..., Mounted], s3: S3, busy: None) -> Mounted:
    s3.put("passing", {"m/model.safetensors": MODEL})
    s3.forget()
    return mount("s3://passing/m", *OPTIONS)


class Loader:
    """A process that has opened the model, and reads it when it is told to."""

    def __init__(self, mounted: Mounted) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAPPED, mounted.path / "model.safetensors"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "opened\n"

    def digest(self) -> str:
        return self.process.communicate("read\n", timeout=TIMEOUT_S)[0].strip()


@pytest.fixture
def loader(passing: Mounted) -> Iterator[Callable[[], Loader]]:
    loaders: list[Loader] = []

    def load() -> Loader:
        loaders.append(Loader(passing))
        return loaders[-1]

    yield load
    for one in loaders:
        one.process.kill()
        one.process.communicate()


def status_of(mounted: Mounted) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(lazyfs("status", mounted.path, "--json").stdout)
    return answer


def wait_until(mounted: Mounted, is_true: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true(status := status_of(mounted)):
        assert time.monotonic() < deadline, status
        time.sleep(0.1)


def all_is_there(status: dict[str, Any]) -> bool:
    return bool(status["ready"]["model"])


def half_passed(status: dict[str, Any]) -> bool:
    return bool(status["passed_bytes"] > len(MODEL) // 2)


def test_what_passes_is_what_s3_has_and_is_not_asked_for_again(
    passing: Mounted, loader: Callable[[], Loader], s3: S3
) -> None:
    load = loader()
    wait_until(passing, all_is_there)
    assert half_passed(status_of(passing))
    assert load.digest() == DIGEST
    asked = Counter(s3.data_requests())
    again = asked.total() - len(asked) - status_of(passing)["second_requests"]
    assert again < len(asked) // 4  # a kernel may take pages before they are read (DAMON)


def test_who_comes_later_with_o_direct_gets_the_same(
    passing: Mounted, loader: Callable[[], Loader]
) -> None:
    load = loader()
    wait_until(passing, half_passed)
    assert python(DIRECT, passing.path / "model.safetensors").strip() == DIGEST
    assert load.digest() == DIGEST


def test_readers_who_are_faster_than_s3_get_their_parts(
    passing: Mounted, loader: Callable[[], Loader], s3: S3
) -> None:
    s3.fault("model.safetensors", "slow", times=60, seconds=0.02)
    loads = [loader() for _ in range(3)]
    wait_until(passing, lambda status: bool(status["passed_bytes"]))
    with ThreadPoolExecutor(len(loads)) as threads:
        assert set(threads.map(Loader.digest, loads)) == {DIGEST}
    assert status_of(passing)["trouble"] is None


def test_bodies_that_break_off_are_asked_for_again(
    passing: Mounted, loader: Callable[[], Loader], s3: S3
) -> None:
    load = loader()
    s3.fault("model.safetensors", "truncate", times=30)
    wait_until(passing, all_is_there)
    assert load.digest() == DIGEST
    assert status_of(passing)["passed_bytes"]
