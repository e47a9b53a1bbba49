"""An idmapped copy of a mount, as a container runtime makes it for a pod with a user namespace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import Mounted, is_mounted, shell, wait_until_gone
from s3 import S3

FIRST_ID = 100_000

# mount_setattr(2) on a detached copy of the mount at $1, with the user namespace of $3; seen at $2.
MAP = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        sys.exit(f"{number}: {os.strerror(ctypes.get_errno())}")
    return result
source, target, namespace = sys.argv[1:]
tree = call(428, -100, os.fsencode(source), 1)  # open_tree, OPEN_TREE_CLONE
mapped = struct.pack("4Q", 0x100000, 0, 0, os.open(namespace, os.O_RDONLY))  # MOUNT_ATTR_IDMAP
call(442, tree, b"", 0x1000, mapped, len(mapped))
call(429, tree, b"", -100, os.fsencode(target), 4)
"""


def kernel_has_it() -> bool:
    """FUSE allows idmapped mounts since Linux 6.12."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and tuple(map(int, found.groups())) >= (6, 12)


pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not kernel_has_it(), reason="needs Linux 6.12 or newer"),
]


@pytest.fixture
def user_namespace() -> Iterator[Path]:
    """One in which root is user FIRST_ID outside."""
    holder = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo made; exec sleep 100"], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"made\n"
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{holder.pid}/{name}").write_text(f"0 {FIRST_ID} 65536")
    yield Path(f"/proc/{holder.pid}/ns/user")
    holder.kill()
    holder.communicate()


@pytest.fixture
def mapped(user_namespace: Path, tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """`mapped(mountpoint)` gives the path of an idmapped copy."""
    target = tmp_path / "mapped"
    target.mkdir()

    def make(mountpoint: Path) -> Path:
        command = [sys.executable, "-c", MAP, mountpoint, target, user_namespace]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert answer.returncode == 0, answer.stderr
        return target

    yield make
    if is_mounted(target):
        subprocess.run(["umount", "--lazy", target], check=True, timeout=60)


def owner_and_content(path: Path) -> list[str]:
    return shell("stat -c %u:%g file; cat file", path).stdout.split()


def test_files_have_owners_in_the_pods_user_namespace(
    mount: Callable[..., Mounted], mapped: Callable[[Path], Path], s3: S3
) -> None:
    """Also after the worker was replaced: the kernel keeps what was agreed with the first."""
    s3.put("mapped", {"file": b"content", "other": b"x"})
    mounted = mount("s3://mapped", "--allow-other")
    copy = mapped(mounted.path)
    assert owner_and_content(copy) == [f"{FIRST_ID}:{FIRST_ID}", "content"]
    assert owner_and_content(mounted.path) == ["0:0", "content"]

    former = mounted.worker
    os.kill(former, signal.SIGKILL)
    wait_until_gone(former)
    assert shell("cat other", copy).stdout == "x"
    assert owner_and_content(copy) == [f"{FIRST_ID}:{FIRST_ID}", "content"]


def test_a_pods_user_reads_its_own_files(
    mount: Callable[..., Mounted], mapped: Callable[[Path], Path], s3: S3
) -> None:
    """Files that only their owner may read, read by the user that is root in the pod."""
    s3.put("private", {"file": b"content"})
    mounted = mount("s3://private", "--allow-other", "--file-mode=400", "--dir-mode=500")
    copy = mapped(mounted.path)
    reading = "setpriv --reuid={0} --regid={0} --clear-groups cat file"
    assert shell(reading.format(FIRST_ID), copy).stdout == "content"
    assert "Permission denied" in shell(reading.format(1), copy).stderr
