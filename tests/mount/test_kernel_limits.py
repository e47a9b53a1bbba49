"""The kernel keeps the limits of concurrent reads and read-ahead, also after a worker died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import Mounted, fusectl, shell, wait_until_gone
from s3 import S3

from lazyfs.fuse.session import MAX_BACKGROUND

pytestmark = pytest.mark.fuse


def test_limits_of_reads(mount: Callable[..., Mounted], s3: S3, tmp_path: Path) -> None:
    s3.put("limits", {"m/file": b"x"})
    mounted = mount("s3://limits/m", "--read-ahead=2MiB")
    number = mounted.path.stat().st_dev
    for _ in range(2):
        device = Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}")
        assert (device / "read_ahead_kb").read_text() == "2048\n"
        with fusectl(tmp_path / "fusectl") as connections:
            connection = connections / str(os.minor(number))
            assert (connection / "max_background").read_text() == f"{MAX_BACKGROUND}\n"
        (tmp_path / "fusectl").rmdir()
        worker = mounted.worker
        os.kill(worker, signal.SIGKILL)
        wait_until_gone(worker)
        assert shell("cat file", mounted.path).stdout == "x"
