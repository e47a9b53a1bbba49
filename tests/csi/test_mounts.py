"""Bind mounts as the node sees them: the plugin's container has its own mount namespace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi import mounts
from lazyfs.errors import MountError
from lazyfs.fuse import mount_syscalls

pytestmark = pytest.mark.fuse

BIND = """
import sys
from pathlib import Path
from csi import mounts
mounts.bind(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A directory whose mounts propagate, and in it a filesystem, `source`."""
    subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
    subprocess.run(["mount", "--make-shared", tmp_path], check=True)
    (tmp_path / "source").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "model", tmp_path / "source"], check=True)
    yield tmp_path
    subprocess.run(["umount", "--recursive", tmp_path], check=True)


def flags(path: Path) -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(set(line.split()[5].split(",")) for line in lines if line.split()[4] == str(path))


def device(path: Path) -> str:
    entry = mount_syscalls.find_mount(path)
    assert entry is not None
    return entry.device


def test_mount_flags_are_visible_on_the_node(node: Path) -> None:
    target = node / "target"
    subprocess.run(
        [
            "unshare", "--mount", "--propagation=unchanged", sys.executable, "-c", BIND,
            node / "source", target, device(node / "source"),
        ],
        check=True, timeout=60,
    )  # fmt: skip
    assert {"ro", "nosuid", "nodev", "noexec"} <= flags(target)


def test_older_kernels_set_mount_flags_only_in_the_container(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_bind_guarded", lambda source, target: False)
    mounts.bind(node / "source", node / "target", device(node / "source"))
    assert {"ro", "nosuid", "nodev", "noexec"} <= flags(node / "target")


def test_another_filesystem_is_refused(node: Path) -> None:
    with pytest.raises(MountError, match="no longer mounted there"):
        mounts.bind(node / "source", node / "target", "0:4711")
    assert mount_syscalls.find_mount(node / "target") is None


def test_a_refusal_of_the_kernel_is_reported(node: Path) -> None:
    with pytest.raises(MountError, match="bind mount failed: No such file"):
        mounts.bind(node / "missing", node / "target", "0:4711")
