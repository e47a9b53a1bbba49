"""Finds the processes that can see a mount, and those that use it, in all mount namespaces.

A container runtime, or `unshare --mount`, copies all mounts of a namespace. An unmount in the
original namespace does not reach such a copy, and the kernel ends a FUSE session with its last
mount. All of this is read from `/proc`, without a request to the filesystem itself, whose daemon
may be down. Only root sees processes of other users.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lazyfs.fuse.mount_syscalls import MountEntry

# Users named in one message.
MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class MountUser:
    """A process that can see a mount.

    Attributes:
        command: as ps(1) shows it.
        is_here: whether it is in the mount namespace of this process.
        uses: whether it has a file open or mapped in the mount, or its working or root directory.
    """

    pid: int
    command: str
    is_here: bool
    uses: bool


def users_of(device: str) -> list[MountUser]:
    """The processes that can see a mount, other than this one.

    Args:
        device: the mount's device number, `major:minor`.
    """
    here = _namespace("self")
    mount_ids: dict[str, frozenset[str]] = {}
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            namespace = _namespace(process.name)
            if namespace not in mount_ids:
                mount_ids[namespace] = _mount_ids(process, device)
            ids = mount_ids[namespace]
            if ids:
                uses = _uses(process, ids, device)
                command = (process / "comm").read_text().strip()
                is_here = namespace == here
                found.append(MountUser(int(process.name), command, is_here, uses))
        except OSError:
            continue  # it has ended, or belongs to another user
    return found


def named(users: list[MountUser]) -> str:
    """`sleep (123), python3 (456) and 7 more`."""
    shown = ", ".join(f"{user.command} ({user.pid})" for user in users[:MOST_NAMED])
    more = len(users) - MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _namespace(pid: str) -> str:
    return str(Path(f"/proc/{pid}/ns/mnt").readlink())


def _mount_ids(process: Path, device: str) -> frozenset[str]:
    """The ids of the mounts of a device in the namespace of a process."""
    lines = (process / "mountinfo").read_text(errors="surrogateescape").split("\n")
    entries = (MountEntry(line) for line in lines if line)
    return frozenset(entry.mount_id for entry in entries if entry.device == device)


def _uses(process: Path, mount_ids: frozenset[str], device: str) -> bool:
    return not mount_ids.isdisjoint(_open_mounts(process)) or _maps(process, device)


def _open_mounts(process: Path) -> Iterator[str]:
    """The ids of the mounts in which a process has open files (proc(5), fdinfo)."""
    for name in ("cwd", "root"):
        # O_PATH opens the link's file without a request to its filesystem (open(2)).
        descriptor = os.open(process / name, os.O_PATH | os.O_CLOEXEC)
        try:
            yield _mount_id(Path(f"/proc/self/fdinfo/{descriptor}"))
        finally:
            os.close(descriptor)
    for info in (process / "fdinfo").iterdir():
        try:
            yield _mount_id(info)
        except OSError:
            continue  # it has just been closed


def _mount_id(info: Path) -> str:
    for line in info.read_text().splitlines():
        if line.startswith("mnt_id:"):
            return line.split()[1]
    return ""


def _maps(process: Path, device: str) -> bool:
    """Whether a process has a file of a device mapped (proc(5), maps)."""
    major, _, minor = device.partition(":")
    wanted = f"{int(major):02x}:{int(minor):02x}"
    with open(process / "maps", errors="surrogateescape") as lines:
        return any(line.split(None, 4)[3] == wanted for line in lines)
