"""Mounts with a copy in another mount namespace, as container runtimes make them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mounting import Mounted, is_mounted, lazyfs, shell, wait_until_gone
from s3 import S3

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes mount namespaces"),
]


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("copies", {"m/file": b"content", "m/big": bytes(20 << 20)})


@contextmanager
def in_a_copy(command: str) -> Iterator[subprocess.Popen[str]]:
    """A shell in a mount namespace of its own; its command says when it has begun."""
    process = subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_an_unused_copy(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://copies/m")
    worker = mounted.worker
    with in_a_copy("cd /; echo begun; read") as holder:
        answer = lazyfs("umount", mounted.path)
        assert answer.returncode == 0, answer.stderr
        assert f"({holder.pid})" in answer.stderr and answer.stderr.count("\n") == 1
        assert not is_mounted(mounted.path)
        for pid in (mounted.pid, worker):
            wait_until_gone(pid)
        assert "nothing is mounted" in lazyfs("umount", mounted.path).stderr
        again = mount("s3://copies/m", path=mounted.path)
        assert shell("cat file", again.path).stdout == "content"
        assert lazyfs("umount", again.path).returncode == 0


USERS = {
    "open": "exec 3<{path}/file; cd /; echo begun; read; cat <&3",
    "directory": "cd {path}; echo begun; read; cat file",
    "mapped": "cd /; python3 -c '{mapped}' {path}/file",
}
MAPPED = """
import mmap, sys
with open(sys.argv[1]) as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("begun", flush=True)
input()
print(view[:7].decode())
"""


@pytest.mark.parametrize("how", USERS)
def test_a_copy_in_use_is_still_served(mount: Callable[..., Mounted], how: str) -> None:
    """The mountpoint can be used meanwhile, and the other mount is not disturbed."""
    mounted = mount("s3://copies/m")
    worker = mounted.worker
    with in_a_copy(USERS[how].format(path=mounted.path, mapped=MAPPED)) as user:
        answer = lazyfs("umount", mounted.path)
        assert answer.returncode == 1
        assert "in use by" in answer.stderr and "--force" in answer.stderr
        assert not is_mounted(mounted.path)
        again = mount("s3://copies/m", path=mounted.path)
        # The worker of the first one dies, and the next one leaves the second one's socket alone.
        os.kill(worker, signal.SIGKILL)
        output, _ = user.communicate("\n", timeout=60)
        assert output.startswith("content")
        wait_until_gone(mounted.pid)
        assert str(again.path) in lazyfs("status").stdout
        assert shell("cat file", again.path).stdout == "content"
        assert lazyfs("umount", again.path).returncode == 0


def test_force_ends_a_copy_in_use(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://copies/m", "--prefetch=off", "--cache-dir=none")
    with in_a_copy(USERS["open"].format(path=mounted.path)) as user:
        assert lazyfs("umount", mounted.path).returncode == 1
        answer = lazyfs("umount", "--force", mounted.path)
        assert (answer.returncode, answer.stderr) == (0, "")
        wait_until_gone(mounted.pid)
        output, _ = user.communicate("\n", timeout=60)
        assert "content" not in output and "cat" in output


def test_force_ends_a_mount_in_use_here(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://copies/m")
    user = subprocess.Popen(["sleep", "60"], cwd=mounted.path)
    try:
        refused = lazyfs("umount", mounted.path)
        assert refused.returncode == 1 and f"sleep ({user.pid})" in refused.stderr
        answer = lazyfs("umount", "--force", mounted.path)
        assert (answer.returncode, answer.stderr) == (0, "")
        wait_until_gone(mounted.pid)
    finally:
        user.kill()
        user.wait(timeout=60)


def test_a_detached_mount_frees_its_mountpoint(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://copies/m")
    user = subprocess.Popen(["sleep", "60"], cwd=mounted.path)
    try:
        assert lazyfs("umount", "--lazy", mounted.path).returncode == 0
        again = mount("s3://copies/m", path=mounted.path)
        assert shell("cat file", again.path).stdout == "content"
        seen = subprocess.run(
            ["cat", f"/proc/{user.pid}/cwd/file"], capture_output=True, timeout=60, check=False
        )
        assert seen.stdout == b"content"
        assert lazyfs("umount", again.path).returncode == 0
    finally:
        user.kill()
        user.wait(timeout=60)
    wait_until_gone(mounted.pid)


def test_a_bind_mount_is_not_an_unused_copy(mount: Callable[..., Mounted], tmp_path: Path) -> None:
    mounted = mount("s3://copies/m")
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "--bind", mounted.path, other], check=True)
    try:
        answer = lazyfs("umount", mounted.path)
        assert answer.returncode == 1 and str(other) in answer.stderr
        assert shell("cat file", other).stdout == "content"
    finally:
        subprocess.run(["umount", other], check=True)
    wait_until_gone(mounted.pid)
