"""What a daemon asks of the kernel, and gives up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lazyfs.process.privileges import Rights, start, worker_user
from lazyfs.user import held_capabilities

PROTECT = """
import sys
from pathlib import Path
from lazyfs.process.privileges import protect_from_oom
score = Path("/proc/self/oom_score_adj")
try:
    score.write_text(sys.argv[1])
except PermissionError:
    sys.exit(77)
protect_from_oom()
print(score.read_text())
"""


@pytest.mark.parametrize(("before", "after"), [(-100, -500), (-997, -997)])
def test_protection_from_oom_is_never_given_back(before: int, after: int) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PROTECT, str(before)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if answer.returncode == 77:
        pytest.skip("needs CAP_SYS_RESOURCE")
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) == after


CONFINED = """
import ctypes, os, socket, subprocess, sys, threading

libc = ctypes.CDLL(None, use_errno=True)

def errno_of(call, *arguments):
    return 0 if getattr(libc, call)(*arguments) >= 0 else ctypes.get_errno()

threads = [threading.Thread(target=lambda: print("thread")) for _ in range(1)]
[each.start() or each.join() for each in threads]
print(subprocess.run(["echo", "program"], capture_output=True, text=True).stdout, end="")
socket.socketpair(), socket.getaddrinfo("localhost", 1), os.memfd_create("x")
print(errno_of("unshare", 0x10000000), errno_of("ptrace", 0, 0, 0, 0))
for family in (socket.AF_PACKET, 38, 40):  # AF_ALG, AF_VSOCK
    try:
        socket.socket(family, socket.SOCK_SEQPACKET)
    except OSError as error:
        print(error.errno)
try:
    os.setuid(0)
    print("is root")
except PermissionError:
    print("is no root")
"""


@pytest.mark.parametrize("rights", [Rights.NONE, Rights.READ_ALL_FILES, Rights.USER])
def test_system_calls_that_a_worker_may_make(
    rights: Rights, request: pytest.FixtureRequest
) -> None:
    """Threads, programs and the network; no namespaces, tracing and odd sockets."""
    if rights is Rights.NONE:
        request.getfixturevalue("for_all")
    user = worker_user(rights)
    read, write = os.pipe()
    process = start(
        [sys.executable, "-c", CONFINED], user, outputs=(subprocess.DEVNULL, write, None)
    )
    os.close(write)
    with open(read) as said:
        words = said.read().split()
    assert process.wait(timeout=60) == 0
    assert words[:2] == ["thread", "program"]
    assert words[2:7] == ["1", "1", "97", "97", "97"], "EPERM and EAFNOSUPPORT"
    stays_root = os.geteuid() == 0 and user.uid is None
    assert words[7:] == (["is", "root"] if stays_root else ["is", "no", "root"])


def test_each_worker_has_a_new_user() -> None:
    one, other = worker_user(Rights.NONE), worker_user(Rights.NONE)
    if one.uid is None:
        pytest.skip("needs root")
    assert one.uid != other.uid and one.group == other.group
    assert one.group not in (one.uid, other.uid)


def test_the_supervisor_keeps_its_rights() -> None:
    before = held_capabilities()
    start(["true"], worker_user(Rights.NONE)).wait(timeout=60)
    assert held_capabilities() == before
    with pytest.raises(FileNotFoundError):
        start(["/nonexistent"], worker_user(Rights.NONE))


BEYOND = """
import asyncio, threading
from lazyfs import faults
from lazyfs.process import privileges
privileges.MEMORY_BYTES = 200 << 20
privileges.limit_memory(1 << 20)
threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(50)]
[each.start() for each in threads]

async def parse():
    return bytearray(500 << 20)

asyncio.run(faults.contained("parsing", parse))
print(len(bytearray(20 << 20)))
"""


def test_memory_beyond_the_limit_costs_one_task_and_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEYOND], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == str(20 << 20)
    assert "parsing failed: this process has all the memory that it may have" in done.stderr
    assert "Traceback" not in done.stderr
