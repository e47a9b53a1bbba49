"""The privileges of a mount's processes, and what a crash reveals."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Mounted, shell
from s3 import S3

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="others have no capabilities to give up"),
]
DAC_READ_SEARCH = 1 << 2


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    shards = {f"m/model-{n:05}-of-00004.safetensors": os.urandom(4 << 20) for n in range(1, 5)}
    server.put("rights", {"m/config.json": b"{}", **shards})


def statuses(pid: int) -> Iterator[dict[str, str]]:
    """What the kernel says of each thread of a process (proc(5), status)."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "status").read_text()
        yield dict(re.findall(r"^(\w+):\s*(.*)$", text, re.MULTILINE))


def test_no_thread_of_a_worker_keeps_a_capability(mount: Callable[..., Mounted]) -> None:
    """Of those that are there after a load, and after another worker has gone on."""
    mounted = mount("s3://rights/m", "--block-size=256KiB")
    for _ in range(2):
        shell("cat * | wc -c", mounted.path)
        found = list(statuses(mounted.worker))
        assert len(found) > 2
        for status in found:
            for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
                assert not int(status[name], 16) & ~DAC_READ_SEARCH, status
            assert status["NoNewPrivs"] == "1"
        worker = mounted.worker
        os.kill(worker, signal.SIGKILL)
        subprocess.run(["stat", mounted.path / "config.json"], check=True, timeout=60)


def test_a_worker_leaves_no_core_dump(mount: Callable[..., Mounted]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        mounted = mount("s3://rights/m")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    limits = Path(f"/proc/{mounted.worker}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    # Owned by root and closed to others is what cannot be dumped (proc(5)). It is root's anyhow;
    # so ask who may trace it: a process without capabilities, of the same user.
    peek = f"cat /proc/{mounted.worker}/environ > /dev/null"
    tried = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "bash", "-c", peek],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert "Permission denied" in tried.stderr
