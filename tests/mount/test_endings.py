"""A mount ends at once, also while its worker waits for S3 and threads of it cannot be killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounting import TIMEOUT_S, Mounted, is_mounted, lazyfs, python, wait_until_gone
from s3 import S3

from lazyfs.fuse.mount_syscalls import RESEND_SINCE

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        tuple(map(int, os.uname().release.split(".")[:2])) < RESEND_SINCE,
        reason="this kernel cannot resend requests",
    ),
]

AHEAD = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(descriptor, 0, 1 << 20, os.POSIX_FADV_WILLNEED)
"""


def waits_for_a_page(worker: int) -> bool:
    """Whether a push waits until the kernel unlocks a page, which is when a read is answered."""
    waits = [(task / "wchan").read_text() for task in Path(f"/proc/{worker}/task").iterdir()]
    return any("folio" in wait or "lock_page" in wait for wait in waits)


@pytest.fixture
def stuck(mount: Callable[..., Mounted], s3: S3) -> Mounted:
    """A mount whose worker pushes the second block into pages that a read of both has locked.

    The first block never comes. No process waits for the read: it was the kernel's read-ahead.
    """
    s3.put("ends", {"m/model.bin": bytes(4 << 20)})
    s3.forget()
    s3.fault("GET /ends/m/model", "hang", seconds=90, times=100, range="bytes=0-262143")
    mounted = mount("s3://ends/m", "--block-size=256KiB", "--prefetch-on=open")
    python(AHEAD, mounted.path / "model.bin")
    until_s = time.monotonic() + TIMEOUT_S
    while not waits_for_a_page(mounted.worker):
        assert time.monotonic() < until_s
        time.sleep(0.1)
    return mounted


@pytest.mark.parametrize("whom", ["both", "supervisor", "worker first"])
def test_a_signal_ends_it(stuck: Mounted, whom: str) -> None:
    worker = stuck.worker
    if whom != "supervisor":
        os.kill(worker, signal.SIGTERM)
    if whom == "worker first":
        wait_until_gone(worker)
    stuck.kill(signal.SIGTERM)
    wait_until_gone(stuck.pid)
    assert not is_mounted(stuck.path)


@pytest.mark.parametrize("how", [[], ["--force"]])
def test_the_command_ends_it(stuck: Mounted, how: list[str]) -> None:
    answer = lazyfs("umount", *how, stuck.path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert not is_mounted(stuck.path)
    wait_until_gone(stuck.pid)
