"""Readers that are killed while S3 is silent end at once, whatever they wait for."""

from __future__ import annotations

import hashlib
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from gate import Gate
from mounting import TIMEOUT_S, Mounted, environment, shell
from s3 import S3

pytestmark = pytest.mark.fuse

BODY = random.Random(3).randbytes(4 << 20)
OPTIONS = ["--prefetch=off", "--block-size=1MiB", "--io-timeout=10m"]
# What is promised (docs/RELIABILITY.md).
LET_GO_S = 5.0

# Each says that it begins, and then waits for S3.
READ = """
import os, sys
file = os.open(sys.argv[1] + "/file", os.O_RDONLY)
print("begins", flush=True)
os.read(file, 1 << 16)
"""
DIRECT = """
import mmap, os, sys
file = os.open(sys.argv[1] + "/file", os.O_RDONLY | os.O_DIRECT)
print("begins", flush=True)
os.preadv(file, [mmap.mmap(-1, 1 << 16)], 0)
"""
FAULT = """
import mmap, sys
file = open(sys.argv[1] + "/file", "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("begins", flush=True)
mapped[1 << 20]
"""
# Without read-ahead the faulting thread waits for the answer itself, and not for a page.
RANDOM_FAULT = FAULT.replace("print(", "mapped.madvise(mmap.MADV_RANDOM)\nprint(")
OPEN = """
import sys
print("begins", flush=True)
open(sys.argv[1] + "/sub/deep/file")
"""
STAT = """
import os, sys
print("begins", flush=True)
os.stat(sys.argv[1] + "/sub/deep/file")
"""
LIST = """
import os, sys
print("begins", flush=True)
os.listdir(sys.argv[1] + "/sub/deep")
"""
# A timer goes off all the time, and its handler does nothing.
DISTURBED = """
import hashlib, mmap, signal, sys
signal.signal(signal.SIGALRM, lambda *_: None)
file = open(sys.argv[1] + "/file", "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
mapped.madvise(mmap.MADV_RANDOM)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
print("begins", flush=True)
digests = [hashlib.sha256(mapped).hexdigest(), hashlib.sha256(file.read()).hexdigest()]
print(digests == [sys.argv[2]] * 2)
"""
READERS = {
    "read": READ, "direct": DIRECT, "fault": FAULT, "random fault": RANDOM_FAULT, "open": OPEN,
    "stat": STAT, "list": LIST,
}  # fmt: skip


@pytest.fixture
def gate(server: S3) -> Iterator[Gate]:
    made = Gate(server.url)
    yield made
    made.open()
    made.close()


@pytest.fixture(scope="module")
def bucket(server: S3) -> None:
    # More than a page of a listing, so that not all is known at the beginning.
    server.put_many("killed", [f"m/many/{n}" for n in range(1000)])
    server.put("killed", {"m/file": BODY, "m/sub/deep/file": b"x"})


@pytest.fixture
def mounted(bucket: None, gate: Gate, tmp_path: Path) -> Iterator[Mounted]:
    made = Mounted("s3://killed/m", tmp_path / "mnt", tmp_path / "cache", gate.url, *OPTIONS)
    shell("stat file", made.path)
    gate.stick()
    yield made
    gate.open()
    made.end()


def begin(
    code: str, path: Path, *arguments: str, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a reader, and let it come to where it waits."""
    reader = subprocess.Popen(
        [*before, sys.executable, "-c", code, path, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "begins\n"
    time.sleep(1)
    assert reader.poll() is None, "it does not wait"
    return reader


def kill(reader: subprocess.Popen[str]) -> None:
    """Kill a reader, which must be gone as soon as is promised."""
    reader.kill()
    try:
        reader.wait(LET_GO_S)
    except subprocess.TimeoutExpired:
        wait = Path(f"/proc/{reader.pid}/wchan").read_text()
        pytest.fail(f"it still waits, in {wait}")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_is_killed_is_gone(mounted: Mounted, name: str) -> None:
    kill(begin(READERS[name], mounted.path))


def test_other_signals_end_no_wait(mounted: Mounted, gate: Gate) -> None:
    """Not even where an error would be SIGBUS."""
    reader = begin(DISTURBED, mounted.path, hashlib.sha256(BODY).hexdigest())
    time.sleep(LET_GO_S)
    gate.open()
    assert reader.communicate(timeout=TIMEOUT_S) == ("True\n", None)


@pytest.fixture
def beyond(bucket: None, gate: Gate, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A mount whose daemon is in a process namespace of its own, and a process in there."""
    path = tmp_path / "mnt"
    path.mkdir()
    command = [
        *(sys.executable, "-m", "lazyfs", "mount", "s3://killed/m", path),
        *(f"--cache-dir={tmp_path / 'cache'}", f"--endpoint-url={gate.url}", *OPTIONS),
    ]
    script = (
        f"{shlex.join(map(str, command))} && test -f {path}/file && echo seen && exec sleep 600"
    )
    namespace = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert namespace.stdout is not None
    while (line := namespace.stdout.readline()) != "seen\n":
        assert line, "it could not be mounted"
    children = Path(f"/proc/{namespace.pid}/task/{namespace.pid}/children").read_text()
    gate.stick()
    yield path, int(children)
    namespace.kill()
    namespace.wait(TIMEOUT_S)


@pytest.mark.parametrize("name", ["direct", "random fault", "stat"])
def test_a_reader_that_the_daemon_cannot_see(beyond: tuple[Path, int], name: str) -> None:
    path, inside = beyond
    kill(begin(READERS[name], path, before=["nsenter", "--mount", f"--target={inside}"]))
