"""Processes that move bytes beside the worker: what a reader gets is the same."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from certificates import make_certificates
from mounting import Mounted, python, wait_until_gone
from s3 import S3
from safetensors.numpy import save
from test_models import settle

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SHARDS = {
    f"m/model-{shard:05}-of-00004.safetensors": save(
        {f"layer.{shard}": np.random.default_rng(shard).integers(0, 256, 12 * MIB, np.uint8)}
    )
    for shard in (1, 2, 3, 4)
}
DIGEST = hashlib.md5(b"".join(SHARDS.values())).hexdigest()
LOAD = """
import hashlib, mmap, pathlib, sys
digest = hashlib.md5()
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        digest.update(mapped)
print(digest.hexdigest())
"""
OPTIONS = ["--movers=2", "--block-size=1MiB", "--memory-limit=64MiB"]


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("moved", SHARDS)


def mover_pids(mounted: Mounted) -> list[int]:
    """The processes that the worker has started to move bytes."""
    children = Path(f"/proc/{mounted.worker}/task").glob("*/children")
    pids = [int(pid) for each in children for pid in each.read_text().split()]
    return [
        pid for pid in pids if b"lazyfs.movers.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def rights(pid: int) -> dict[str, str]:
    """What a process may do."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {name: fields[name] for name in ("Uid", "Groups", "CapEff", "NoNewPrivs", "Seccomp")}


def wait_for_movers(mounted: Mounted) -> list[int]:
    until_s = time.monotonic() + 60
    while mounted.status()["movers"]["running"] < 2:
        assert time.monotonic() < until_s
        python("import os, sys; os.listdir(sys.argv[1])", mounted.path)
        time.sleep(0.05)
    return mover_pids(mounted)


def test_a_load(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /moved/m/", "slow", times=10**6, seconds=0.05)
    mounted = mount("s3://moved/m", *OPTIONS)
    assert python(LOAD, mounted.path).strip() == DIGEST
    pids = wait_for_movers(mounted)
    assert len(pids) == 2
    for pid in pids:
        assert rights(pid) == rights(mounted.worker)
    assert mounted.status()["movers"] == {"limit": 2, "running": 2, "lost": 0}
    mounted.end()
    for pid in pids:
        wait_until_gone(pid, 60)
    # What they wrote to the disk is right.
    before = len(s3.data_requests())
    again = mount("s3://moved/m", *OPTIONS)
    assert python(LOAD, again.path).strip() == DIGEST
    asked = [key for key, _ in s3.data_requests()[before:]]
    assert len(asked) <= len(SHARDS), "at most to see that they may be read"


def test_movers_that_are_killed_are_replaced(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /moved/m/", "slow", times=10**6, seconds=0.3)
    mounted = mount("s3://moved/m", *OPTIONS, "--cache-dir=none")
    loader = subprocess.Popen(
        [sys.executable, "-c", LOAD, mounted.path], stdout=subprocess.PIPE, text=True
    )
    try:
        for pid in wait_for_movers(mounted):
            os.kill(pid, signal.SIGKILL)
        output, _ = loader.communicate(timeout=100)
    finally:
        loader.kill()
        loader.wait()
    assert output.strip() == DIGEST
    assert mounted.log().count("a process that moves bytes ended unexpectedly") <= 2
    assert "Traceback" not in mounted.log()


def test_movers_end_with_a_killed_worker(mount: Callable[..., Mounted], s3: S3) -> None:
    s3.fault("GET /moved/m/", "slow", times=10**6, seconds=0.3)
    mounted = mount("s3://moved/m", *OPTIONS)
    loader = subprocess.Popen(
        [sys.executable, "-c", LOAD, mounted.path], stdout=subprocess.PIPE, text=True
    )
    try:
        pids = wait_for_movers(mounted)
        os.kill(mounted.worker, signal.SIGKILL)
        for pid in pids:
            wait_until_gone(pid, 60)
        output, _ = loader.communicate(timeout=100)
    finally:
        loader.kill()
        loader.wait()
    assert output.strip() == DIGEST


def test_a_refusal_of_s3_is_not_repeated(mount: Callable[..., Mounted], s3: S3) -> None:
    """A mover hands the answer on; nobody asks a second time to understand it."""
    mounted = mount("s3://moved/m", *OPTIONS, "--prefetch=off")
    first = sorted(SHARDS)[0].removeprefix("m/")
    code = f"open({str(mounted.path / first)!r}, 'rb').read(3 << 20)"
    python(code)
    wait_for_movers(mounted)
    settle(s3)
    s3.fault("GET /moved/m/", "status", times=10**6, status=403, code="AccessDenied")
    before = len(s3.data_requests())
    for shard in sorted(SHARDS)[1:3]:
        path = mounted.path / shard.removeprefix("m/")
        failed = subprocess.run(
            [sys.executable, "-c", f"open({str(path)!r}, 'rb').read(1)"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "Permission denied" in failed.stderr
    assert len(s3.data_requests()) - before <= 4
    assert "Traceback" not in mounted.log()


def test_tls(tmp_path: Path) -> None:
    authority, pem, key = make_certificates(tmp_path)
    server = S3(pem, key, authority=authority)
    server.put("moved", SHARDS)
    mounted = Mounted(
        "s3://moved/m", tmp_path / "mnt", tmp_path / "cache", server.url, *OPTIONS,
        f"--ca-bundle={authority}",
    )  # fmt: skip
    try:
        assert python(LOAD, mounted.path).strip() == DIGEST
        assert mounted.status()["movers"]["lost"] == 0
    finally:
        mounted.end()
        server.stop()
